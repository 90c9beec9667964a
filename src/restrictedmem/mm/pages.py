"""get_page: a consumer takes pages of a restricted file."""

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

# States of a page: 0 is not taken, _TAKEN is taken. From _ORDER on, the page is taken and the state
# also says its folio's order. A block's order is an order or _UNKNOWN.
_TAKEN: Final = 1
_ORDER: Final = 2
_UNKNOWN: Final = 0xFF
_WITHOUT_ORDER: Final = bytes([0]) + bytes([_TAKEN]) * 255


@final
class Pages:
    """The pages that one consumer takes from a window of a file.

    It needs one byte of memory for each page of the window. It is local to the consumer's process.
    A missing page is allocated in the memfd without a message to the service. Every page that it
    returns reads as zero until the consumer writes to it. The proposal left the host's old content
    in the page (docs/reference/divergences.md). A taken page is a reference until it is put or its
    range is invalidated.

    This class asks the backing for the order once for each 2 MiB block. Only a punch splits a
    folio. Consumers hear of a punch before it (``invalidate_start``) and after it
    (``invalidate_end``), for at least a part of the folio. Between the two, this class remembers no
    order of the blocks that the punch touches, and they count as single pages.

    So an order above 0 was true when it was returned. A consumer that makes one translation of a
    whole folio must check ``InvalidationSequence.retry`` over the whole folio. That check notices
    every punch that has begun since.
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
        """Prepare to take pages of ``window``.

        ``sequence`` is the file's. Without it, no process may punch the file at the same time.
        """
        self._backing = backing
        self._sequence = sequence
        self._window = window
        self._start = window.start
        self._state = bytearray(window.end - window.start)
        self._first_block = window.start >> PMD_ORDER
        self._orders = bytearray([_UNKNOWN]) * (
            (window.end - 1 >> PMD_ORDER) + 1 - self._first_block
        )
        # Blocks, as indices of _orders, in which an invalidation is in progress.
        self._changing: list[range] = []
        self._mutex = sync.mutex()
        #: How many pages were newly taken since the start.
        self.taken = 0

    def get_page(self, pgoff: pgoff_t) -> int:
        """Take one page and return the order of its folio (``restrictedmem_get_page``).

        A missing page is allocated, whatever the file's size. The order does not say where in the
        folio the page lies. It does not say either whether the rest of the folio is in the window.

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
        """Take one present page and return the order of its folio.

        This is ``restrictedmem_get_page_noalloc`` of Michael Roth's tree, for a consumer that
        cleans up at a file's end. Roth's function failed with EINVAL beyond the file's size, so it
        found no page of a file that was never sized. Here the size does not matter, as for
        get_page. This call does not pin a page that was only preallocated.

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
        """Take every page of a range with one call to the backing.

        The backing may make folios of blocks that the range covers whole.

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
        """Drop the reference to one page, if there is one; the page stays in the file.

        Raises:
            OSError: EFAULT outside the window.
        """
        if pgoff not in range(self._start, self._window.end):
            raise failed("put_page", EFAULT, "outside the window")
        with self._mutex:
            self._put(PageRange(pgoff, pgoff_t(pgoff + 1)))

    def invalidate_start(self, span: PageRange) -> int:
        """Let go of the pages of a range before a punch, and return how many were taken."""
        with self._mutex:
            self._changing.append(self._blocks(span))
            return self._forget(span)

    def invalidate_end(self, span: PageRange) -> None:
        """Remember orders of the blocks of a range again.

        This drops no reference: a page that is taken by now was taken after the punch.
        """
        # An end without a start harms no order. ``check`` finds such an end.
        with self._mutex, suppress(ValueError):
            self._changing.remove(self._blocks(span))

    def forget(self, span: PageRange) -> int:
        """Let go of the pages of a range, and return how many were taken."""
        with self._mutex:
            return self._forget(span)

    def count(self, span: PageRange) -> int:
        """Return how many pages of a range this consumer has taken and so holds references to."""
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
                    # The page is punched by now. The caller finds this out when it checks for a
                    # retry.
                    return 0
                if error.errno not in NOT_TOLD:
                    raise
                order = 0
            self._orders[block] = order
        self._state[index] = _ORDER + order
        return order

    def _refuse_invalidated(self, start: pgoff_t, end: pgoff_t) -> None:
        """Refuse to take pages that a punch may be about to free.

        Such pages would still count as taken after they are gone. An invalidation enters the
        sequence before it comes for the mutex (``invalidate_start``). So a page that passes this
        check is either taken after the operation, or ``invalidate_start`` lets go of it.

        Raises:
            OSError: EAGAIN.
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
            # Release all of the range, not only taken pages. A backing may also hold pages around
            # them.
            self._backing.release(span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)
        taken = last - first - self._state.count(0, first, last)
        self._state[first:last] = bytes(last - first)
        return taken

    def _blocks(self, span: PageRange) -> range:
        """Return which blocks a range touches, as indices of ``_orders``.

        A range may touch a block only outside the window.
        """
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
