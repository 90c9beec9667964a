"""The interface between a VM and its engine, which runs guest code (``software``, ``kernel``).

A VM keeps slots and attributes (``vm_memory``), and knows when vCPUs enter and leave the guest
(``engine_vcpu``). An engine knows where private memory lies. It maps memory into the guest as slots
and attributes say, and runs one instruction after the other.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.abi.kvm_x86 import kvm_sregs
from restrictedmem.consumer import Bound
from restrictedmem.kvm.memslot import Memslot, PrivateHalf
from restrictedmem.protocol.exits import Exit
from restrictedmem.units import PageRange, gfn_t

_T = TypeVar("_T")


class Binder(Protocol):
    """Registers and unregisters this process's notifiers with the service (BIND, UNBIND)."""

    def bind(self, token: bytes, window: PageRange, take: Callable[[Bound], _T]) -> _T:
        """Register a notifier on a range of the file whose holder presented ``token``.

        ``take`` gets the result of the registration, descriptors included. It returns what the
        engine makes of it. The notifier is called only after ``take`` has returned.

        Raises:
            OSError: EINVAL for a token that was presented on no restricted descriptor; an error of
                ``take``, and then nothing is registered.
        """
        ...

    def bind_again(self, binding: int, window: PageRange, take: Callable[[int], _T]) -> _T:
        """Register another notifier on a file of which this process has a binding.

        ``take`` gets the number of the new binding.

        Raises:
            OSError: as ``bind``.
        """
        ...

    def unbind(self, number: int) -> None:
        """Unregister a notifier; the file may go away after that."""
        ...


