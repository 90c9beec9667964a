"""The slots of one VM, found by number and by guest page in logarithmic time.

They are the counterpart of ``struct kvm_memslots``.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Final, final

from restrictedmem.kvm.memslot import Memslot

_BASE: Final = attrgetter("base_gfn")
_END: Final = attrgetter("end_gfn")


@final
class Memslots:
    """Slots that do not overlap.

    One thread changes them. Any thread may iterate over them at any time, and may look slots up
    while none is changed.
    """

    __slots__ = ("_by_gfn", "_by_number")

    def __init__(self, slots: Iterable[Memslot] = ()) -> None:
        """Begin with some slots."""
        self._by_number: dict[int, Memslot] = {}
        self._by_gfn: list[Memslot] = []
        for slot in slots:
            self.add(slot)

    def add(self, slot: Memslot) -> None:
        """Add a slot. No other slot has its number or any of its guest pages."""
        self._by_gfn.insert(bisect_left(self._by_gfn, slot.base_gfn, key=_BASE), slot)
        self._by_number[slot.number] = slot

    def remove(self, slot: Memslot) -> None:
        """Remove a slot.

        Raises:
            KeyError: when it is not there.
        """
        del self._by_number[slot.number]
        del self._by_gfn[bisect_left(self._by_gfn, slot.base_gfn, key=_BASE)]

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

    def __iter__(self) -> Iterator[Memslot]:
        """Iterate over the slots that there are now, in the order they were added."""
        return iter(self._by_number.copy().values())

    def __len__(self) -> int:
        return len(self._by_number)
