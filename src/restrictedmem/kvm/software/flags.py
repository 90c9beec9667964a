"""The flags of an instruction that is executed again because an access of its own was refused.

Unicorn computes flags only when they are needed. ``cc_op`` says which instruction was the last to
set any, and ``cc_src`` and others keep its operands. SETcc, RCL and RCR have flags computed into
``cc_src`` before they touch memory. When their access is refused, Unicorn puts ``cc_op`` back, but
not ``cc_src`` (its pull request 2373). From then on, flags are computed from flags. But the right
flags are in ``cc_src``, once it is known that they were computed.

RCL and RCR always do this first. SETcc does or does not: this depends on its condition, and on
what was known of ``cc_op`` when it was translated. So each SETcc gets a hook (``fetched``). Before
Unicorn calls a hook, it computes all flags into ``cc_src``, whatever the instruction. Every other
instruction sets flags after its last access to memory.
"""

import struct
from typing import Final, final

from restrictedmem.kvm.decode import Instruction
from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.uc import Context, Uc

#: CF, PF, AF, ZF, SF, OF.
_STATUS: Final = 0x8D5
_ROTATES: Final = frozenset((0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3))
_RCL_RCR: Final = (2, 3)

_DIRECTION: Final = 0x400
#: RFLAGS at a guest's start: IF, and the bit that is always set.
RFLAGS: Final = 0x202
# Two words from which MARK_FLAGS makes ``cc_dst`` and ``cc_src``. No register keeps them.
_FIRST: Final = 0x5C0F_FEE1_2345_6789
_SECOND: Final = 0x1B57_ED0C_0FFE_E987
_WORDS: Final = struct.Struct("=QQ")
# Bytes from ``cc_src`` to other fields of ``struct CPUX86State``: eflags of 64 bits, and df of 32
# bits, which is -1 where DF is set.
_EFLAGS: Final = -16
_DF: Final = 20
_U32: Final = (1 << 32) - 1
#: Code that leaves the marks behind, and zeroes in RAX and RCX.
MARK_FLAGS: Final = (
    bytes.fromhex("48b8")
    + _FIRST.to_bytes(8, "little")  # mov rax, _FIRST
    + bytes.fromhex("48b9")
    + _SECOND.to_bytes(8, "little")  # mov rcx, _SECOND
    + bytes.fromhex("4801c8b800000000b900000000")  # add rax, rcx; mov eax, 0; mov ecx, 0
)


def find_source(context: Context) -> int:
    """Return the byte offset of ``cc_src`` in a context that was saved right after MARK_FLAGS.

    Raises:
        RuntimeError: when this version of Unicorn keeps something else there.
    """
    # cc_dst, cc_src
    source = context.find(_WORDS.pack(_FIRST + _SECOND, _SECOND)) + 8
    # The status flags do not count here. DF is clear.
    flags, direction = context.word(source + _EFLAGS), context.word(source + _DF) & _U32
    if source < 8 or flags & ~_STATUS != RFLAGS or direction != 1:
        raise RuntimeError("this version of unicorn keeps flags otherwise")
    return source


@final
class LateFlags:
    """The flags of one emulator."""

    def __init__(self, uc: Uc, source: int) -> None:
        """``source`` is the offset that ``find_source`` returned."""
        self._uc = uc
        self._context = Context(uc)
        self._source = source

    def refused(self) -> None:
        """Save an instruction's flags; the hook that refuses its access calls this.

        Later it is too late: Unicorn computes again all that it keeps of them.
        """
        self._context.save()

    def mend(self) -> None:
        """Give the guest back its flags, which the instruction had already computed."""
        status = self._context.word(self._source) & _STATUS
        # While the guest runs, these two are not in eflags, but in cc_op and df.
        others = self._context.word(self._source + _EFLAGS) & ~(_STATUS | _DIRECTION)
        backwards = self._context.word(self._source + _DF) & _U32 == _U32
        self._uc.write(unicorn.RFLAGS, others | status | _DIRECTION * backwards)


def computes_first(instruction: Instruction | None) -> bool:
    """Say whether an instruction, hook or not, computes flags before it touches memory."""
    if instruction is None:
        return False
    return instruction.opcode in _ROTATES and instruction.group in _RCL_RCR
