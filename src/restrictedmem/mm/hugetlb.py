"""Pages in a memfd of hugetlbfs: huge pages of one size, set aside by the machine's administrator."""

import os
from collections.abc import Iterator
from errno import ENOENT, ENOSPC
from typing import Final, final

from restrictedmem import sync
from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd
from restrictedmem.mm.folios import Piece, is_present, looking
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PageRange, pgoff_t

_SECTOR: Final = 512
# Bytes that are mapped at once to look at them; at least one huge page.
_AT_ONCE: Final = 1 << 30


@final
class HugetlbBacking:
    """Huge pages of one order, 9 or 18 (``Backing``).

    As hugetlbfs has it: allocating takes every huge page that the range touches, punching a part of one frees nothing and zeroes that
    part, and what an allocation took before it found the pool empty stays.
    """

    __slots__ = ("_fd", "_mutex", "base_order", "limit")

    def __init__(self, order: int, *, fd: OwnedFd | None = None, limit: int | None = None) -> None:
        """Make an empty backing, or take over a memfd that another process made; see ``MemfdBacking``."""
        self.base_order = order
        self.limit = limit
        self._fd = fd
        self._mutex = sync.mutex()

    @property
    def hugepage(self) -> bool:
        """Return False: there is nothing to make large."""
        return False

    @property
    def blksize(self) -> int:
        """Return the bytes of a huge page."""
        return 1 << self.base_order + PAGE_SHIFT

    def fileno(self) -> int:
        """Return the memfd, made now when there was none; it takes nothing from the pool yet.

        Raises:
            OSError: EMFILE, ENFILE, ENOMEM; ENODEV where the kernel has no huge pages of this size.
        """
        if self._fd is None:
            with self._mutex:
                if self._fd is None:
                    size = self.base_order + PAGE_SHIFT
                    fd = memory.memfd_create("restrictedmem", memory.MFD_HUGETLB | size << memory.MFD_HUGE_SHIFT)
                    os.ftruncate(fd.fileno(), MAX_FILE_BYTES & -self.blksize)
                    self._fd = fd
        return self._fd.fileno()

    def allocate(self, offset: int, length: int) -> None:
        """Take every huge page that a byte range touches (see ``Allocator``).

        Raises:
            OSError: ENOSPC beyond the limit, before anything is taken, and from an empty pool; EINVAL beyond the last whole huge page.
        """
        self.charge(offset, length)
        os.posix_fallocate(self.fileno(), offset, length)

    def charge(self, offset: int, length: int) -> None:
        """Check that the huge pages a byte range touches may be held.

        Raises:
            OSError: ENOSPC beyond the limit.
        """
        limit = self.limit
        if limit is None:
            return
        first, last = offset // self.blksize, -(-(offset + length) // self.blksize)
        held, wanted = self.resident(), (last - first) * self.blksize
        if held + wanted <= limit:
            return
        span = PageRange(pgoff_t(first << self.base_order), pgoff_t(last << self.base_order))
        wanted -= sum(self.blksize for _, _, order in self.folios(span) if order is not None)
        if held + wanted > limit:
            raise OSError(ENOSPC, f"descriptor would hold {held + wanted} bytes, the limit is {limit}")

    def punch(self, offset: int, length: int) -> None:
        """Free the whole huge pages of an aligned range, and zero what it has of others (see ``Backing``)."""
        if self._fd is not None:
            memory.fallocate(self._fd.fileno(), memory.PUNCH, offset, length)

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return the order of the huge pages, for a page in one that was taken (see ``Allocator``)."""
        start = (pgoff << PAGE_SHIFT) & -self.blksize
        with looking(self.fileno(), start, self.blksize, self.blksize) as mapping:
            if not is_present(mapping, 0):
                raise OSError(ENOENT, "get_page: no page")
        return self.base_order

    def release(self, offset: int, length: int) -> None:
        """Do nothing: pages are not held (see ``Allocator``)."""

    def folios(self, span: PageRange) -> Iterator[Piece]:
        """Yield huge pages and holes (see ``Backing``).

        Costs a fault for each huge page that there may be, up to the last that the file has: no call counts those of a range.
        """
        size, told, step = 1 << self.base_order, span.start, max(1 << self.base_order, _AT_ONCE >> PAGE_SHIFT)
        left = self.resident() // self.blksize
        # Where a range is longer than what lies before it, the last huge page may be found sooner from the beginning on.
        first = 0 if len(span) > span.start else span.start & -size
        last = min(span.end, MAX_FILE_BYTES // self.blksize << self.base_order)
        while left and first < last:
            for pgoff in self._present(first, min(last, first + step)):
                left -= 1
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
            return [start + (at >> PAGE_SHIFT) for at in range(0, length, self.blksize) if is_present(mapping, at)]

    def resident(self) -> int:
        """Return the bytes held (see ``Backing``)."""
        return 0 if self._fd is None else os.fstat(self._fd.fileno()).st_blocks * _SECTOR

    def close(self) -> None:
        """Close the memfd; nothing is held from then on."""
        fd, self._fd = self._fd, None
        if fd is not None:
            fd.close()
