"""get_page: how a consumer takes pages of a restricted file."""

from errno import EFAULT
from typing import Final, final

from restrictedmem import sync
from restrictedmem.mm.backing import Allocator
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

_TAKEN: Final = 1


@final
class Pages:
    """The pages that one consumer takes from a window of a file; one byte of memory for each page of the window.

    Local to the consumer's process: a missing page is allocated in the memfd without a message to the service. Every page handed out
    reads as zero until the consumer writes it (the proposal left the host's old content in: docs/divergences.md).
    """

    __slots__ = ("_backing", "_mutex", "_start", "_state", "_window", "taken")

    def __init__(self, backing: Allocator, window: PageRange) -> None:
        self._backing = backing
        self._window = window
        self._start = window.start
        self._state = bytearray(len(window))
        self._mutex = sync.mutex()
        #: How many pages were handed out anew, since the start.
        self.taken = 0

    def get_page(self, pgoff: pgoff_t) -> int:
        """Take one page and return its order (``restrictedmem_get_page``); allocated when it is missing, whatever the file's size.

        The order is 0: docs/divergences.md says why, and what a larger folio changes.

        Raises:
            OSError: EFAULT outside the window; ENOSPC, ENOMEM from the backing.
        """
        index = pgoff - self._start
        if index < 0:
            raise OSError(EFAULT, "get_page: outside the window")
        with self._mutex:
            try:
                if not self._state[index]:
                    self._backing.allocate(pgoff << PAGE_SHIFT, PAGE_SIZE)
                    self._state[index] = _TAKEN
                    self.taken += 1
            except IndexError:
                raise OSError(EFAULT, "get_page: outside the window") from None
        return 0

    def get_pages(self, span: PageRange) -> None:
        """Take every page of a range with one call to the backing.

        Raises:
            OSError: EFAULT when a part lies outside the window; ENOSPC, ENOMEM from the backing.
        """
        if span.start < self._start or span.end > self._window.end:
            raise OSError(EFAULT, "get_pages: outside the window")
        first, last = span.start - self._start, span.end - self._start
        with self._mutex:
            missing = len(span) - self._state.count(_TAKEN, first, last)
            if missing:
                self._backing.allocate(span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)
                self._state[first:last] = bytes([_TAKEN]) * len(span)
                self.taken += missing

    def forget(self, span: PageRange) -> int:
        """Forget that pages were taken, and return how many were.

        Called at invalidate_start, and again at invalidate_end for what was taken in between.
        """
        span = self._window.clip(span)
        first, last = span.start - self._start, span.end - self._start
        with self._mutex:
            known = self._state.count(_TAKEN, first, last)
            self._state[first:last] = bytes(len(span))
        return known

    def count(self, span: PageRange) -> int:
        """Return how many pages of a range are taken: the references this consumer holds."""
        span = self._window.clip(span)
        with self._mutex:
            return self._state.count(_TAKEN, span.start - self._start, span.end - self._start)

    def close(self) -> None:
        """Close the backing."""
        self._backing.close()
