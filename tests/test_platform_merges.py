"""The entries of the direct map that come back when a guest's pages go.

They are no larger than the folio of the pages.
"""

from typing import Final

import pytest

from restrictedmem.platform.direct_map import PMD_ORDER, PUD_ORDER
from restrictedmem.platform.snp import Snp
from restrictedmem.units import PageRange, gfn_t, pgoff_t

BLOCKS: Final = 512
BLOCK: Final = 1 << PMD_ORDER
FILE: Final = 7


def blocks(first: int, last: int) -> PageRange:
    return PageRange(pgoff_t(first * BLOCK), pgoff_t(last * BLOCK))


def snp(prepared: int = BLOCKS) -> Snp:
    """Blocks of 2 MiB from the start of a file on, assigned to the guest as such."""
    made = Snp(unmap=True)
    made.prepare(FILE, blocks(0, prepared), gfn_t(0), PMD_ORDER)
    return made


def sizes(snp: Snp) -> dict[int, int]:
    return dict(snp.sev.direct_map.entries())


@pytest.mark.parametrize(
    ("order", "left", "merges"),
    [
        # What is of no folio is the host's again, and stays as it is.
        (None, {PMD_ORDER: BLOCKS}, 0),
        (0, {PMD_ORDER: BLOCKS}, 0),
        (PMD_ORDER, {PMD_ORDER: BLOCKS}, 0),
        (PUD_ORDER, {PUD_ORDER: 1}, 1),
    ],
)
def test_a_gib_that_goes_whole_comes_back_as_its_folio(
    order: int | None, left: dict[int, int], merges: int
) -> None:
    made = snp()
    made.invalidate(FILE, blocks(0, BLOCKS), order)
    assert sizes(made) == left
    assert made.sev.direct_map.merges[PUD_ORDER] == merges
    assert made.sev.direct_map.absent() == 0


@pytest.mark.parametrize("order", [PMD_ORDER, PUD_ORDER])
def test_the_last_block_of_a_gib_merges_no_more_than_its_folio(order: int) -> None:
    """All others are the host's: only the folio's order keeps them apart."""
    made = snp()
    made.invalidate(FILE, blocks(0, BLOCKS - 1), PMD_ORDER)
    made.invalidate(FILE, blocks(BLOCKS - 1, BLOCKS), order)
    assert sizes(made) == ({PMD_ORDER: BLOCKS} if order == PMD_ORDER else {PUD_ORDER: 1})


def test_a_gib_merges_at_its_end() -> None:
    """In the middle of the range, where all is the host's already, nothing does."""
    made = snp(1)
    made.invalidate(FILE, blocks(0, 1), PUD_ORDER)
    assert sizes(made) == {PMD_ORDER: BLOCKS}


def test_a_part_of_a_block_merges_nothing() -> None:
    made = Snp(unmap=True)
    span = PageRange(pgoff_t(0), pgoff_t(BLOCK - 1))
    made.prepare(FILE, span, gfn_t(0), 0)
    made.invalidate(FILE, span, PUD_ORDER)
    assert made.sev.direct_map.merges == {}
    assert made.sev.direct_map.absent() == 0
