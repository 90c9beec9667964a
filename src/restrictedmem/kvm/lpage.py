"""The largest block that may be mapped as one, as in ``kvm_lpage_info``.

It also has v10's bit for mixed attributes (v10 6/9).
"""

from enum import IntEnum
from typing import Final, final

from restrictedmem.units import gfn_t


class Level(IntEnum):
    """``PG_LEVEL_*``."""

    PAGE = 1
    """4 KiB."""
    PMD = 2
    """2 MiB."""
    PUD = 3
    """1 GiB."""

    def __init__(self, level: int) -> None:
        #: The order of the smallest folio that can be mapped at this level.
        self.order = 9 * (level - 1)
        #: ``KVM_PAGES_PER_HPAGE``.
        self.pages = 1 << self.order

    @classmethod
    def of_order(cls, order: int) -> "Level":
        """Return the largest level at which a folio of an order can be mapped."""
        return cls(min(order // 9, 2) + 1)


#: Levels of more than a page.
LARGE: Final = (Level.PMD, Level.PUD)
_NO_BLOCKS: Final = bytearray()
# In variables: to look up a member of an enumeration takes as long as to count blocks.
_PMD, _PUD = Level.PMD.order, Level.PUD.order
_PMD_ALONE, _BOTH = (Level.PMD,), (Level.PUD, Level.PMD)


@final
class LpageInfo:
    """Two facts about each 2 MiB and 1 GiB block of a slot.

    Does the block lie whole in the slot? Are its pages all private or all shared?
    """

    __slots__ = ("_attributes", "_base", "_end", "_levels", "_mixed")

    def __init__(
        self, base: gfn_t, end: gfn_t, starts: tuple[int, ...], attributes: bytearray
    ) -> None:
        """Describe pages ``base`` to ``end``, all with the same attribute so far.

        ``starts`` has the first page that each half shows of its file. A block cannot be mapped as
        one if its guest pages and its file pages are not equally aligned. ``attributes`` stays the
        slot's, with one byte a page.
        """
        self._base = base
        self._end = end
        self._attributes = attributes
        shifts = 0
        for start in starts:
            shifts |= start - base
        #: Levels at which guest pages and file pages are equally aligned, the largest first.
        self._levels: tuple[Level, ...] = (
            () if shifts & (1 << _PMD) - 1 else _PMD_ALONE if shifts & (1 << _PUD) - 1 else _BOTH
        )
        last = end - 1
        #: By level, a byte for each block.
        self._mixed = (
            _NO_BLOCKS,
            _NO_BLOCKS,
            bytearray((last >> _PMD) - (base >> _PMD) + 1),
            bytearray((last >> _PUD) - (base >> _PUD) + 1),
        )

    def _block(self, level: Level, gfn: int) -> int:
        return (gfn >> level.order) - (self._base >> level.order)

    def update(self, start: gfn_t, end: gfn_t) -> None:
        """Note that the attributes of a range were made equal.

        So the blocks between its first block and its last block are not mixed.
        """
        for level in LARGE:
            first, last = self._block(level, start), self._block(level, end - 1)
            mixed = self._mixed[level]
            mixed[first : last + 1] = bytes(last + 1 - first)
            for block in {first, last}:
                mixed[block] = self._is_mixed(level, block)

    def _is_mixed(self, level: Level, block: int) -> bool:
        """Say whether a block is mixed, as far as it lies in the slot."""
        start = (block + self._base // level.pages) * level.pages
        first, last = max(start, self._base), min(start + level.pages, self._end)
        step = 1
        if level is Level.PUD:
            children = self._mixed[Level.PMD][
                self._block(Level.PMD, first) : self._block(Level.PMD, last - 1) + 1
            ]
            if any(children):
                return True
            # None of the smaller blocks is mixed, so one page of each is enough.
            step = Level.PMD.pages
        pages = self._attributes[first - self._base : last - self._base : step]
        pages.append(self._attributes[last - 1 - self._base])
        return 0 < pages.count(0) < len(pages)

    def max_level(self, gfn: int) -> Level:
        """Return the largest level at which a page may be mapped.

        This is ``kvm_mmu_max_mapping_level`` without the order of the page's folio.
        """
        for level in self._levels:
            start = gfn & -level.pages
            if (
                self._base <= start
                and start + level.pages <= self._end
                and not self._mixed[level][self._block(level, gfn)]
            ):
                return level
        return Level.PAGE

    def mixed(self, level: Level) -> int:
        """Count the blocks whose pages are neither all private nor all shared."""
        return self._mixed[level].count(1)
