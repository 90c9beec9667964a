"""Which guest pages are private, whatever slots there are: v9 5/8, v10 2/9 (KVM keeps an xarray, one entry a page)."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from errno import ENOMEM
from itertools import pairwise
from typing import Final, final

from restrictedmem.mm.notifier import Api
from restrictedmem.units import gfn_t

#: More than a guest of 1 TiB has when every other 1 MiB is shared; 8 bytes each.
_MAX_CHANGES: Final = 1 << 21

#: Which of the pages at which attributes change go, by their numbers, and those that come in their
#: place.
Change = tuple[int, int, list[gfn_t]]


@final
class Attributes:
    """The attribute of every guest page, kept as the pages at which it changes; written by the VM's thread alone."""

    __slots__ = ("_api", "_changes")

    def __init__(self, api: Api) -> None:
        """Make every page shared (v10) or private (v9)."""
        self._api = api
        self._changes: list[int] = []

    def _after(self, changes: int) -> bool:
        """Say what pages are after so many changes."""
        return (self._api is Api.V9) ^ bool(changes & 1)

    def is_private(self, gfn: int) -> bool:
        """Say what a page is."""
        return self._after(bisect_right(self._changes, gfn))

    def forbids_mmio(self, gfn: int) -> bool:
        """Say whether an access without a slot is a memory fault: of a private page in v10; v9 asked only where a slot was."""
        return self._api is Api.V10 and self.is_private(gfn)

    def prepare(self, start: gfn_t, end: gfn_t, *, private: bool) -> Change:
        """Return what makes a range private or shared, for ``apply`` before anything else is changed.

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

    def set(self, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Make a range private or shared, as ``prepare`` and ``apply`` do."""
        self.apply(self.prepare(start, end, private=private))

    def apply(self, change: Change) -> None:
        """Make the change."""
        first, last, edges = change
        self._changes[first:last] = edges

    def private_runs(self, start: gfn_t, end: gfn_t) -> Iterator[tuple[gfn_t, gfn_t]]:
        """Yield the runs of private pages in a range."""
        before, after = bisect_right(self._changes, start), bisect_left(self._changes, end)
        if before >= after:
            # No change in there, as in most slots.
            if start < end and self._after(before):
                yield start, end
            return
        edges = [start, *(gfn_t(gfn) for gfn in self._changes[before:after]), end]
        for changes, (first, last) in enumerate(pairwise(edges), before):
            if self._after(changes):
                yield first, last
