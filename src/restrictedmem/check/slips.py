"""Slips: mistakes of the postings, which ``restrictedmem check`` puts back into the code.

No other command does so. A search that finds nothing shows something only if it would have found
these. Each slip has a class that replaces production's, the scenario that convicts it, and the rule
that it breaks. Section numbers are those of the project's notes on the postings; mails are those of
the series' thread.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, final

from restrictedmem.check.explorer import Result
from restrictedmem.check.invariants import Rule
from restrictedmem.check.scenarios import SCENARIOS
from restrictedmem.check.world import Parts
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.mm.design import Bindings, Callback, Design, File, Folio
from restrictedmem.mm.memfd import never
from restrictedmem.mm.notifier import Notifier
from restrictedmem.mm.remembering import Lazy
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import PAGE_SHIFT, U64_MAX, PageRange, gfn_t, pgoff_t

_IN_PROGRESS: Final = 1
_START: Final = 2
_END: Final = 3


@final
@dataclass(frozen=True, slots=True)
class Slip:
    """A mistake of a posting."""

    name: str
    description: str
    #: The source that describes the mistake.
    source: str
    parts: Parts
    #: The scenario that convicts it, with which design, by which rule.
    scenario: str
    design: str
    rule: Rule

    def search(self, *, exhaustive: bool = False, limit_seconds: float = 600) -> Result:
        """Search the slip's scenario with the slip in it."""
        return SCENARIOS[self.scenario].search(
            self.design, parts=self.parts, exhaustive=exhaustive, limit_seconds=limit_seconds
        )


class BytesAsPages(Design):
    """Callbacks get byte offsets, but take them for page offsets (v9)."""

    name = "v9"
    __slots__ = ()

    def callbacks(self, file: File, span: PageRange) -> Sequence[Callback]:
        """Return the range as v9's restrictedmem_fallocate passed it."""
        del file
        return ((pgoff_t(span.start << PAGE_SHIFT), pgoff_t(span.end << PAGE_SHIFT), None),)

    def kept_out(self, file: File, span: PageRange) -> PageRange:
        """Return the same range: consumers kept faults out of the range they were told."""
        start, end, _ = self.callbacks(file, span)[0]
        return PageRange(start, end)


class SlotThatUnderflows(Memslot):  # type: ignore[misc] # a slip
    """A hole that ends below the slot's window wraps around (v9 and v10).

    So the whole slot counts as hit.
    """

    def gfns_of(self, span: PageRange) -> tuple[gfn_t, gfn_t]:
        """Return what kvm_restrictedmem_invalidate_start computed, in 64 bits."""
        assert self.private is not None
        base = self.private.window.start
        start = self.base_gfn + (span.start - base if span.start > base else 0)
        end = self.base_gfn + span.end - base & U64_MAX
        # KVM went on to zap beyond the slot; here nothing is there.
        start, end = min(start, self.end_gfn), min(end, self.end_gfn)
        return gfn_t(start), gfn_t(max(start, end))


class SlotWithoutIndex(Memslot):  # type: ignore[misc] # a slip
    """The slot's first page of the file is not subtracted (Sean Christopherson's branch)."""

    def gfns_of(self, span: PageRange) -> tuple[gfn_t, gfn_t]:
        """Return ``base_gfn + max(start, index)``, and the end likewise."""
        assert self.private is not None
        inside = self.private.window.clip(span)
        if not len(inside):
            return self.base_gfn, self.base_gfn
        return self.clip(gfn_t(self.base_gfn + inside.start), gfn_t(self.base_gfn + inside.end))


