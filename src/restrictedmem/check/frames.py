"""A file's page frames without a kernel: the backing of the checker's worlds.

This module does to frames what tmpfs and hugetlbfs do, and nothing else. ``invariants`` decides who
may still use a frame. A frame is identified by its page and by a number that grows with each
allocation. So a frame that was freed and allocated again counts as another frame.
"""

from collections.abc import Callable, Hashable, Iterator
from errno import ENOMEM, ENOSPC
from typing import Final, Protocol, final

from restrictedmem.check.control import saw, touch
from restrictedmem.mm.memfd import never
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

HUGE: Final = 9
#: Pages of a huge folio.
HUGE_PAGES: Final = 1 << HUGE
_PRESENT: Final = bytes([0]) + bytes([1]) * 255
#: The name that the explorer has for all frames of a world together: two operations conflict unless
#: both only read.
MEMORY: Final = "memory"


class FrameObserver(Protocol):
    """A listener to changes of a file's frames (``invariants``); ranges are in file pages."""

    def before_free(self, span: PageRange) -> None:
        """Check that nobody uses frames that are about to be freed."""

    def freed(self, span: PageRange) -> None:
        """Check that nobody still wants the content of frames that were freed."""

    def zeroed(self, span: PageRange) -> None:
        """Check that nobody still wants the content of frames that were zeroed."""

    def dying(self) -> None:
        """Note that the last reference to the file is gone."""


