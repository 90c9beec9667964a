"""The attribute of each guest page, private or shared, whatever slots there are.

This follows v9 5/8 and v10 2/9. KVM keeps the attributes in an xarray, with one entry a page.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from errno import ENOMEM
from itertools import pairwise
from typing import Final, final

from restrictedmem.mm.notifier import Api
from restrictedmem.units import gfn_t

#: How often the attribute may change along the guest pages; each change takes 8 bytes. A guest of
#: 1 TiB in which every other 1 MiB is shared has fewer changes.
_MAX_CHANGES: Final = 1 << 21

#: An update of the list of changes: the first index and the end index of the entries that go, and
#: the pages that come in their place.
Change = tuple[int, int, list[gfn_t]]


@final
class Attributes:
    """The attributes of all guest pages, kept as a list of the pages at which they change.

    Only the VM's thread writes it.
    """

    __slots__ = ("_api", "_changes")

    def __init__(self, api: Api) -> None:
        """Begin with every page shared (v10) or private (v9)."""
        self._api = api
        self._changes: list[int] = []

    def _after(self, changes: int) -> bool:
        """Say whether the pages behind so many changes are private."""
        return (self._api is Api.V9) ^ bool(changes & 1)

    def is_private(self, gfn: int) -> bool:
        """Say whether a page is private."""
        return self._after(bisect_right(self._changes, gfn))

    def forbids_mmio(self, gfn: int) -> bool:
        """Say whether an access to a page without a slot is a memory fault.

        In v10 it is one if the page is private. v9 looked at attributes only where a slot was.
        """
        return self._api is Api.V10 and self.is_private(gfn)

    def prepare(self, start: gfn_t, end: gfn_t, *, private: bool) -> Change:
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

    def set(self, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Make a range private or shared, as ``prepare`` and ``apply`` do."""
        self.apply(self.prepare(start, end, private=private))

    def apply(self, change: Change) -> None:
        """Make an update that ``prepare`` returned."""
        first, last, edges = change
        self._changes[first:last] = edges

    def private_runs(self, start: gfn_t, end: gfn_t) -> Iterator[tuple[gfn_t, gfn_t]]:
        """Yield the runs of private pages in a range."""
        before, after = bisect_right(self._changes, start), bisect_left(self._changes, end)
        if before >= after:
            # The attribute does not change in the range, as in most slots.
            if start < end and self._after(before):
                yield start, end
            return
        edges = [start, *(gfn_t(gfn) for gfn in self._changes[before:after]), end]
        for changes, (first, last) in enumerate(pairwise(edges), before):
            if self._after(changes):
                yield first, last
