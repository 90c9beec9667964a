"""A model of the kernel's direct map: which entry maps each page, and whether it is present.

The map covers a modelled physical memory. Every GiB begins as one entry. A caller that needs other
rights for a part of an entry splits it (``set_memory_4k``, ``__split_large_page``). The kernel of
the mailing-list thread never merged entries again. So this model merges them only on request.
"""

from collections import Counter
from typing import Final, final

PTE_ORDER: Final = 0
PMD_ORDER: Final = 9
PUD_ORDER: Final = 18
_STEP: Final = 9

#: Entries by their number in physical memory. A value says whether the entry is present, or is the
#: table of 512 entries that a split has put in its place.
_Table = dict[int, "bool | _Table"]


@final
class DirectMap:
    """Entries of 1 GiB, 2 MiB and 4 KiB over every GiB that ``add`` was called for.

    Pages are pfns. Orders are those of entries.
    """

    __slots__ = ("_top", "merges", "removals", "restores", "splits")

    def __init__(self) -> None:
        self._top: _Table = {}
        #: How many entries of an order were split, merged, made absent and made present since the
        #: start.
        self.splits, self.merges, self.removals, self.restores = (Counter[int]() for _ in range(4))

    def add(self, pfn: int) -> None:
        """Map the GiB of a page by one entry, if it is not mapped yet."""
        self._top.setdefault(pfn >> PUD_ORDER, True)

    def lookup(self, pfn: int) -> tuple[int, bool]:
        """Return the order of the entry that covers a page, and whether it is present.

        This is ``lookup_address``.
        """
        table, order = self._table_of(pfn, PTE_ORDER)
        return order, bool(table[pfn >> order])

    def _table_of(self, pfn: int, order: int) -> tuple[_Table, int]:
        """Return the table with the entry that covers a page, and the entry's order.

        This is ``order``, or a larger order where no split has made such an entry.
        """
        table, found = self._top, PUD_ORDER
        while found > order and isinstance(below := table[pfn >> found], dict):
            table, found = below, found - _STEP
        return table, found

    def split(self, pfn: int, order: int) -> None:
        """Split the entry that covers a page until it is of ``order``.

        Each split makes 512 entries with the rights of the old one. With order 0 this is
        ``set_memory_4k``.
        """
        table, found = self._table_of(pfn, order)
        while found > order:
            present = table[pfn >> found]
            first = (pfn >> found) << _STEP
            below: _Table = dict.fromkeys(range(first, first + (1 << _STEP)), present)
            table[pfn >> found] = below
            self.splits[found] += 1
            table, found = below, found - _STEP

    def remove(self, pfn: int, order: int) -> None:
        """Unmap ``1 << order`` aligned pages (``set_direct_map_invalid_noflush``).

        An entry that covers more is split first.
        """
        self._set_present(pfn, order, present=False)
        self.removals[order] += 1

    def restore(self, pfn: int, order: int) -> None:
        """Map ``1 << order`` aligned pages again (``set_direct_map_default_noflush``).

        This merges no entries.
        """
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
        """Merge the 512 entries below an entry of ``order``; return whether it is one now.

        They are merged only if each is a present entry, not a table.
        """
        table, found = self._table_of(pfn, order)
        entry = table[pfn >> found]
        if isinstance(entry, dict):
            if any(below is not True for below in entry.values()):
                return False
            table[pfn >> order] = True
            self.merges[order] += 1
        return bool(table[pfn >> found])

    def entries(self) -> Counter[int]:
        """Count the entries by order, present or not."""
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