@final
class Frames:
    """Frames of one file (``Backing`` for the shim, ``Allocator`` for a consumer).

    ``kind`` is one of these:

    - ``memfd``: single pages.
    - ``thp``: 2 MiB folios; a punch inside one splits it.
    - ``hugetlb``: 2 MiB folios; a punch inside one zeroes the range and frees nothing.
    """

    def __init__(self, observer: FrameObserver, npages: int, kind: str) -> None:
        self._observer = observer
        self.kind = kind
        #: By page: the number of its frame; 0 for a hole.
        self.numbers = bytearray(npages)
        self._births = bytearray(npages)
        #: By page: the value that the guest wrote last; a page that is not here is zero.
        self.content: dict[int, int] = {}
        #: First pages of the huge folios that are not split.
        self._huge: set[int] = set()
        self.limit: int | None = None
        self.base_order = HUGE if kind == "hugetlb" else 0
        self.hugepage = kind == "thp"
        self.blksize = PAGE_SIZE << (0 if kind == "memfd" else HUGE)
        #: Whether there is no memory (``exhausted``), and whether a punch fails (``refuses``).
        self.exhausted = False
        self.refuses = False

    def state(self) -> Hashable:
        """Return the state without the frames' numbers.

        Of the numbers, only this matters: which remembered numbers are equal to them (``against``).
        """
        return (
            self.against(self.numbers),
            tuple(sorted(self.content.items())),
            tuple(sorted(self._huge)),
            self.exhausted,
        )

    def against(self, remembered: bytes | bytearray, start: int = 0) -> bytes:
        """Return for each remembered number: 0 if 0, 1 if it is still valid, 2 if it is past.

        The numbers are those that the pages from ``start`` on had at some time.
        """
        present = self.numbers[start : start + len(remembered)]
        if remembered == present:
            return bytes(present.translate(_PRESENT))
        return bytes(
            number and 1 + (number != now) for number, now in zip(remembered, present, strict=True)
        )

    def fileno(self) -> int:
        """Return -1 for no descriptor (``Backing``): nobody maps the frames."""
        return -1

    def allocate(self, offset: int, length: int, abandoned: Callable[[], bool] = never) -> None:
        """Make pages present (``Backing``)."""
        # Two allocations commute, so this access counts as a read.
        touch(MEMORY, write=False)
        saw(None)
        first, last = offset >> PAGE_SHIFT, -(-(offset + length) >> PAGE_SHIFT)
        # Where a huge folio has room, the kernel allocates one, also beyond the range.
        folios = [] if self.kind == "memfd" else self._room(first, last)
        if folios:
            first, last = min(first, folios[0]), max(last, folios[-1] + HUGE_PAGES)
        missing = [pgoff for pgoff in range(first, last) if not self.numbers[pgoff]]
        if not missing:
            return
        if self.exhausted:
            raise OSError(ENOSPC, "allocate: no memory")
        self._huge.update(folios)
        for pgoff in missing:
            self._births[pgoff] += 1
            self.numbers[pgoff] = self._births[pgoff]

    def _room(self, first: int, last: int) -> list[int]:
        """Return the first pages of the empty blocks of 2 MiB that a range meets."""
        return [
            head
            for head in range(first & -HUGE_PAGES, last, HUGE_PAGES)
            if not any(self.numbers[head : head + HUGE_PAGES])
        ]

    def refill(self) -> None:
        """End the shortage of memory."""
        touch(MEMORY, write=True)
        saw(None)
        self.exhausted = False

    def punch(self, offset: int, length: int) -> None:
        """Free those frames of a range that the kernel would free (``Backing``)."""
        span = PageRange.of_bytes(offset, length)
        span = PageRange(pgoff_t(0), pgoff_t(len(self.numbers))).clip(span)
        if self.kind != "hugetlb":
            self._free(span)
            return
        whole = PageRange(
            pgoff_t(-(-span.start // HUGE_PAGES) * HUGE_PAGES), pgoff_t(span.end & -HUGE_PAGES)
        )
        if len(whole):
            self._zero(PageRange(span.start, whole.start))
            self._free(whole)
            self._zero(PageRange(whole.end, span.end))
        else:
            self._zero(span)

    def _free(self, span: PageRange) -> None:
        self._observer.before_free(span)
        touch(MEMORY, write=True)
        saw(None)
        if self.refuses:
            raise OSError(ENOMEM, "punch: no memory to split a folio")
        self._observer.freed(span)
        self.numbers[span.start : span.end] = bytes(len(span))
        self._huge -= {
            head for head in self._huge if span.start < head + HUGE_PAGES and head < span.end
        }
        self._forget(span)

    def _zero(self, span: PageRange) -> None:
        if len(span):
            touch(MEMORY, write=True)
            saw(None)
            self._observer.zeroed(span)
            self._forget(span)

    def _forget(self, span: PageRange) -> None:
        for pgoff in [pgoff for pgoff in self.content if span.start <= pgoff < span.end]:
            del self.content[pgoff]

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return the order of a page's folio (``Allocator``)."""
        touch(MEMORY, write=False)
        order = self.order(pgoff)
        saw(order)
        return order

    def order(self, pgoff: int) -> int:
        """Return the order of a page's folio; this is no step of an actor."""
        return HUGE if pgoff & -HUGE_PAGES in self._huge else 0

    def folios(self, span: PageRange) -> Iterator[tuple[pgoff_t, pgoff_t, int | None]]:
        """Yield folios and holes (``Backing``)."""
        touch(MEMORY, write=False)
        found = tuple(self._folios(span))
        saw(found)
        return iter(found)

    def _folios(self, span: PageRange) -> Iterator[tuple[pgoff_t, pgoff_t, int | None]]:
        pgoff: int = span.start
        while pgoff < span.end:
            head = pgoff & -HUGE_PAGES
            if head in self._huge:
                yield pgoff_t(head), pgoff_t(head + HUGE_PAGES), HUGE
                pgoff = head + HUGE_PAGES
            elif pgoff < len(self.numbers) and self.numbers[pgoff]:
                yield pgoff_t(pgoff), pgoff_t(pgoff + 1), 0
                pgoff += 1
            else:
                start = pgoff
                while pgoff < min(span.end, len(self.numbers)) and not self.numbers[pgoff]:
                    pgoff += 1
                # Beyond the last frame, the rest of the range is one hole.
                pgoff = span.end if pgoff >= len(self.numbers) else pgoff
                yield pgoff_t(start), pgoff_t(pgoff), None

    def release(self, offset: int, length: int) -> None:
        """Do nothing: frames are not pinned (``Allocator``)."""

    def renew(self) -> Callable[[], None]:
        """Free everything; the function returned does nothing (``Backing``)."""
        self.punch(0, len(self.numbers) << PAGE_SHIFT)
        return lambda: None

    def resident(self) -> int:
        """Return the number of allocated bytes (``Backing``)."""
        return (len(self.numbers) - self.numbers.count(0)) << PAGE_SHIFT

    def close(self) -> None:
        """Free everything (``Backing``)."""
        whole = PageRange(pgoff_t(0), pgoff_t(len(self.numbers)))
        self._observer.dying()
        self.refuses = False
        self._free(whole)
