"""Which pages of a file or of a guest are private, kept as the pages at which that changes."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from errno import ENOMEM
from itertools import pairwise
from typing import Final, Generic, TypeVar, cast

#: How often the attribute may change along the pages; each change takes 8 bytes. A guest of 1 TiB
#: in which every other 1 MiB is shared has fewer changes.
_MAX_CHANGES: Final = 1 << 21

_P = TypeVar("_P", bound=int)

#: An update of the list of changes: the first index and the end index of the entries that go, and
#: the pages that come in their place.
Change = tuple[int, int, Sequence[int]]


class PageAttributes(Generic[_P]):
    """The attribute of every page, private or shared.

    One thread at a time may change it.
    """

    __slots__ = ("_changes", "_first")

    def __init__(self, *, private: bool) -> None:
        """Begin with every page private or shared."""
        self._first = private
        self._changes: list[int] = []

    def _after(self, changes: int) -> bool:
        """Say whether the pages behind so many changes are private."""
        return self._first ^ bool(changes & 1)

    def is_private(self, page: int) -> bool:
        """Say whether a page is private."""
        return self._after(bisect_right(self._changes, page))

    def prepare(self, start: _P, end: _P, *, private: bool) -> Change:
        """Return the update that makes a range private or shared, for ``apply``.

        The caller calls it before it changes anything else.

        Raises:
            OSError: ENOMEM.
        """
        first, last = bisect_left(self._changes, start), bisect_right(self._changes, end)
        edges = [
            *([start] if self._after(first) is not private else []),
            *([end] if self._after(last) is not private else []),
        ]
        if len(self._changes) + len(edges) - (last - first) > _MAX_CHANGES:
            raise OSError(ENOMEM, "too many ranges of different attributes")
        return first, last, edges

    def set(self, start: _P, end: _P, *, private: bool) -> None:
        """Make a range private or shared, as ``prepare`` and ``apply`` do."""
        self.apply(self.prepare(start, end, private=private))

    def apply(self, change: Change) -> None:
        """Make an update that ``prepare`` returned."""
        first, last, edges = change
        self._changes[first:last] = edges

    def private_runs(self, start: _P, end: _P) -> Iterator[tuple[_P, _P]]:
        """Yield the runs of private pages in a range."""
        before, after = bisect_right(self._changes, start), bisect_left(self._changes, end)
        if before >= after:
            # The attribute does not change in the range, as in most slots.
            if start < end and self._after(before):
                yield start, end
            return
        edges = [start, *(cast(_P, page) for page in self._changes[before:after]), end]
        for changes, (first, last) in enumerate(pairwise(edges), before):
            if self._after(changes):
                yield first, last
