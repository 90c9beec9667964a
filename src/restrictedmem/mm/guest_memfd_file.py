"""A guest_memfd whose pages are converted where they are.

The source is the series "guest_memfd: In-place conversion support" (v8). The page
docs/understand/conversion-in-place.md has the design.
"""

import os
import stat
from collections.abc import Callable, Iterator
from errno import EINVAL, EIO, EOPNOTSUPP
from itertools import chain
from typing import Final, Protocol, final, runtime_checkable

from restrictedmem import sync
from restrictedmem.abi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from restrictedmem.abi.memory import FallocMode
from restrictedmem.failure import failed
from restrictedmem.mm import designs
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.memfd import never
from restrictedmem.mm.notifier import Notifier
from restrictedmem.mm.page_attributes import PageAttributes
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import MAX_FILE_BYTES, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

_FLAGS: Final = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
_KEEP_SIZE: Final = int(FallocMode.KEEP_SIZE)
_PUNCH_HOLE: Final = int(FallocMode.PUNCH_HOLE)
_NOTHING: Final = PageRange(pgoff_t(0), pgoff_t(0))


@runtime_checkable
class Converts(Protocol):
    """A notifier that hears of conversions, too."""

    def convert(self, start: pgoff_t, end: pgoff_t, *, private: bool) -> None:
        """Take pages for private or shared from now on.

        An invalidation of the pages is in progress, or no vCPU is in the guest.
        """
        ...


