"""A vCPU on Unicorn, which emulates guest code; each TLB miss is a fault of our MMU.

A hook ends each run. ``_why`` is the reason that the hook gave: an exit, or something that has to
be done before the guest goes on.
"""

import ctypes
import mmap
from collections import deque
from typing import Final, final

from restrictedmem.abi.kvm import ExitReason, kvm_regs
from restrictedmem.abi.kvm_x86 import kvm_sregs
from restrictedmem.kvm.decode import decode
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.kvm.mmu import Mmu
from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.alone import Alone
from restrictedmem.kvm.software.code import CodePages
from restrictedmem.kvm.software.fetched import FetchedCode
from restrictedmem.kvm.software.flags import LateFlags, computes_first
from restrictedmem.kvm.software.guest_debug import GuestDebug
from restrictedmem.kvm.software.length import length
from restrictedmem.kvm.software.mmio import Scratch
from restrictedmem.kvm.software.physical import PhysicalMemory
from restrictedmem.kvm.software.reset import enter_user_mode
from restrictedmem.kvm.software.tlb import (
    GPA_END,
    HOLE,
    HYPERCALL_CODE,
    REPORT,
    SCRATCH,
    RunEnd,
    Tlb,
)
from restrictedmem.kvm.software.turns import Turns
from restrictedmem.kvm.software.uc import Context, Uc
from restrictedmem.kvm.software.unicorn import MEM_FETCH
from restrictedmem.kvm.software.wide import is_wide
from restrictedmem.protocol import exits
from restrictedmem.protocol.exits import Exit
from restrictedmem.protocol.guest_abi import HYPERCALL_PAGE
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, U64_MAX, gfn_t

#: The code of the hypercall page. Of all things, an invalid opcode ends a run most precisely.
HYPERCALL: Final = bytes.fromhex(
    "0f0b"  # ud2
    "c3"  # ret
)
_RET: Final = HYPERCALL_PAGE + 2

#: No port. The I/O breakpoint is set to it when an IN or OUT has to go on.
_NO_PORT: Final = U64_MAX

# Exceptions (Intel SDM 6.15).
_INVALID_OPCODE: Final = exits.Shutdown(6)
# What Unicorn takes for invalid opcodes: INT1 raises #DB, a trap; RDPMC #GP (CR4.PCE is clear).
_INT1: Final = 0xF1
_NOT_INVALID: Final = {_INT1: exits.Shutdown(1), 0x0F33: exits.Shutdown(13)}
#: KVM's exit for an instruction that it cannot carry out: string I/O between a port and MMIO.
_EMULATION_FAILURE: Final = exits.Unknown(ExitReason.INTERNAL_ERROR)


