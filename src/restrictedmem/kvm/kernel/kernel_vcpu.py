"""A vCPU of the kernel engine: KVM_RUN, and what its exits mean to the owner."""

import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from errno import EACCES, EFAULT, EOPNOTSUPP
from typing import Final, final

from restrictedmem.abi.kvm import ExitReason, kvm_regs
from restrictedmem.abi.kvm_x86 import KVM_SYNC_X86_REGS, kvm_cpuid_entry2, kvm_sregs
from restrictedmem.devkvm import VcpuFd
from restrictedmem.kvm.kernel import guest_system
from restrictedmem.kvm.kernel.guest_system import System
from restrictedmem.kvm.kernel.page_tables import NO_EXECUTE, PRESENT, WRITABLE
from restrictedmem.kvm.kernel.string_input import Place, StringInput
from restrictedmem.protocol import exits
from restrictedmem.protocol.exits import Exit
from restrictedmem.protocol.guest_abi import GPA_BITS, HYPERCALL_PAGE
from restrictedmem.units import PAGE_MASK, PAGE_SIZE, U64_MAX, gfn_t

# The general registers in ``kvm_run``, in the order of ``kvm_regs``. They are read at every exit,
# for which ctypes would be slow. Between two runs they are the vCPU's: the next run takes in a
# change there.
_REGS: Final = struct.Struct("=18Q")
_RAX, _RCX, _RDX, _RSI, _RDI, _RSP, _R10, _RIP, _RFLAGS = 0, 2, 3, 4, 5, 6, 10, 16, 17
_WORD: Final = struct.Struct("=Q")
_IO_OUT: Final = 1
_HYPERCALL_OUT: Final = (HYPERCALL_PAGE, HYPERCALL_PAGE + 2)

_TRAP_FLAG: Final = 1 << 8

# Exceptions (Intel SDM 6.15), and the error code of #PF (4.7).
_DEBUG: Final = 1
_INVALID_OPCODE: Final = 6
_GENERAL_PROTECTION: Final = 13
_PAGE_FAULT: Final = 14
_PF_WRITE: Final = 1 << 1
_PF_FETCH: Final = 1 << 4

#: KVM's exit for an instruction that it cannot carry out.
_EMULATION_FAILURE: Final = exits.Unknown(ExitReason.INTERNAL_ERROR)

_MSR_LSTAR: Final = 0xC000_0082


