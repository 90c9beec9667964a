"""TLB misses of one emulator: each is a fault of the secondary MMU, to be answered or refused.

Guest addresses are identity mapped. Both halves of a slot are in Unicorn's physical memory
(``physical``). At each miss (UC_HOOK_TLB_FILL) the slot's entry decides which half a guest page
shows, and with what rights. So to take pages away means to zap entries and to flush the TLB.
"""

import ctypes
from collections.abc import Callable
from enum import Enum
from errno import EACCES, EFAULT
from typing import Final, final

from restrictedmem.abi.kvm import KVM_MEMORY_EXIT_FLAG_PRIVATE
from restrictedmem.kvm.memslot import ALL, CODE, EXEC, PRIVATE, READ, WRITE, Memslot
from restrictedmem.kvm.mmu import Fault, Mmu
from restrictedmem.kvm.software.code import CodePages
from restrictedmem.kvm.software.fetched import FetchedCode
from restrictedmem.kvm.software.flags import LateFlags
from restrictedmem.kvm.software.mmio import Scratch
from restrictedmem.kvm.software.physical import PhysicalMemory, Window
from restrictedmem.kvm.software.uc import Uc
from restrictedmem.kvm.software.unicorn import MEM_FETCH, MEM_READ, MEM_WRITE, RBP, RIP, RSP
from restrictedmem.protocol import exits
from restrictedmem.protocol.exits import Exit
from restrictedmem.protocol.guest_abi import GPA_BITS, HYPERCALL_PAGE, REPORT_PAGE
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, U64_MAX

# The engine's own addresses in Unicorn's physical memory. The halves lie behind them.
GPA_END: Final = 1 << GPA_BITS
HYPERCALL_CODE: Final = 1 << 45
REPORT: Final = HYPERCALL_CODE + PAGE_SIZE
SCRATCH: Final = 1 << 46
#: A load from an address without memory is sent to its own address in this hole. The hole's hook
#: then learns the exact address and size.
HOLE: Final = 1 << 47

# Exceptions (Intel SDM 6.15).
_STACK_FAULT: Final = exits.Shutdown(12)
_GENERAL_PROTECTION: Final = exits.Shutdown(13)
_PAGE_FAULT: Final = exits.Shutdown(14)
#: First address that is not canonical. The last one is as far below 2^64.
_CANONICAL: Final = 1 << 47
_ENTER: Final = 0xC8
_LEAVE: Final = 0xC9


class RunEnd(Enum):
    """The reason for which a run ended, other than an exit."""

    AGAIN = 1
    """A fault has to be tried again, because an invalidation came between."""
    STEP = 2
    """The instruction stores to a page that has no memory for it."""
    ALONE = 3
    """The instruction has to be executed alone."""


