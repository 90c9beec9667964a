"""The fault path, which translates a guest page or says why it cannot.

It follows v10 8/9 (kvm_faultin_pfn).

A vCPU that misses a page calls ``fault``. A thread that takes pages away first zaps them
(``invalidate_start``, ``set_attributes``, ``lose``). Then it makes every vCPU drop what it cached.
The retry protocol orders the two: a fault throws away what it looked up while the range was being
invalidated.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from errno import EFAULT, ENOENT
from typing import final

from restrictedmem import sync
from restrictedmem.abi import memory
from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.lpage import Level
from restrictedmem.kvm.memslot import CODE, LEVEL_SHIFT, PRIVATE, WRITE, MemfdHalf, Memslot
from restrictedmem.kvm.memslots import Memslots
from restrictedmem.kvm.page_fault import FAULT_AROUND, PageFault, around
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.platform.platform import NoPlatform, Platform
from restrictedmem.protocol.trace_events import Trace, now
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, gfn_t


class Fault(Enum):
    """The result of a fault that did not end in an errno."""

    MAPPED = 1
    """The translation is installed."""
    RETRY = 2
    """An invalidation came between (RET_PF_RETRY): leave the guest, wait, enter again."""
    NO_HALF = 3
    """The page's attribute names a half that the slot does not have."""


@final
@dataclass(slots=True)
class Counters:
    """Counts since the VM was made; ``zapped`` and ``freed`` count pages, others events."""

    faults_private: int = 0
    faults_shared: int = 0
    retries: int = 0
    invalidations: int = 0
    zapped: int = 0
    freed: int = 0
    splits: int = 0
    """Large translations that were split, because a part had to go or to lose a right."""


