"""A decoder for as much of an instruction as identifies it (Intel SDM volume 2, chapter 2)."""

from dataclasses import dataclass
from typing import Final, final

#: The longest instruction; bytes.
LONGEST: Final = 15
_FS_GS: Final = frozenset(b"\x64\x65")
_LEGACY: Final = frozenset(b"\x26\x2e\x36\x3e\x66\x67\xf0\xf2\xf3") | _FS_GS
_REX: Final = range(0x40, 0x50)
_REX_B: Final = 1
#: The bytes that may stand before an opcode.
PREFIXES: Final = _LEGACY | frozenset(_REX)
_ESCAPE: Final = 0x0F
_REGISTER: Final = 0xC0
_SP: Final = 4
_BP: Final = 5

# Opcodes that use the stack, whatever else they do. FF does so with some extensions in ModRM.
_PUSH_POP_CALL_RET: Final = frozenset((
    *range(0x50, 0x60), 0x68, 0x6A, 0x8F, 0x9C, 0x9D, 0xC2, 0xC3, 0xC8, 0xC9, 0xCA, 0xCB, 0xCF,
    0xE8, 0x0FA0, 0x0FA1, 0x0FA8, 0x0FA9,
))  # fmt: skip
_CALLS_AND_PUSH: Final = {0xFF: (2, 3, 6)}
#: Opcodes that may have a LOCK prefix (Intel SDM volume 2, LOCK). For opcodes that ModRM extends:
#: the extensions that may have one.
_LOCKABLE: Final = frozenset((
    *(row | width for row in range(0, 0x38, 8) for width in (0, 1)), 0x86, 0x87,
    0x0FAB, 0x0FB0, 0x0FB1, 0x0FB3, 0x0FBB, 0x0FC0, 0x0FC1,
))  # fmt: skip
_LOCKABLE_GROUPS: Final = {
    **dict.fromkeys((0x80, 0x81, 0x83), range(7)),
    **dict.fromkeys((0xF6, 0xF7), (2, 3)),
    **dict.fromkeys((0xFE, 0xFF), (0, 1)),
    0x0FBA: (5, 6, 7),
    0x0FC7: (1,),
}
_LOCK: Final = 0xF0
#: The undefined opcode extensions of group 5 and group 8.
_UNDEFINED_GROUPS: Final = {0xFF: (7,), 0x0FBA: range(4)}
#: Opcodes that only the byte behind them identifies: shifts and rotations, INT, group 5, CMPXCHG8B
#: and 16B.
_SAID_BY_OPERAND: Final = frozenset((0xC0, 0xC1, 0xCD, 0xD0, 0xD1, 0xD2, 0xD3, 0xFF, 0x0FC7))


@final
@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: prefixes, opcode, and the two bytes behind it, fewer where code ends.

    An opcode of two bytes is one number, with 0x0F as its high byte.
    """

    prefixes: bytes
    opcode: int
    operands: bytes

    @property
    def modrm(self) -> int:
        """The byte behind the opcode: ModRM, where the opcode has one."""
        return self.operands[0] if self.operands else 0

    @property
    def group(self) -> int:
        """The opcode extension that ModRM adds (a manual's ``/digit``)."""
        return self.modrm >> 3 & 7

    @property
    def in_memory(self) -> bool:
        """Whether the operand that ModRM names is in memory."""
        return self.modrm < _REGISTER

    @property
    def uses_stack(self) -> bool:
        """Whether the instruction does a push or a pop."""
        return self.opcode in _PUSH_POP_CALL_RET or self.group in _CALLS_AND_PUSH.get(
            self.opcode, ()
        )

    @property
    def is_invalid(self) -> bool:
        """Whether the instruction is invalid: in its group, or with its LOCK prefix."""
        if self.group in _UNDEFINED_GROUPS.get(self.opcode, ()):
            return True
        lockable = self.opcode in _LOCKABLE or self.group in _LOCKABLE_GROUPS.get(self.opcode, ())
        return _LOCK in self.prefixes and not (lockable and self.in_memory)

    @property
    def based_on_stack(self) -> bool:
        """Whether the operand that ModRM names has RSP or RBP as its base, and so is in SS."""
        rex = self.prefixes[-1] if self.prefixes and self.prefixes[-1] in _REX else 0
        if not self.in_memory or rex & _REX_B or not _FS_GS.isdisjoint(self.prefixes):
            return False
        mod, rm = self.modrm >> 6, self.modrm & 7
        if rm == _SP and len(self.operands) > 1:
            # A SIB byte follows. RBP without a displacement means that there is no base.
            rm = self.operands[1] & 7
            return rm == _SP or (rm == _BP and mod > 0)
        return rm == _BP and mod > 0


def decode(code: bytes) -> Instruction | None:
    """Return the instruction at the start of ``code``; None if too little of it is there."""
    at = 0
    while at < len(code) and code[at] in PREFIXES:
        at += 1
    end = at + (2 if code[at : at + 1] == bytes((_ESCAPE,)) else 1)
    if len(code) < end:
        return None
    found = Instruction(code[:at], int.from_bytes(code[at:end], "big"), code[end : end + 2])
    return None if found.opcode in _SAID_BY_OPERAND and not found.operands else found
