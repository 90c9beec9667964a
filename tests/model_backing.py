"""A backing in memory, with folios of any order, and a consumer that notes what it hears."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import EIO, ENOSPC, ENOTSUP
from typing import final

from restrictedmem.mm.backing import Backing
from restrictedmem.mm.memfd import never
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

Heard = tuple[str, int, int, int | None]


@final
class ModelBacking:
    """Folios by their first page, and what pages hold that are not zero.

    ``splits`` says what a punch of a part of a folio does: it splits it, as tmpfs does, or clears
    the part, as hugetlbfs does.
    """

    def __init__(self, *, order: int = 0, splits: bool = True, limit: int | None = None) -> None:
        self.limit = limit
        self.hugepage = False
        self.blksize = PAGE_SIZE << order
        self.base_order = 0 if splits else order
        self.order = order
        self.splits = splits
        self.content: dict[int, int] = {}
        #: Outcomes of the next operations, first to last: True for a failure. All later ones
        #: succeed.
        self.failures: list[bool] = []
        #: How many folios may be looked at before looking fails; None for any number.
        self.looks: int | None = None
        #: A function to call in a punch.
        self.on_punch: Callable[[], object] = lambda: None
        #: The folios that were freed whole.
        self.freed: list[tuple[int, int]] = []
        self._folios: dict[int, int] = {}
        self._starts: list[int] = []

    def place(self, start: int, order: int, count: int = 1) -> None:
        """Put folios there, one after the other."""
        for first in range(start, start + (count << order), 1 << order):
            assert first % (1 << order) == 0
            assert all(
                found is None
                for *_, found in self._walk(
                    PageRange(pgoff_t(first), pgoff_t(first + (1 << order)))
                )
            )
            self._folios[first] = order
        self._starts = sorted(self._folios)

    def _step(self) -> None:
        if self.failures and self.failures.pop(0):
            raise OSError(EIO, "made to fail")

    def allocate(self, offset: int, length: int, abandoned: Callable[[], bool] = never) -> None:
        self._step()
        span = PageRange.around_bytes(offset, length)
        missing = [(start, end) for start, end, order in self._walk(span) if order is None]
        for start, end in missing:
            for page in range(start, end):
                if self._at(page) is None:
                    first = page & -(1 << self.order)
                    room = all(
                        o is None
                        for *_, o in self._walk(
                            PageRange(pgoff_t(first), pgoff_t(first + (1 << self.order)))
                        )
                    )
                    order = self.order if room else 0
                    if (
                        self.limit is not None
                        and self.resident() + (PAGE_SIZE << order) > self.limit
                    ):
                        raise OSError(ENOSPC, "over the limit")
                    self.place(page & -(1 << order), order)

    def punch(self, offset: int, length: int) -> None:
        self.on_punch()
        self._step()
        span = PageRange.of_bytes(offset, length)
        for start, end, order in list(self._walk(span)):
            gone = PageRange(start, end).clip(span)
            for page in [page for page in self.content if gone.start <= page < gone.end]:
                del self.content[page]
            if order is None or (len(gone) < end - start and not self.splits):
                continue
            del self._folios[start]
            if len(gone) == end - start:
                self.freed.append((start, end))
            for page in (page for page in range(start, end) if not gone.start <= page < gone.end):
                self._folios[page] = 0
        self._starts = sorted(self._folios)

    def _at(self, page: int) -> tuple[int, int] | None:
        index = bisect_right(self._starts, page) - 1
        if index < 0:
            return None
        start = self._starts[index]
        order = self._folios[start]
        return (start, order) if page < start + (1 << order) else None

    def order_of(self, pgoff: pgoff_t) -> int:
        found = self._at(pgoff)
        assert found is not None, f"no page {pgoff:#x}"
        return found[1]

    def release(self, offset: int, length: int) -> None:
        del offset, length

    def folios(self, span: PageRange) -> Iterator[tuple[pgoff_t, pgoff_t, int | None]]:
        for found in self._walk(span):
            if self.looks is not None:
                self.looks -= 1
                if self.looks < 0:
                    raise OSError(EIO, "made to fail")
            yield found

    def _walk(self, span: PageRange) -> Iterator[tuple[pgoff_t, pgoff_t, int | None]]:
        page = span.start
        while page < span.end:
            found = self._at(page)
            if found is None:
                index = bisect_right(self._starts, page)
                end = (
                    min(span.end, pgoff_t(self._starts[index]))
                    if index < len(self._starts)
                    else span.end
                )
                yield page, end, None
            else:
                start, order = found
                end = pgoff_t(start + (1 << order))
                yield pgoff_t(start), end, order
            page = end

    def renew(self) -> Callable[[], None]:
        self.close()
        return lambda: None

    def resident(self) -> int:
        return sum(PAGE_SIZE << order for order in self._folios.values())

    def fileno(self) -> int:
        raise OSError(ENOTSUP, "a model has no descriptor")

    def close(self) -> None:
        self._folios.clear()
        self._starts.clear()
        self.content.clear()


@final
@dataclass(eq=False)
class Recorder:
    """A consumer that takes pages, releases them when told to, and records the callbacks."""

    backing: Backing
    heard: list[Heard] = field(default_factory=list[Heard])
    held: set[int] = field(default_factory=set[int])
    #: The ranges it was asked to count.
    asked: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    #: A function to call in invalidate_start.
    at_start: Callable[[pgoff_t, pgoff_t], object] = lambda start, end: None

    def take(self, page: int) -> None:
        """Take a page (get_page)."""
        self.backing.allocate(page << PAGE_SHIFT, PAGE_SIZE)
        self.held.add(page)

    def _give_up(self, what: str, start: int, end: int, order: int | None) -> None:
        self.heard.append((what, start, end, order))
        self.held = {page for page in self.held if not start <= page < end}

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self._give_up("start", start, end, order)
        self.at_start(start, end)

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self._give_up("end", start, end, order)

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        self.heard.append(("error", start, end, None))

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        self.asked.append((start, end))
        return sum(start <= page < end for page in self.held)

    def callbacks(self) -> list[tuple[int, int, int | None]]:
        """Return what was heard since the last look; each start has its end, in the same order."""
        heard, self.heard = self.heard, []
        starts, ends = (
            [tuple(one[1:]) for one in heard if one[0] == what] for what in ("start", "end")
        )
        assert starts == ends, heard
        return [(start, end, order) for what, start, end, order in heard if what == "start"]
