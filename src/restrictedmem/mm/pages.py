"""get_page: how a consumer takes pages of a restricted file."""

from contextlib import suppress
from errno import EAGAIN, EFAULT, ENOENT
from typing import Final, final

from restrictedmem import sync
from restrictedmem.abi.memory import PMD_ORDER
from restrictedmem.failure import failed
from restrictedmem.mm.backing import Allocator
from restrictedmem.mm.folios import NOT_TOLD
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

# What is known of a page: nothing, that it was taken, or (from _ORDER on) the order of its folio,
# too. And of a block.
_TAKEN: Final = 1
_ORDER: Final = 2
_UNKNOWN: Final = 0xFF
_WITHOUT_ORDER: Final = bytes([0]) + bytes([_TAKEN]) * 255


@final
class Pages:
    """The pages that one consumer takes from a window of a file; one byte of memory for each page of the window.

    Local to the consumer's process: a missing page is allocated in the memfd without a message to
    the service. Every page handed out reads as zero until the consumer writes it (the proposal left
    the host's old content in: docs/reference/divergences.md). A page that was taken is a reference,
    until it is put or the range is invalidated.

    Orders are asked of the backing once for each 2 MiB. Only a punch splits a folio, and it is told
    before (``invalidate_start``) and after (``invalidate_end``), for a part of the folio at least.
    From the first on no order of the blocks it touches is remembered, until the second they count
    as pages. So an order other than 0 was the truth when it was returned; and whoever makes one
    translation of a whole folio checks ``InvalidationSequence.retry`` over all of it, which notices
    every punch that began since.
    """

    __slots__ = (
        "_backing",
        "_changing",
        "_first_block",
        "_mutex",
        "_orders",
        "_sequence",
        "_start",
        "_state",
        "_window",
        "taken",
    )

    def __init__(
        self, backing: Allocator, window: PageRange, sequence: InvalidationSequence | None = None
    ) -> None:
        """Take pages of ``window``; ``sequence`` is the file's, without which nobody may punch it meanwhile."""
        self._backing = backing
        self._sequence = sequence
        self._window = window
        self._start = window.start
        self._state = bytearray(window.end - window.start)
        self._first_block = window.start >> PMD_ORDER
        self._orders = bytearray([_UNKNOWN]) * (
            (window.end - 1 >> PMD_ORDER) + 1 - self._first_block
        )
        # Blocks, as indices of _orders, whose pages are being invalidated.
        self._changing: list[range] = []
        self._mutex = sync.mutex()
        #: How many pages were handed out anew, since the start.
        self.taken = 0

    def get_page(self, pgoff: pgoff_t) -> int:
        """Take one page and return the order of its folio (``restrictedmem_get_page``); allocated if missing, whatever the file's size.

        The order says nothing about where in the folio the page lies, nor whether the rest of it is
        in the window.

        Raises:
            OSError: EAGAIN while the page is being invalidated; EFAULT outside the window; ENOSPC,
                ENOMEM from the backing.
        """
        index = pgoff - self._start
        if index < 0:
            raise failed("get_page", EFAULT, "outside the window")
        try:
            with self._mutex:
                state = self._state[index]
                return state - _ORDER if state >= _ORDER else self._take(pgoff, index)
        except IndexError:
            raise failed("get_page", EFAULT, "outside the window") from None

    def get_page_noalloc(self, pgoff: pgoff_t) -> int:
        """Take one page that is there, and return the order of its folio (``restrictedmem_get_page_noalloc`` of Michael Roth's tree).

        For those who clean up at a file's end. Theirs failed with EINVAL beyond the file's size, so
        of a file that was never sized it found nothing; here the size does not matter, as for
        get_page. A page that was only preallocated is not pinned by this.

        Raises:
            OSError: EAGAIN while the page is being invalidated; EFAULT outside the window; ENOENT
                for a hole; EACCES, ENOSYS, ENOTTY, EPERM where the kernel does not tell
                (docs/understand/folios.md).
        """
        if pgoff not in range(self._start, self._window.end):
            raise failed("get_page", EFAULT, "outside the window")
        with self._mutex:
            order = self._backing.order_of(pgoff)
            if not self._state[pgoff - self._start]:
                self._refuse_invalidated(pgoff, pgoff_t(pgoff + 1))
                self._state[pgoff - self._start] = _TAKEN
                self.taken += 1
            return 0 if self._changes(pgoff) else order

    def get_pages(self, span: PageRange) -> None:
        """Take every page of a range with one call to the backing, which may make folios of what the range covers whole.

        Raises:
            OSError: EAGAIN while a part is being invalidated; EFAULT when a part lies outside the
                window; ENOSPC, ENOMEM from the backing.
        """
        if span.start < self._start or span.end > self._window.end:
            raise failed("get_pages", EFAULT, "outside the window")
        first, last = span.start - self._start, span.end - self._start
        with self._mutex:
            missing = self._state.count(0, first, last)
            if missing:
                self._refuse_invalidated(span.start, span.end)
                self._backing.allocate(span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)
                self._forget_orders(self._blocks(span))
                self._state[first:last] = bytes([_TAKEN]) * len(span)
                self.taken += missing

    def put_page(self, pgoff: pgoff_t) -> None:
        """Drop the reference to one page, which stays in the file; without one, nothing happens.

        Raises:
            OSError: EFAULT outside the window.
        """
        if pgoff not in range(self._start, self._window.end):
            raise failed("put_page", EFAULT, "outside the window")
        with self._mutex:
            self._put(PageRange(pgoff, pgoff_t(pgoff + 1)))

    def invalidate_start(self, span: PageRange) -> int:
        """Let go of the pages of a range that is about to be punched, and return how many were taken."""
        with self._mutex:
            self._changing.append(self._blocks(span))
            return self._forget(span)

    def invalidate_end(self, span: PageRange) -> None:
        """Let orders of the blocks of a range be remembered again. No page is let go of: what is taken by now was taken after the hole."""
        # One without a start is for the checker to find, and harms no order.
        with self._mutex, suppress(ValueError):
            self._changing.remove(self._blocks(span))

    def forget(self, span: PageRange) -> int:
        """Let go of the pages of a range, and return how many were taken."""
        with self._mutex:
            return self._forget(span)

    def count(self, span: PageRange) -> int:
        """Return how many pages of a range are taken: the references this consumer holds."""
        span = self._window.clip(span)
        with self._mutex:
            return len(span) - self._state.count(
                0, span.start - self._start, span.end - self._start
            )

    def close(self) -> None:
        """Close the backing."""
        self._backing.close()

    # Preconditions of all below: _mutex held.

    def _take(self, pgoff: pgoff_t, index: int) -> int:
        """Take a page, if it is not taken yet, and find its order."""
        if not self._state[index]:
            self._refuse_invalidated(pgoff, pgoff_t(pgoff + 1))
            self._backing.allocate(pgoff << PAGE_SHIFT, PAGE_SIZE)
            self._state[index] = _TAKEN
            self.taken += 1
        if self._changes(pgoff):
            return 0
        block = (pgoff >> PMD_ORDER) - self._first_block
        order = self._orders[block]
        if order == _UNKNOWN:
            try:
                order = self._backing.order_of(pgoff)
            except OSError as error:
                if error.errno == ENOENT:
                    # Punched by now, as whoever checks for a retry finds out.
                    return 0
                if error.errno not in NOT_TOLD:
                    raise
                order = 0
            self._orders[block] = order
        self._state[index] = _ORDER + order
        return order

    def _refuse_invalidated(self, start: pgoff_t, end: pgoff_t) -> None:
        """Refuse to take pages that may be about to go: they would still count as taken when they are there no more.

        Whoever invalidates enters the sequence before it comes for the mutex
        (``invalidate_start``). So what passes here was taken after the operation, or is let go of
        there.
        """
        if self._sequence is not None and self._sequence.busy_over(start, end):
            raise failed("get_page", EAGAIN, "the page is being invalidated")

    def _changes(self, pgoff: pgoff_t) -> bool:
        """Say whether a part of a page's block is being invalidated."""
        block = (pgoff >> PMD_ORDER) - self._first_block
        return any(block in blocks for blocks in self._changing)

    def _forget(self, span: PageRange) -> int:
        self._forget_orders(self._blocks(span))
        return self._put(self._window.clip(span))

    def _put(self, span: PageRange) -> int:
        """Drop the references to a range in the window, and return how many there were."""
        first, last = span.start - self._start, span.end - self._start
        if first < last:
            # Not only where pages were taken: a backing may hold those around them, too.
            self._backing.release(span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)
        taken = last - first - self._state.count(0, first, last)
        self._state[first:last] = bytes(last - first)
        return taken

    def _blocks(self, span: PageRange) -> range:
        """Return which blocks a range touches, as indices of ``_orders``; one may be touched outside the window alone."""
        first = max(0, (span.start >> PMD_ORDER) - self._first_block)
        return range(
            first,
            max(first, min(len(self._orders), (span.end - 1 >> PMD_ORDER) + 1 - self._first_block)),
        )

    def _forget_orders(self, blocks: range) -> None:
        if self._orders.count(_UNKNOWN, blocks.start, blocks.stop) < len(blocks):
            self._orders[blocks.start : blocks.stop] = bytes([_UNKNOWN]) * len(blocks)
            shift = (self._first_block << PMD_ORDER) - self._start
            first, last = (
                max(0, (blocks.start << PMD_ORDER) + shift),
                (blocks.stop << PMD_ORDER) + shift,
            )
            self._state[first:last] = self._state[first:last].translate(_WITHOUT_ORDER)
