"""The memory of one VM: its slots and the attributes of its pages.

Slots are made from the owner's requests and the service's bindings.
"""

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from errno import EEXIST, EFAULT, EINVAL, ENOMEM, EOPNOTSUPP
from typing import Final, final

from restrictedmem.abi import kvm, process
from restrictedmem.abi.stat import Identity
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine import Engine
from restrictedmem.kvm.half import SharedFile, SharedFiles, SharedHalf, identity_of
from restrictedmem.kvm.lpage import Level
from restrictedmem.kvm.memslot import ALL, EXEC, READ, WRITE, MemfdHalf, Memslot, PrivateHalf
from restrictedmem.kvm.memslots import Memslots
from restrictedmem.kvm.whole import begun, whole
from restrictedmem.mm.notifier import Api
from restrictedmem.protocol.guest_abi import GPA_BITS, HYPERCALL_PAGE, REPORT_PAGE
from restrictedmem.protocol.vm_wire import NO_NAMES, SlotFiles
from restrictedmem.service import wire
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, U64_MAX, PageRange, gfn_t

#: KVM_CAP_NR_MEMSLOTS of a stock x86 kernel, which leaves out KVM's own slots.
MAX_SLOTS: Final = 32764
#: KVM_MEM_MAX_NR_PAGES.
MAX_PAGES: Final = (1 << 31) - 1
#: Pages of all slots together, 256 GiB. An engine has up to three bytes for each page, whether or
#: not there is memory behind it.
MAX_ALL_PAGES: Final = 1 << 26
#: Least seconds from one report for ``ps`` to the next. Without a limit, each of thousands of slots
#: would wait for the service.
_REPORT_INTERVAL: Final = 0.05