class FileThatLocksTwice(RestrictedFile):
    """The lock is dropped between the notifiers' starts and their ends (v9 and v10).

    The pass over the notifiers for start takes the lock, and so does the pass for end.
    """

    __slots__ = ()

    def fallocate(
        self, mode: int, offset: int, length: int, abandoned: Callable[[], bool] = never
    ) -> None:
        """Do what restrictedmem_fallocate did; there each consumer had its own sequence."""
        span = PageRange.around_bytes(offset, length)
        self.sequence().begin(span.start, span.end)
        self._notifiers_sem.down_read()
        for notifier in self.notifiers(span.start, span.end):
            notifier.invalidate_start(span.start, span.end, None)
        self._notifiers_sem.up_read()
        try:
            with self._mutex:
                self._fallocate(mode, offset, length, abandoned)
        finally:
            self.sequence().end()
            self._notifiers_sem.down_read()
            for notifier in self.notifiers(span.start, span.end):
                notifier.invalidate_end(span.start, span.end, None)
            self._notifiers_sem.up_read()


class SequenceThatOverwrites(InvalidationSequence):  # type: ignore[misc] # a slip
    """One begin, and then each range is added by itself (v10).

    As long as a single invalidation is in progress, each range overwrites the one before.
    """

    __slots__ = ()

    def range_add(self, start: pgoff_t, end: pgoff_t) -> None:
        """Add a range as v10's kvm_mmu_invalidate_range_add did."""
        words = self._words
        with self._mutex:
            if words.read(_IN_PROGRESS) != 1:
                start, end = (
                    min(start, pgoff_t(words.read(_START))),
                    max(end, pgoff_t(words.read(_END))),
                )
            words.write(_START, start)
            words.write(_END, end)


class FoliosAddedOneByOne(Folio):  # type: ignore[misc] # a slip
    """Callbacks go folio by folio; ``range_add`` adds each to the invalidation under way."""

    __slots__ = ()

    def kept_out(self, file: File, span: PageRange) -> PageRange:
        """Return an empty range: ``callbacks`` adds the ranges."""
        del file
        return PageRange(span.start, span.start)

    def callbacks(self, file: File, span: PageRange) -> Iterator[Callback]:
        """Add all ranges before consumers hear of the first."""
        sequence = file.sequence()
        assert isinstance(sequence, SequenceThatOverwrites)
        found = list(super().callbacks(file, span))
        for start, end, _ in found:
            sequence.range_add(start, end)
        return iter(found)


class FileWithInclusiveEnds(RestrictedFile):
    """Bindings include the page after their last (Sean Christopherson's series).

    xa_store_range takes the last index as part of the range.
    """

    __slots__ = ()

    def notifiers(self, start: pgoff_t, end: pgoff_t) -> Sequence[Notifier]:
        """Return the notifiers whose range overlaps this range, the ends of both included."""
        return [r.notifier for r in self.registrations() if start <= r.end and end >= r.start]


class BindingsThatLeak(Bindings):  # type: ignore[misc] # a slip
    """The count rises for each punch, but falls only if the range was bound (kvm_rmem)."""

    __slots__ = ()

    @contextmanager
    def invalidation(self, file: File, span: PageRange) -> Generator[None]:
        """End only an invalidation that a consumer heard of."""
        if file.notifiers(span.start, span.end):
            with super().invalidation(file, span):
                yield
        else:
            file.sequence().begin(span.start, span.end)
            yield


class SequenceWithoutRetry(InvalidationSequence):  # type: ignore[misc] # a slip
    """The fault path does not check whether the result of get_page is still valid."""

    __slots__ = ()

    def busy_over(self, start: pgoff_t, end: pgoff_t) -> bool:
        """Return false."""
        return False

    def retry(self, snapshot: int, start: pgoff_t, end: pgoff_t) -> bool:
        """Return false."""
        return False


class FileThatTellsAll(RestrictedFile):
    """An unregistration tells all consumers that all of the file goes (SNP trees' cleanup)."""

    __slots__ = ()

    def unregister_notifier(self, notifier: Notifier) -> None:
        """Tell all consumers, then unregister one."""
        self._notifiers_sem.down_read()
        everything = pgoff_t(0), pgoff_t(1 << 20)
        self.sequence().begin(*everything)
        for other in self.notifiers(*everything):
            other.invalidate_start(*everything, None)
        self.sequence().end()
        for other in self.notifiers(*everything):
            other.invalidate_end(*everything, None)
        self._notifiers_sem.up_read()
        super().unregister_notifier(notifier)


