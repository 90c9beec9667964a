"""The set of punched pages, for designs that remember them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, final

from restrictedmem.units import PageRange, pgoff_t

BLOCK_ORDER: Final = 9
BLOCK_PAGES: Final = 1 << BLOCK_ORDER


def round_out(span: PageRange, order: int = BLOCK_ORDER) -> PageRange:
    """Return the aligned blocks of an order that a range touches, as one range.

    The default order is 9 (2 MiB).
    """
    size = 1 << order
    return PageRange(pgoff_t(span.start & -size), pgoff_t(span.end + -span.end % size))


def blocks(span: PageRange, order: int = BLOCK_ORDER) -> Iterator[PageRange]:
    """Yield the aligned blocks that a range touches."""
    around, size = round_out(span, order), 1 << order
    for start in range(around.start, around.end, size):
        yield PageRange(pgoff_t(start), pgoff_t(start + size))


def outside(whole: PageRange, span: PageRange) -> Sequence[PageRange]:
    """Return the parts of ``whole`` before and after ``span``, which overlaps it."""
    if span.start <= whole.start and whole.end <= span.end:
        return ()
    parts = (
        PageRange(whole.start, max(whole.start, span.start)),
        PageRange(min(whole.end, span.end), whole.end),
    )
    return [part for part in parts if part]


@final
class Punched:
    """A set of pages that needs little memory where it is empty.

    It has one number of 512 bits for each block of 2 MiB that has any page of the set.
    """

    __slots__ = ("_bits",)

    def __init__(self) -> None:
        #: By the block's first page; no number is 0.
        self._bits: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(bits.bit_count() for bits in self._bits.values())

    def has(self, spans: Iterable[PageRange]) -> bool:
        """Say whether every page of some ranges is in the set."""
        return all(
            not _mask(block, span) & ~self._bits.get(block.start, 0)
            for span in spans
            for block in blocks(span)
        )

    def touched(self, span: PageRange) -> Sequence[PageRange]:
        """Return the blocks of 2 MiB that overlap a range and have a page in the set."""
        if not self._bits:
            return ()
        around = round_out(span)
        starts = range(around.start, around.end, BLOCK_PAGES)
        if len(starts) > len(self._bits):
            return [
                PageRange(pgoff_t(start), pgoff_t(start + BLOCK_PAGES))
                for start in self._bits
                if start in starts
            ]
        return [block for block in blocks(span) if block.start in self._bits]

    def add(self, span: PageRange) -> None:
        """Add pages."""
        for block in blocks(span):
            self._bits[block.start] = self._bits.get(block.start, 0) | _mask(block, span)

    def discard(self, span: PageRange) -> None:
        """Remove those pages of a range that are in the set."""
        for block in self.touched(span):
            left = self._bits[block.start] & ~_mask(block, span)
            if left:
                self._bits[block.start] = left
            else:
                del self._bits[block.start]


def _mask(block: PageRange, span: PageRange) -> int:
    """Return a number with a bit for each page of a block that lies in a range."""
    part = block.clip(span)
    return (1 << part.end - block.start) - (1 << part.start - block.start)
