"""Pages in a memfd of hugetlbfs: huge pages of one size, set aside by the machine's administrator."""

import os
from collections.abc import Iterator
from errno import ENOENT, ENOSYS
from typing import Final, final

from restrictedmem.abi import memory
from restrictedmem.failure import failed
from restrictedmem.fd import OwnedFd
from restrictedmem.mm.folios import Piece, is_present, looking
from restrictedmem.mm.memfd import InMemfd, make_memfd
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PageRange, pgoff_t

# Bytes that are mapped at once to look at them; at least one huge page.
_AT_ONCE: Final = 1 << 30
#: Huge pages that one walk looks for at most.
_MOST_LOOKS: Final = 1 << 17


@final
class HugetlbBacking(InMemfd):
    """Huge pages of one order, 9 or 18 (``Backing``).

    As hugetlbfs has it: allocating takes every huge page that the range touches, punching a part of
    one frees nothing and zeroes that part, and what an allocation took before it found the pool
    empty stays.
    """

    __slots__ = ("_order",)

    def __init__(self, order: int, *, fd: OwnedFd | None = None, limit: int | None = None) -> None:
        """Make an empty backing, or take over a memfd (``InMemfd``)."""
        super().__init__(fd, limit)
        self._order = order

    @property
    def base_order(self) -> int:
        """Return the order of the huge pages."""
        return self._order

    @property
    def hugepage(self) -> bool:
        """Return False: there is nothing to make large."""
        return False

    @property
    def blksize(self) -> int:
        """Return the bytes of a huge page."""
        return 1 << self.base_order + PAGE_SHIFT

    def _make(self) -> OwnedFd:
        # It takes nothing from the pool yet.
        size = self.base_order + PAGE_SHIFT
        return make_memfd(self.blksize, memory.MFD_HUGETLB | size << memory.MFD_HUGE_SHIFT)

    def _allocate(self, offset: int, length: int) -> None:
        # ENOSPC from an empty pool; EINVAL beyond the last whole huge page.
        os.posix_fallocate(self.fileno(), offset, length)

    def _held_of(self, start: int, length: int) -> int:
        return sum(
            self.blksize
            for _, _, order in self.folios(PageRange.of_bytes(start, length))
            if order is not None
        )

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return the order of the huge pages, for a page in one that was taken (see ``Allocator``)."""
        start = (pgoff << PAGE_SHIFT) & -self.blksize
        with looking(self.fileno(), start, self.blksize, self.blksize) as mapping:
            if not is_present(mapping, 0):
                raise failed("get_page", ENOENT, "no page")
        return self.base_order

    def folios(self, span: PageRange) -> Iterator[Piece]:
        """Yield huge pages and holes (see ``Backing``).

        Costs a fault for each huge page that there may be, up to the last that the file has: no
        call counts those of a range.

        Raises:
            OSError: ENOSYS where that would be more than ``_MOST_LOOKS``; whoever punches must not
                keep the service for hours.
        """
        size, told, step = (
            1 << self.base_order,
            span.start,
            max(1 << self.base_order, _AT_ONCE >> PAGE_SHIFT),
        )
        found = 0
        # Where a range is longer than what lies before it, the last huge page may be found sooner
        # from the beginning on.
        first = 0 if len(span) > span.start else span.start & -size
        last = min(span.end, MAX_FILE_BYTES // self.blksize << self.base_order)
        looks = _MOST_LOOKS
        # Counted each time: pages that came meanwhile must not stand for others.
        while first < last and found < self.resident() // self.blksize:
            if looks <= 0:
                raise failed("folios", ENOSYS, "huge pages lie too far apart to be looked for")
            looks -= max(step >> self.base_order, 1)
            for pgoff in self._present(first, min(last, first + step)):
                found += 1
                if pgoff + size > span.start:
                    if told < pgoff:
                        yield told, pgoff_t(pgoff), None
                    told = pgoff_t(pgoff + size)
                    yield pgoff_t(pgoff), told, self.base_order
            first += step
        if told < span.end:
            yield told, span.end, None

    def _present(self, start: int, end: int) -> list[int]:
        """Return the first pages of the huge pages that are there, of a range that begins at one and may end inside one."""
        size = 1 << self.base_order
        length = (end - start + size - 1 & -size) << PAGE_SHIFT
        with looking(self.fileno(), start << PAGE_SHIFT, length, self.blksize) as mapping:
            return [
                start + (at >> PAGE_SHIFT)
                for at in range(0, length, self.blksize)
                if is_present(mapping, at)
            ]
