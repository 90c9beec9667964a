"""The engine on Unicorn: guest code is emulated, and every TLB miss of it is a fault of the secondary MMU.

Guest addresses are identity mapped. Both halves of a slot lie in Unicorn's physical memory (``physical``); which one a guest page shows,
and with what rights, the slot's entry decides at each miss (UC_HOOK_TLB_FILL). So to take pages away is to zap entries and flush the TLB.

A run ends in a hook, and ``_why`` is the hook's word on it: an exit, or what has to be done before the guest goes on.
"""

import ctypes
import mmap
from collections import deque
from collections.abc import Callable
from enum import Enum
from errno import EACCES, EFAULT
from typing import Final, final

from restrictedmem.abi.kvm import KVM_MEMORY_EXIT_FLAG_PRIVATE, ExitReason, kvm_regs
from restrictedmem.abi.kvm_x86 import kvm_sregs
from restrictedmem.kvm import exits
from restrictedmem.kvm.exits import Exit
from restrictedmem.kvm.guest_abi import GPA_BITS, HYPERCALL_PAGE, REPORT_PAGE
from restrictedmem.kvm.memslot import ALL, CODE, EXEC, READ, WRITE, Memslot
from restrictedmem.kvm.mmu import Fault, Mmu
from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.code import CodePages
from restrictedmem.kvm.software.debug import GuestDebug
from restrictedmem.kvm.software.mmio import Scratch
from restrictedmem.kvm.software.physical import PhysicalMemory, Window
from restrictedmem.kvm.software.reset import enter_user_mode
from restrictedmem.kvm.software.turns import Turns
from restrictedmem.kvm.software.unicorn import MEM_FETCH, MEM_READ, MEM_WRITE, Uc
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, gfn_t

# What is the engine's own in Unicorn's physical memory; the halves lie behind it.
_GPA_END: Final = 1 << GPA_BITS
_HYPERCALL_CODE: Final = 1 << 45
_REPORT_PAGE: Final = _HYPERCALL_CODE + PAGE_SIZE
_SCRATCH: Final = 1 << 46
#: A load from nowhere is sent to its own address in this hole, for the hook that learns its exact address and size.
_HOLE: Final = 1 << 47

#: An invalid opcode is what ends a run most precisely.
HYPERCALL: Final = bytes.fromhex(
    "0f0b"  # ud2
    "c3"  # ret
)
_RET: Final = HYPERCALL_PAGE + 2

_TRAP_FLAG: Final = 0x100
#: No port: what the I/O breakpoint is set to when an IN or OUT is to go on.
_NO_PORT: Final = (1 << 64) - 1
_WORD: Final = (1 << 64) - 1

# Exceptions (Intel SDM 6.15).
_DEBUG: Final = exits.Shutdown(1)
_INVALID_OPCODE: Final = exits.Shutdown(6)
_PAGE_FAULT: Final = exits.Shutdown(14)
#: KVM's word for an instruction that it cannot carry out: string I/O between a port and MMIO.
_EMULATION_FAILURE: Final = exits.Unknown(ExitReason.INTERNAL_ERROR)


class _Stop(Enum):
    """Why a run ended that is no exit."""

    AGAIN = 1
    """A fault has to be tried again, after an invalidation."""
    STEP = 2
    """The instruction stores to a page without memory to write to."""


