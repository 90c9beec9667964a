"""Pages that stay where they are while a consumer has them.

The postings left an open end: pages are unevictable, but migration could move what a TD or an SNP
guest has mapped. The kernel's answer was an address space whose pages cannot migrate; from user
space it is a reference that migration respects (FOLL_LONGTERM), and one that anybody can take is
that of a buffer registered with a ring (docs/understand/pinning.md).
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

#: Pages of a buffer, 2 MiB: with ``io_uring.IORING_MAX_REG_BUFFERS`` of them a ring pins 32 GiB.
BLOCK: Final = 512


@final
class _PinnedRun(NamedTuple):
    """Pinned pages, and the buffer that pins them."""

    start: pgoff_t
    end: pgoff_t
    buffer: int


@final
class PinnedBacking:
    """A mapped backing whose pages are pinned as they are allocated (``Allocator``).

    The first page taken of an aligned 2 MiB brings all of it, as one buffer; where the limit
    forbids that, or a part is being invalidated, what was asked for alone.
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
        """Own ``inner``, whose pages of ``window`` lie from ``address`` on in this process; ``sequence`` is the file's, as for ``Pages``.

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
        #: Pages that lost their pin to a punch beside them, because no buffer was left or the limit
        #: had sunk.
        self.unpinned = 0
        try:
            self._ring = io_uring.io_uring_setup(1)
        except OSError as error:
            # Its own memory counts for the limit, too.
            if error.errno != ENOMEM:
                raise
            raise _limited(error) from None
        try:
            io_uring.register_sparse_buffers(self._ring, io_uring.IORING_MAX_REG_BUFFERS)
        except BaseException:
            self._ring.close()
            raise

    def allocate(self, offset: int, length: int) -> None:
        """Make every page that an aligned range touches present, and pin it (``Allocator``).

        Raises:
            OSError: ENOMEM over RLIMIT_MEMLOCK; ENOBUFS when the ring has no buffer left; what the
                backing says.
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
        """Say whether a part is being invalidated, which may have been released by now: pinned again, it would outlast the punch.

        What is invalidated from here on is released when the caller has let go of ``Pages``' mutex.
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
        """Unpin an aligned range (``Allocator``). The rest of a buffer that it cuts is unpinned for a moment, too."""
        span = PageRange.of_bytes(offset, length)
        with self._mutex:
            first, last = span.start // BLOCK, (span.end - 1) // BLOCK + 1
            # A consumer that goes lets go of the largest file there is, of which it has few blocks.
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
        """Unpin what of a run lies in a range; yields the runs that are left of it."""
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
                    # Nobody can be told: the owner's punch works, pinned neighbours or not.
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
        """Return what the backing says (``Allocator``)."""
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