class LazyByItsBits(Lazy):  # type: ignore[misc] # a slip
    """A huge page is freed once each part was punched, even if it has been touched since."""

    __slots__ = ()

    def _goes(self, file: File, rest: Sequence[PageRange]) -> bool:
        del file
        return self._punched.has(rest)


def _designed(kind: type[Design]) -> Callable[[str], Design]:
    return lambda name: kind(teardown=name.endswith("+teardown"))


_ALL: Final = (
    Slip(
        "bytes-as-pages",
        "v9 passes byte offsets to callbacks that take pages, so nothing is zapped from the second "
        "page on",
        "Michael Roth, 28 November 2022",
        Parts(design=_designed(BytesAsPages)),
        "punch-block-fault",
        "v9",
        Rule.RANGE,
    ),
    Slip(
        "clip-underflow",
        "a hole that ends below a slot's window wraps around and hits the whole slot",
        "Vishal Annapurve on v10",
        Parts(slot=SlotThatUnderflows),
        "punch-beside",
        "v10",
        Rule.RANGE,
    ),
    Slip(
        "no-index",
        "guest pages are computed without subtracting the slot's first page of the file, so the "
        "wrong pages are zapped",
        "Sean Christopherson's branch",
        Parts(slot=SlotWithoutIndex),
        "punch-beside",
        "v10",
        Rule.FREED,
    ),
    Slip(
        "two-locks-register",
        "the lock is dropped between start and end: a consumer that registers meanwhile hears an "
        "end without a start",
        "Sean Christopherson, January 2023",
        Parts(file=FileThatLocksTwice),
        "punch-register",
        "v10",
        Rule.BALANCE,
    ),
    Slip(
        "two-locks-unregister",
        "the lock is dropped between start and end: a consumer that unregisters meanwhile never "
        "hears the end",
        "Sean Christopherson, January 2023",
        Parts(file=FileThatLocksTwice),
        "punch-unregister",
        "v10",
        Rule.BALANCE,
    ),
    Slip(
        "range-add-overwrites",
        "several ranges are added to one invalidation, but faults are kept out of the last only",
        "v10 4/9, repaired in v13",
        Parts(design=_designed(FoliosAddedOneByOne), sequence=SequenceThatOverwrites),
        "folios-fault",
        "folio",
        Rule.WINDOW,
    ),
    Slip(
        "inclusive-end",
        "a binding includes the page after its last, so its consumer hears of that page",
        "Michael Roth and Chao Peng on Sean Christopherson's series",
        Parts(file=FileWithInclusiveEnds),
        "punch-unbound",
        "bindings",
        Rule.RANGE,
    ),
    Slip(
        "begin-without-end",
        "the count of invalidations rises for a range that no consumer bound, and stays there",
        "kvm_rmem of Sean Christopherson's series",
        Parts(design=_designed(BindingsThatLeak)),
        "punch-unbound",
        "bindings",
        Rule.DEADLOCK,
    ),
    Slip(
        "no-retry",
        "a fault installs the result of get_page without checking for an invalidation since",
        "the retry protocol of KVM, without its check (mmu_invalidate_retry)",
        Parts(sequence=SequenceWithoutRetry),
        "punch-fault",
        "v10",
        Rule.WINDOW,
    ),
    Slip(
        "unregister-tells-all",
        "the deletion of one slot makes consumers give back the pages of every slot of the file",
        "the SNP trees of December 2022",
        Parts(file=FileThatTellsAll),
        "unregister-one-of-two",
        "v10",
        Rule.RANGE,
    ),
    Slip(
        "lazy-by-bits",
        "a huge page is freed once each part was punched, although the guest has touched one again",
        "Michael Roth, 31 October 2022, taken literally",
        Parts(design=_designed(LazyByItsBits)),
        "huge-page-in-parts",
        "lazy",
        Rule.LOST,
    ),
)

SLIPS: Final[dict[str, Slip]] = {slip.name: slip for slip in _ALL}