@final
class GuestMemfdFile(RestrictedFile):
    """A file of a fixed size, whose shared pages its owner can map.

    Lock order: ``converting`` comes before all other locks of the file, and ``_content`` after
    them. Nothing waits for another process while it holds ``_content``.
    """

    __slots__ = ("_attributes", "_content", "_leaving", "converting")

    def __init__(
        self,
        size: int,
        flags: int,
        inode: Inode,
        account: Callable[[int], None] | None = None,
        *,
        limit: int | None = None,
    ) -> None:
        """Make a file of ``size`` bytes; ``flags`` are ``GUEST_MEMFD_FLAG_*``.

        ``account`` is that of ``RestrictedFile``, and ``limit`` is the most bytes that the file may
        hold.

        Raises:
            OSError: EINVAL for unknown flags, for flags without MMAP, and for a size that is 0, not
                page aligned or larger than any file's.
        """
        if flags & ~_FLAGS or not flags & GUEST_MEMFD_FLAG_MMAP:
            raise failed("create_guest_memfd", EINVAL, f"flags {flags:#x}")
        if not 0 < size <= MAX_FILE_BYTES or size & PAGE_MASK:
            raise failed("create_guest_memfd", EINVAL, f"size {size:#x}")
        super().__init__(designs.make("v10"), MemfdBacking(limit=limit), inode, account)
        self.size = size
        inode.mode = stat.S_IFREG | 0o600
        #: Held over a whole conversion.
        self.converting = sync.mutex()
        #: Held while content is read or written, and while attributes change.
        self._content = sync.mutex()
        #: Written with both locks held.
        self._attributes = PageAttributes[pgoff_t](private=not flags & GUEST_MEMFD_FLAG_INIT_SHARED)
        #: Pages that are about to become private: they are written back, and not read any more.
        self._leaving = _NOTHING

    @property
    def blocks(self) -> int:
        """Return 0, as a guest_memfd shows no blocks."""
        return 0

    @property
    def nlink(self) -> int:
        """Return 1, as for any anonymous inode."""
        return 1

    @property
    def blksize(self) -> int:
        """Return the page size, whatever the machine's policy for memfds."""
        return PAGE_SIZE

    # The owner's operations.

    def ftruncate(self, length: int) -> None:
        """Refuse: the size is set once for all.

        Raises:
            OSError: EINVAL.
        """
        raise failed("ftruncate", EINVAL, "a guest_memfd has its size from its creation on")

    def fallocate_unheard(
        self, mode: int, offset: int, length: int, abandoned: Callable[[], bool] = never
    ) -> bool:
        """Do what ``RestrictedFile`` does, with the checks of kvm_gmem_fallocate.

        Raises:
            OSError: EOPNOTSUPP for a mode without KEEP_SIZE or with an unknown bit; EINVAL for a
                range that is not page aligned, and for an allocation beyond the end; else as
                ``RestrictedFile``.
        """
        if not mode & _KEEP_SIZE or mode & ~(_KEEP_SIZE | _PUNCH_HOLE):
            raise failed("fallocate", EOPNOTSUPP, f"mode {mode:#x}")
        if (offset | length) & PAGE_MASK:
            raise failed("fallocate", EINVAL, "range is not page aligned")
        if not mode & _PUNCH_HOLE and offset + length > self.size:
            raise failed("fallocate", EINVAL, "range ends beyond the file")
        return super().fallocate_unheard(mode, offset, length, abandoned)

    def convert(
        self, span: PageRange, *, private: bool, zero: bool, drop: Callable[[PageRange], None]
    ) -> None:
        """Make pages private or shared (``__kvm_gmem_set_attributes``).

        ``zero`` frees pages that change. ``drop`` takes pages out of the page cache; ``read`` and
        ``write_back`` are called meanwhile.

        Raises:
            OSError: ENOMEM for too many ranges of different attributes; what ``drop`` raises. The
                attributes are then as they were.
        """
        with self.converting:
            runs = tuple(self._others(span, private=private))
            if not runs:
                return
            change = self._attributes.prepare(span.start, span.end, private=private)
            hull = PageRange(runs[0].start, runs[-1].end)
            self._notifiers_sem.down_read()
            try:
                with self.design.invalidation(self, hull):
                    self._leave(hull if private else _NOTHING)
                    try:
                        drop(hull)
                        for run in runs if zero else ():
                            self.backing.punch(run.start << PAGE_SHIFT, len(run) << PAGE_SHIFT)
                        with self._content:
                            self._attributes.apply(change)
                    finally:
                        self._leave(_NOTHING)
                    for notifier in self.notifiers(hull.start, hull.end):
                        _tell(notifier, hull, private=private)
            finally:
                self._notifiers_sem.up_read()

    def _leave(self, span: PageRange) -> None:
        with self._content:
            self._leaving = span

    def _others(self, span: PageRange, *, private: bool) -> Iterator[PageRange]:
        """Yield the runs of pages whose attribute is not ``private``."""
        runs = list(self._attributes.private_runs(span.start, span.end))
        if not private:
            yield from (PageRange(start, end) for start, end in runs)
            return
        edges = (span.start, *chain.from_iterable(runs), span.end)
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            if start < end:
                yield PageRange(start, end)

    # The page cache's operations.

    def read(self, offset: int, length: int) -> bytes:
        """Return the content of shared pages.

        Under a limit, missing pages are allocated now, so that they can be written back later.

        Raises:
            OSError: EIO if a page is private or about to be; ENOSPC, ENOMEM. The kernel then asks
                for the page alone that was touched.
        """
        span = PageRange.around_bytes(offset, length)
        with self._content:
            if len(self._leaving.clip(span)):
                raise failed("read", EIO, "the page is about to be private")
            self._check_shared(span)
            if self.backing.limit is not None:
                self.backing.allocate(offset, length)
            return os.pread(self.backing.fileno(), length, offset)

    def write_back(self, offset: int, data: bytes) -> None:
        """Store the content of shared pages.

        Raises:
            OSError: EIO if a page is private; ENOSPC, ENOMEM.
        """
        with self._content:
            self._check_shared(PageRange.around_bytes(offset, len(data)))
            os.pwrite(self.backing.fileno(), data, offset)

    def _check_shared(self, span: PageRange) -> None:
        if any(self._attributes.private_runs(span.start, span.end)):
            raise failed("read", EIO, "the page is private")

    # The consumers' operations.

    def tell_attributes(self, notifier: Notifier, span: PageRange) -> None:
        """Tell a notifier which pages of a range are private; it takes the others for shared."""
        with self.converting:
            for start, end in self._attributes.private_runs(span.start, span.end):
                _tell(notifier, PageRange(start, end), private=True)

    def renew(self) -> None:
        """Refuse: the file stays with its first VM, as a guest_memfd is one VM's.

        Raises:
            OSError: EINVAL.
        """
        raise failed("bind", EINVAL, "the guest_memfd belongs to another VM")


def _tell(notifier: Notifier, span: PageRange, *, private: bool) -> None:
    assert isinstance(notifier, Converts)
    notifier.convert(span.start, span.end, private=private)