@final
class SoftwareVcpu:
    """One vCPU on Unicorn (``VcpuEngine``)."""

    def __init__(self, mmu: Mmu, report_page: mmap.mmap, turns: Turns, code: CodePages) -> None:
        """Make a vCPU in its reset state, without slots; all arguments are its VM's.

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
        self._number = self._tlb.number = code.add_vcpu()

    def _set_up(self, uc: Uc) -> None:
        """Bring a new emulator to a state in which a guest can run on it."""
        self._reset, source, wide = enter_user_mode(uc)
        self._undo = Context(uc)
        self._flags = LateFlags(uc, source)
        self._memory = PhysicalMemory(uc)
        self._fetched = FetchedCode(uc)
        self._scratch = Scratch(uc, SCRATCH)
        self._hypercall_page = mmap.mmap(-1, PAGE_SIZE)
        self._hypercall_page[: len(HYPERCALL)] = HYPERCALL
        uc.map(
            HYPERCALL_CODE,
            PAGE_SIZE,
            ctypes.addressof(ctypes.c_char.from_buffer(self._hypercall_page)),
        )
        uc.map(REPORT, PAGE_SIZE, ctypes.addressof(ctypes.c_char.from_buffer(self._report_page)))
        self._hypercall = uc.registers(
            unicorn.RIP, unicorn.RAX, unicorn.RDI, unicorn.RSI, unicorn.RDX, unicorn.R10
        )
        #: The registers that IN, OUT, INS and OUTS may change.
        self._io = uc.registers(unicorn.RIP, unicorn.RAX, unicorn.RSI, unicorn.RDI)
        self._io_before: tuple[int, ...] = ()
        #: The answer to the IN or OUT at an address, for its second execution: (RIP, port, value).
        self._io_answer: tuple[int, int, int] | None = None

        self._why: Exit | RunEnd | None = None
        #: The exit that ``complete`` answers; the stores of one instruction that are still to be
        #: reported; and whether an instruction has to be stepped.
        self._asked: exits.PortIn | exits.MmioRead | exits.Hypercall | None = None
        self._stores: deque[exits.MmioWrite] = deque()
        self._unfinished = False
        #: How the guest stopped for good. It is never entered again: after some exceptions RIP is
        #: behind the instruction that raised them. And Unicorn takes a second exception for one in
        #: the handler of the first, and makes it a #DF.
        self._ended: exits.Shutdown | None = None
        self._debug = GuestDebug(uc, self._memory, self._on_breakpoint)
        #: Whether an instruction was finished whose single step is still to be reported.
        self._stepped = False

        self._alone = Alone(uc, self._memory, self._fetched, self._start, self.drop, wide)
        self._tlb = Tlb(
            uc,
            self._mmu,
            self._code,
            self._memory,
            self._fetched,
            self._scratch,
            self._flags,
        )
        uc.hook_tlb_fill(self._tlb.fill)
        uc.hook_interrupt(self._on_interrupt)
        uc.hook_system_calls(self._on_system_call)
        uc.hook_in(self._on_in)
        uc.hook_out(self._on_out)
        uc.hook_unmapped_read(HOLE, GPA_END, self._tlb.on_unmapped_read)

    def close(self) -> None:
        """Free the emulator; the slots' memory stays the caller's."""
        self._uc.close()
        self._hypercall_page.close()

    @property
    def fills(self) -> int:
        """How many TLB misses there were."""
        return self._tlb.count()

    # Slots.

    def add_slot(self, slot: Memslot) -> None:
        """Let the guest reach a slot's halves."""
        self._memory.add(slot)

    def remove_slot(self, slot: Memslot) -> None:
        """Forget a slot and everything that was cached of it."""
        self._forget_code(slot.base_gfn, slot.end_gfn)
        self._memory.remove(slot)
        self._tlb.forget_window()

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Drop cached translations and translated code of some pages (``VcpuEngine``)."""
        self._forget_code(start, end)
        self._memory.drop(start, end)

    def _forget_code(self, start: gfn_t, end: gfn_t) -> None:
        with self._memory.maintenance():
            self._fetched.drop(start << PAGE_SHIFT, end << PAGE_SHIFT)

    # Hooks.

    def _on_interrupt(self, _uc: int, vector: int) -> None:
        if self._why is None:
            self._why = exits.Shutdown(vector)
        self._uc.stop()

    def _on_system_call(self, _uc: int) -> None:
        # EFER.SCE is clear.
        self._why = _INVALID_OPCODE
        self._uc.stop()

    def _on_breakpoint(self, _uc: int, address: int, _size: int) -> None:
        # An instruction that is executed again, to be finished, was already reported.
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
        """Return the answer to this very IN or OUT.

        Without an answer, set the breakpoint that ends the run right after the instruction.
        """
        self._io_before = self._io.read()
        answer, self._io_answer = self._io_answer, None
        if answer is not None and answer[:2] == (self._io_before[0], port):
            self._uc.write(unicorn.DR0, _NO_PORT)
            return answer[2]
        self._uc.write(unicorn.DR0, port)
        return None

    # Running.

    def set_regs(self, regs: kvm_regs) -> None:
        """Set where the guest starts; reset all other registers (``VcpuEngine``)."""
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
        """Set the general registers of a guest that may have run (``VcpuEngine``).

        If RIP changes, the guest is done with the instruction that it was at.
        """
        if regs.rip != self._uc.read(unicorn.RIP):
            self._asked = self._io_answer = None
            self._finish_instruction()
            self._stores.clear()
        self._debug.set_regs(regs)

    def get_sregs(self) -> kvm_sregs:
        """Return selectors, bases and control registers (``VcpuEngine``)."""
        return self._debug.get_sregs()

    def set_guest_debug(self, *, step: bool, breakpoints: frozenset[int]) -> None:
        """Set where the guest has to stop (``VcpuEngine``)."""
        self._stepped = False
        self._debug.set(step=step, breakpoints=breakpoints)

    def complete(self, value: int) -> None:
        """Pass on the value that the last exit asked for, if it asked (``VcpuEngine``)."""
        asked, self._asked = self._asked, None
        match asked:
            case exits.Hypercall():
                self._uc.write(unicorn.RAX, value & U64_MAX)
                self._uc.write(unicorn.RIP, _RET)
                self._stepped = self._debug.step
            case exits.PortIn(port, size):
                self._io_answer = self._io_before[0], port, value & (1 << 8 * size) - 1
            case exits.MmioRead():
                self._scratch.answer(asked, value)
            case None:
                pass

    def settle(self) -> None:
        """Wait for the end of invalidations, and for this vCPU's turn (``VcpuEngine``)."""
        self._mmu.wait_settled(unless=lambda: self._turn.kicked)
        self._turns.take(self._turn)

    def run(self) -> Exit | None:
        """Run guest code until it exits, if it is this vCPU's turn (``VcpuEngine``).

        An exit that did not get the value it asked for comes again.
        """
        if not self._turns.has(self._turn):
            return None
        try:
            for gfn in self._code.take_stale(self._number):
                self.drop(gfn_t(gfn), gfn_t(gfn + 1))
            for page in self._fetched.rewritten():
                self.drop(gfn_t(page >> PAGE_SHIFT), gfn_t((page >> PAGE_SHIFT) + 1))
            if self._fetched.crowded:
                self.drop(gfn_t(0), gfn_t(GPA_END >> PAGE_SHIFT))
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
        if not self._stepped and not self._alone.execute():
            return self._exit()
        self._stepped = False
        return exits.Debug(exits.SINGLE_STEP, self._uc.read(unicorn.RIP), exits.DR6_BS)

    def kick(self) -> None:
        """Make ``run`` or ``settle`` return soon (``VcpuEngine``)."""
        self._uc.kick()
        self._turns.kick(self._turn)
        self._mmu.wake()

    def _start(self) -> Exit | RunEnd | None:
        """Run until something ends the run; note and return the reason."""
        self._why = None
        self._tlb.begin()
        error = self._uc.start()
        refusal = self._tlb.refused()
        if refusal is not None:
            self._why = refusal
            if self._tlb.access != MEM_FETCH:
                self._refused_access()
        if error == unicorn.ERR_INSN_INVALID:
            self._why = self._invalid_opcode()
        if error and self._why is None:
            raise RuntimeError(unicorn.error_text("uc_emu_start", error))
        return self._why

    def _refused_access(self) -> None:
        """Give the guest its flags back, if the instruction at RIP had computed them.

        Set ``_why`` if the instruction is invalid, and so may touch nothing.
        """
        rip = self._uc.read(unicorn.RIP)
        instruction = self._fetched.instruction(rip)
        if instruction is not None and instruction.is_invalid:
            # Unicorn notices this only after the access.
            self._why = _INVALID_OPCODE
        hooked = self._fetched.has_hook(rip) or self._debug.has_hook(rip)
        if hooked or computes_first(instruction):
            self._flags.mend()

    def _invalid_opcode(self) -> Exit | RunEnd:
        rip, number, rdi, rsi, rdx, r10 = self._hypercall.read()
        if rip == HYPERCALL_PAGE:
            return exits.Hypercall(number, (rdi, rsi, rdx, r10))
        code = self._fetched.code(rip)
        instruction = decode(code)
        if is_wide(instruction):
            return RunEnd.ALONE
        if code and length(code) > len(code):
            refusal = self._tlb.fetch(rip + len(code))
            if refusal is not None:
                return refusal
        if instruction is None:
            return _INVALID_OPCODE
        if instruction.opcode == _INT1:
            self._uc.write(unicorn.RIP, rip + len(instruction.prefixes) + 1)
        return _NOT_INVALID.get(instruction.opcode, _INVALID_OPCODE)

    def _exit(self, *, alone: bool = False) -> Exit | None:
        """Turn the reason why the run ended into an exit, or None if the guest has to go on.

        ``alone`` says that the run was of one instruction alone.
        """
        match self._why:
            case None | RunEnd.AGAIN:
                return None
            case RunEnd.ALONE:
                return self._go_alone()
            case exits.MemoryFault() | exits.Shutdown() if not alone and self._may_need_no_page():
                return self._go_alone(to_the_end=True)
            case RunEnd.STEP:
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
                    # OUTS: under a REP prefix the breakpoint came before the count was changed. So
                    # the instruction has to be executed again to be finished.
                    self._io.write(self._io_before)
                    self._io_answer = rip, port, 0
                else:
                    self._stepped = self._debug.step
            case exits.Shutdown():
                self._ended = self._why
            case _:
                pass
        return self._why

    def _may_need_no_page(self) -> bool:
        """Say whether the run ended at a fetch that the instruction at RIP may not need.

        Unicorn translates a block whole before it executes the first instruction.
        """
        if self._tlb.access != MEM_FETCH or self._tlb.refused() is None:
            return False
        return self._tlb.page != self._uc.read(unicorn.RIP) & ~PAGE_MASK

    def _go_alone(self, *, to_the_end: bool = False) -> Exit | None:
        """Execute the instruction at RIP alone.

        With ``to_the_end``, execute those that follow on its page, too.
        """
        before = self._uc.read(unicorn.RIP)
        while self._alone.execute():
            rip = self._uc.read(unicorn.RIP)
            if not to_the_end or not before < rip <= before | PAGE_MASK:
                return None
            before = rip
        return self._exit(alone=True)

    def _step(self) -> Exit | None:
        """Try the instruction at RIP, which touches MMIO.

        ``_unfinished`` is False once it is done.
        """
        uc, scratch = self._uc, self._scratch
        self._undo.save()
        uc.flush_tlb()
        scratch.begin()
        try:
            done = self._alone.execute()
        finally:
            scratch.stepping = False
            uc.flush_tlb()
        if done and scratch.wanted is None:
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