class VcpuEngine(Protocol):
    """One vCPU that runs guest code.

    The vCPU's thread calls these methods. Another thread may call them while it keeps the vCPU
    outside the guest. Any thread may call ``kick`` at any time.
    """

    def set_regs(self, regs: kvm_regs) -> None:
        """Set where the guest starts (rip, rsp, rdi, rsi).

        All other registers have their values at reset.
        """
        ...

    def get_regs(self) -> kvm_regs:
        """Return the general registers.

        Only a debug policy allows this call and the next three.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot; the next three raise the same.
        """
        ...

    def change_regs(self, regs: kvm_regs) -> None:
        """Set all general registers of a guest that may have run, and no other registers."""
        ...

    def get_sregs(self) -> kvm_sregs:
        """Return at least the selectors, the bases of FS and GS, and the control registers."""
        ...

    def set_guest_debug(self, *, step: bool, breakpoints: frozenset[int]) -> None:
        """Stop (``exits.Debug``) after each instruction, or before those at the breakpoints.

        The guest's code looks unchanged to the guest. A hypercall, port or MMIO instruction first
        exits as usual, and is a step once it was completed.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot; ENOSPC for more breakpoints than the engine
                has.
        """
        ...

    def complete(self, value: int) -> None:
        """Pass on the value that the last exit asked for, if it asked for one."""
        ...

    def settle(self) -> None:
        """Wait outside the guest until the cause for which ``run`` returned None is over.

        ``kick`` ends the wait, too.
        """
        ...

    def run(self) -> Exit | None:
        """Run guest code until it exits; return None if kicked or if ``settle`` is needed."""
        ...

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Drop cached translations and translated code of a range of guest pages."""
        ...

    def kick(self) -> None:
        """Make ``run`` or ``settle`` return soon; outside of these, have no lasting effect.

        Any thread may call it.
        """
        ...

    def prefault(self, start: gfn_t, end: gfn_t) -> int:
        """Map pages from ``start`` on as a read would, and return how many.

        0 means that the caller has to call ``settle`` and to try again.

        Preconditions: the vCPU is outside the guest.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot; ENOENT where there is no slot; EFAULT where
                the slot lacks the half; EHWPOISON; ENOSPC, ENOMEM.
        """
        ...


class Engine(Protocol):
    """The memory and the vCPUs of one VM.

    The VM's thread calls ``add_slot``, ``remove_slot`` and ``set_attributes``.
    """

    @property
    def name(self) -> str:
        """The name that ``--engine`` has for the engine."""
        ...

    @property
    def hypercall_code(self) -> bytes:
        """The code that is on the hypercall page; zeroes follow."""
        ...

    @property
    def report_page(self) -> memoryview:
        """The page that the guest can read and write at ``guest_abi.REPORT_PAGE``.

        It is memory of this process, and the same for all vCPUs.
        """
        ...

    def bind(self, token: bytes, window: PageRange) -> PrivateHalf:
        """Make the private half of a slot that shows ``window`` of a restricted file.

        Closing the half unbinds it.

        Raises:
            OSError: EINVAL as ``Binder.bind``; ENOMEM.
        """
        ...

    def bind_again(self, ino: int, window: PageRange) -> PrivateHalf:
        """Make the private half of another slot, of the file with an inode number.

        Raises:
            OSError: ESTALE when no slot shows the file; else as ``bind``.
        """
        ...

    def add_slot(self, slot: Memslot) -> None:
        """Let the guest reach a slot.

        Preconditions: no vCPU is in the guest.
        """
        ...

    def remove_slot(self, slot: Memslot) -> None:
        """Forget a slot and everything that was cached of it.

        Preconditions: no vCPU is in the guest.
        """
        ...

    def destroy(self) -> None:
        """Unbind what outlives the slots.

        Preconditions: the slots are gone, and no vCPU enters the guest any more.
        """
        ...

    def set_attributes(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Write a range of ``slot.attributes``; return when no vCPU reaches the other half.

        vCPUs may be running.

        Raises:
            OSError: ENOMEM, and nothing was changed. After any other exception the range may have
                been changed in part.
        """
        ...

    def invalidate_start(self, binding: int, span: PageRange, order: int | None) -> None:
        """Return when no page of a range of a bound file is in use any more.

        ``order`` is that of the folio in which the range lies, if the file's design tells it. The
        notify thread calls this method and the next three. The next three do nothing for an
        unknown binding.
        """
        ...

    def invalidate_end(self, binding: int, span: PageRange, order: int | None) -> None:
        """Let faults on the range work again."""
        ...

    def error(self, binding: int, span: PageRange) -> None:
        """Give up pages of a bound file until they are punched: the machine has lost them.

        An engine that cannot do this ignores the call.
        """
        ...

    def page_count(self, binding: int, span: PageRange) -> int:
        """Return how many pages of a bound file's range are taken and not given up since."""
        ...

    def launch_update(self, slot: Memslot, gpa: int, data: bytes) -> None:
        """Write whole pages of content into the private half of a slot.

        Preconditions: no vCPU has run yet.

        Raises:
            OSError: ENOSPC, ENOMEM, EFAULT as the platform has it. Nothing was written then,
                because the content of a failed call will not be measured.
        """
        ...

    def read_private(self, slot: Memslot, gpa: int, size: int) -> bytes:
        """Return content of the private half of a slot, for a debug policy.

        Missing pages read as zero and stay missing.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot.
        """
        ...

    def write_private(self, slot: Memslot, gpa: int, data: bytes) -> None:
        """Change content of the private half of a slot, for a debug policy.

        Preconditions: no vCPU is in the guest.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot; ENOSPC, ENOMEM.
        """
        ...

    def inject_failure(self, slot: Memslot, gfn: gfn_t) -> None:
        """Act as if the machine had lost the page of a slot's private half at ``gfn``.

        The page stays lost until it is punched.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot.
        """
        ...

    def check_extension(self, cap: int) -> int:
        """Answer KVM_CHECK_EXTENSION for what depends on the engine; 0 for anything else."""
        ...

    def create_vcpu(self, number: int) -> VcpuEngine:
        """Make a vCPU that reaches all present slots.

        The VM uses numbers in turn. If the last vCPU was made in vain, return it again.

        Raises:
            OSError: the errno for what the machine lacks, for example ENOMEM.
        """
        ...

    def statistics(self) -> dict[str, object]:
        """Return counts since the start, as far as this engine knows them."""
        ...

    def platform_report(self) -> dict[str, object]:
        """Return the platform's report (``Platform.report``), which is empty without one."""
        ...
