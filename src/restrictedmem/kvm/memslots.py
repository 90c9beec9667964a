"""The slots of one VM, found by number and by guest page in logarithmic time.

They are the counterpart of ``struct kvm_memslots``.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Final, final

from restrictedmem.kvm.memslot import Memslot
from restrictedmem.units import PageRange, pgoff_t

_BASE: Final = attrgetter("base_gfn")
_END: Final = attrgetter("end_gfn")


def _first(slot: Memslot) -> pgoff_t:
    return slot.memfd_half.window.start


@final
class Memslots:
    """Slots that do not overlap, neither in the guest nor in a guest_memfd.

    One thread changes them. Any thread may iterate over them at any time, and may look slots up
    while none is changed.
    """

    __slots__ = ("_by_gfn", "_by_number", "_by_pgoff")

    def __init__(self, slots: Iterable[Memslot] = ()) -> None:
        """Begin with some slots."""
        self._by_number: dict[int, Memslot] = {}
        self._by_gfn: list[Memslot] = []
        #: By the inode number of each guest_memfd: the slots that show its pages, in their order.
        self._by_pgoff: dict[int, list[Memslot]] = {}
        for slot in slots:
            self.add(slot)

    def add(self, slot: Memslot) -> None:
        """Add a slot. No other slot has its number, its guest pages or those of a guest_memfd."""
        self._by_gfn.insert(bisect_left(self._by_gfn, slot.base_gfn, key=_BASE), slot)
        self._by_number[slot.number] = slot
        if slot.in_place:
            shown = self._by_pgoff.setdefault(slot.memfd_half.ino, [])
            shown.insert(bisect_left(shown, _first(slot), key=_first), slot)

    def remove(self, slot: Memslot) -> None:
        """Remove a slot.

        Raises:
            KeyError: when it is not there.
        """
        del self._by_number[slot.number]
        del self._by_gfn[bisect_left(self._by_gfn, slot.base_gfn, key=_BASE)]
        if slot.in_place:
            shown = self._by_pgoff[slot.memfd_half.ino]
            del shown[bisect_left(shown, _first(slot), key=_first)]
            if not shown:
                del self._by_pgoff[slot.memfd_half.ino]

    def get(self, number: int) -> Memslot | None:
        """Return the slot with a number."""
        return self._by_number.get(number)

    def at(self, gfn: int) -> Memslot | None:
        """Return the slot that shows a guest page."""
        index = bisect_right(self._by_gfn, gfn, key=_BASE)
        if index and gfn < self._by_gfn[index - 1].end_gfn:
            return self._by_gfn[index - 1]
        return None

    def overlapping(self, start: int, end: int) -> list[Memslot]:
        """Return the slots with any of the guest pages ``start`` to ``end``.

        They are in the order of their addresses.
        """
        first = bisect_right(self._by_gfn, start, key=_END)
        return self._by_gfn[first : max(first, bisect_left(self._by_gfn, end, key=_BASE))]

    def shows(self, ino: int, span: PageRange) -> bool:
        """Say whether a slot shows any of these pages of a guest_memfd."""
        shown = self._by_pgoff.get(ino, [])
        before = bisect_left(shown, span.end, key=_first)
        return before > 0 and shown[before - 1].memfd_half.window.end > span.start

    def __iter__(self) -> Iterator[Memslot]:
        """Iterate over the slots that there are now, in the order they were added."""
        return iter(self._by_number.copy().values())

    def __len__(self) -> int:
        return len(self._by_number)