@final
class VmMemory:
    """Slots and attributes of one VM, which only the VM's thread changes."""

    def __init__(
        self,
        engine: Engine,
        service: Channel,
        api: Api,
        attributes: Attributes,
        seal: Callable[[int], None],
    ) -> None:
        """Make a VM without slots; ``seal`` is that of ``SharedFiles``."""
        self.slots = Memslots()
        self._npages = 0
        self._shared_files = SharedFiles(seal)
        #: Of the private halves, for ``statistics``: their bytes, and how many are locked; and the
        #: number of halves that are not locked, by the reason.
        self._private_bytes = self._locked_bytes = 0
        self._unlocked: Counter[str] = Counter()
        self.api = api
        self._engine = engine
        self._service = service
        self._attributes = attributes
        #: Whether ``ps`` has to hear of something, and when it may (``time.monotonic``).
        self._unreported = False
        self._next_report = 0.0

    # Slots.

    def set_region(
        self,
        region: kvm.kvm_userspace_memory_region_ext,
        token: bytes,
        shared_fd: OwnedFd | None,
        names: SlotFiles = NO_NAMES,
    ) -> None:
        """Create, move or delete a slot (KVM_SET_USER_MEMORY_REGION).

        ``names`` replace the token or the descriptor, for files that slots show already. A slot
        with a private half can only be deleted, as v9 and v10 meant it. The postings let such a
        slot lose its flag, and with it its notifier.

        Preconditions: no vCPU is in the guest.

        Raises:
            OSError: EINVAL and EEXIST as v9, v10 and KVM have them (conformance/cases/slots.py
                asks the kernel); EINVAL for a descriptor that is not restricted, a deletion of
                nothing, dirty logging, and every change but a move; ESTALE for the name of a file
                that no slot shows, and then the token is as it was; ENOMEM for more pages than
                ``MAX_ALL_PAGES``.
        """
        _check(region)
        old = self.slots.get(region.slot)
        if not region.memory_size:
            if old is None:
                raise OSError(EINVAL, f"no slot {region.slot}")
            self._replace(old, None)
            with whole():
                old.close()
            if old.private is not None:
                self._changed()
        elif old is None:
            self._check_overlap(region, None)
            if self._npages + (region.memory_size >> PAGE_SHIFT) > MAX_ALL_PAGES:
                raise OSError(
                    ENOMEM, f"the slots of a VM have {MAX_ALL_PAGES} pages at most, all together"
                )
            new = self._create(region, token, shared_fd, names)
            self._replace(None, new)
            if new.private is not None:
                self._changed()
        else:
            _check_move(
                old, region, names.shared if shared_fd is None else identity_of(shared_fd.fileno())
            )
            gfn = gfn_t(region.guest_phys_addr >> PAGE_SHIFT)
            if gfn != old.base_gfn:
                self._check_overlap(region, old)
                moved = Memslot(
                    old.number,
                    gfn,
                    old.end_gfn - old.base_gfn,
                    private=None,
                    shared=old.shared,
                    rights=old.rights,
                )
                self._replace(old, moved)

    def clear(self) -> None:
        """Delete every slot, as the end of a VM does.

        Preconditions: no vCPU is in the guest.
        """
        for slot in self.slots:
            self._replace(slot, None)
            slot.close()
        self._report()

    def _create(
        self,
        region: kvm.kvm_userspace_memory_region_ext,
        token: bytes,
        shared_fd: OwnedFd | None,
        names: SlotFiles,
    ) -> Memslot:
        """Make a slot; register with the service for its private half."""
        private = shared = None
        end = region.userspace_addr + region.memory_size
        # This may fail, so it comes before the token is used up.
        file = (
            None
            if shared_fd is not None or names.shared is None
            else self._shared_files.of_name(names.shared, end)
        )
        if region.flags & kvm.KVM_MEM_PRIVATE:
            window = PageRange.of_bytes(region.restricted_offset, region.memory_size)
            private = (
                self._engine.bind_again(names.restricted, window)
                if names.restricted
                else self._engine.bind(token, window)
            )
        try:
            in_place = isinstance(private, MemfdHalf) and private.in_place
            if shared_fd is not None:
                file = (
                    self._shared_files.of_guest_memfd(shared_fd.fileno())
                    if in_place
                    else self._shared_files.of_fd(shared_fd.fileno(), end)
                )
            if private is not None and in_place:
                _check_in_place(region, private, file)
                if self.slots.shows(private.ino, private.window):
                    raise OSError(EEXIST, "another slot shows some of these pages of the file")
            if file is not None:
                shared = SharedHalf(file, region.userspace_addr, region.memory_size)
            rights = READ | EXEC if region.flags & kvm.KVM_MEM_READONLY else ALL
            start, npages = (
                gfn_t(region.guest_phys_addr >> PAGE_SHIFT),
                region.memory_size >> PAGE_SHIFT,
            )
            return Memslot(
                region.slot, start, npages, private=private, shared=shared, rights=rights
            )
        except BaseException:
            if private is not None:
                private.close()
            if shared is not None:
                shared.close()
            raise

    def _replace(self, old: Memslot | None, new: Memslot | None) -> None:
        """Take a slot away and put another in its place, or leave things as they were.

        A slot that only the engine has, and not this list, would be in no measurement, and nobody
        would own it.
        """
        with whole():
            if old is not None:
                self._engine.remove_slot(old)
            if new is not None:
                try:
                    self._add(new)
                except OSError:
                    with begun():
                        if old is not None:
                            self._engine.add_slot(old)
                        else:
                            new.close()
                    raise
            if old is not None:
                self.slots.remove(old)
                self._npages -= len(old.attributes)
                if old.private is not None:
                    self._account(old.private, -1)
            if new is not None:
                self.slots.add(new)
                self._npages += len(new.attributes)
                if new.private is not None:
                    self._account(new.private, 1)

    def _add(self, new: Memslot) -> None:
        for start, end in (
            self._attributes.private_runs(new.base_gfn, new.end_gfn)
            if self._heeds_attributes(new)
            else ()
        ):
            new.attributes[start - new.base_gfn : end - new.base_gfn] = b"\1" * (end - start)
            new.lpage.update(start, end)
        self._engine.add_slot(new)
        if new.in_place:
            # From now on the slot hears of conversions. Those before this call count, too.
            half = new.memfd_half
            pages = wire.BOUND_PAGES.pack(half.binding, half.window.start, half.window.end)
            try:
                self._service.call(wire.ATTRIBUTES, pages)
            except OSError:
                self._engine.remove_slot(new)
                raise

    def _check_overlap(
        self, region: kvm.kvm_userspace_memory_region_ext, itself: Memslot | None
    ) -> None:
        start, end = (
            region.guest_phys_addr >> PAGE_SHIFT,
            (region.guest_phys_addr + region.memory_size) >> PAGE_SHIFT,
        )
        engines_own = start < (REPORT_PAGE >> PAGE_SHIFT) + 1 and end > HYPERCALL_PAGE >> PAGE_SHIFT
        if engines_own or any(slot is not itself for slot in self.slots.overlapping(start, end)):
            raise OSError(EEXIST, "guest addresses overlap another slot")

    def slot_of(self, gfn: int) -> Memslot | None:
        """Return the slot that shows a guest page."""
        return self.slots.at(gfn)

    # Attributes.

    def supported_attributes(self) -> int:
        """Return the attributes that can be set (KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES).

        Raises:
            OSError: EOPNOTSUPP for v9, which had no such call.
        """
        if self.api is not Api.V10:
            raise OSError(EOPNOTSUPP, f"this VM follows {self.api.value}")
        return kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE

    def set_attributes(self, api: Api, address: int, size: int, attributes: int, flags: int) -> int:
        """Make a range private or shared, with or without slots in it.

        Return how many bytes were done, from the start: all, or up to the slot where an engine
        failed. From then on, no vCPU can reach the other half of these bytes.

        Raises:
            OSError: EINVAL for an unaligned, empty or wrapping range, and for an unknown attribute
                or flag; EOPNOTSUPP for the other posting's call; the errno of the engine, or
                ENOMEM, when nothing was done (v10 returned 0 then, which its authors corrected
                later), and in v9 also when a part was done.
        """
        if api is not self.api:
            raise OSError(EOPNOTSUPP, f"this VM follows {self.api.value}")
        if (
            flags
            or attributes & ~kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
            or not size
            or (address | size) & PAGE_MASK
            or address + size > U64_MAX
        ):
            raise OSError(
                EINVAL, "range is empty, unaligned or wraps, or an attribute or flag is unknown"
            )
        start, end, private = (
            gfn_t(address >> PAGE_SHIFT),
            gfn_t((address + size) >> PAGE_SHIFT),
            bool(attributes),
        )
        if any(slot.in_place for slot in self.slots.overlapping(start, end)):
            raise OSError(EINVAL, "pages of a guest_memfd are converted on the file")
        done = start
        try:
            for slot in self.slots.overlapping(start, end):
                first, last = slot.clip(start, end)
                if self._heeds_attributes(slot):
                    self._set_attributes(done, first, private=private)
                    done = first
                    change = self._attributes.prepare(first, last, private=private)
                    self._engine.set_attributes(slot, first, last, private=private)
                    with begun():
                        slot.lpage.update(first, last)
                        self._attributes.apply(change)
                    done = last
            self._set_attributes(done, end, private=private)
        except OSError:
            if done == start or api is Api.V9:
                raise
            return (done - start) << PAGE_SHIFT
        return size

    def _heeds_attributes(self, slot: Memslot) -> bool:
        # v9 compared attributes with the access only where the slot could be private; v10 always.
        return not slot.in_place and (self.api is Api.V10 or slot.private is not None)

    def _set_attributes(self, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        if start < end:
            self._attributes.set(start, end, private=private)

    def inject_failure(self, gpa: int) -> None:
        """Act as if the machine had lost a private page, until it is punched; for tests.

        Raises:
            OSError: EINVAL for an unaligned address; EFAULT where there is no private half;
                EOPNOTSUPP when the engine cannot.
        """
        slot = self.slot_of(gpa >> PAGE_SHIFT)
        if gpa & PAGE_MASK:
            raise OSError(EINVAL, "inject_failure: not a page's address")
        if slot is None or slot.private is None:
            raise OSError(EFAULT, "inject_failure: not inside a private slot")
        self._engine.inject_failure(slot, gfn_t(gpa >> PAGE_SHIFT))

    # Launch and statistics.

    def launch_update(self, gpa: int, data: bytes) -> None:
        """Put whole pages of initial content into private memory.

        Raises:
            OSError: EINVAL for part of a page; EFAULT where the range is not private pages of one
                slot; ENOSPC, ENOMEM when there are no pages for it.
        """
        if not data or (gpa | len(data)) & PAGE_MASK:
            raise OSError(EINVAL, "launch_update: not whole pages")
        slot = self.slot_of(gpa >> PAGE_SHIFT)
        if slot is None or slot.private is None or gpa + len(data) > slot.end_gfn << PAGE_SHIFT:
            raise OSError(EFAULT, "launch_update: not inside a private slot")
        start, end = gpa >> PAGE_SHIFT, (gpa + len(data)) >> PAGE_SHIFT
        if slot.attributes.count(0, start - slot.base_gfn, end - slot.base_gfn):
            raise OSError(EFAULT, "launch_update: pages are shared")
        self._engine.launch_update(slot, gpa, data)

    def statistics(self) -> dict[str, object]:
        """Return sizes, how much is locked, and which cgroup pays for it."""
        return {
            **self._locking(),
            "memlock_limit": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            "swap": swap_exists(),
            "cgroup": cgroup(),
            "mixed_2m": sum(slot.lpage.mixed(Level.PMD) for slot in self.slots),
            "mixed_1g": sum(slot.lpage.mixed(Level.PUD) for slot in self.slots),
        }

    def _account(self, half: PrivateHalf, sign: int) -> None:
        self._private_bytes += sign * (len(half.window) << PAGE_SHIFT)
        self._locked_bytes += sign * half.locked
        if half.unlocked_because:
            self._unlocked[half.unlocked_because] += sign

    def _locking(self) -> dict[str, object]:
        reason = next((reason for reason, count in self._unlocked.items() if count), "")
        return {
            "pid": os.getpid(),
            "private_bytes": self._private_bytes,
            "locked_bytes": self._locked_bytes,
            "unlocked_because": reason,
        }

    # For ``ps``, which asks the service and not this process.

    def _changed(self) -> None:
        self._unreported = True
        self.report_if_due()

    def report_due_in(self) -> float | None:
        """Return the seconds until ``report_if_due`` has something to do; None for never."""
        return max(0.0, self._next_report - time.monotonic()) if self._unreported else None

    def report_if_due(self) -> None:
        """Tell the service what changed since the last report, if that is long enough ago."""
        if self._unreported and time.monotonic() >= self._next_report:
            self._report()

    def _report(self) -> None:
        # No call fails because of this: the slot is there, or gone.
        with suppress(OSError):
            self._service.call(wire.REPORT, json.dumps(self._locking()).encode())
        self._unreported = False
        self._next_report = time.monotonic() + _REPORT_INTERVAL


def _check(region: kvm.kvm_userspace_memory_region_ext) -> None:
    """Check what does not depend on other slots; for a deletion, too."""
    gpa, size = region.guest_phys_addr, region.memory_size
    if region.flags & ~(kvm.KVM_MEM_PRIVATE | kvm.KVM_MEM_READONLY):
        raise OSError(EINVAL, f"flags {region.flags:#x}")
    if (gpa | size | region.userspace_addr) & PAGE_MASK or size >> PAGE_SHIFT > MAX_PAGES:
        raise OSError(EINVAL, "address or size is not page aligned, or the slot is too large")
    if region.slot >= MAX_SLOTS or gpa + size > 1 << GPA_BITS:
        raise OSError(EINVAL, "slot number or guest address is out of range")
    if region.flags & kvm.KVM_MEM_PRIVATE and (
        region.restricted_offset & PAGE_MASK or region.restricted_offset > U64_MAX - size
    ):
        raise OSError(EINVAL, "restricted_offset is not page aligned, or wraps")


def _check_in_place(
    region: kvm.kvm_userspace_memory_region_ext, private: PrivateHalf, file: SharedFile | None
) -> None:
    """Check that both halves are the same part of the same guest_memfd, and can be written."""
    if (
        file is None
        or file.identity[1] != private.ino
        or region.userspace_addr != region.restricted_offset
        or region.flags & kvm.KVM_MEM_READONLY
    ):
        raise OSError(EINVAL, "a guest_memfd serves both halves of a slot, which is not read-only")


def _check_move(
    old: Memslot, region: kvm.kvm_userspace_memory_region_ext, shown: Identity | None
) -> None:
    """Check that a request changes nothing of a slot but its guest address.

    ``shown`` is the memfd that the request names.
    """
    if old.private is not None or region.flags & kvm.KVM_MEM_PRIVATE:
        raise OSError(EINVAL, f"slot {old.number} has a private half: it can only be deleted")
    readonly = bool(region.flags & kvm.KVM_MEM_READONLY)
    if region.memory_size >> PAGE_SHIFT != old.end_gfn - old.base_gfn or readonly is bool(
        old.rights & WRITE
    ):
        raise OSError(EINVAL, f"slot {old.number} has another size, or READONLY differs")
    source = None if shown is None else (shown, region.userspace_addr)
    if source != (old.shared and (old.shared.file.identity, old.shared.offset)):
        raise OSError(EINVAL, f"slot {old.number} shows other memory")


def swap_exists() -> bool:
    """Say whether any swap area is in use (/proc/swaps).

    Only then does it matter whether memory is locked.
    """
    try:
        with open("/proc/swaps", "rb") as swaps:
            return len(swaps.readlines()) > 1
    except OSError:
        return False


def cgroup() -> str:
    """Return the cgroup whose memory controller pays for this process's pages.

    It is in /proc/self/cgroup.
    """
    found = (
        path
        for controllers, path in process.cgroups()
        if b"memory" in controllers.split(b",") or not controllers
    )
    return next(found, b"none").decode(errors="replace")
