"""A vCPU: its registers and exits, and how another thread kicks it out of the guest."""

import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Iterable, Mapping
from errno import EFAULT, EINTR, EINVAL
from typing import Final, final

from restrictedmem.abi import kvm, kvm_x86, process
from restrictedmem.abi import kvm_run as shared
from restrictedmem.abi._ioctl import raw_ioctl
from restrictedmem.abi._syscall import raise_errno
from restrictedmem.devkvm._entries import CpuidEntries, MsrEntries, SignalSet
from restrictedmem.failure import failed
from restrictedmem.fd import OwnedFd

#: The signal that ``VcpuFd.kick`` sends. It is ignored by default, so it does no harm to a thread
#: that does not expect it.
KICK: Final = signal.SIGURG

_RUN: Final = kvm.KVM_RUN.request
_MEMORY_FAULT: Final = int(kvm.ExitReason.MEMORY_FAULT)


@final
class VcpuFd(OwnedFd):
    """The descriptor of KVM_CREATE_VCPU.

    One thread uses it at a time; only ``kick`` is for other threads.
    """

    __slots__ = ("_mapping", "_mmap_size", "_page", "_thread", "run_errno")

    def __init__(self, fd: int, mmap_size: int) -> None:
        super().__init__(fd)
        self._mmap_size = mmap_size
        self._mapping: mmap.mmap | None = None
        self._page: shared.kvm_run | None = None
        self._thread = 0
        #: Cause of the last memory fault: EFAULT, or EHWPOISON for a page that the machine has
        #: lost.
        self.run_errno = 0

    def close(self) -> None:
        """Close the descriptor.

        The mapping goes when nothing refers to ``kvm_run`` and ``io_data`` any more.
        """
        self._page = self._mapping = None
        super().close()

    @property
    def kvm_run(self) -> shared.kvm_run:
        """Return the struct that the vCPU shares with this process.

        It has ``exit_reason``, ``exit``, ``immediate_exit`` and the registers in ``s``.
        """
        return self._page or self._map()

    def _map(self) -> shared.kvm_run:
        self._mapping = mmap.mmap(self.fileno(), self._mmap_size)
        self._page = shared.kvm_run.from_buffer(self._mapping)
        return self._page

    def io_data(self) -> memoryview:
        """Return the bytes of the last KVM_EXIT_IO.

        They are the bytes that the guest has written, or room for those that it reads.
        """
        io = self.kvm_run.exit.io
        assert self._mapping is not None
        return memoryview(self._mapping)[io.data_offset : io.data_offset + io.size * io.count]

    def run(self) -> int:
        """Run the guest until it exits, and return ``KVM_EXIT_*``.

        ``kvm_run.exit`` has the rest. A memory fault is an exit too, although KVM_RUN fails then.
        ``run_errno`` has its errno.

        Raises:
            OSError: EINTR after a signal, a kick or with ``immediate_exit``, and then nothing has
                been lost; EFAULT for a page that the kernel cannot get, without further
                information; EIO in another process than the VM's.
        """
        page = self._page or self._map()
        # If KVM_RUN fails with another errno than EFAULT, it leaves the last exit's reason in
        # place.
        page.exit_reason = 0
        if raw_ioctl(self.fileno(), _RUN, None) < 0:
            self._run_failed(page)
        return page.exit_reason

    def _run_failed(self, page: shared.kvm_run) -> None:
        number = ctypes.get_errno()
        if number in (EFAULT, kvm.EHWPOISON) and page.exit_reason == _MEMORY_FAULT:
            self.run_errno = number
            return
        if number == EINTR and self._thread:
            signal.sigtimedwait((KICK,), 0)
        raise_errno("KVM_RUN", number)

    def accept_kicks(self) -> None:
        """Let ``kick`` reach this thread, which must be the one that calls ``run`` afterwards.

        SIGURG stays blocked in the thread, except while the thread is in KVM_RUN. The other signals
        that are blocked now are the signals that KVM_RUN blocks.
        """
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.set_signal_mask(blocked - {KICK})
        signal.pthread_sigmask(signal.SIG_BLOCK, (KICK,))
        self._thread = threading.get_native_id()

    def kick(self) -> None:
        """Make the current KVM_RUN, or else the next one, return EINTR.

        Any thread may call this. A kick is never lost.

        Raises:
            OSError: EINVAL before ``accept_kicks``, ESRCH when the thread has ended.
        """
        process.tgkill(os.getpid(), self._thread, KICK)

    def set_signal_mask(self, signals: Iterable[int]) -> None:
        """Block these signals, and no others, while the thread is in KVM_RUN."""
        kvm.KVM_SET_SIGNAL_MASK(self, SignalSet.of(signals))

    def get_regs(self) -> kvm.kvm_regs:
        """Return the general registers."""
        regs = kvm.kvm_regs()
        kvm_x86.KVM_GET_REGS(self, regs)
        return regs

    def set_regs(self, regs: kvm.kvm_regs) -> None:
        """Set the general registers."""
        kvm_x86.KVM_SET_REGS(self, regs)

    def get_sregs(self) -> kvm_x86.kvm_sregs:
        """Return the segment, descriptor table and control registers."""
        sregs = kvm_x86.kvm_sregs()
        kvm_x86.KVM_GET_SREGS(self, sregs)
        return sregs

    def set_sregs(self, sregs: kvm_x86.kvm_sregs) -> None:
        """Set the segment, descriptor table and control registers.

        Raises:
            OSError: EINVAL for values that contradict each other, such as EFER.LMA without CR0.PG.
        """
        kvm_x86.KVM_SET_SREGS(self, sregs)

    def get_fpu(self) -> kvm_x86.kvm_fpu:
        """Return the x87 and SSE registers."""
        fpu = kvm_x86.kvm_fpu()
        kvm_x86.KVM_GET_FPU(self, fpu)
        return fpu

    def set_fpu(self, fpu: kvm_x86.kvm_fpu) -> None:
        """Set the x87 and SSE registers."""
        kvm_x86.KVM_SET_FPU(self, fpu)

    def get_xsave(self) -> kvm_x86.kvm_xsave:
        """Return the data that XSAVE would store, as far as it fits 4096 bytes."""
        xsave = kvm_x86.kvm_xsave()
        kvm_x86.KVM_GET_XSAVE(self, xsave)
        return xsave

    def set_xsave(self, xsave: kvm_x86.kvm_xsave) -> None:
        """Set the data that XRSTOR would load.

        Raises:
            OSError: EINVAL for features that the vCPU does not have.
        """
        kvm_x86.KVM_SET_XSAVE(self, xsave)

    def get_xcrs(self) -> kvm_x86.kvm_xcrs:
        """Return the extended control registers."""
        xcrs = kvm_x86.kvm_xcrs()
        kvm_x86.KVM_GET_XCRS(self, xcrs)
        return xcrs

    def set_xcrs(self, xcrs: kvm_x86.kvm_xcrs) -> None:
        """Set the extended control registers.

        Raises:
            OSError: EINVAL for features that the vCPU's CPUID does not have.
        """
        kvm_x86.KVM_SET_XCRS(self, xcrs)

    def get_vcpu_events(self) -> kvm_x86.kvm_vcpu_events:
        """Return the exceptions and interrupts that are pending for the guest."""
        events = kvm_x86.kvm_vcpu_events()
        kvm_x86.KVM_GET_VCPU_EVENTS(self, events)
        return events

    def set_vcpu_events(self, events: kvm_x86.kvm_vcpu_events) -> None:
        """Set the exceptions and interrupts that are pending for the guest."""
        kvm_x86.KVM_SET_VCPU_EVENTS(self, events)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Return model specific registers by their number.

        Raises:
            OSError: EINVAL with the number of a register that cannot be read.
        """
        entries = MsrEntries.of(dict.fromkeys(indices, 0), kvm_x86.KVM_GET_MSRS.name)
        _all_msrs(kvm_x86.KVM_GET_MSRS.name, entries, kvm_x86.KVM_GET_MSRS(self, entries))
        return entries.values()

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Set model specific registers in turn.

        Raises:
            OSError: EINVAL with the number of a register that refuses its value; those before it
                are set.
        """
        entries = MsrEntries.of(values, kvm_x86.KVM_SET_MSRS.name)
        _all_msrs(kvm_x86.KVM_SET_MSRS.name, entries, kvm_x86.KVM_SET_MSRS(self, entries))

    def get_cpuid2(self) -> list[kvm_x86.kvm_cpuid_entry2]:
        """Return the guest's CPUID entries."""
        entries = CpuidEntries.room()
        kvm_x86.KVM_GET_CPUID2(self, entries)
        return entries.listed()

    def set_cpuid2(self, entries: Iterable[kvm_x86.kvm_cpuid_entry2]) -> None:
        """Set the guest's CPUID entries, and so which features its registers may turn on.

        Raises:
            OSError: E2BIG for more than 256 entries, EINVAL for a change after the first run.
        """
        kvm_x86.KVM_SET_CPUID2(self, CpuidEntries.of(entries))

    def get_mp_state(self) -> int:
        """Return ``KVM_MP_STATE_*``."""
        state = kvm_x86.kvm_mp_state()
        kvm_x86.KVM_GET_MP_STATE(self, state)
        return state.mp_state

    def set_mp_state(self, state: int) -> None:
        """Set ``KVM_MP_STATE_*``.

        Raises:
            OSError: EINVAL for a state that needs an interrupt controller.
        """
        kvm_x86.KVM_SET_MP_STATE(self, kvm_x86.kvm_mp_state(mp_state=state))

    def set_guest_debug(self, control: int, debug_registers: Iterable[int] = ()) -> None:
        """Set ``KVM_GUESTDBG_*``, and DR0 to DR7 for hardware breakpoints; 0 ends debugging."""
        debug = kvm_x86.kvm_guest_debug(control=control)
        for number, value in enumerate(debug_registers):
            debug.debugreg[number] = value
        kvm_x86.KVM_SET_GUEST_DEBUG(self, debug)

    def translate(self, linear_address: int) -> int | None:
        """Return the guest physical address of a linear address, None if it is not mapped.

        The address comes from the guest's page tables.
        """
        translation = kvm_x86.kvm_translation(linear_address=linear_address)
        kvm_x86.KVM_TRANSLATE(self, translation)
        return translation.physical_address if translation.valid else None

    def pre_fault_memory(self, gpa: int, size: int) -> int:
        """Map guest physical memory before the guest touches it, and return the bytes left.

        One call may map only a part.

        Raises:
            OSError: EOPNOTSUPP without KVM_CAP_PRE_FAULT_MEMORY, ENOENT where no slot is, EINVAL
                unless aligned, EINTR.
        """
        request = kvm.kvm_pre_fault_memory(gpa=gpa, size=size)
        kvm.KVM_PRE_FAULT_MEMORY(self, request)
        return request.size


def _all_msrs(call: str, entries: MsrEntries, done: int) -> None:
    if done < entries.nmsrs:
        raise failed(call, EINVAL, f"MSR {entries.entries[done].index:#x}")
