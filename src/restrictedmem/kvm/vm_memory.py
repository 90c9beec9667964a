"""The memory of one VM: slots made from the owner's requests and the service's bindings, and the attributes of its pages."""

import json
import os
import resource
from errno import EACCES, EEXIST, EFAULT, EINVAL, ENOMEM, EOPNOTSUPP
from typing import Final, final

from restrictedmem.abi import kvm
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.engine import Engine
from restrictedmem.kvm.guest_abi import GPA_BITS, HYPERCALL_PAGE
from restrictedmem.kvm.memslot import ALL, EXEC, READ, Half, Memslot, PrivateHalf, forbid_shrinking
from restrictedmem.mm.notifier import Api
from restrictedmem.service import wire
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PageRange, gfn_t

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

    def __init__(self, engine: Engine, service: Channel, api: Api) -> None:
        self.slots: tuple[Memslot, ...] = ()
        self._engine = engine
        self._api = api
        self._service = service
        self._attribute_changes: list[tuple[gfn_t, gfn_t, bool]] = []

    # Slots.

    def create_slot(self, region: kvm.kvm_userspace_memory_region_ext, token: bytes, shared_fd: OwnedFd | None) -> None:
        """Make a slot (KVM_SET_USER_MEMORY_REGION), registering with the service for its private half; no vCPU is in the guest.

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
            if private is not None and self._api is Api.V9:
                slot.attributes[:] = bytes([1]) * npages
            for *change, is_private in self._attribute_changes:
                first, last = slot.clip(*change)
                slot.attributes[first - start : last - start] = bytes([is_private]) * (last - first)
            self._engine.add_slot(slot)
        except BaseException:
            if private is not None:
                private.close()
            if shared is not None:
                shared.close()
            raise
        self.slots = (*self.slots, slot)
        self._report()

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
        if any(slot.number == region.slot for slot in self.slots):
            raise OSError(EINVAL, f"slot {region.slot} exists: delete it first")
        start, end = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
        taken = [(slot.base_gfn, slot.end_gfn) for slot in self.slots]
        hypercall = HYPERCALL_PAGE >> PAGE_SHIFT
        if any(start < last and end > first for first, last in [*taken, (hypercall, hypercall + 1)]):
            raise OSError(EEXIST, "guest addresses overlap another slot")

    def _bind(self, token: bytes, window: PageRange) -> PrivateHalf:
        try:
            return self._engine.bind(token, window)
        except OSError as error:
            # As fget and file_is_restrictedmem failing: EINVAL for both.
            raise OSError(EINVAL if error.errno == EACCES else error.errno, error.strerror) from None

    @staticmethod
    def _map_shared(fd: OwnedFd, offset: int, size: int) -> Half:
        forbid_shrinking(fd.fileno())
        if offset + size > os.fstat(fd.fileno()).st_size:
            raise OSError(EINVAL, "the shared half ends past its memfd")
        return Half(fd.fileno(), offset, size)

    def delete_slot(self, number: int) -> None:
        """Delete a slot and unregister its notifier; no vCPU is in the guest.

        Raises:
            OSError: EINVAL when there is none.
        """
        slot = next((slot for slot in self.slots if slot.number == number), None)
        if slot is None:
            raise OSError(EINVAL, f"no slot {number}")
        self.slots = tuple(other for other in self.slots if other is not slot)
        self._engine.remove_slot(slot)
        slot.close()
        self._report()

    def slot_of(self, gfn: int) -> Memslot | None:
        """Return the slot that shows a guest page."""
        return next((slot for slot in self.slots if slot.base_gfn <= gfn < slot.end_gfn), None)

    # Attributes.

    def set_attributes(self, api: Api, address: int, size: int, attributes: int, flags: int) -> None:
        """Make a range private or shared, slots or none; on return no vCPU reaches the other half of it any more.

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
        for slot in self.slots:
            first, last = slot.clip(start, end)
            if first < last:
                self._engine.set_attributes(slot, first, last, private=private)

    # Launch and statistics.

    def launch_update(self, gpa: int, data: bytes) -> None:
        """Put initial content into private memory.

        Raises:
            OSError: EFAULT where the range is not private pages of one slot; ENOSPC, ENOMEM when pages cannot be had.
        """
        slot = self.slot_of(gpa >> PAGE_SHIFT)
        if slot is None or slot.private is None or gpa + len(data) > slot.end_gfn << PAGE_SHIFT:
            raise OSError(EFAULT, "launch_update: not inside a private slot")
        start, end = gpa >> PAGE_SHIFT, (gpa + len(data) + PAGE_SIZE - 1) >> PAGE_SHIFT
        if slot.attributes.count(0, start - slot.base_gfn, end - slot.base_gfn):
            raise OSError(EFAULT, "launch_update: pages are shared")
        self._engine.launch_update(slot, gpa, data)

    def statistics(self) -> dict[str, object]:
        """Return sizes, what is locked, and who pays for it."""
        halves = [slot.private for slot in self.slots if slot.private is not None]
        return {
            "pid": os.getpid(),
            "private_bytes": sum(len(half.window) << PAGE_SHIFT for half in halves),
            "locked_bytes": sum(half.locked for half in halves),
            "unlocked_because": next((half.unlocked_because for half in halves if half.unlocked_because), ""),
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
