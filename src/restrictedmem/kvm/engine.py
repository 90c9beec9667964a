"""What runs guest code: the seam between a VM and its engine, of which there are two (``software``, ``kernel``).

A VM keeps slots and attributes (``vm_memory``) and knows when vCPUs enter and leave the guest
(``vcpu``). An engine knows where private memory lies, maps it into the guest as slots and
attributes say, and runs one instruction after the other.
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

        ``take`` gets what came of it, descriptors included, and returns what the engine makes of
        it, which hears of nothing before.

        Raises:
            OSError: EINVAL for a token of no restricted descriptor; what ``take`` raises, and then
                nothing is registered.
        """
        ...

    def bind_again(self, binding: int, window: PageRange, take: Callable[[int], _T]) -> _T:
        """Register a further notifier on a file, of which this process has a binding; ``take`` gets the number of the new one.

        Raises:
            OSError: as ``bind``.
        """
        ...

    def unbind(self, number: int) -> None:
        """Unregister it; the file may go."""
        ...


class VcpuEngine(Protocol):
    """Guest code on one vCPU. All but ``kick`` are called by the vCPU's thread, or while it is outside the guest and kept there."""

    def set_regs(self, regs: kvm_regs) -> None:
        """Set where the guest starts (rip, rsp, rdi, rsi); all other registers are what they are at reset."""
        ...

    def get_regs(self) -> kvm_regs:
        """Return the general registers. This and the next three only for a debug policy.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot; so the next three.
        """
        ...

    def change_regs(self, regs: kvm_regs) -> None:
        """Set the general registers of a guest that may have run, and no others."""
        ...

    def get_sregs(self) -> kvm_sregs:
        """Return selectors, the bases of FS and GS, and control registers, if no more."""
        ...

    def set_guest_debug(self, *, step: bool, breakpoints: frozenset[int]) -> None:
        """Stop (``exits.Debug``) after each instruction, or before those at the addresses; the guest sees no other code for it.

        A hypercall, port or MMIO instruction first exits as ever, and is a step once it was
        completed.

        Raises:
            OSError: EOPNOTSUPP; ENOSPC for more breakpoints than the engine has.
        """
        ...

    def complete(self, value: int) -> None:
        """Give the value that the last exit asked for; ignored when it asked for none."""
        ...

    def settle(self) -> None:
        """Wait, outside the guest, until whatever made ``run`` return None is over, or until ``kick``."""
        ...

    def run(self) -> Exit | None:
        """Run guest code until it exits; None when it was kicked, or ``settle`` has to be called."""
        ...

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Forget cached translations and translated code of a range of guest pages."""
        ...

    def kick(self) -> None:
        """Make ``run`` or ``settle`` return soon; called by any thread, with no lasting effect outside them."""
        ...

    def prefault(self, start: gfn_t, end: gfn_t) -> int:
        """Map pages from ``start`` on as a read would, and return how many were done: at least one. The vCPU is outside the guest.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot; ENOENT where no slot is; EFAULT where the
                slot lacks the half; EHWPOISON; ENOSPC, ENOMEM.
        """
        ...


class Engine(Protocol):
    """One VM's memory and vCPUs. ``add_slot``, ``remove_slot`` and ``set_attributes`` are called by the VM's thread."""

    @property
    def name(self) -> str:
        """What ``--engine`` calls it."""
        ...

    @property
    def hypercall_code(self) -> bytes:
        """What the guest finds on the hypercall page; zeroes follow."""
        ...

    @property
    def report_page(self) -> memoryview:
        """What the guest finds at ``guest_abi.REPORT_PAGE``, to read and write: one page of this process, of all vCPUs."""
        ...

    def bind(self, token: bytes, window: PageRange) -> PrivateHalf:
        """Make the private half of a slot that shows ``window`` of a restricted file; its ``close`` unbinds it.

        Raises:
            OSError: EINVAL as ``Binder.bind``; ENOMEM.
        """
        ...

    def bind_again(self, ino: int, window: PageRange) -> PrivateHalf:
        """Make the private half of a further slot, of the file with an inode number.

        Raises:
            OSError: ESTALE when no slot shows the file; else as ``bind``.
        """
        ...

    def add_slot(self, slot: Memslot) -> None:
        """Let the guest reach a slot. No vCPU is in the guest."""
        ...

    def remove_slot(self, slot: Memslot) -> None:
        """Forget a slot and whatever was cached of it. No vCPU is in the guest."""
        ...

    def destroy(self) -> None:
        """Unbind what outlives the slots, which are gone. No vCPU enters the guest any more."""
        ...

    def set_attributes(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Write a range of ``slot.attributes`` and return when no vCPU reaches the other half of it any more. vCPUs may be running.

        Raises:
            OSError: ENOMEM, and nothing was changed; after any other exception anything may have
                been.
        """
        ...

    def invalidate_start(self, binding: int, span: PageRange, order: int | None) -> None:
        """Return when no page of a range of a bound file is used any more; unknown bindings are ignored.

        ``order`` is that of the folio the range lies in, where the file's design tells it. Called
        by the notify thread, as the next three.
        """
        ...

    def invalidate_end(self, binding: int, span: PageRange, order: int | None) -> None:
        """Let faults on the range work again."""
        ...

    def error(self, binding: int, span: PageRange) -> None:
        """Give pages of a bound file up until they are punched: the machine has lost them. Ignored by an engine that cannot."""
        ...

    def page_count(self, binding: int, span: PageRange) -> int:
        """Return how many pages of a range of a bound file are taken and were not let go of since."""
        ...

    def launch_update(self, slot: Memslot, gpa: int, data: bytes) -> None:
        """Write whole pages of content into the private half of a slot. No vCPU has run yet.

        Raises:
            OSError: ENOSPC, ENOMEM, EFAULT as the platform has it; nothing was written then, for it
                will not be measured.
        """
        ...

    def read_private(self, slot: Memslot, gpa: int, size: int) -> bytes:
        """Return content of the private half of a slot, for a debug policy; pages that are missing read as zero and stay missing.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot.
        """
        ...

    def write_private(self, slot: Memslot, gpa: int, data: bytes) -> None:
        """Change content of the private half of a slot, for a debug policy. No vCPU is in the guest.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot; ENOSPC, ENOMEM.
        """
        ...

    def inject_failure(self, slot: Memslot, gfn: gfn_t) -> None:
        """Act as if the machine had lost the page of the private half that a slot shows there, until it is punched.

        Raises:
            OSError: EOPNOTSUPP when the engine cannot.
        """
        ...

    def check_extension(self, cap: int) -> int:
        """Answer KVM_CHECK_EXTENSION for what depends on the engine; 0 for what it does not know."""
        ...

    def create_vcpu(self, number: int) -> VcpuEngine:
        """Make a vCPU, which reaches all slots there are, or return one that was made in vain: numbers are used in turn.

        Raises:
            OSError: what the machine lacks, ENOMEM for one.
        """
        ...

    def statistics(self) -> dict[str, object]:
        """Return counts since the start, those that this engine can know."""
        ...

    def platform_report(self) -> dict[str, object]:
        """Return what the platform under the engine reports (``Platform.report``); nothing when there is none."""
        ...
