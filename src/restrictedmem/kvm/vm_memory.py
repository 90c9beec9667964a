"""The memory of one VM: slots made from the owner's requests and the service's bindings, and the attributes of its pages."""

import json
import os
import resource
from errno import EACCES, EEXIST, EFAULT, EINVAL, ENOMEM, EOPNOTSUPP
from typing import Final, final

from restrictedmem.abi import kvm
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.guest_abi import GPA_BITS, HYPERCALL_PAGE
from restrictedmem.kvm.memslot import ALL, EXEC, READ, Half, Memslot, PrivateHalf, forbid_shrinking
from restrictedmem.kvm.mmu import Mmu
from restrictedmem.mm.notifier import Api
from restrictedmem.service import wire
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PageRange, gfn_t, pgoff_t

#: KVM_CAP_NR_MEMSLOTS less KVM's own, as a stock x86 kernel reports it.
MAX_SLOTS: Final = 32764
#: KVM_MEM_MAX_NR_PAGES.
MAX_PAGES: Final = (1 << 31) - 1
#: Attribute changes remembered for pages that no slot covers yet.
_MAX_CHANGES: Final = 4096
_U64_MAX: Final = (1 << 64) - 1


@final
class VmMemory:
    """Slots, attributes and the fault path of one VM; changed by the VM's thread alone."""

    def __init__(self, service: Channel, api: Api) -> None:
        self.mmu = Mmu()
        self._api = api
        self._service = service
        self._attribute_changes: list[tuple[gfn_t, gfn_t, bool]] = []

    # Slots.

    def create_slot(self, region: kvm.kvm_userspace_memory_region_ext, token: bytes, shared_fd: OwnedFd | None) -> Memslot:
        """Make a slot (KVM_SET_USER_MEMORY_REGION), registering with the service for its private half.

        Raises:
            OSError: EINVAL and EEXIST as v9 and v10 (docs/architecture.md has the rules); EINVAL for a descriptor that is not restricted.
        """
        self._check(region)
        start = gfn_t(region.guest_phys_addr >> PAGE_SHIFT)
        npages = region.memory_size >> PAGE_SHIFT
        private = shared = None
        if region.flags & kvm.KVM_MEM_PRIVATE:
            private = self._bind(token, PageRange.of_bytes(region.restricted_offset, region.memory_size))
        try:
            if shared_fd is not None:
                shared = self._map_shared(shared_fd, region.userspace_addr, region.memory_size)
            rights = READ | EXEC if region.flags & kvm.KVM_MEM_READONLY else ALL
            slot = Memslot(region.slot, start, npages, private=private, shared=shared, rights=rights)
        except BaseException:
            if private is not None:
                self._unbind(private)
            raise
        if private is not None:
            private.half.lock()
            if self._api is Api.V9:
                slot.attributes[:] = bytes([1]) * npages
        for *change, is_private in self._attribute_changes:
            first, last = slot.clip(*change)
            slot.attributes[first - start : last - start] = bytes([is_private]) * (last - first)
        self.mmu.slots = (*self.mmu.slots, slot)
        self._report()
        return slot

    def _check(self, region: kvm.kvm_userspace_memory_region_ext) -> None:
        gpa, size = region.guest_phys_addr, region.memory_size
        if region.flags & ~(kvm.KVM_MEM_PRIVATE | kvm.KVM_MEM_READONLY):
            raise OSError(EINVAL, f"flags {region.flags:#x}")
        if (gpa | size | region.userspace_addr) & PAGE_MASK or size >> PAGE_SHIFT > MAX_PAGES:
            raise OSError(EINVAL, "address or size is not page aligned, or the slot is too large")
        if region.slot >= MAX_SLOTS or gpa + size > 1 << GPA_BITS:
            raise OSError(EINVAL, "slot number or guest address is out of range")
        if region.flags & kvm.KVM_MEM_PRIVATE and (region.restricted_offset & PAGE_MASK or region.restricted_offset > _U64_MAX - size):
            raise OSError(EINVAL, "restricted_offset is not page aligned, or wraps")
        if any(slot.number == region.slot for slot in self.mmu.slots):
            raise OSError(EINVAL, f"slot {region.slot} exists: delete it first")
        start, end = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
        taken = [(slot.base_gfn, slot.end_gfn) for slot in self.mmu.slots]
        hypercall = HYPERCALL_PAGE >> PAGE_SHIFT
        if any(start < last and end > first for first, last in [*taken, (hypercall, hypercall + 1)]):
            raise OSError(EEXIST, "guest addresses overlap another slot")

    def _bind(self, token: bytes, window: PageRange) -> PrivateHalf:
        try:
            body, fds = self._service.call(wire.BIND, token)
        except OSError as error:
            # As fget and file_is_restrictedmem failing: EINVAL for both.
            raise OSError(EINVAL if error.errno == EACCES else error.errno, error.strerror) from None
        number, ino, limit = wire.BINDING.unpack(body)
        return PrivateHalf(number, ino, fds[0], fds[1], window, limit or None)

    def _unbind(self, private: PrivateHalf) -> None:
        self._service.call(wire.UNBIND, private.binding.to_bytes(8, "little"))

    @staticmethod
    def _map_shared(fd: OwnedFd, offset: int, size: int) -> Half:
        forbid_shrinking(fd.fileno())
        if offset + size > os.fstat(fd.fileno()).st_size:
            raise OSError(EINVAL, "the shared half ends past its memfd")
        return Half(fd.fileno(), offset, size)

    def delete_slot(self, number: int) -> Memslot:
        """Take a slot out of the VM; the caller makes every vCPU forget it and then calls ``release``.

        Raises:
            OSError: EINVAL when there is none.
        """
        slot = next((slot for slot in self.mmu.slots if slot.number == number), None)
        if slot is None:
            raise OSError(EINVAL, f"no slot {number}")
        self.mmu.slots = tuple(other for other in self.mmu.slots if other is not slot)
        return slot

    def release(self, slot: Memslot) -> None:
        """Unregister a deleted slot's notifier and unmap its halves."""
        if slot.private is not None:
            self._unbind(slot.private)
        slot.close()
        self._report()

    def slot_of_binding(self, binding: int) -> Memslot | None:
        """Return the slot that a binding belongs to; None while the slot is being made or after it was deleted: it has no entries then."""
        return next((slot for slot in self.mmu.slots if slot.private is not None and slot.private.binding == binding), None)

    # Attributes.

    def set_attributes(self, api: Api, address: int, size: int, attributes: int, flags: int) -> list[tuple[gfn_t, gfn_t]]:
        """Make a range private or shared, slots or none; returns the guest pages that every vCPU must drop.

        Raises:
            OSError: EINVAL for unaligned, empty or wrapping ranges, unknown attributes or flags; EOPNOTSUPP for the other posting's call.
        """
        if api is not self._api:
            raise OSError(EOPNOTSUPP, f"this VM follows {self._api.value}")
        if flags or attributes & ~kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE or not size or (address | size) & PAGE_MASK or address + size > _U64_MAX:
            raise OSError(EINVAL, "range is empty, unaligned or wraps, or an attribute or flag is unknown")
        if len(self._attribute_changes) >= _MAX_CHANGES:
            raise OSError(ENOMEM, "too many attribute changes")
        start, end = gfn_t(address >> PAGE_SHIFT), gfn_t((address + size) >> PAGE_SHIFT)
        private = bool(attributes)
        kept = [change for change in self._attribute_changes if not (start <= change[0] and change[1] <= end)]
        self._attribute_changes = [*kept, (start, end, private)]
        changed: list[tuple[gfn_t, gfn_t]] = []
        for slot in self.mmu.slots:
            first, last = slot.clip(start, end)
            if first < last:
                self.mmu.set_attributes(slot, first, last, private=private)
                changed.append((first, last))
        return changed

    # Launch and statistics.

    def launch_update(self, gpa: int, data: bytes) -> None:
        """Put initial content into private memory.

        Raises:
            OSError: EFAULT where the range is not private pages of one slot; ENOSPC, ENOMEM when pages cannot be had.
        """
        slot = self.mmu.slot_of(gpa >> PAGE_SHIFT)
        if slot is None or slot.private is None or gpa + len(data) > slot.end_gfn << PAGE_SHIFT:
            raise OSError(EFAULT, "launch_update: not inside a private slot")
        start, end = gpa >> PAGE_SHIFT, (gpa + len(data) + PAGE_SIZE - 1) >> PAGE_SHIFT
        if slot.attributes.count(0, start - slot.base_gfn, end - slot.base_gfn):
            raise OSError(EFAULT, "launch_update: pages are shared")
        slot.private.pages.get_pages(PageRange(slot.pgoff_of(start), pgoff_t(slot.pgoff_of(start) + end - start)))
        slot.private.half.write(gpa - (slot.base_gfn << PAGE_SHIFT), data)

    def statistics(self) -> dict[str, object]:
        """Return counts of pages, faults and invalidations, and what is locked."""
        halves = [slot.private for slot in self.mmu.slots if slot.private is not None]
        counters = self.mmu.counters
        return {
            "pid": os.getpid(),
            "pages_taken": sum(half.pages.taken for half in halves),
            "faults_private": counters.faults_private,
            "faults_shared": counters.faults_shared,
            "fault_retries": counters.retries,
            "invalidations": counters.invalidations,
            "entries_zapped": counters.zapped,
            "pages_freed": counters.freed,
            "private_bytes": sum(half.half.size for half in halves),
            "locked_bytes": sum(half.half.locked for half in halves),
            "unlocked_because": next((half.half.unlocked_because for half in halves if half.half.unlocked_because), ""),
            "memlock_limit": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            "swap": swap_exists(),
            "cgroup": cgroup(),
        }

    def _report(self) -> None:
        # For ps, which asks the service and not us.
        keys = ("pid", "private_bytes", "locked_bytes", "unlocked_because")
        found = self.statistics()
        self._service.call(wire.REPORT, json.dumps({key: found[key] for key in keys}).encode())


def swap_exists() -> bool:
    """Say whether any swap area is in use (/proc/swaps): only then does it matter whether memory is locked."""
    try:
        with open("/proc/swaps", encoding="ascii") as swaps:
            return len(swaps.readlines()) > 1
    except OSError:
        return False


def cgroup() -> str:
    """Return the cgroup whose memory controller pays for the pages this process takes (/proc/self/cgroup)."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split(":", 2) for line in file]
    return next((path for _, controllers, path in rows if "memory" in controllers.split(",") or not controllers), "none")
