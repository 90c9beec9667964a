"""Backing in a memfd of hugetlbfs: huge pages of one size, reserved by the administrator."""

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

# Bytes of the mapping in which the code looks for huge pages; at least one huge page.
_AT_ONCE: Final = 1 << 30
#: The most huge pages that one walk looks for.
_MOST_LOOKS: Final = 1 << 17


@final
class HugetlbBacking(InMemfd):
    """Huge pages of one order, 9 or 18 (``Backing``).

    It does what hugetlbfs does. Allocating takes every huge page that the range touches. Punching a
    part of a huge page frees nothing and zeroes that part. If an allocation finds the pool empty,
    the huge pages that it took before stay.
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
        """Return False: the pages are huge already."""
        return False

    @property
    def blksize(self) -> int:
        """Return the bytes of a huge page."""
        return 1 << self.base_order + PAGE_SHIFT

    def _make(self) -> OwnedFd:
        # This reserves nothing from the pool.
        size = self.base_order + PAGE_SHIFT
        return make_memfd(self.blksize, memory.MFD_HUGETLB | size << memory.MFD_HUGE_SHIFT)

    def _allocate(self, offset: int, length: int) -> None:
        # ENOSPC: the pool is empty. EINVAL: the range is beyond the last whole huge page.
        os.posix_fallocate(self.fileno(), offset, length)

    def _held_of(self, start: int, length: int) -> int:
        return sum(
            self.blksize
            for _, _, order in self.folios(PageRange.of_bytes(start, length))
            if order is not None
        )

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return the order of the huge pages, if the page lies in an allocated one.

        See ``Allocator``.
        """
        start = (pgoff << PAGE_SHIFT) & -self.blksize
        with looking(self.fileno(), start, self.blksize, self.blksize) as mapping:
            if not is_present(mapping, 0):
                raise failed("get_page", ENOENT, "the page is not allocated")
        return self.base_order

    def folios(self, span: PageRange) -> Iterator[Piece]:
        """Yield huge pages and holes (see ``Backing``).

        No system call counts the huge pages of a range. So this costs a fault for each huge page
        that might be present, up to the last huge page that the file has.

        Raises:
            OSError: ENOSYS where that would be more than ``_MOST_LOOKS`` faults. A punch must not
                keep the service busy for hours.
        """
        size, told, step = (
            1 << self.base_order,
            span.start,
            max(1 << self.base_order, _AT_ONCE >> PAGE_SHIFT),
        )
        found = 0
        # If the range is longer than the part of the file before it, walk from the beginning of the
        # file. That may find the last huge page sooner.
        first = 0 if len(span) > span.start else span.start & -size
        last = min(span.end, MAX_FILE_BYTES // self.blksize << self.base_order)
        looks = _MOST_LOOKS
        # Count the file's huge pages again each time. With an old count, huge pages that came
        # meanwhile would end the walk too early.
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
        """Return the first pages of the huge pages that are present in a range.

        The range begins at a huge page and may end inside one.
        """
        size = 1 << self.base_order
        length = (end - start + size - 1 & -size) << PAGE_SHIFT
        with looking(self.fileno(), start << PAGE_SHIFT, length, self.blksize) as mapping:
            return [
                start + (at >> PAGE_SHIFT)
                for at in range(0, length, self.blksize)
                if is_present(mapping, at)
            ]
