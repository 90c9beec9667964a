"""One fault of a private page: what it looks up before mmu_lock is taken.

It is the counterpart of ``struct kvm_page_fault``.
"""

from typing import Final, final

from restrictedmem.kvm.lpage import Level
from restrictedmem.kvm.memslot import MemfdHalf, Memslot
from restrictedmem.units import PageRange

#: Pages mapped at one fault, in an aligned block: 64 KiB, as much as the kernel maps around a file
#: fault (fault_around_bytes).
FAULT_AROUND: Final = 16


@final
class PageFault:
    """The pages for a fault to map: ``first`` to ``last`` of the slot, ``span`` of the file.

    ``get_large``, ``get_around`` and ``get`` take the pages (kvm_mmu_faultin_pfn). Before that they
    note a ``snapshot`` of the file's sequence (mmu_seq), which ``Mmu`` checks under mmu_lock.
    """

    __slots__ = ("first", "index", "level", "private", "slot", "snapshot", "span")

    first: int
    span: PageRange
    snapshot: int

    def __init__(self, slot: Memslot, index: int) -> None:
        """Begin a fault of one page of a slot that has a private half."""
        self.slot = slot
        self.index = index
        self.private: MemfdHalf = slot.memfd_half
        self.level = Level.PAGE

    @property
    def last(self) -> int:
        """The slot's page after the last page that has to be mapped."""
        return self.first + len(self.span)

    def _cover(self, first: int, last: int) -> None:
        self.first = first
        self.span = self.slot.span_of(first, last)

    def get_large(self) -> bool:
        """Take the largest block around the page that may be one translation.

        Return whether there is a block larger than a page. Alignment, attributes and the order of
        the page's folio allow a block. The order is true as long as nothing of the block is
        invalidated, and the snapshot tells that.
        """
        if not self.private.may_have_folios:
            return False
        highest = self.slot.lpage.max_level(self.slot.base_gfn + self.index)
        if highest is Level.PAGE:
            return False
        self.snapshot = self.private.sequence.snapshot()
        try:
            return self._get_block(highest)
        except OSError:
            # The page alone may be available, or fail with an errno of its own.
            return False

    def _get_block(self, highest: Level) -> bool:
        slot, pages = self.slot, self.private.pages
        expected = min(highest, Level.of_order(self.private.order))
        block = slot.span_of(*slot.block(self.index, expected))
        # As in shmem, a fault makes no folio of pages that came one by one, or that remain of a
        # folio that was split.
        if not pages.count(block):
            pages.get_pages(block)
        order = pages.get_page(slot.span_of(self.index, self.index + 1).start)
        level = min(highest, Level.of_order(order))
        while level > Level.PAGE:
            first, last = slot.block(self.index, level)
            if self._may_be_one(first, last):
                pages.get_pages(slot.span_of(first, last))
                self._cover(first, last)
                self.level = level
                return True
            level = Level(level - 1)
        return False

    def _may_be_one(self, first: int, last: int) -> bool:
        """Say whether a block is all private, with no page lost or protected for its code.

        ``lpage`` may be out of date.
        """
        slot, private = self.slot, self.private
        if private.failed and private.lost(slot.span_of(first, last)):
            return False
        return not slot.attributes.count(0, first, last) and not slot.has_code(first, last)

    def get_around(self) -> None:
        """Take the page and those around it that are alike; if that fails, the page alone.

        Raises:
            OSError: the errno of get_page; BlockingIOError while the page is being invalidated.
        """
        self.snapshot = self.private.sequence.snapshot()
        self._cover(*around(self.slot, self.index))
        self._leave_out_lost()
        try:
            self.private.pages.get_pages(self.span)
        except OSError:
            if len(self.span) == 1:
                raise
            # If the block is not available, the page alone may be.
            self._cover(self.index, self.index + 1)
            self.private.pages.get_pages(self.span)

    def get(self, first: int, last: int) -> None:
        """Take the pages ``first`` to ``last``, or ``first`` alone when one of them is lost.

        Raises:
            OSError: as ``get_around``.
        """
        self.snapshot = self.private.sequence.snapshot()
        self._cover(first, last)
        self._leave_out_lost()
        self.private.pages.get_pages(self.span)

    def _leave_out_lost(self) -> None:
        if self.private.failed and self.private.lost(self.span):
            self._cover(self.index, self.index + 1)


def around(slot: Memslot, index: int) -> tuple[int, int]:
    """Return the block of pages to map with a page, or the page alone.

    The block is aligned and in the slot. Its pages have the page's attribute, and none is mapped.
    """
    gfn = index + slot.base_gfn
    first = max(gfn & -FAULT_AROUND, slot.base_gfn) - slot.base_gfn
    last = min(gfn | FAULT_AROUND - 1, slot.end_gfn - 1) + 1 - slot.base_gfn
    if (
        slot.attributes.count(slot.attributes[index], first, last)
        == slot.entries.count(0, first, last)
        == last - first
    ):
        return first, last
    return index, index + 1
