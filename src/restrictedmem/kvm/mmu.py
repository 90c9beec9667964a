"""The fault path: from a guest page without a translation to one with, or to the reason why not (v10 8/9, kvm_faultin_pfn).

Whoever runs guest code asks ``fault`` for a missing page; whoever takes pages away calls ``zap`` before and makes every vCPU drop what it
cached. In between stands the retry protocol: what was looked up while a range was being invalidated is thrown away.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from errno import EFAULT, ENOENT
from typing import Final, final

from restrictedmem import sync
from restrictedmem.abi import memory
from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.lpage import Level
from restrictedmem.kvm.memslot import CODE, PRIVATE, WRITE, MemfdHalf, Memslot
from restrictedmem.kvm.trace import Trace, now
from restrictedmem.platform.host import NoPlatform, Platform
from restrictedmem.units import PAGE_SHIFT, PageRange, gfn_t, pgoff_t


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

    def __init__(self, attributes: Attributes, trace: Trace | None = None, platform: Platform | None = None) -> None:
        """Make a VM without slots; ``attributes`` are those of its pages."""
        self.attributes = attributes
        self._trace = trace or Trace()
        self._platform = platform or NoPlatform()
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
        if self._trace.on:
            return self._traced_fault(slot, index)
        if slot.attributes[index]:
            return self._fault_private(slot, index)
        return self._fault_shared(slot, index)

    def _traced_fault(self, slot: Memslot, index: int) -> Fault:
        private = bool(slot.attributes[index])
        first, last = _around(slot, index)
        started, result, errno = now(), "", 0
        try:
            fault = self._fault_private(slot, index) if private else self._fault_shared(slot, index)
            result = fault.name.lower()
        except OSError as error:
            result, errno = "error", error.errno or EFAULT
            raise
        finally:
            self._trace.emit(
                "fault",
                gfn=slot.base_gfn + first,
                npages=last - first - slot.entries.count(0, first, last),
                private=private,
                result=result,
                errno=errno,
                private_pages=self.private_pages(),
                ns=now() - started,
            )
        return fault

    def private_pages(self) -> int:
        """Return how many pages were taken and not freed since, as far as this MMU knows."""
        return sum(slot.memfd_half.pages.taken for slot in self.slots if slot.private) - self.counters.freed

    def _fault_private(self, slot: Memslot, index: int) -> Fault:
        if slot.private is None:
            return Fault.NO_HALF
        private = slot.memfd_half
        snapshot = private.sequence.snapshot()
        first, last = _around(slot, index)
        shift = private.window.start
        if private.failed and last - first > 1 and not private.failed.isdisjoint(range(first + shift, last + shift)):
            first, last = index, index + 1
        try:
            private.pages.get_pages(PageRange(pgoff_t(first + shift), pgoff_t(last + shift)))
        except OSError:
            if last - first == 1:
                raise
            # Where a block cannot be had, the page alone may be.
            first, last = index, index + 1
            private.pages.get_page(pgoff_t(index + shift))
        return self._install_private(slot, private, snapshot, first, last)

    def _install_private(self, slot: Memslot, private: MemfdHalf, snapshot: int, first: int, last: int) -> Fault:
        """Install what get_page returned since ``snapshot``, unless it may be out of date."""
        span = PageRange(pgoff_t(first + private.window.start), pgoff_t(last + private.window.start))
        with self._lock:
            if private.failed and not private.failed.isdisjoint(range(span.start, span.end)):
                raise OSError(EHWPOISON, "get_page: the machine has lost the page")
            if private.sequence.retry(snapshot, span.start, span.end) or slot.attributes.count(0, first, last):
                self.counters.retries += 1
                return Fault.RETRY
            self._platform.prepare(private.ino, span, gfn_t(slot.base_gfn + first), 0)
            _install(slot, first, last, slot.rights | PRIVATE)
            self.counters.faults_private += 1
        return Fault.MAPPED

    def _fault_shared(self, slot: Memslot, index: int) -> Fault:
        if slot.shared is None:
            return Fault.NO_HALF
        first, last = _around(slot, index)
        return self._install_shared(slot, first, last)

    def _install_shared(self, slot: Memslot, first: int, last: int) -> Fault:
        with self._lock:
            if slot.attributes.count(1, first, last):
                self.counters.retries += 1
                return Fault.RETRY
            _install(slot, first, last, slot.rights)
            self.counters.faults_shared += 1
        return Fault.MAPPED

    def prefault(self, start: gfn_t, end: gfn_t) -> int:
        """Map pages from ``start`` on as a read would (``kvm_arch_vcpu_pre_fault_memory``), up to the end of the 2 MiB they lie in.

        Returns how many, 0 when an invalidation came between.

        Raises:
            OSError: ENOENT where no slot is; EFAULT where the slot lacks the half; EHWPOISON; ENOSPC, ENOMEM.
        """
        slot = self.slot_of(start)
        if slot is None:
            raise OSError(EFAULT if self.attributes.forbids_mmio(start) else ENOENT, f"prefault: no slot at {start << PAGE_SHIFT:#x}")
        first = start - slot.base_gfn
        private = slot.attributes[first]
        # Beyond what can be one block, 16 pages that are alike, or one.
        block = Level.PMD.pages if slot.lpage.max_level(start) > Level.PAGE else FAULT_AROUND
        last = min(end, slot.end_gfn, gfn_t((start | block - 1) + 1)) - slot.base_gfn
        if slot.attributes.count(private, first, last) < last - first:
            last = first + 1
        if (slot.private if private else slot.shared) is None:
            raise OSError(EFAULT, f"prefault: the slot has no such half at {start << PAGE_SHIFT:#x}")
        fault = self._prefault_private(slot, first, last) if private else self._prefault_shared(slot, first, last)
        return last - first if fault is Fault.MAPPED else 0

    def _prefault_private(self, slot: Memslot, first: int, last: int) -> Fault:
        private = slot.memfd_half
        snapshot = private.sequence.snapshot()
        private.pages.get_pages(PageRange(pgoff_t(first + private.window.start), pgoff_t(last + private.window.start)))
        return self._install_private(slot, private, snapshot, first, last)

    def _prefault_shared(self, slot: Memslot, first: int, last: int) -> Fault:
        assert slot.shared is not None
        with suppress(OSError):
            # A guest's first access does the same; the call came with Linux 5.14.
            slot.shared.mapping.madvise(memory.MADV_POPULATE_READ, first << PAGE_SHIFT, (last - first) << PAGE_SHIFT)
        return self._install_shared(slot, first, last)

    def protect_code(self, slot: Memslot, gfn: int) -> tuple[int, bool]:
        """Make a page that a vCPU fetches from lose WRITE for all; returns the entry, 0 when it was zapped, and whether it is new to it.

        The caller makes every other vCPU drop its translation before that runs again.
        """
        index = gfn - slot.base_gfn
        with self._lock:
            entry = slot.entries[index]
            if not entry or entry & CODE:
                return entry, False
            slot.entries[index] = entry = entry & ~WRITE | CODE
            return entry, True

    def wait_settled(self, unless: Callable[[], bool]) -> None:
        """Wait until no invalidation is in progress over any slot, which is when a fault that had to retry may work.

        Ends early when ``unless`` becomes true, followed by ``wake``.
        """
        if self._busy():
            with self._settled:
                self._settled.wait_for(lambda: unless() or not self._busy())

    def _busy(self) -> bool:
        return any(slot.private is not None and slot.memfd_half.sequence.busy() for slot in self.slots)

    def wake(self) -> None:
        """Make ``wait_settled`` look again."""
        with self._settled:
            self._settled.notify_all()

    def lose(self, ino: int, span: PageRange) -> list[tuple[gfn_t, gfn_t]]:
        """Refuse pages of a file until they are punched (``kvm_gmem_error_folio``); returns the guest pages that showed them, zapped."""
        shown: list[tuple[gfn_t, gfn_t]] = []
        for slot in self.slots:
            if slot.private is not None and slot.memfd_half.ino == ino:
                start, end = slot.gfns_of(span)
                if start < end:
                    with self._lock:
                        slot.memfd_half.failed.update(pgoff_t(slot.pgoff_of(gfn)) for gfn in range(start, end))
                    self.zap(slot, start, end)
                    shown.append((start, end))
        return shown

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
        with self._lock:
            slot.memfd_half.failed -= {pgoff for pgoff in slot.memfd_half.failed if span.start <= pgoff < span.end}
        self.counters.freed += slot.memfd_half.pages.forget(span)
        self.counters.invalidations += 1
        return start, end

    def invalidate_end(self, slot: Memslot, span: PageRange) -> None:
        """Let faults on the range work again."""
        slot.memfd_half.pages.forget(span)
        self.wake()

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


def _install(slot: Memslot, first: int, last: int, entry: int) -> None:
    """Write the entries that are still missing."""
    slot.entries[first:last] = slot.entries[first:last].replace(b"\0", bytes((entry,)))