@final
class SoftwareVcpu:
    """One vCPU on Unicorn (``VcpuEngine``)."""

    def __init__(self, mmu: Mmu, report_page: mmap.mmap, turns: Turns, code: CodePages) -> None:
        """Make a vCPU in its reset state, without slots; all else is its VM's.

        Raises:
            RuntimeError: when Unicorn is missing or its version does not fit.
            OSError: ENOMEM.
        """
        self._mmu = mmu
        self._turns = turns
        self._code = code
        self._report_page = report_page
        self._uc = Uc()
        try:
            self._set_up(self._uc)
        except BaseException:
            self._uc.close()
            raise
        self._turn = turns.join(self._uc.kick)
        self._number = code.add_vcpu()

    def _set_up(self, uc: Uc) -> None:
        """Bring a new emulator to where a guest can run on it."""
        self._reset = enter_user_mode(uc)
        self._undo = uc.context()
        self._memory = PhysicalMemory(uc)
        self._scratch = Scratch(uc, _SCRATCH)
        self._hypercall_page = mmap.mmap(-1, PAGE_SIZE)
        self._hypercall_page[: len(HYPERCALL)] = HYPERCALL
        uc.map(_HYPERCALL_CODE, PAGE_SIZE, ctypes.addressof(ctypes.c_char.from_buffer(self._hypercall_page)))
        uc.map(_REPORT_PAGE, PAGE_SIZE, ctypes.addressof(ctypes.c_char.from_buffer(self._report_page)))
        self._hypercall = uc.registers(unicorn.RIP, unicorn.RAX, unicorn.RDI, unicorn.RSI, unicorn.RDX, unicorn.R10)
        #: What IN, OUT, INS and OUTS may change.
        self._io = uc.registers(unicorn.RIP, unicorn.RAX, unicorn.RSI, unicorn.RDI)
        self._io_before: tuple[int, ...] = ()
        #: The answer to the IN or OUT at an address, for when it is executed again: (RIP, port, value).
        self._io_answer: tuple[int, int, int] | None = None

        self._why: Exit | _Stop | None = None
        self._failure: BaseException | None = None
        #: The exit that ``complete`` answers, the stores of one instruction still to be reported, and whether one is to be stepped.
        self._asked: exits.PortIn | exits.MmioRead | exits.Hypercall | None = None
        self._stores: deque[exits.MmioWrite] = deque()
        self._unfinished = False
        #: How the guest stopped for good. It is never entered again: Unicorn stands behind some instructions that raised an exception, and
        #: takes a second exception for one in the handler of the first, which makes it #DF.
        self._ended: exits.Shutdown | None = None
        self._debug = GuestDebug(uc, self._on_breakpoint)
        #: Whether an instruction was finished that a single step is still to be reported of.
        self._stepped = False

        fill, self._forget_window, self._count_fills = self._make_fill()
        uc.hook_tlb_fill(fill)
        uc.hook_interrupt(self._on_interrupt)
        uc.hook_system_calls(self._on_system_call)
        uc.hook_in(self._on_in)
        uc.hook_out(self._on_out)
        uc.hook_unmapped_read(_HOLE, _GPA_END, self._on_unmapped_read)

    def close(self) -> None:
        """Free the emulator; the slots' memory stays the caller's."""
        self._undo.close()
        self._reset.close()
        self._uc.close()
        self._hypercall_page.close()

    @property
    def fills(self) -> int:
        """How many TLB misses there were."""
        return self._count_fills()

    # Slots.

    def add_slot(self, slot: Memslot) -> None:
        """Make a slot's halves reachable."""
        self._memory.add(slot)

    def remove_slot(self, slot: Memslot) -> None:
        """Forget a slot and whatever was cached of it."""
        self._memory.remove(slot)
        self._forget_window()

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Forget cached translations and translated code of a range of guest pages (``VcpuEngine``)."""
        self._memory.drop(start, end)

    # TLB misses.

    def _make_fill(self) -> tuple[Callable[[int, int, int, int], int], Callable[[], None], Callable[[], int]]:
        # Called a million times a second: what it needs is in local variables, the slot of the last miss at hand.
        refill, find = self._refill, self._memory.find
        start = end = fills = last_result = 0
        entries = bytearray()
        offsets: tuple[int, ...] = ()
        answer = memoryview(bytearray(16)).cast("Q")
        # By access; a fetch always goes the long way, which notes where there is code.
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
                start, end, entries, offsets = window.start, window.end, window.slot.entries, window.offsets
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
        """Answer a miss: physical page and rights; no rights refuse it, and end the run with ``_why`` set."""
        try:
            answer = self._fault_around_slots(page, access) if window is None else self._fault(window, page, access)
        except BaseException as error:  # noqa: BLE001 - ctypes would drop it; the run raises it instead.
            self._failure = error
            return 0, 0
        if isinstance(answer, tuple):
            return answer
        self._why = answer
        return 0, 0

    def _fault_around_slots(self, page: int, access: int) -> tuple[int, int] | Exit | _Stop:
        if page == HYPERCALL_PAGE and access != MEM_WRITE:
            return _HYPERCALL_CODE, READ | EXEC
        if page == REPORT_PAGE and access != MEM_FETCH:
            return _REPORT_PAGE, READ | WRITE
        if page >= _GPA_END:
            return (page, ALL) if self._memory.maintaining else _PAGE_FAULT
        if self._mmu.attributes.forbids_mmio(page >> PAGE_SHIFT):
            return exits.MemoryFault(KVM_MEMORY_EXIT_FLAG_PRIVATE, page, PAGE_SIZE, EFAULT)
        if access == MEM_FETCH:
            return exits.MemoryFault(0, page, PAGE_SIZE, EFAULT)
        if self._scratch.stepping:
            return self._scratch.translate(page), READ | WRITE
        return (_HOLE + page, READ) if access == MEM_READ else _Stop.STEP

    def _fault(self, window: Window, page: int, access: int) -> tuple[int, int] | Exit | _Stop:
        if not window.offsets:
            self._memory.show(window)
        index = (page - window.start) >> PAGE_SHIFT
        entries = window.slot.entries
        if not entries[index]:
            try:
                fault = self._mmu.fault(window.slot, page >> PAGE_SHIFT)
            except OSError as error:
                return self._memory_fault(window, page, error.errno or EFAULT)
            if fault is Fault.NO_HALF:
                return self._memory_fault(window, page, EFAULT)
        # Read once: zapped meanwhile or never installed, it is 0.
        entry = self._protect_code(window.slot, page >> PAGE_SHIFT) if access == MEM_FETCH else entries[index]
        if not entry:
            return _Stop.AGAIN
        view, physical = window.views[entry >> 3 & 1], page + window.offsets[entry >> 3]
        assert view is not None
        if entry & 1 << access - MEM_READ:
            if access == MEM_FETCH:
                view.fetched(physical)
                return physical, entry & ALL
            return physical, entry & (READ | WRITE)
        if access != MEM_WRITE:
            return self._memory_fault(window, page, EACCES)
        if entry & CODE and window.slot.rights & WRITE:
            self._code.written(page >> PAGE_SHIFT, self._number)
            return physical, READ | WRITE
        # A store to memory that is only to be read is MMIO (KVM_MEM_READONLY).
        return (self._scratch.translate(page), READ | WRITE) if self._scratch.stepping else _Stop.STEP

    def _protect_code(self, slot: Memslot, gfn: int) -> int:
        if not slot.rights & EXEC:
            return slot.entries[gfn - slot.base_gfn]
        entry, newly_protected = self._mmu.protect_code(slot, gfn)
        if entry:
            self._code.fetched(gfn, self._number, newly_protected=newly_protected)
        return entry

    def _memory_fault(self, window: Window, page: int, errno: int) -> exits.MemoryFault:
        private = window.slot.attributes[(page - window.start) >> PAGE_SHIFT]
        return exits.MemoryFault(KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0, page, PAGE_SIZE, errno)

    # The other hooks.

    def _on_interrupt(self, _uc: int, vector: int) -> None:
        if self._why is None:
            self._why = exits.Shutdown(vector)
        self._uc.stop()

    def _on_system_call(self, _uc: int) -> None:
        # EFER.SCE is clear.
        self._why = _INVALID_OPCODE
        self._uc.stop()

    def _on_breakpoint(self, _uc: int, address: int, _size: int) -> None:
        # An instruction that is executed again, to be finished, was reported before.
        if address in self._debug.breakpoints and not self._unfinished:
            self._why = exits.Debug(exits.BREAKPOINT, address)
            self._uc.stop()

    def _on_in(self, _uc: int, port: int, size: int) -> int:
        value = self._io_value(port)
        if value is None:
            self._why = exits.PortIn(port, size)
        return value or 0

    def _on_out(self, _uc: int, port: int, size: int, data: int) -> None:
        if self._io_value(port) is None:
            self._why = exits.PortOut(port, size, data)

    def _io_value(self, port: int) -> int | None:
        """Return the answer to this very IN or OUT; without one, set the breakpoint that ends the run right after it."""
        self._io_before = self._io.read()
        answer, self._io_answer = self._io_answer, None
        if answer is not None and answer[:2] == (self._io_before[0], port):
            self._uc.write(unicorn.DR0, _NO_PORT)
            return answer[2]
        self._uc.write(unicorn.DR0, port)
        return None

    def _on_unmapped_read(self, _uc: int, _kind: int, address: int, size: int, _value: int) -> bool:
        self._why = exits.MmioRead(address - _HOLE, size)
        return False

    # Running.

    def set_regs(self, regs: kvm_regs) -> None:
        """Set where the guest starts; every other register is what it is at reset (``VcpuEngine``)."""
        self._reset.restore()
        self._uc.write(unicorn.RIP, regs.rip)
        self._uc.write(unicorn.RSP, regs.rsp)
        self._uc.write(unicorn.RDI, regs.rdi)
        self._uc.write(unicorn.RSI, regs.rsi)
        self._asked = self._io_answer = self._ended = None
        self._finish_instruction()
        self._stores.clear()

    def get_regs(self) -> kvm_regs:
        """Return the general registers (``VcpuEngine``)."""
        return self._debug.get_regs()

    def change_regs(self, regs: kvm_regs) -> None:
        """Set the general registers of a guest on its way (``VcpuEngine``); elsewhere, it is done with the instruction it was at."""
        if regs.rip != self._uc.read(unicorn.RIP):
            self._asked = self._io_answer = None
            self._finish_instruction()
            self._stores.clear()
        self._debug.set_regs(regs)

    def get_sregs(self) -> kvm_sregs:
        """Return selectors, bases and control registers (``VcpuEngine``)."""
        return self._debug.get_sregs()

    def set_guest_debug(self, *, step: bool, breakpoints: frozenset[int]) -> None:
        """Say where to stop (``VcpuEngine``)."""
        self._stepped = False
        self._debug.set(step=step, breakpoints=breakpoints)

    def complete(self, value: int) -> None:
        """Give the value that the last exit asked for; ignored when it asked for none (``VcpuEngine``)."""
        asked, self._asked = self._asked, None
        match asked:
            case exits.Hypercall():
                self._uc.write(unicorn.RAX, value & _WORD)
                self._uc.write(unicorn.RIP, _RET)
                self._stepped = self._debug.step
            case exits.PortIn(port, size):
                self._io_answer = self._io_before[0], port, value & (1 << 8 * size) - 1
            case exits.MmioRead():
                self._scratch.answer(asked, value)
            case None:
                pass

    def settle(self) -> None:
        """Wait until no invalidation is in progress, and it is this vCPU's turn (``VcpuEngine``)."""
        self._mmu.wait_settled(unless=lambda: self._turn.kicked)
        self._turns.take(self._turn)

    def run(self) -> Exit | None:
        """Run guest code until it exits (``VcpuEngine``), if it is this vCPU's turn; an exit that got no value it asked for comes again."""
        if not self._turns.has(self._turn):
            return None
        try:
            for gfn in self._code.take_stale(self._number):
                self._memory.drop(gfn_t(gfn), gfn_t(gfn + 1))
            return self._run()
        finally:
            self._turns.give(self._turn)

    def prefault(self, start: gfn_t, end: gfn_t) -> int:
        """Map pages, if it is this vCPU's turn (``VcpuEngine``)."""
        if not self._turns.has(self._turn):
            return 0
        try:
            return self._mmu.prefault(start, end)
        finally:
            self._turns.give(self._turn)

    def _run(self) -> Exit | None:
        if self._ended is not None:
            return self._ended
        if self._unfinished:
            exit_ = self._step()
            if exit_ is not None or self._unfinished:
                return exit_
        if self._stores:
            return self._stores.popleft()
        if self._debug.step:
            return self._single_step()
        self._start()
        return self._exit()

    def _single_step(self) -> Exit | None:
        if not self._stepped:
            flags = unicorn.RFLAGS
            self._uc.write(flags, self._uc.read(flags) | _TRAP_FLAG)
            try:
                self._start()
            finally:
                self._uc.write(flags, self._uc.read(flags) & ~_TRAP_FLAG)
            if self._why != _DEBUG:
                return self._exit()
        self._stepped = False
        return exits.Debug(exits.SINGLE_STEP, self._uc.read(unicorn.RIP), exits.DR6_BS)

    def kick(self) -> None:
        """Make ``run`` or ``settle`` return soon (``VcpuEngine``)."""
        self._uc.kick()
        self._turns.kick(self._turn)
        self._mmu.wake()

    def _start(self) -> None:
        self._why = None
        error = self._uc.start()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        if error == unicorn.ERR_INSN_INVALID:
            self._why = self._invalid_opcode()
        if error and self._why is None:
            raise RuntimeError(unicorn.error_text("uc_emu_start", error))

    def _invalid_opcode(self) -> Exit:
        rip, number, rdi, rsi, rdx, r10 = self._hypercall.read()
        return exits.Hypercall(number, (rdi, rsi, rdx, r10)) if rip == HYPERCALL_PAGE else _INVALID_OPCODE

    def _exit(self) -> Exit | None:
        """Turn the reason why the run ended into an exit, or into None when the guest is to go on."""
        match self._why:
            case None | _Stop.AGAIN:
                return None
            case _Stop.STEP:
                self._unfinished = True
                return self._run()
            case exits.MmioRead():
                self._unfinished = True
                self._asked = self._why
            case exits.Hypercall():
                self._asked = self._why
            case exits.PortIn():
                self._io.write(self._io_before)
                self._asked = self._why
            case exits.PortOut(port):
                rip, _, rsi, _ = self._io_before
                if self._uc.read(unicorn.RSI) != rsi:
                    # OUTS: under a REP prefix the breakpoint came before the count, so it has to be executed again to be finished.
                    self._io.write(self._io_before)
                    self._io_answer = rip, port, 0
                else:
                    self._stepped = self._debug.step
            case exits.Shutdown():
                self._ended = self._why
            case _:
                pass
        return self._why

    def _step(self) -> Exit | None:
        """Try the one instruction at RIP that touches MMIO; ``_unfinished`` says whether it is done."""
        uc, scratch = self._uc, self._scratch
        self._undo.save()
        uc.flush_tlb()
        uc.write(unicorn.RFLAGS, uc.read(unicorn.RFLAGS) | _TRAP_FLAG)
        scratch.begin()
        try:
            self._start()
        finally:
            scratch.stepping = False
            uc.flush_tlb()
        if self._why == _DEBUG and scratch.wanted is None:
            uc.write(unicorn.RFLAGS, uc.read(unicorn.RFLAGS) & ~_TRAP_FLAG)
            self._stores.extend(scratch.stores)
            self._finish_instruction()
            self._stepped = self._debug.step
            return None
        self._undo.restore()
        if scratch.wanted is not None:
            self._asked = scratch.wanted
            return self._asked
        match self._why:
            case exits.MemoryFault():
                return self._why
            case exits.Shutdown():
                self._ended = self._why
                return self._why
            case exits.PortIn() | exits.PortOut():
                self._finish_instruction()
                return _EMULATION_FAILURE
            case _:
                return None

    def _finish_instruction(self) -> None:
        self._unfinished = False
        self._scratch.forget()