@final
class Tlb:
    """The TLB of one emulator, filled by a hook."""

    def __init__(
        self,
        uc: Uc,
        mmu: Mmu,
        code: CodePages,
        memory: PhysicalMemory,
        fetched: FetchedCode,
        scratch: Scratch,
        flags: LateFlags,
    ) -> None:
        """``mmu`` and ``code`` are the VM's; the others are the emulator's."""
        self._uc = uc
        self._mmu = mmu
        self._code = code
        #: The vCPU's number in ``code``.
        self.number = 0
        self._memory = memory
        self._fetched = fetched
        self._scratch = scratch
        self._flags = flags
        self._refusal: Exit | RunEnd | None = None
        self._failure: BaseException | None = None
        #: The access that was refused (MEM_READ, MEM_WRITE or MEM_FETCH), and its guest page.
        self.access = 0
        self.page = 0
        #: The hook; a function to call when a slot is gone; a function that counts the misses.
        self.fill, self.forget_window, self.count = self._make_fill()

    def begin(self) -> None:
        """Note that a run begins."""
        self._refusal = None

    def refused(self) -> Exit | RunEnd | None:
        """Return why an access was refused, which ended the run; None if none was.

        Raises:
            BaseException: the exception of the fault path.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return self._refusal

    def _refuse(self, why: Exit | RunEnd, access: int, page: int) -> None:
        self._refusal, self.access, self.page = why, access, page
        if access != MEM_FETCH:
            self._flags.refused()

    def fetch(self, page: int) -> Exit | RunEnd | None:
        """Translate a page as a miss of a fetch would, in no run; return why that is refused.

        Return None when it is not refused.

        Raises:
            BaseException: as ``refused``.
        """
        self.begin()
        self._refill(page, MEM_FETCH, self._memory.find(page))
        return self.refused()

    def on_unmapped_read(self, _uc: int, _kind: int, address: int, size: int, _value: int) -> bool:
        """Refuse a load from the hole, now that its address and size are known."""
        self._refuse(exits.MmioRead(address - HOLE, size), MEM_READ, address - HOLE & ~PAGE_MASK)
        return False

    def _make_fill(
        self,
    ) -> tuple[Callable[[int, int, int, int], int], Callable[[], None], Callable[[], int]]:
        # Unicorn calls it a million times a second. So what it needs is in local variables, with
        # the slot of the last miss.
        refill, find = self._refill, self._memory.find
        start = end = fills = last_result = 0
        entries = bytearray()
        offsets: tuple[int, ...] = ()
        answer = memoryview(bytearray(16)).cast("Q")
        # By access. A fetch always takes the long way, which notes where code is.
        needed = [0] * (MEM_FETCH + 1)
        needed[MEM_READ], needed[MEM_WRITE] = READ, WRITE

        def fill(_uc: int, page: int, access: int, result: int) -> int:
            nonlocal start, end, entries, offsets, fills, answer, last_result
            fills += 1
            if result != last_result:
                # The two words lie on Unicorn's stack, nearly always at the same place.
                answer = memoryview((ctypes.c_uint64 * 2).from_address(result)).cast("B").cast("Q")
                last_result = result
            if not start <= page < end:
                window = find(page)
                if window is None or not window.offsets:
                    answer[0], answer[1] = refill(page, access, window)
                    return answer[1]
                start, end, entries, offsets = (
                    window.start,
                    window.end,
                    window.slot.entries,
                    window.offsets,
                )
            entry = entries[(page - start) >> PAGE_SHIFT]
            if entry & needed[access]:
                answer[0] = page + offsets[entry >> 3]
                answer[1] = entry & (READ | WRITE)
                return 1
            answer[0], answer[1] = refill(page, access, find(page))
            return answer[1]

        def forget() -> None:
            nonlocal start, end
            start = end = 0

        return fill, forget, lambda: fills

    def _refill(self, page: int, access: int, window: Window | None) -> tuple[int, int]:
        """Answer a miss: physical page and rights. No rights refuse it, which ends the run."""
        if self._memory.maintaining:
            # Unicorn asks for itself: this is no access of the guest. Pages of the engine map to
            # themselves; the guest's are refused.
            return (page, ALL) if page >= GPA_END else (0, 0)
        try:
            answer = (
                self._around_slots(page, access)
                if window is None
                else self._fault(window, page, access)
            )
        except BaseException as error:  # noqa: BLE001 - ctypes would drop it; ``refused`` raises it.
            self._failure = error
            return 0, 0
        if isinstance(answer, tuple):
            return answer
        self._refuse(answer, access, page)
        return 0, 0

    def _around_slots(self, page: int, access: int) -> tuple[int, int] | Exit | RunEnd:
        if page == HYPERCALL_PAGE and access != MEM_WRITE:
            return HYPERCALL_CODE, READ | EXEC
        if page == REPORT_PAGE and access != MEM_FETCH:
            return REPORT, READ | WRITE
        if page >= GPA_END:
            return (
                _PAGE_FAULT
                if not _CANONICAL <= page <= U64_MAX - _CANONICAL
                else self._no_address(page, access)
            )
        if self._mmu.attributes.forbids_mmio(page >> PAGE_SHIFT):
            return exits.MemoryFault(KVM_MEMORY_EXIT_FLAG_PRIVATE, page, PAGE_SIZE, EFAULT)
        if access == MEM_FETCH:
            return exits.MemoryFault(0, page, PAGE_SIZE, EFAULT)
        if self._scratch.stepping:
            return self._scratch.translate(page), READ | WRITE
        return (HOLE + page, READ) if access == MEM_READ else RunEnd.STEP

    def _no_address(self, page: int, access: int) -> exits.Shutdown:
        """Return the exception of an address that is not canonical.

        For an access to the stack it is another one (Intel SDM 3.3.7.1).
        """
        # By now Unicorn has set RIP to the instruction.
        instruction = None if access == MEM_FETCH else self._fetched.instruction(self._uc.read(RIP))
        if instruction is None:
            return _GENERAL_PROTECTION
        on_stack = instruction.uses_stack and page in self._stack(instruction.opcode)
        return _STACK_FAULT if on_stack or instruction.based_on_stack else _GENERAL_PROTECTION

    def _stack(self, opcode: int) -> set[int]:
        """Return the pages that an instruction may push to or pop from."""
        top = self._uc.read(RSP)
        places = [top - 8, top - 1, top, top + 7]
        if opcode in (_ENTER, _LEAVE):
            frame = self._uc.read(RBP)
            places += [frame - 8, frame, frame + 7]
        return {place & U64_MAX & ~PAGE_MASK for place in places}

    def _fault(self, window: Window, page: int, access: int) -> tuple[int, int] | Exit | RunEnd:
        if not window.offsets:
            self._memory.show(window)
        index = (page - window.start) >> PAGE_SHIFT
        entries = window.slot.entries
        if not entries[index]:
            try:
                fault = self._mmu.fault(window.slot, page >> PAGE_SHIFT)
            except OSError as error:
                return _memory_fault(window, page, error.errno or EFAULT)
            if fault is Fault.NO_HALF:
                return _memory_fault(window, page, EFAULT)
        # The entry is read once. If it was zapped meanwhile or never installed, it is 0.
        entry = (
            self._protect_code(window.slot, page >> PAGE_SHIFT)
            if access == MEM_FETCH
            else entries[index]
        )
        if not entry:
            return RunEnd.AGAIN
        view, physical = window.views[entry >> 3 & 1], page + window.offsets[entry >> 3]
        assert view is not None
        if entry & 1 << access - MEM_READ:
            if access == MEM_FETCH:
                view.fetched(physical)
                anew = self._fetched.fetched(
                    page, view.half, physical - view.base, shared=not entry & PRIVATE
                )
                return RunEnd.AGAIN if anew else (physical, entry & ALL)
            return physical, entry & (READ | WRITE)
        if access != MEM_WRITE:
            return _memory_fault(window, page, EACCES)
        if entry & CODE and window.slot.rights & WRITE:
            self._code.written(page >> PAGE_SHIFT, self.number)
            return physical, READ | WRITE
        # A store to read-only memory is MMIO (KVM_MEM_READONLY).
        return (
            (self._scratch.translate(page), READ | WRITE) if self._scratch.stepping else RunEnd.STEP
        )

    def _protect_code(self, slot: Memslot, gfn: int) -> int:
        if not slot.rights & EXEC:
            return slot.entries[gfn - slot.base_gfn]
        entry, newly_protected = self._mmu.protect_code(slot, gfn)
        if entry:
            self._code.fetched(gfn, self.number, newly_protected=newly_protected)
        return entry


def _memory_fault(window: Window, page: int, errno: int) -> exits.MemoryFault:
    private = window.slot.attributes[(page - window.start) >> PAGE_SHIFT]
    return exits.MemoryFault(KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0, page, PAGE_SIZE, errno)
