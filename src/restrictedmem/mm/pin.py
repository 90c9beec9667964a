"""Pinning: pages stay at their physical address while a consumer has them.

The postings left this open. Pages are unevictable, but migration could move a page that a TD or an
SNP guest has mapped. The kernel's answer was an address space whose pages cannot migrate. User
space can take a reference that migration respects (FOLL_LONGTERM). Any process can get such a
reference by registering a buffer with an io_uring ring (docs/understand/pinning.md).
"""

from collections.abc import Iterator
from errno import ENOBUFS, ENOMEM, ENOSPC
from typing import Final, NamedTuple, final

from restrictedmem import sync
from restrictedmem.abi import io_uring
from restrictedmem.failure import failed
from restrictedmem.mm.backing import Allocator
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import PAGE_SHIFT, PageRange, pgoff_t

#: Pages of a buffer, 2 MiB. With ``io_uring.IORING_MAX_REG_BUFFERS`` of them a ring pins 32 GiB.
BLOCK: Final = 512


@final
class _PinnedRun(NamedTuple):
    """A run of pinned pages, and the buffer that pins them."""

    start: pgoff_t
    end: pgoff_t
    buffer: int


@final
class PinnedBacking:
    """A mapped backing that pins pages when it allocates them (``Allocator``).

    The first page that is taken of an aligned 2 MiB block brings the whole block, as one buffer. In
    two cases only the requested pages are taken: if the limit forbids the block, or if a part of it
    is being invalidated.
    """

    __slots__ = (
        "_address",
        "_free",
        "_inner",
        "_mutex",
        "_ring",
        "_runs",
        "_sequence",
        "_window",
        "unpinned",
    )

    def __init__(
        self,
        inner: Allocator,
        address: int,
        window: PageRange,
        sequence: InvalidationSequence | None = None,
    ) -> None:
        """Own ``inner``, whose pages of ``window`` lie from ``address`` on in this process.

        ``sequence`` is the file's, as for ``Pages``.

        Raises:
            OSError: EPERM or ENOSYS where there is no io_uring; EINVAL before Linux 5.19; ENOMEM.
        """
        self._inner = inner
        self._address = address
        self._window = window
        self._sequence = sequence
        self._mutex = sync.mutex()
        self._runs: dict[int, list[_PinnedRun]] = {}
        self._free = list(range(io_uring.IORING_MAX_REG_BUFFERS - 1, -1, -1))
        #: Pages that a punch beside them has left without a pin, because no buffer was left or the
        #: limit had been lowered.
        self.unpinned = 0
        try:
            self._ring = io_uring.io_uring_setup(1)
        except OSError as error:
            # The ring's own memory counts for RLIMIT_MEMLOCK, too.
            if error.errno != ENOMEM:
                raise
            raise _limited(error) from None
        try:
            io_uring.register_sparse_buffers(self._ring, io_uring.IORING_MAX_REG_BUFFERS)
        except BaseException:
            self._ring.close()
            raise

    def allocate(self, offset: int, length: int) -> None:
        """Allocate every page that an aligned range touches, and pin it (``Allocator``).

        Raises:
            OSError: ENOMEM over RLIMIT_MEMLOCK; ENOBUFS when the ring has no buffer left; what the
                backing raises.
        """
        span = PageRange.of_bytes(offset, length)
        with self._mutex:
            for block in range(span.start // BLOCK, (span.end - 1) // BLOCK + 1):
                self._allocate_block(block, _block_range(block).clip(span))

    def _allocate_block(self, block: int, part: PageRange) -> None:
        runs = self._runs.setdefault(block, [])
        whole = self._window.clip(_block_range(block))
        if not runs and not self._is_invalidated(whole):
            try:
                self._take(runs, whole)
            except OSError as error:
                if error.errno != ENOSPC or whole == part:
                    raise
            else:
                return
        for gap in list(_gaps(part, runs)):
            self._take(runs, gap)

    def _is_invalidated(self, span: PageRange) -> bool:
        """Say whether a part of a range is being invalidated.

        Such a part may have been released already. If it were pinned again, it would outlast the
        punch. An invalidation that begins after this check releases the part later, when the caller
        has dropped the mutex of ``Pages``.
        """
        return self._sequence is not None and self._sequence.busy_over(span.start, span.end)

    def _take(self, runs: list[_PinnedRun], span: PageRange) -> None:
        self._inner.allocate(span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)
        runs.append(self._pin(span.start, span.end))
        runs.sort()

    def _pin(self, start: pgoff_t, end: pgoff_t) -> _PinnedRun:
        if not self._free:
            raise failed("get_page", ENOBUFS, "the ring has no buffer left to pin with")
        address = self._address + ((start - self._window.start) << PAGE_SHIFT)
        try:
            io_uring.update_buffer(self._ring, self._free[-1], address, (end - start) << PAGE_SHIFT)
        except OSError as error:
            raise _limited(error) from None
        return _PinnedRun(start, end, self._free.pop())

    def release(self, offset: int, length: int) -> None:
        """Unpin an aligned range (``Allocator``).

        If the range cuts a buffer, the rest of that buffer is also unpinned for a moment.
        """
        span = PageRange.of_bytes(offset, length)
        with self._mutex:
            first, last = span.start // BLOCK, (span.end - 1) // BLOCK + 1
            # A consumer that ends releases the whole range of the largest possible file, but has
            # few blocks of it.
            blocks = (
                range(first, last)
                if last - first <= len(self._runs)
                else [block for block in self._runs if first <= block < last]
            )
            for block in blocks:
                if block in self._runs:
                    self._runs[block] = [
                        kept for run in self._runs[block] for kept in self._cut(run, span)
                    ]
                    if not self._runs[block]:
                        del self._runs[block]

    def _cut(self, run: _PinnedRun, span: PageRange) -> Iterator[_PinnedRun]:
        """Unpin the part of a run that lies in a range, and yield the runs that are left."""
        if run.end <= span.start or span.end <= run.start:
            yield run
            return
        io_uring.update_buffer(self._ring, run.buffer, 0, 0)
        self._free.append(run.buffer)
        for start, end in ((run.start, span.start), (span.end, run.end)):
            if start < end:
                try:
                    yield self._pin(start, end)
                except OSError:
                    # The owner's punch must work even if its neighbours lose their pin, so this is
                    # only counted.
                    self.unpinned += end - start

    @property
    def pinned(self) -> int:
        """Return the bytes pinned."""
        with self._mutex:
            return (
                sum(run.end - run.start for runs in self._runs.values() for run in runs)
                << PAGE_SHIFT
            )

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return the order that the inner backing returns (``Allocator``)."""
        return self._inner.order_of(pgoff)

    def close(self) -> None:
        """Unpin everything and close the backing."""
        self._ring.close()
        self._inner.close()


def _limited(error: OSError) -> OSError:
    return failed("get_page", error.errno, "cannot pin: RLIMIT_MEMLOCK, CAP_IPC_LOCK")


def _block_range(block: int) -> PageRange:
    return PageRange(pgoff_t(block * BLOCK), pgoff_t((block + 1) * BLOCK))


def _gaps(span: PageRange, runs: list[_PinnedRun]) -> Iterator[PageRange]:
    """Yield the parts of a range that are in no run; ``runs`` are in order."""
    start = span.start
    for run in runs:
        if start < min(run.start, span.end):
            yield PageRange(start, min(run.start, span.end))
        start = max(start, min(run.end, span.end))
    if start < span.end:
        yield PageRange(start, span.end)
