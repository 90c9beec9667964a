"""The kernel's direct map, of a modelled physical memory: through which entry the kernel reaches each page, and whether it does.

Every GiB begins as one entry. Who needs other rights for a part of it splits it (``set_memory_4k``,
``__split_large_page``); the kernel that the thread speaks of never merged one again, so that
putting entries together is done here only where somebody asks for it.
"""

from collections import Counter
from typing import Final, final

PTE_ORDER: Final = 0
PMD_ORDER: Final = 9
PUD_ORDER: Final = 18
_STEP: Final = 9

#: Entries by their number in physical memory: present or not, or the table of 512 that a split put
#: in its place.
_Table = dict[int, "bool | _Table"]


@final
class DirectMap:
    """Entries of 1 GiB, 2 MiB and 4 KiB over the GiB that ``add`` named. Pages are pfns, orders those of the entries."""

    __slots__ = ("_top", "merges", "removals", "restores", "splits")

    def __init__(self) -> None:
        self._top: _Table = {}
        #: How many entries of an order were split, put together, made absent and made present since
        #: the start.
        self.splits, self.merges, self.removals, self.restores = (Counter[int]() for _ in range(4))

    def add(self, pfn: int) -> None:
        """Map the GiB of a page by one entry, if it is not mapped yet."""
        self._top.setdefault(pfn >> PUD_ORDER, True)

    def lookup(self, pfn: int) -> tuple[int, bool]:
        """Return the order of the entry that covers a page, and whether it is present (``lookup_address``)."""
        table, order = self._table_of(pfn, PTE_ORDER)
        return order, bool(table[pfn >> order])

    def _table_of(self, pfn: int, order: int) -> tuple[_Table, int]:
        """Return the table with the entry of a page, and the entry's order: the one asked for, or above it where nothing was split."""
        table, found = self._top, PUD_ORDER
        while found > order and isinstance(below := table[pfn >> found], dict):
            table, found = below, found - _STEP
        return table, found

    def split(self, pfn: int, order: int) -> None:
        """Split what covers a page until its entry is of ``order`` (``set_memory_4k`` for 0); 512 entries with the rights of the one."""
        table, found = self._table_of(pfn, order)
        while found > order:
            present = table[pfn >> found]
            first = (pfn >> found) << _STEP
            below: _Table = dict.fromkeys(range(first, first + (1 << _STEP)), present)
            table[pfn >> found] = below
            self.splits[found] += 1
            table, found = below, found - _STEP

    def remove(self, pfn: int, order: int) -> None:
        """Unmap ``1 << order`` aligned pages (``set_direct_map_invalid_noflush``); an entry that covers more is split first."""
        self._set_present(pfn, order, present=False)
        self.removals[order] += 1

    def restore(self, pfn: int, order: int) -> None:
        """Map ``1 << order`` aligned pages again (``set_direct_map_default_noflush``), by the entries there are."""
        self._set_present(pfn, order, present=True)
        self.restores[order] += 1

    def _set_present(self, pfn: int, order: int, *, present: bool) -> None:
        self.split(pfn, order)
        table, _ = self._table_of(pfn, order)
        entry = table[pfn >> order]
        if isinstance(entry, dict):
            entry.update(dict.fromkeys(entry, present))
        else:
            table[pfn >> order] = present

    def merge(self, pfn: int, order: int) -> bool:
        """Put the 512 entries below one of ``order`` together; say whether there is one now: not unless all are present entries."""
        table, found = self._table_of(pfn, order)
        entry = table[pfn >> found]
        if isinstance(entry, dict):
            if any(below is not True for below in entry.values()):
                return False
            table[pfn >> order] = True
            self.merges[order] += 1
        return bool(table[pfn >> found])

    def entries(self) -> Counter[int]:
        """Count the entries there are by order, present or not."""
        return Counter(order for order, _ in self._leaves())

    def absent(self) -> int:
        """Count the pages that the kernel cannot reach."""
        return sum(1 << order for order, present in self._leaves() if not present)

    def _leaves(self) -> list[tuple[int, bool]]:
        found: list[tuple[int, bool]] = []
        tables = [(self._top, PUD_ORDER)]
        for table, order in tables:
            for entry in table.values():
                if isinstance(entry, dict):
                    tables.append((entry, order - _STEP))
                else:
                    found.append((order, entry))
        return found
