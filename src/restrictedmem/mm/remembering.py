"""Designs that remember what was punched: ``batched`` and ``lazy`` of Michael Roth's mails."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, final

from restrictedmem import sync
from restrictedmem.mm.backing import Backing
from restrictedmem.mm.design import Callback, Design, File
from restrictedmem.mm.notifier import Notifier
from restrictedmem.mm.punched import BLOCK_ORDER, Punched, blocks, outside, round_out
from restrictedmem.units import PAGE_SHIFT, PageRange, pgoff_t

#: A punch of at most so many blocks walks through all of them, one by one.
_MANY: Final = 1 << 12


class _Remembering(Design):
    """A design that remembers what was punched.

    Punches of one file run one at a time. Otherwise, if two punches covered the two halves of a
    block, neither would see that the block is complete.
    """

    __slots__ = ("_punched", "_turn")

    def __init__(self, *, teardown: bool) -> None:
        super().__init__(teardown=teardown)
        #: Written under the file's mutex, or with its semaphore held for writing.
        self._punched = Punched()
        self._turn = sync.mutex()

    @contextmanager
    def invalidation(self, file: File, span: PageRange) -> Generator[None]:
        """Do what ``Design.invalidation`` does, for one punch at a time.

        A consumer must not punch a file that it hears of, so no thread waits for a turn of its own.
        """
        with self._turn, super().invalidation(file, span):
            yield

    def allocate(self, file: File, offset: int, length: int, abandoned: Callable[[], bool]) -> None:
        """Allocate, and no longer count the pages as punched.

        The design does not learn what consumers allocate.
        """
        super().allocate(file, offset, length, abandoned)
        self._punched.discard(PageRange.around_bytes(offset, length))

    def forget(self) -> None:
        """Start again with no page punched."""
        self._punched = Punched()

    def _blocks(
        self, span: PageRange, order: int, there: Backing | None = None
    ) -> Iterable[PageRange]:
        """Return the blocks that a punch of ``span`` touches.

        Of more than ``_MANY`` blocks it returns only these: the blocks at both ends, blocks with
        pages that count as punched, and blocks that have pages in the backing ``there``.
        """
        around, size = round_out(span, order), 1 << order
        if len(around) <= _MANY << order:
            return blocks(span, order)
        starts = {around.start, pgoff_t(around.end - size)}
        starts.update(pgoff_t(block.start & -size) for block in self._punched.touched(span))
        if there is not None:
            starts.update(
                pgoff_t(start & -size)
                for start, _, found in there.folios(span)
                if found is not None
            )
        return [PageRange(start, pgoff_t(start + size)) for start in sorted(starts)]


@final
class Batched(_Remembering):
    """Parts of 2 MiB are freed without a callback; the last one gets one for all of the block.

    Michael Roth described it on 1 November 2022. It is sound only where an owner converts pages,
    and so unmaps them, before it punches them. A consumer that still maps a page does not hear that
    it goes.
    """

    name = "batched"
    __slots__ = ()

    def kept_out(self, file: File, span: PageRange) -> PageRange:
        """Return the blocks of 2 MiB that the punch touches."""
        return round_out(span)

    def callbacks(self, file: File, span: PageRange) -> Iterator[Callback]:
        """Yield the blocks that this punch completes.

        Each has order 9, which is true if the block was one folio.
        """
        for block in self._blocks(span, BLOCK_ORDER, file.backing):
            if self._punched.has(outside(block, span)):
                yield block.start, block.end, BLOCK_ORDER

    def punch(self, file: File, offset: int, length: int) -> None:
        """Free at once, and remember which part of each block is punched."""
        span = PageRange.of_bytes(offset, length)
        touched = self._blocks(span, BLOCK_ORDER)
        super().punch(file, offset, length)
        for block in touched:
            if self._punched.has(outside(block, span)):
                self._punched.discard(block)
            else:
                self._punched.add(block.clip(span))


@final
class Lazy(_Remembering):
    """A huge page is freed only when all of it was punched (Michael Roth, 31 October 2022).

    The design is for huge pages that cannot be split. Consumers hear exactly of the punch itself.
    If the punch covers a part of a huge page, the backing (hugetlbfs) clears that part. With its
    last part the huge page goes, and consumers hear of it whole, with its order. It stays while a
    consumer has a page of it that was punched before and then touched again. On a backing of small
    pages this design does what v10 does.
    """

    name = "lazy"
    __slots__ = ("_told",)

    def __init__(self, *, teardown: bool) -> None:
        super().__init__(teardown=teardown)
        #: The huge pages that consumers were told of during this punch.
        self._told: set[pgoff_t] = set()

    def kept_out(self, file: File, span: PageRange) -> PageRange:
        """Return all of each huge page that the punch touches."""
        return round_out(span, file.backing.base_order)

    def callbacks(self, file: File, span: PageRange) -> Iterator[Callback]:
        """Yield the punch, and then each huge page that goes with it."""
        self._told.clear()
        yield span.start, span.end, None
        if not file.backing.base_order:
            return
        touched = self._blocks(span, file.backing.base_order, file.backing)
        going = {folio.start for folio in touched if self._goes(file, outside(folio, span))}
        for start, end, order in file.backing.folios(span) if going else ():
            if order is not None and start in going:
                self._told.add(start)
                yield start, end, order

    def everything(self, file: File, span: PageRange) -> Iterable[Callback]:
        """Yield one callback for each folio: all that was punched in part goes now."""
        for start, end, order in file.backing.folios(span):
            yield max(start, span.start), min(end, span.end), order

    def _goes(self, file: File, rest: Sequence[PageRange]) -> bool:
        """Say whether the rest of a huge page was punched before and no consumer has it.

        Consumers have just let go of the part that the current punch covers.
        """
        return self._punched.has(rest) and not any(
            notifier.page_count(part.start, part.end)
            for part in rest
            for notifier in file.notifiers(part.start, part.end)
        )

    def punch(self, file: File, offset: int, length: int) -> None:
        """Free the huge pages that the punch covers, and those whose last part it punches.

        Consumers have let go of the pages of a punch that fails. So nobody could tell any more
        whether they had touched some of them again, and none of them counts as punched.
        """
        span, order = PageRange.of_bytes(offset, length), file.backing.base_order
        touched = self._blocks(span, order) if order else ()
        try:
            super().punch(file, offset, length)
        except OSError:
            self._punched.discard(span)
            raise
        for folio in touched:
            rest = outside(folio, span)
            told = folio.start in self._told or not file.notifiers(folio.start, folio.end)
            if rest and not (told and self._punched.has(rest)):
                self._punched.add(folio.clip(span))
                continue
            if rest:
                super().punch(file, folio.start << PAGE_SHIFT, len(folio) << PAGE_SHIFT)
            self._punched.discard(folio)

    def leave(self, file: File, notifier: Notifier, span: PageRange) -> None:
        """Forget the punches of each block that the leaving consumer has pages of.

        The consumer has touched such a block again after its punch. After it has left, no other
        process knows this.
        """
        if notifier.page_count(span.start, span.end):
            for block in self._punched.touched(span):
                if notifier.page_count(block.start, block.end):
                    self._punched.discard(block)
        super().leave(file, notifier, span)