@final
class KernelVcpu:
    """One vCPU on /dev/kvm (``VcpuEngine``)."""

    def __init__(
        self,
        number: int,
        vcpu: VcpuFd,
        own: System,
        *,
        cpuid: Iterable[kvm_cpuid_entry2],
        find: Callable[[int], int | None],
        flags_of: Callable[[int], int],
        read: Callable[[int, int], bytes],
    ) -> None:
        """Own ``vcpu``, which is new.

        ``find`` returns the owner's address of a guest physical address. ``flags_of`` returns the
        flags of a memory fault there. ``read`` returns what can be read of a piece of a page.
        """
        self._number = number
        self._system = own
        self._find = find
        self._flags_of = flags_of
        self.vcpu = vcpu
        self._base = vcpu.get_sregs()
        own.add_vcpu(number)
        vcpu.set_cpuid2(cpuid)
        vcpu.set_msrs({_MSR_LSTAR: guest_system.SYSCALL_TARGET})
        self._run = vcpu.kvm_run
        self._run.kvm_valid_regs = KVM_SYNC_X86_REGS
        self._shared_regs = memoryview(self._run.s.regs.regs).cast("B")
        self._start = kvm_regs()
        self._entered = False
        self._step = False
        self._breakpoints: frozenset[int] = frozenset()
        #: Whether a #DB has to come that the guest did not ask for; and whether OUT was carried
        #: out, and its step is still to be reported.
        self._trapped = False
        self._stepped = False
        #: The exit that ``complete`` answers; the rest of one string instruction, each access with
        #: the place of its value; and where the answer goes.
        self._asked: exits.Hypercall | exits.PortIn | None = None
        self._strings: deque[tuple[exits.PortIn | exits.PortOut, memoryview]] = deque()
        self._answer_to: memoryview | None = None
        self._input = StringInput(own.tables, read)
        self._ended: exits.Shutdown | exits.Unknown | None = None
        #: Whether KVM may still have to carry out the IN or OUT for which it exited; and the
        #: registers at that exit.
        self._in_pending = self._out_pending = False
        self._regs_at_io: tuple[int, ...] = ()

    # Registers.

    def set_regs(self, regs: kvm_regs) -> None:
        """Set where the guest starts (``VcpuEngine``); this is done when it starts."""
        self._start = kvm_regs(
            rip=regs.rip, rsp=regs.rsp, rdi=regs.rdi, rsi=regs.rsi, rflags=self._system.user_flags
        )
        self._entered = False

    def _enter(self) -> None:
        if not self._entered:
            if self._in_pending or self._out_pending:
                self._finish_io()
            self.vcpu.set_sregs(self._system.sregs(self._base, self._number))
            self._put_regs(bytes(self._start))
            self.vcpu.accept_kicks()
            self._entered = True

    def _put_regs(self, regs: bytes) -> None:
        self._shared_regs[:] = regs
        self._run.kvm_dirty_regs = KVM_SYNC_X86_REGS

    def _finish_io(self) -> None:
        """Have KVM carry out the IN or OUT for which it exited, without entering the guest.

        Registers may have been changed meanwhile. KVM's emulator changes registers only now. If it
        saw such a change, it would forget what IN has read.
        """
        self._in_pending = self._out_pending = False
        changed, wanted = self._run.kvm_dirty_regs, bytes(self._shared_regs)
        self._run.kvm_dirty_regs = 0
        self._run.immediate_exit = 1
        self._input.entered()
        try:
            with suppress(InterruptedError):
                self.vcpu.run()
        finally:
            self._run.immediate_exit = 0
        # Nobody hears of a fault: it goes when registers are set, and comes again.
        self._input.faulted(_place(_REGS.unpack(self._shared_regs)))
        if changed:
            each = zip(
                _REGS.unpack(wanted), self._regs_at_io, _REGS.unpack(self._shared_regs), strict=True
            )
            self._put_regs(
                _REGS.pack(*(now if then == given else given for given, then, now in each))
            )

    def get_regs(self) -> kvm_regs:
        """Return the general registers (``VcpuEngine``).

        After an exit for OUT, they are those behind the OUT.
        """
        self._enter()
        if self._out_pending:
            self._finish_io()
        return kvm_regs.from_buffer_copy(self._shared_regs)

    def change_regs(self, regs: kvm_regs) -> None:
        """Set the general registers of a guest that may have run (``VcpuEngine``).

        If RIP changes, the guest is done with the instruction that it was at.
        """
        if regs.rip != self.get_regs().rip:
            self._asked = None
            self._strings.clear()
        self._put_regs(bytes(regs))

    def get_sregs(self) -> kvm_sregs:
        """Return the registers that KVM has (``VcpuEngine``)."""
        self._enter()
        return self.vcpu.get_sregs()

    def set_guest_debug(self, *, step: bool, breakpoints: frozenset[int]) -> None:
        """Set where the guest has to stop (``VcpuEngine``).

        With any breakpoint, the engine runs step by step, and looks at RIP before every
        instruction.
        """
        self._step = step
        self._breakpoints = breakpoints
        self._stepped = False

    def copy(self, to: int, words: int) -> None:
        """Copy 8-byte words from staging memory to the guest's linear address ``to``.

        The content of the registers is lost.

        Raises:
            OSError: EFAULT, EHWPOISON or ENOMEM as KVM_RUN, when there is no page for it.
        """
        if self._run_copy(to, words, guest_system.IOPL_3) is not None:
            raise OSError(EFAULT, "the vCPU that copies ended with an exception")

    def needs_iopl(self) -> bool:
        """Say whether CPL3 may use ports with IOPL 3 only, whatever the TSS says.

        The vCPU tries it. The content of the registers is lost.

        Raises:
            OSError: as KVM_RUN.
        """
        self._system.stage(b"")
        return self._run_copy(0, 0, 0) == _GENERAL_PROTECTION

    def _run_copy(self, to: int, words: int, flags: int) -> int | None:
        """Copy; return None, or the vector of the exception that ended the copy."""
        self.vcpu.set_sregs(self._system.sregs(self._base, self._number, copying=True))
        regs = kvm_regs(
            rip=guest_system.COPY,
            rdi=to,
            rsi=guest_system.STAGING,
            rcx=words,
            rflags=guest_system.USER_FLAGS | flags,
        )
        self._put_regs(bytes(regs))
        self._entered = False
        reason = _run_to_exit(self.vcpu)
        if reason != ExitReason.IO:
            raise OSError(self.vcpu.run_errno or EFAULT, f"KVM_RUN ended with {reason}")
        return guest_system.vector_at(self._run.s.regs.regs.rip)

    def prefault(self, start: gfn_t, end: gfn_t) -> int:
        """Refuse (``VcpuEngine``).

        KVM cannot do it with shadow paging, and was not tried with any other paging.
        """
        raise OSError(EOPNOTSUPP, "the kernel engine cannot prefault")

    # Running.

    def complete(self, value: int) -> None:
        """Pass on the value that the last exit asked for (``VcpuEngine``)."""
        asked, self._asked = self._asked, None
        match asked:
            case exits.Hypercall():
                _WORD.pack_into(self._shared_regs, 8 * _RAX, value & U64_MAX)
                self._run.kvm_dirty_regs = KVM_SYNC_X86_REGS
            case exits.PortIn(_, size):
                assert self._answer_to is not None
                self._answer_to[:] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            case None:
                pass

    def settle(self) -> None:
        """Do nothing: KVM itself waits for invalidations to end (``VcpuEngine``)."""

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Do nothing: KVM zaps the translations of a page that goes (``VcpuEngine``)."""

    def kick(self) -> None:
        """Make KVM_RUN return EINTR (``VcpuEngine``)."""
        with suppress(OSError):
            # Before the vCPU's first run there is no thread to signal.
            self.vcpu.kick()

    def run(self) -> Exit | None:
        """Run guest code until it exits (``VcpuEngine``)."""
        if self._ended is not None:
            return self._ended
        if self._strings:
            return self._next_of_string()
        self._enter()
        if self._step or self._breakpoints:
            return self._run_in_steps()
        return self._run_once()

    def _run_once(self) -> Exit | None:
        if self._in_pending and self._run.kvm_dirty_regs:
            self._finish_io()
        self._in_pending = self._out_pending = False
        self._input.entered()
        try:
            reason = self.vcpu.run()
        except InterruptedError:
            return None
        match reason:
            case ExitReason.IO:
                return self._io()
            case ExitReason.MEMORY_FAULT:
                return self._memory_fault()
            case ExitReason.MMIO:
                # This is INS or OUTS with private memory, which KVM cannot touch. It would go on
                # with zeroes.
                self._ended = _EMULATION_FAILURE
                return self._ended
            case _:
                return exits.Unknown(reason)

    def _run_in_steps(self) -> Exit | None:
        """Run with the trap flag set, so that our handler gets its #DB.

        PVM has no debug exits (KVM_SET_GUEST_DEBUG).
        """
        stepped, self._stepped = self._stepped, False
        if self._in_pending:
            self._finish_io()
            # If the trap flag was set at the exit, a #DB is pending now; setting registers drops
            # it. Else there is none.
            self._put_regs(bytes(self._shared_regs))
            # INS may have faulted, and then this was no step.
            stepped = _place(_REGS.unpack(self._shared_regs)) != _place(self._regs_at_io)
        if stepped and self._step:
            return exits.Debug(exits.SINGLE_STEP, self.get_regs().rip, exits.DR6_BS)
        while True:
            regs = self.get_regs()
            if regs.rip in self._breakpoints:
                return exits.Debug(exits.BREAKPOINT, regs.rip)
            regs.rflags |= _TRAP_FLAG
            self._put_regs(bytes(regs))
            self._trapped = True
            exit_ = self._run_once()
            regs = self.get_regs()
            regs.rflags &= ~_TRAP_FLAG
            self._put_regs(bytes(regs))
            if not isinstance(exit_, exits.Debug) or self._step:
                # KVM emulates OUT, and forgets the trap flag meanwhile.
                self._stepped = isinstance(exit_, exits.Hypercall | exits.PortOut)
                return exit_

    def _io(self) -> Exit | None:
        regs = _REGS.unpack(self._shared_regs)
        rip = regs[_RIP]
        vector = guest_system.vector_at(rip)
        if vector is not None:
            return self._exception(vector, regs)
        io = self._run.exit.io
        direction, port, size, count = io.direction, io.port, io.size, io.count
        self._out_pending, self._in_pending, self._regs_at_io = (
            direction == _IO_OUT,
            direction != _IO_OUT,
            regs,
        )
        if rip in _HYPERCALL_OUT and (direction, port, size, count) == (
            _IO_OUT,
            guest_system.HYPERCALL_PORT,
            1,
            1,
        ):
            self._asked = exits.Hypercall(
                regs[_RAX], (regs[_RDI], regs[_RSI], regs[_RDX], regs[_R10])
            )
            return self._asked
        data = self.vcpu.io_data()
        wanted = range(0, size * count, size)
        if direction != _IO_OUT:
            wanted = self._input.ask(_place(regs), regs[_RFLAGS], data, size)
            if not wanted:
                return self._run_once()
        for at in wanted:
            one = data[at : at + size]
            if direction == _IO_OUT:
                self._strings.append(
                    (exits.PortOut(port, size, int.from_bytes(one, "little")), one)
                )
            else:
                self._strings.append((exits.PortIn(port, size), one))
        return self._next_of_string()

    def _next_of_string(self) -> Exit:
        exit_, data = self._strings.popleft()
        if isinstance(exit_, exits.PortIn):
            self._asked, self._answer_to = exit_, data
        return exit_

    def _memory_fault(self) -> Exit:
        fault = self._run.exit.memory_fault
        self._input.faulted(_place(_REGS.unpack(self._shared_regs)))
        gpa = self._find(fault.gpa)
        assert gpa is not None
        return exits.MemoryFault(self._flags_of(gpa), gpa, fault.size, self.vcpu.run_errno)

    # Exceptions.

    def _exception(self, vector: int, regs: tuple[int, ...]) -> Exit | None:
        """Put the vCPU back to where the exception happened; return the exit for its owner."""
        # rip, cs, rflags, rsp and ss, after the error code if there is one.
        *code, rip, _, rflags, rsp, _ = self._system.read_stack(self._number, regs[_RSP])
        sregs = self.vcpu.get_sregs()
        address = sregs.cr2
        guest_system.enter_user_mode(sregs)
        self.vcpu.set_sregs(sregs)
        back = list(regs)
        back[_RIP], back[_RFLAGS], back[_RSP] = rip, rflags, rsp
        self._put_regs(_REGS.pack(*back))
        self._input.faulted(_place(back))
        if vector == _DEBUG and self._trapped:
            self._trapped = False
            return (
                exits.Debug(exits.SINGLE_STEP, rip, exits.DR6_BS)
                if self._step or self._breakpoints
                else None
            )
        if vector == _PAGE_FAULT and code:
            if address == guest_system.SYSCALL_TARGET:
                vector = _INVALID_OPCODE
            elif address < 1 << GPA_BITS:
                return self._page_fault(address, code[0])
        self._ended = exits.Shutdown(vector)
        return self._ended

    def _page_fault(self, address: int, code: int) -> Exit | None:
        """Say which page cannot be had and why; None if it can be had by now."""
        entry = self._system.tables.entry(address)
        if entry & PRESENT:
            if not (
                (code & _PF_WRITE and not entry & WRITABLE)
                or (code & _PF_FETCH and entry & NO_EXECUTE)
            ):
                return None
            errno = EACCES
        else:
            errno = EFAULT
        page = address & ~PAGE_MASK
        return exits.MemoryFault(self._flags_of(page), page, PAGE_SIZE, errno)


def _place(regs: Sequence[int]) -> Place:
    return regs[_RIP], regs[_RCX], regs[_RDI]


def _run_to_exit(vcpu: VcpuFd) -> int:
    while True:
        with suppress(InterruptedError):
            return vcpu.run()
