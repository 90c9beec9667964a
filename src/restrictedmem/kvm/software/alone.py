"""Execution of one instruction and no more, for which Unicorn has no call.

The trap flag does this: its #DB comes right behind the instruction.
"""

from collections.abc import Callable
from typing import Final, final

from restrictedmem.kvm.decode import Instruction
from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.fetched import FetchedCode
from restrictedmem.kvm.software.physical import PhysicalMemory
from restrictedmem.kvm.software.tlb import RunEnd
from restrictedmem.kvm.software.uc import Uc
from restrictedmem.kvm.software.wide import WideExchange, is_wide
from restrictedmem.protocol import exits
from restrictedmem.protocol.exits import Exit
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, gfn_t

_TRAP_FLAG: Final = 0x100
_DEBUG: Final = exits.Shutdown(1)
_PUSHF: Final = 0x9C
_POPF: Final = 0x9D
_INT: Final = 0xCD


@final
class Alone:
    """An executor of single instructions on one emulator; the guest does not notice."""

    def __init__(
        self,
        uc: Uc,
        memory: PhysicalMemory,
        fetched: FetchedCode,
        start: Callable[[], Exit | RunEnd | None],
        drop: Callable[[gfn_t, gfn_t], None],
        wide: WideExchange,
    ) -> None:
        """``start`` runs until something ends the run, and says why; ``drop`` forgets code."""
        self._uc = uc
        self._memory = memory
        self._fetched = fetched
        self._start = start
        self._drop = drop
        self._wide = wide

    def execute(self) -> bool:
        """Execute the instruction at RIP, and say whether it was completed.

        If it was not, the last ``start`` said why.
        """
        rip, flags = self._uc.read(unicorn.RIP), self._uc.read(unicorn.RFLAGS)
        instruction = self._instruction(rip)
        if instruction is None and self._memory.find(rip & ~PAGE_MASK) is not None:
            return False
        if instruction is not None and instruction.opcode == _PUSHF:
            return self._push_flags(rip, rip + len(instruction.prefixes) + 1)
        if not is_wide(instruction):
            return self._trap(flags, instruction)
        if flags & _TRAP_FLAG:
            # The guest has set it. With it, the instruction may have been translated as an invalid
            # one.
            self._uc.flush_code()
        with self._wide.available():
            return self._trap(flags, instruction)

    def _instruction(self, rip: int) -> Instruction | None:
        """Return the instruction at an address, fetched if need be; None if it cannot be."""
        found = self._fetched.instruction(rip)
        if found is None and self._memory.find(rip & ~PAGE_MASK) is not None:
            with self._fetched.looking():
                self._start()
            found = self._fetched.instruction(rip)
        return found

    def _trap(self, flags: int, instruction: Instruction | None) -> bool:
        if flags & _TRAP_FLAG:
            # The guest has set it, so the #DB is the guest's, too.
            self._start()
            return False
        uc, opcode = self._uc, 0 if instruction is None else instruction.opcode
        uc.write(unicorn.RFLAGS, flags | _TRAP_FLAG)
        done = False
        try:
            why = self._start()
            # INT 1 raises the same vector. Its operand stands where other instructions have ModRM.
            one = instruction is not None and instruction.modrm == 1
            done = why == _DEBUG and not (opcode == _INT and one)
        finally:
            if not (done and opcode == _POPF):
                uc.write(unicorn.RFLAGS, uc.read(unicorn.RFLAGS) & ~_TRAP_FLAG)
        return done

    def _push_flags(self, rip: int, end: int) -> bool:
        """Execute PUSHF without the trap flag, which it would store, as a block of its own."""
        # No translated block may go on beyond it. Unicorn itself drops the block that ends there.
        self._drop(gfn_t(rip >> PAGE_SHIFT), gfn_t((end - 1 >> PAGE_SHIFT) + 1))
        with self._uc.stop_at(end):
            why = self._start()
        return why is None and self._uc.read(unicorn.RIP) == end
