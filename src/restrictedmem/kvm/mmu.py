"""The fault path: from a guest page without a translation to one with, or to the reason why not (v10 8/9, kvm_faultin_pfn).

Whoever runs guest code asks ``fault`` for a missing page; whoever takes pages away calls ``zap`` before and makes every vCPU drop what it
cached. In between stands the retry protocol: what was looked up while a range was being invalidated is thrown away.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final, final

from restrictedmem import sync
from restrictedmem.kvm.memslot import PRIVATE, Memslot
from restrictedmem.units import PageRange, gfn_t, pgoff_t


class Fault(Enum):
    """How a fault ended, when it did not end in an errno."""

    MAPPED = 1
    """The translation is installed."""
    RETRY = 2
    """An invalidation came between (RET_PF_RETRY): leave the guest, wait, enter again."""
    NO_HALF = 3
    """The page's attribute names a half that the slot does not have."""


@final
@dataclass(slots=True)
class Counters:
    """What the MMU did, since the VM was made; pages unless said otherwise."""

    faults_private: int = 0
    faults_shared: int = 0
    retries: int = 0
    invalidations: int = 0
    zapped: int = 0
    freed: int = 0


#: Pages mapped at one fault, an aligned block: 64 KiB, what the kernel maps around a file fault (fault_around_bytes).
FAULT_AROUND: Final = 16


@final
class Mmu:
    """The slots of one VM and their secondary page tables. ``_lock`` is mmu_lock: held for each change of an entry, never across a wait."""

    def __init__(self) -> None:
        self.slots: tuple[Memslot, ...] = ()
        self.counters = Counters()
        self._lock = sync.mutex()
        self._settled = sync.condition(self._lock)

    def slot_of(self, gfn: int) -> Memslot | None:
        """Return the slot that shows a guest page."""
        for slot in self.slots:
            if slot.base_gfn <= gfn < slot.end_gfn:
                return slot
        return None

    def fault(self, slot: Memslot, gfn: int) -> Fault:
        """Install the translation of a page of a slot.

        Raises:
            OSError: what get_page failed with.
        """
        index = gfn - slot.base_gfn
        if slot.attributes[index]:
            return self._fault_private(slot, index)
        return self._fault_shared(slot, index)

    def _fault_private(self, slot: Memslot, index: int) -> Fault:
        if slot.private is None:
            return Fault.NO_HALF
        private = slot.memfd_half
        snapshot = private.sequence.snapshot()
        first, last = _around(slot, index)
        shift = private.window.start
        try:
            private.pages.get_pages(PageRange(pgoff_t(first + shift), pgoff_t(last + shift)))
        except OSError:
            if last - first == 1:
                raise
            # Where a block cannot be had, the page alone may be.
            first, last = index, index + 1
            private.pages.get_page(pgoff_t(index + shift))
        with self._lock:
            if private.sequence.retry(snapshot, pgoff_t(first + shift), pgoff_t(last + shift)) or slot.attributes.count(0, first, last):
                self.counters.retries += 1
                return Fault.RETRY
            slot.entries[first:last] = bytes((slot.rights | PRIVATE,)) * (last - first)
            self.counters.faults_private += 1
        return Fault.MAPPED

    def _fault_shared(self, slot: Memslot, index: int) -> Fault:
        if slot.shared is None:
            return Fault.NO_HALF
        with self._lock:
            if slot.attributes[index]:
                self.counters.retries += 1
                return Fault.RETRY
            first, last = _around(slot, index)
            slot.entries[first:last] = bytes((slot.rights,)) * (last - first)
            self.counters.faults_shared += 1
        return Fault.MAPPED

    def wait_settled(self) -> None:
        """Wait until no invalidation is in progress over any slot, which is when a fault that had to retry may work."""
        with self._settled:
            self._settled.wait_for(lambda: not any(slot.private and slot.memfd_half.sequence.busy() for slot in self.slots))

    def zap(self, slot: Memslot, start: gfn_t, end: gfn_t) -> None:
        """Remove the translations of guest pages of a slot; the caller makes every vCPU drop them before it relies on it."""
        first, last = start - slot.base_gfn, end - slot.base_gfn
        with self._lock:
            self.counters.zapped += (last - first) - slot.entries.count(0, first, last)
            slot.entries[first:last] = bytes(last - first)

    def invalidate_start(self, slot: Memslot, span: PageRange) -> tuple[gfn_t, gfn_t]:
        """Zap what shows a range of the private half's file and forget its pages; returns the guest pages."""
        start, end = slot.gfns_of(span)
        self.zap(slot, start, end)
        self.counters.freed += slot.memfd_half.pages.forget(span)
        self.counters.invalidations += 1
        return start, end

    def invalidate_end(self, slot: Memslot, span: PageRange) -> None:
        """Let faults on the range work again."""
        slot.memfd_half.pages.forget(span)
        with self._settled:
            self._settled.notify_all()

    def set_attributes(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Say which half a range of guest pages of a slot shows, and zap it; the caller makes every vCPU drop it."""
        with self._lock:
            slot.attributes[start - slot.base_gfn : end - slot.base_gfn] = bytes([private]) * (end - start)
        self.zap(slot, start, end)


def _around(slot: Memslot, index: int) -> tuple[int, int]:
    """Return the block of pages to map with one: aligned, in the slot, all with its attribute and none mapped yet; or the page alone."""
    gfn = index + slot.base_gfn
    first = max(gfn & -FAULT_AROUND, slot.base_gfn) - slot.base_gfn
    last = min(gfn | FAULT_AROUND - 1, slot.end_gfn - 1) + 1 - slot.base_gfn
    if slot.attributes.count(slot.attributes[index], first, last) == slot.entries.count(0, first, last) == last - first:
        return first, last
    return index, index + 1
