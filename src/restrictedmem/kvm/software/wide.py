"""CMPXCHG8B and CMPXCHG16B, whose flags Unicorn gets wrong.

Unicorn takes all flags but ZF from an earlier block. The flags are right where a block begins with
the instruction. So the emulated processor does not have the two instructions (CX8 and CX16 of
CPUID). Each ends the run as an invalid opcode, and is then executed alone, on a processor that has
it. To the guest, CPUID says that the processor has both.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, final

from restrictedmem.kvm.decode import Instruction
from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.uc import Context, Uc

#: Code that copies CPUID of leaf 1 to RSI, RDI, R8 and R9, which later code does not
#: overwrite.
ASK_PROCESSOR: Final = bytes.fromhex("b8010000000fa24889c64889df4989c84989d1")
ASKED: Final = (unicorn.RSI, unicorn.RDI, unicorn.R8, unicorn.R9)
_LEAF: Final = 1
_CX8: Final = 1 << 8
_CX16: Final = 1 << 13
_OSXSAVE: Final = 1 << 27
#: Bytes of ``CPUX86State`` behind those of a context: as far as ``features[FEAT_1_ECX]``, and some
#: more.
_FEATURES: Final = 128
_OPCODE: Final = 0x0FC7


def is_wide(instruction: Instruction | None) -> bool:
    """Say whether an instruction is CMPXCHG8B or CMPXCHG16B."""
    if instruction is None or not instruction.in_memory:
        return False
    return instruction.opcode == _OPCODE and instruction.group == 1


@final
class WideExchange:
    """A switch that takes the two instructions from one emulator, and can give them back."""

    def __init__(self, uc: Uc, cpuid: tuple[int, ...]) -> None:
        """Take the two instructions; ``cpuid`` is what ASK_PROCESSOR found, eax to edx.

        Raises:
            RuntimeError: when this version of Unicorn keeps its processor's features elsewhere.
        """
        self._context = Context(uc, more=_FEATURES)
        self._cpuid = cpuid
        self._registers = uc.registers(unicorn.RAX, unicorn.RBX, unicorn.RCX, unicorn.RDX)
        version, _, ecx, edx = cpuid
        self._context.save()
        # cpuid_version, features[FEAT_1_EDX], features[FEAT_1_ECX]
        found = self._context.find(version.to_bytes(4, "little") + edx.to_bytes(8, "little"))
        self._edx, self._ecx = found + 4, found + 12
        if found < 0 or self._context.word(self._ecx) != ecx & ~_OSXSAVE:
            raise RuntimeError("this version of unicorn has another layout")
        self._set(available=False)
        uc.hook_cpuid(self._on_cpuid)

    def _set(self, *, available: bool) -> None:
        context = self._context
        context.save()
        for at, feature in ((self._edx, _CX8), (self._ecx, _CX16)):
            others = context.word(at) & ~feature
            context.set_word(at, others | feature * available)
        context.restore()

    @contextmanager
    def available(self) -> Generator[None]:
        """Let the two instructions be translated meanwhile."""
        self._set(available=True)
        try:
            yield
        finally:
            self._set(available=False)

    def _on_cpuid(self, _uc: int) -> int:
        """Answer CPUID of leaf 1; leave every other leaf to Unicorn."""
        if self._registers.read()[0] & 0xFFFF_FFFF != _LEAF:
            return 0
        self._registers.write(self._cpuid)
        return 1