@final
class Mmu:
    """The slots of one VM and their secondary page tables.

    ``_lock`` is mmu_lock. It is held for each change of an entry, and never across a wait.
    """

    def __init__(
        self, attributes: Attributes, trace: Trace | None = None, platform: Platform | None = None
    ) -> None:
        """Make a VM without slots; ``attributes`` are those of its pages."""
        self.attributes = attributes
        self._trace = trace or Trace()
        self._platform = platform or NoPlatform()
        self.slots = Memslots()
        #: The slots with a private half, by the half's binding.
        self._bound: dict[int, Memslot] = {}
        #: The sequences of these halves' files, each with the number of slots that have it.
        self._sequences: dict[InvalidationSequence, int] = {}
        #: Halves with an invalidation that was told of and has not ended, under the lock. The slot
        #: of such a half may be gone, or not yet there.
        self._told_halves: set[MemfdHalf] = set()
        self.counters = Counters()
        self._lock = sync.mutex()
        self._settled = sync.condition(self._lock)

    def slot_of(self, gfn: int) -> Memslot | None:
        """Return the slot that shows a guest page."""
        return self.slots.at(gfn)

    def slot_of_binding(self, binding: int) -> Memslot | None:
        """Return the slot of a binding.

        Return None while the slot is being made, or after it was deleted: it has no entries then.
        """
        return self._bound.get(binding)

    def add_slot(self, slot: Memslot) -> None:
        """Add a slot.

        Preconditions: no vCPU is in the guest.
        """
        self.slots.add(slot)
        if slot.private is not None:
            half = slot.memfd_half
            self._bound[half.binding] = slot
            self._sequences[half.sequence] = self._sequences.get(half.sequence, 0) + 1

    def remove_slot(self, slot: Memslot) -> None:
        """Forget a slot.

        Preconditions: no vCPU is in the guest.
        """
        self.slots.remove(slot)
        if slot.private is not None:
            half = slot.memfd_half
            del self._bound[half.binding]
            self._sequences[half.sequence] -= 1
            if not self._sequences[half.sequence]:
                del self._sequences[half.sequence]
        # A thread that waits for the end of an invalidation of this slot will not hear of it.
        self.wake()

    def fault(self, slot: Memslot, gfn: int) -> Fault:
        """Install the translation of a page of a slot.

        Raises:
            OSError: the errno of get_page.
        """
        index = gfn - slot.base_gfn
        private = bool(slot.attributes[index])
        if self._trace.on:
            return self._traced_fault(slot, index, private=private)
        return self._fault(slot, index, private=private)

    def _fault(self, slot: Memslot, index: int, *, private: bool) -> Fault:
        if (slot.private if private else slot.shared) is None:
            return Fault.NO_HALF
        if not private:
            if slot.in_place:
                return self._fault_in_place(slot, index)
            return self._map_shared(slot, *around(slot, index))
        fault = PageFault(slot, index)
        try:
            if not fault.get_large():
                fault.get_around()
        except BlockingIOError:
            # get_page returned EAGAIN. KVM looks so early, too, since 6.8
            # (mmu_invalidate_retry_gfn_unsafe).
            self.counters.retries += 1
            return Fault.RETRY
        return self._map_private(fault)

    def _traced_fault(self, slot: Memslot, index: int, *, private: bool) -> Fault:
        first, last = around(slot, index)
        started, result, errno = now(), "", 0
        try:
            fault = self._fault(slot, index, private=private)
            result = fault.name.lower()
        except OSError as error:
            result, errno = "error", error.errno or EFAULT
            raise
        finally:
            entry = slot.entries[index]
            if entry >> LEVEL_SHIFT:
                first, last = slot.leaf(index)
            self._trace.emit(
                "fault",
                gfn=slot.base_gfn + first,
                npages=last - first - slot.entries.count(0, first, last),
                level=(entry >> LEVEL_SHIFT) + 1 if entry else 0,
                private=private,
                result=result,
                errno=errno,
                private_pages=self.private_pages(),
                ns=now() - started,
            )
        return fault

    def private_pages(self) -> int:
        """Return how many pages were taken and not freed since, as far as this MMU knows."""
        return (
            sum(slot.memfd_half.pages.taken for slot in self.slots if slot.private)
            - self.counters.freed
        )

    def _map_private(self, fault: PageFault) -> Fault:
        """Install what get_page returned for a fault, unless it is out of date.

        Raises:
            OSError: EHWPOISON when the machine has lost the page, and the fault maps no other page.
        """
        slot, private, first, last = fault.slot, fault.private, fault.first, fault.last
        large = fault.level is not Level.PAGE
        with self._lock:
            lost = private.failed and private.lost(fault.span)
            if lost and last - first == 1:
                raise OSError(EHWPOISON, "get_page: the machine has lost the page")
            if (
                lost
                or private.sequence.retry(fault.snapshot, fault.span.start, fault.span.end)
                or slot.attributes.count(0, first, last)
                or (large and slot.has_code(first, last))
            ):
                self.counters.retries += 1
                return Fault.RETRY
            order = fault.level.order if large else 0
            gfn = gfn_t(slot.base_gfn + first)
            self._platform.prepare(private.ino, fault.span, gfn, order)
            if large:
                slot.install_large(first, fault.level)
            else:
                slot.install(first, last, slot.rights | PRIVATE)
            self.counters.faults_private += 1
        return Fault.MAPPED

    def _map_shared(self, slot: Memslot, first: int, last: int) -> Fault:
        """Install pages of the shared half, unless a page was converted meanwhile."""
        with self._lock:
            if slot.attributes.count(1, first, last):
                self.counters.retries += 1
                return Fault.RETRY
            slot.install(first, last, slot.rights)
            self.counters.faults_shared += 1
        return Fault.MAPPED

    def _fault_in_place(self, slot: Memslot, index: int) -> Fault:
        """Install a shared page of a guest_memfd, unless the file's sequence has changed.

        The kernel asks the service for the page now, not when the guest touches it: there, a
        refusal would be a SIGBUS.

        Raises:
            OSError: EFAULT when the service has no page.
        """
        assert slot.shared is not None
        half = slot.memfd_half
        snapshot = half.sequence.snapshot()
        failure: OSError | None = None
        try:
            slot.shared.mapping.madvise(memory.MADV_POPULATE_READ, index << PAGE_SHIFT, PAGE_SIZE)
        except OSError as error:
            failure = error
        span = slot.span_of(index, index + 1)
        with self._lock:
            if slot.attributes[index] or half.sequence.retry(snapshot, span.start, span.end):
                self.counters.retries += 1
                return Fault.RETRY
            if failure is not None:
                raise failure
            slot.install(index, index + 1, slot.rights)
            self.counters.faults_shared += 1
        return Fault.MAPPED

    def prefault(self, start: gfn_t, end: gfn_t) -> int:
        """Map pages from ``start`` on as a read would (``kvm_arch_vcpu_pre_fault_memory``).

        Map them up to the end of the 2 MiB in which they lie. Return how many, or 0 when an
        invalidation came between.

        Raises:
            OSError: ENOENT where there is no slot, but EFAULT if that page is private in v10;
                EFAULT where the slot lacks the half; EHWPOISON; ENOSPC, ENOMEM.
        """
        slot = self.slot_of(start)
        if slot is None:
            raise OSError(
                EFAULT if self.attributes.forbids_mmio(start) else ENOENT,
                f"prefault: no slot at {start << PAGE_SHIFT:#x}",
            )
        first = start - slot.base_gfn
        private = slot.attributes[first]
        # Where no block can be one translation, take 16 pages; where pages are not alike, take one.
        block = Level.PMD.pages if slot.lpage.max_level(start) > Level.PAGE else FAULT_AROUND
        last = min(end, slot.end_gfn, gfn_t((start | block - 1) + 1)) - slot.base_gfn
        if slot.attributes.count(private, first, last) < last - first:
            last = first + 1
        if (slot.private if private else slot.shared) is None:
            raise OSError(
                EFAULT, f"prefault: the slot has no such half at {start << PAGE_SHIFT:#x}"
            )
        if not private and slot.in_place:
            return int(self._fault_in_place(slot, first) is Fault.MAPPED)
        if not private:
            return last - first if self._prefault_shared(slot, first, last) is Fault.MAPPED else 0
        done = self._prefault_private(slot, first, last)
        return min(done, end - slot.base_gfn) - first

    def _prefault_private(self, slot: Memslot, first: int, last: int) -> int:
        """Map pages from ``first`` on; return the page after the last one mapped."""
        fault = PageFault(slot, first)
        try:
            if not fault.get_large():
                fault.get(first, last)
        except BlockingIOError:
            return first
        return fault.last if self._map_private(fault) is Fault.MAPPED else first

    def _prefault_shared(self, slot: Memslot, first: int, last: int) -> Fault:
        assert slot.shared is not None
        with suppress(OSError):
            # A guest's first access does the same. The call came with Linux 5.14.
            slot.shared.mapping.madvise(
                memory.MADV_POPULATE_READ, first << PAGE_SHIFT, (last - first) << PAGE_SHIFT
            )
        return self._map_shared(slot, first, last)

    def protect_code(self, slot: Memslot, gfn: int) -> tuple[int, bool]:
        """Write-protect a page for all vCPUs, because one of them fetches from it.

        Return the entry, or 0 when it was zapped; and whether the protection is new to the entry.
        The caller makes every other vCPU drop its translation before that vCPU runs again.
        """
        index = gfn - slot.base_gfn
        with self._lock:
            entry = slot.entries[index]
            if not entry or entry & CODE:
                return entry, False
            # Only the page itself is protected. The rest of a large translation keeps its rights
            # (KVM splits for write tracking, too).
            self.counters.splits += slot.split(index)
            slot.entries[index] = entry = slot.entries[index] & ~WRITE | CODE
            return entry, True

    def wait_settled(self, unless: Callable[[], bool]) -> None:
        """Wait until no invalidation is in progress over any slot, so that a retry may work.

        The wait ends early when ``unless`` becomes true and ``wake`` is then called. Some designs
        tell consumers nothing of a punch, or tell them its end too early. Nobody wakes this thread
        at the end of such a punch, so this call does not wait for that end.
        """
        if not any(sequence.busy() for sequence in self._sequences.copy()):
            return
        with self._settled:
            told = self._told()
            self._settled.wait_for(lambda: unless() or not self._told())
        if not told:
            sync.relax()

    def _told(self) -> bool:
        return any(half.binding in self._bound for half in self._told_halves)

    def expect_end(self, half: MemfdHalf) -> None:
        """Make ``wait_settled`` wait for the end of an invalidation of a half's file."""
        with self._lock:
            half.told += 1
            self._told_halves.add(half)

    def wake(self) -> None:
        """Make ``wait_settled`` check again."""
        with self._settled:
            self._settled.notify_all()

    def lose(self, half: MemfdHalf, span: PageRange) -> tuple[gfn_t, gfn_t]:
        """Refuse pages of a half until they are punched (``kvm_gmem_error_folio``).

        Return the guest pages that showed them, which are zapped.
        """
        lost = half.window.clip(span)
        with self._lock:
            half.failed.update(range(lost.start, lost.end))
            slot = self._bound.get(half.binding)
            return (gfn_t(0), gfn_t(0)) if slot is None else self._zap(slot, *slot.gfns_of(span))

    def _zap(self, slot: Memslot, start: gfn_t, end: gfn_t) -> tuple[gfn_t, gfn_t]:
        """Remove the translations of guest pages of a slot, and large ones whole.

        Return the pages whose translations were removed: at least those given. Every vCPU has to
        drop them before anybody relies on it.

        Preconditions: _lock held.
        """
        if start == end:
            return start, end
        first, last = start - slot.base_gfn, end - slot.base_gfn
        if slot.mapped[Level.PMD] or slot.mapped[Level.PUD]:
            edges = {slot.leaf(first), slot.leaf(last - 1)}
            self.counters.splits += sum(leaf[0] < first or leaf[1] > last for leaf in edges)
            first, last = min(leaf[0] for leaf in edges), max(leaf[1] for leaf in edges)
        self.counters.zapped += slot.remove(first, last)
        return gfn_t(slot.base_gfn + first), gfn_t(slot.base_gfn + last)

    def invalidate_start(self, half: MemfdHalf, span: PageRange) -> tuple[gfn_t, gfn_t]:
        """Zap what shows a range of a half's file, and forget the pages of the range.

        Return the guest pages zapped, none while the half has no slot.
        """
        with self._lock:
            slot = self._bound.get(half.binding)
            zapped = (gfn_t(0), gfn_t(0)) if slot is None else self._zap(slot, *slot.gfns_of(span))
            half.failed -= {pgoff for pgoff in half.failed if span.start <= pgoff < span.end}
        self.counters.freed += half.pages.invalidate_start(span)
        self.counters.invalidations += 1
        return zapped

    def invalidate_end(self, half: MemfdHalf, span: PageRange) -> None:
        """Note the end of an invalidation of a half's file, and wake those who wait for it."""
        half.pages.invalidate_end(span)
        with self._settled:
            half.told -= 1
            if not half.told:
                self._told_halves.discard(half)
            self._settled.notify_all()

    def set_attributes(
        self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool
    ) -> tuple[gfn_t, gfn_t]:
        """Set which half a range of guest pages of a slot shows, and zap the range.

        Return the pages that every vCPU has to drop.
        """
        attributes = bytes([private]) * (end - start)
        with self._lock:
            # Attributes come last: where they say private, no entry leads to the shared half.
            zapped = self._zap(slot, start, end)
            slot.attributes[start - slot.base_gfn : end - slot.base_gfn] = attributes
            return zapped

    def convert(self, half: MemfdHalf, span: PageRange, *, private: bool) -> tuple[gfn_t, gfn_t]:
        """Set which half the guest pages show that show a range of a guest_memfd.

        Return the pages that every vCPU has to drop, none while the half has no slot.
        """
        slot = self._bound.get(half.binding)
        if slot is None:
            return gfn_t(0), gfn_t(0)
        start, end = slot.gfns_of(span)
        zapped = self.set_attributes(slot, start, end, private=private)
        if start < end:
            slot.lpage.update(start, end)
        return zapped

    def mapped(self, level: Level) -> int:
        """Return how many translations of a level there are."""
        return sum(slot.mapped[level] for slot in self.slots)
