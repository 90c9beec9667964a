"""The folios of a range.

Looking finds what was allocated, allocates nothing, and misses nothing that comes meanwhile.
"""

import os
import random
from errno import EACCES
from itertools import pairwise

import pytest

import hugetlb
from outcomes import Errno, in_child, outcome
from real_folios import (
    HUGETLB,
    ORDERS,
    Piece,
    allocate,
    backing_of,
    needs_pool,
    pieces,
    punch,
    span,
    thp,
)
from restrictedmem.abi import memory
from restrictedmem.abi.process import PR_SET_DUMPABLE, prctl
from restrictedmem.mm.backing import Memfd, MemfdBacking
from restrictedmem.mm.folios import BLOCK
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PAGE_SIZE, pgoff_t

__all__ = ["thp"]


@pytest.mark.parametrize("seed", range(6))
def test_folios_are_what_was_allocated_and_looking_allocates_nothing(seed: int) -> None:
    pick = random.Random(seed)
    backing = MemfdBacking(hugepage=True)
    present: dict[int, int] = {}
    for _ in range(12):
        first, count = pick.randrange(4 * BLOCK), pick.choice([1, 2, 3, 100, BLOCK, 2 * BLOCK])
        cut = {page // BLOCK for page in (first, first + count - 1)}
        if pick.random() < 0.6:
            allocate(backing, first, count)
            whole = range(-(-first // BLOCK), (first + count) // BLOCK)
            present |= {page: 0 for page in range(first, first + count) if page not in present}
            present |= {
                page: 9 for block in whole for page in range(block * BLOCK, (block + 1) * BLOCK)
            }
        else:
            punch(backing, first, count)
            present = {
                page: order for page, order in present.items() if not first <= page < first + count
            }
            present |= {
                page: 0
                for page in present
                if page // BLOCK in cut
                and sum(page // BLOCK == p // BLOCK for p in present) < BLOCK
            }
    held = backing.resident()
    first, end = sorted(pick.sample(range(6 * BLOCK), 2))
    found = pieces(backing, first, end)
    assert backing.resident() == held == len(present) * PAGE_SIZE
    assert [start for start, _, _ in found[1:]] == [stop for _, stop, _ in found[:-1]], "a gap"
    for start, stop, order in found:
        assert {present.get(page) for page in range(start, stop)} == {order}
        assert order != 9 or (stop - start == BLOCK and start % BLOCK == 0)
    assert (found[0][0] <= first, found[-1][1] >= end) == (True, True)
    assert all(one[2] is not None or other[2] is not None for one, other in pairwise(found)), (
        "two holes"
    )
    backing.close()


def test_folios_are_whole_where_a_range_begins_inside_one(thp: MemfdBacking) -> None:
    allocate(thp, 0, 2 * BLOCK)
    punch(thp, BLOCK + 3, 1)
    assert pieces(thp, 5, BLOCK + 5) == [
        (0, BLOCK, 9),
        *((page, page + 1, 0) for page in range(BLOCK, BLOCK + 3)),
        (BLOCK + 3, BLOCK + 4, None),
        (BLOCK + 4, BLOCK + 5, 0),
    ]
    assert pieces(thp, 5, 5) == []
    assert pieces(thp, 7 * BLOCK, 7 * BLOCK + 9) == [(7 * BLOCK, 7 * BLOCK + 9, None)]


@pytest.mark.requires("root")
def test_an_undumpable_process_without_root_tells_folios_too(thp: MemfdBacking) -> None:
    """As the service of an ordinary user is."""
    for block in (1, 2, 4):
        allocate(thp, block * BLOCK, BLOCK)
    for page in range(3 * BLOCK, 4 * BLOCK):
        allocate(thp, page, 1)
    # The rest are pages, those of a whole block too, and the last block's mapping is shorter than
    # two.
    assert [
        (start // BLOCK, order)
        for start, _, order in pieces(thp, 0, 5 * BLOCK)
        if not start % BLOCK
    ] == [
        *((0, None), (1, 9), (2, 9), (3, 0), (4, 9)),
    ]

    def look() -> tuple[object, list[Piece]]:
        os.setresuid(65534, 65534, 65534)
        prctl(PR_SET_DUMPABLE, 0)
        return outcome(lambda: thp.order_of(pgoff_t(BLOCK))), pieces(thp, 0, 5 * BLOCK)

    expected = Errno(EACCES), pieces(thp, 0, 5 * BLOCK)
    assert in_child(lambda: look() == expected) == "True"


def test_the_largest_file_is_one_hole_and_its_folios(thp: MemfdBacking) -> None:
    end = MAX_FILE_BYTES >> PAGE_SHIFT
    far = 1 << 40
    allocate(thp, far, BLOCK)
    allocate(thp, end - 2, 2)
    assert pieces(thp, 0, end) == [
        (0, far, None),
        (far, far + BLOCK, 9),
        (far + BLOCK, end - 2, None),
        (end - 2, end - 1, 0),
        (end - 1, end, 0),
    ]
    assert thp.order_of(pgoff_t(end - 1)) == 0
    allocate(thp, end - 511, 511)
    assert {order for *_, order in pieces(thp, end - 511, end)} == {0}


def test_looking_never_allocates_even_against_a_punch(thp: MemfdBacking) -> None:
    """A page that is punched between the count and the look stays punched."""
    allocate(thp, 0, BLOCK)
    found = thp.folios(span(0, BLOCK))
    real = memory.resident_pages
    counted: list[int] = []

    def count(fd: int, offset: int, length: int) -> int:
        counted.append(real(fd, offset, length))
        punch(thp, 0, BLOCK)
        return counted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "resident_pages", count)
        assert [order for *_, order in found] == [0] * BLOCK
    assert counted == [BLOCK]
    assert thp.resident() == 0


def test_a_page_that_comes_meanwhile_hides_no_other(thp: MemfdBacking) -> None:
    """A consumer's fault allocates one while the service counts."""
    allocate(thp, 300, 1)
    real, counts = memory.resident_pages, 0

    def count(fd: int, offset: int, length: int) -> int:
        nonlocal counts
        counts += 1
        found = real(fd, offset, length)
        if counts == 1:
            allocate(thp, 0, 1)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "resident_pages", count)
        found = [*thp.folios(span(0, BLOCK))]
    assert (300, 301, 0) in found


@needs_pool
def test_a_huge_page_that_comes_meanwhile_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with backing_of("hugetlb-2m") as backing:
        far = 1000 * BLOCK
        allocate(backing, far, BLOCK)
        real, counts = type(backing).resident, 0

        def resident(self: Memfd) -> int:
            nonlocal counts
            counts += 1
            found = real(self)  # pyright: ignore[reportArgumentType]
            if counts == 1:
                allocate(backing, 0, BLOCK)
            return found

        monkeypatch.setattr(type(backing), "resident", resident)
        found = [*backing.folios(span(0, far + BLOCK))]
        monkeypatch.undo()
    assert (far, far + BLOCK, 9) in found


@pytest.mark.parametrize("kind", HUGETLB)
def test_huge_pages_of_a_range(kind: str) -> None:
    order = ORDERS[kind]
    size = 1 << order
    with backing_of(kind, 3) as backing:
        assert pieces(backing, 0, 5) == [(0, 5, None)]
        allocate(backing, 2 * size - 1, 2)
        assert pieces(backing, 5, size + 5) == [(5, size, None), (size, 2 * size, order)]
        assert pieces(backing, 0, 1 << 50) == [
            (0, size, None),
            (size, 2 * size, order),
            (2 * size, 3 * size, order),
            (3 * size, 1 << 50, None),
        ]
        assert pieces(backing, 2 * size + 1, 2 * size + 3) == [(2 * size, 3 * size, order)]
        # Right behind one, and long enough to be looked at from the beginning of the file on.
        assert pieces(backing, 3 * size, 1 << 50) == [(3 * size, 1 << 50, None)]
        assert (backing.resident() >> PAGE_SHIFT, hugetlb.free_pages(size << PAGE_SHIFT)) == (
            2 * size,
            1,
        )
        assert (backing.base_order, backing.blksize) == (order, size << PAGE_SHIFT)
