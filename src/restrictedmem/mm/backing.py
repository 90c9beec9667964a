"""The memory under a restricted file."""

import mmap
import os
from collections.abc import Iterator
from errno import EINVAL, ENOSPC, ENOSYS
from typing import Final, Protocol, final

from restrictedmem import sync
from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd
from restrictedmem.units import MAX_FILE_BYTES, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

SECTOR: Final = 512


class Allocator(Protocol):
    """Where a consumer gets pages of a restricted file; offsets and lengths in bytes."""

    def allocate(self, offset: int, length: int) -> None:
        """Make every page that the range touches present; a page that was there keeps its content, a new one is zero.

        Raises:
            OSError: ENOSPC, ENOMEM, EINTR.
        """
        ...

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return the order of the folio that a page lies in now, as far as the kernel tells: 0, 9 or 18. The page is present.

        The truth only while nobody else punches or collapses; who takes pages checks for that afterwards (the retry protocol).
        """
        ...

    def release(self, offset: int, length: int) -> None:
        """Let go of the pages of an aligned range, before somebody else frees them: no reference keeps them where they are."""
        ...

    def close(self) -> None:
        """Free everything, as far as no consumer still maps it."""
        ...


class Backing(Allocator, Protocol):
    """Where a restricted file's pages lie, for the shim, which frees them too."""

    @property
    def limit(self) -> int | None:
        """The most bytes it may hold; None for no limit."""
        ...

    def punch(self, offset: int, length: int) -> None:
        """Free the pages of an aligned range; they read as zero when they are allocated again."""
        ...

    def folios(self, span: PageRange) -> Iterator[tuple[pgoff_t, pgoff_t, int | None]]:
        """Yield what a range is made of, in order and without a gap: first page, page after the last, order of each folio.

        Folios are whole even where the range begins or ends inside one. Neighbouring pages that are missing come as one run with None,
        clipped to the range.
        """
        ...

    def resident(self) -> int:
        """Return the bytes held, preallocated pages included."""
        ...

    def fileno(self) -> int:
        """Return the descriptor a consumer maps."""
        ...


@final
class MemfdBacking:
    """Pages in a memfd (tmpfs), as the proposal's inner file.

    The memfd's own size is the largest tmpfs takes, for the length of its life: a restricted file's size is a number of the shim alone,
    and get_page ignores it (``SGP_WRITE`` in v9 and v10). The memfd is made when the first page is, for most of many descriptors never
    have one.
    """

    __slots__ = ("_fd", "_mutex", "limit")

    def __init__(self, *, fd: OwnedFd | None = None, limit: int | None = None) -> None:
        """Make an empty backing, or take over a memfd that another process made.

        ``limit`` bounds the bytes held; every process that allocates must have the same.
        """
        self._fd = fd
        self._mutex = sync.mutex()
        self.limit = limit

    def fileno(self) -> int:
        """Return the memfd, made now when there was none.

        Raises:
            OSError: EMFILE, ENFILE, ENOMEM.
        """
        if self._fd is None:
            # A consumer may bind while the owner allocates for the first time: two memfds would be two contents.
            with self._mutex:
                if self._fd is None:
                    fd = memory.memfd_create("restrictedmem")
                    os.ftruncate(fd.fileno(), MAX_FILE_BYTES)
                    self._fd = fd
        return self._fd.fileno()

    def allocate(self, offset: int, length: int) -> None:
        """Make every page of the range present (see ``Backing``); ENOSPC beyond the limit, before anything is allocated."""
        self.charge(offset, length)
        # Never past the memfd's size, so posix_fallocate(3) is fallocate(2) with mode 0, a third cheaper than through ctypes.
        os.posix_fallocate(self.fileno(), offset, length)

    def charge(self, offset: int, length: int) -> None:
        """Check that the pages of a range may be held.

        Raises:
            OSError: ENOSPC beyond the limit.
        """
        limit = self.limit
        if limit is None:
            return
        fd = self.fileno()
        start = offset & ~PAGE_MASK
        wanted = -(-(offset + length - start) // PAGE_SIZE) * PAGE_SIZE
        held = os.fstat(fd).st_blocks * SECTOR
        if held + wanted <= limit:
            return
        try:
            wanted -= memory.resident_pages(fd, start, wanted) * PAGE_SIZE
        except OSError as error:
            # Before Linux 6.5 nothing counts preallocated pages of a range: all of it is charged.
            if error.errno != ENOSYS:
                raise
        if held + wanted > limit:
            raise OSError(ENOSPC, f"descriptor would hold {held + wanted} bytes, the limit is {limit}")

    def punch(self, offset: int, length: int) -> None:
        """Free the pages of an aligned range (see ``Backing``)."""
        if self._fd is not None:
            memory.fallocate(self._fd.fileno(), memory.PUNCH, offset, length)

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return 0 (see ``Allocator``)."""
        del pgoff
        return 0

    def release(self, offset: int, length: int) -> None:
        """Do nothing: pages are not held (see ``Allocator``)."""

    def folios(self, span: PageRange) -> Iterator[tuple[pgoff_t, pgoff_t, int | None]]:
        """Yield single pages and holes (see ``Backing``)."""
        fd = self.fileno()
        start = span.start
        for pgoff in range(span.start, span.end):
            if memory.resident_pages(fd, pgoff << PAGE_SHIFT, PAGE_SIZE):
                if start < pgoff:
                    yield start, pgoff_t(pgoff), None
                start = pgoff_t(pgoff + 1)
                yield pgoff_t(pgoff), start, 0
        if start < span.end:
            yield start, span.end, None

    def resident(self) -> int:
        """Return the bytes held (see ``Backing``)."""
        return 0 if self._fd is None else os.fstat(self._fd.fileno()).st_blocks * SECTOR

    def close(self) -> None:
        """Close the memfd; nothing is held from then on."""
        # An O_PATH descriptor goes on asking for the attributes of a file whose last open descriptor is closed.
        fd, self._fd = self._fd, None
        if fd is not None:
            fd.close()


@final
class MappedBacking:
    """A memfd as a consumer has it that maps it: pages come allocated, zeroed and mapped, by one call for all three."""

    __slots__ = ("_mapping", "_memfd", "_start")

    def __init__(self, memfd: MemfdBacking, mapping: mmap.mmap, start: int) -> None:
        """Own ``memfd``, but not the mapping of it, which begins at byte ``start`` of the file."""
        self._memfd = memfd
        self._mapping = mapping
        self._start = start

    def allocate(self, offset: int, length: int) -> None:
        """Make every page of an aligned range inside the mapping present (see ``Allocator``)."""
        self._memfd.charge(offset, length)
        try:
            self._mapping.madvise(memory.MADV_POPULATE_WRITE, offset - self._start, length)
        except OSError as error:
            # MADV_POPULATE_WRITE came with Linux 5.14.
            if error.errno != EINVAL:
                raise
            self._memfd.allocate(offset, length)

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return 0 (see ``Allocator``)."""
        return self._memfd.order_of(pgoff)

    def release(self, offset: int, length: int) -> None:
        """Do nothing: pages are not held (see ``Allocator``)."""

    def close(self) -> None:
        """Close the memfd."""
        self._memfd.close()
