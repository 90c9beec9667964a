"""The pages that a consumer takes: orders beside punches, pages put, kernels that cannot tell."""

from collections.abc import Iterator
from errno import EFAULT, ENOENT, ENOMEM, ENOTTY
from functools import partial
from typing import final

import pytest

from outcomes import Errno, outcome
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.folios import BLOCK
from restrictedmem.mm.pages import Pages
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t


def span(first: int, end: int) -> PageRange:
    return PageRange(pgoff_t(first), pgoff_t(end))


@pytest.fixture
def thp() -> Iterator[MemfdBacking]:
    made = MemfdBacking(hugepage=True)
    yield made
    made.close()


def test_an_order_is_remembered_until_a_part_of_its_block_is_invalidated(thp: MemfdBacking) -> None:
    window = Pages(thp, span(0, 3 * BLOCK))
    window.get_pages(span(0, 2 * BLOCK))
    everywhere = [pgoff_t(page) for page in (3, 8, BLOCK - 1, BLOCK)]
    assert [window.get_page(page) for page in everywhere] == [9, 9, 9, 9]
    assert window.invalidate_start(span(7, 8)) == 1
    # The folio is not split yet, but is about to be: nobody may count on it any more.
    assert thp.order_of(pgoff_t(3)) == 9
    assert [window.get_page(page) for page in everywhere] == [0, 0, 0, 9]
    assert window.get_page_noalloc(pgoff_t(3)) == 0
    thp.punch(7 << PAGE_SHIFT, PAGE_SIZE)
    assert [window.get_page(page) for page in everywhere] == [0, 0, 0, 9]
    window.invalidate_end(span(7, 8))
    assert [window.get_page(page) for page in everywhere] == [0, 0, 0, 9]
    # A punch that failed leaves a folio what it was.
    window.invalidate_start(span(BLOCK, BLOCK + 1))
    assert window.get_page(pgoff_t(BLOCK + 9)) == 0
    window.invalidate_end(span(BLOCK, BLOCK + 1))
    assert window.get_page(pgoff_t(BLOCK + 9)) == 9


def test_orders_of_other_blocks_stay_known(
    thp: MemfdBacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = Pages(thp, span(100, 3 * BLOCK))
    thp.allocate(0, 3 * BLOCK << PAGE_SHIFT)
    everywhere = [pgoff_t(page) for page in (150, BLOCK + 1, 2 * BLOCK + 1)]
    assert [window.get_page(page) for page in everywhere] == [9, 9, 9]
    asked: list[int] = []

    def order_of(_: MemfdBacking, pgoff: pgoff_t) -> int:
        asked.append(pgoff)
        return 0

    monkeypatch.setattr(MemfdBacking, "order_of", order_of)
    window.invalidate_start(span(2 * BLOCK, 2 * BLOCK + 1))
    assert [window.get_page(page) for page in everywhere] == [9, 9, 0]
    assert set(asked) <= {2 * BLOCK + 1}


def test_two_invalidations_of_one_block_are_both_waited_for(thp: MemfdBacking) -> None:
    window = Pages(thp, span(0, BLOCK))
    window.get_pages(span(0, BLOCK))
    window.invalidate_start(span(1, 2))
    window.invalidate_start(span(3, 4))
    window.invalidate_end(span(1, 2))
    assert window.get_page(pgoff_t(9)) == 0
    window.invalidate_end(span(3, 4))
    assert window.get_page(pgoff_t(9)) == 9


def test_a_punch_beside_the_window_but_in_its_block_counts(thp: MemfdBacking) -> None:
    window = Pages(thp, span(100, 200))
    thp.allocate(0, BLOCK << PAGE_SHIFT)
    assert window.get_page(pgoff_t(150)) == 9
    window.invalidate_start(span(300, 301))
    assert window.get_page(pgoff_t(150)) == 0
    thp.punch(300 << PAGE_SHIFT, PAGE_SIZE)
    window.invalidate_end(span(300, 301))
    assert (window.get_page(pgoff_t(150)), window.count(span(100, 200))) == (0, 1)


def test_noalloc_takes_what_is_there_and_nothing_else(thp: MemfdBacking) -> None:
    window = Pages(thp, span(0, 10))
    assert outcome(lambda: window.get_page_noalloc(pgoff_t(3))) == Errno(ENOENT)
    # Beyond a size that was never set, where the posted one found nothing.
    thp.allocate(4 << PAGE_SHIFT, PAGE_SIZE)
    assert (
        window.get_page_noalloc(pgoff_t(4)),
        window.get_page_noalloc(pgoff_t(4)),
        window.taken,
    ) == (0, 0, 1)
    assert (thp.resident(), window.count(span(0, 10))) == (PAGE_SIZE, 1)
    for outside in (-1, 10):
        assert outcome(partial(window.get_page_noalloc, pgoff_t(outside))) == Errno(EFAULT)
        assert outcome(partial(window.put_page, pgoff_t(outside))) == Errno(EFAULT)


@final
class Telling:
    """An allocator that notes what it is told, and fails to tell orders as it is asked to."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, int]] = []
        self.errno = 0
        self.asked = 0

    def allocate(self, offset: int, length: int) -> None:
        self.heard.append(("allocate", offset >> PAGE_SHIFT, length >> PAGE_SHIFT))

    def order_of(self, pgoff: pgoff_t) -> int:
        self.asked += 1
        if self.errno:
            raise OSError(self.errno, "made to fail")
        return 9

    def release(self, offset: int, length: int) -> None:
        self.heard.append(("release", offset >> PAGE_SHIFT, length >> PAGE_SHIFT))

    def close(self) -> None:
        pass


def test_what_is_put_or_invalidated_is_released() -> None:
    told = Telling()
    window = Pages(told, span(2, 10))
    window.get_page(pgoff_t(4))
    window.put_page(pgoff_t(4))
    window.put_page(pgoff_t(4))
    assert window.count(span(0, 99)) == 0
    window.get_page(pgoff_t(5))
    assert window.invalidate_start(span(0, 6)) == 1
    window.get_page(pgoff_t(5))
    window.invalidate_end(span(0, 6))
    assert window.count(span(0, 99)) == 1
    window.invalidate_start(span(10, 20))
    assert told.heard == [
        ("allocate", 4, 1),
        ("release", 4, 1),
        ("release", 4, 1),
        ("allocate", 5, 1),
        ("release", 2, 4),
        ("allocate", 5, 1),
    ]


def test_a_kernel_that_cannot_tell_says_pages_once() -> None:
    told = Telling()
    window = Pages(told, span(0, BLOCK))
    told.errno = ENOTTY
    assert [window.get_page(pgoff_t(page)) for page in range(3)] == [0, 0, 0]
    assert told.asked == 1
    assert outcome(lambda: window.get_page_noalloc(pgoff_t(0))) == Errno(ENOTTY)
    told.errno = ENOENT
    window.forget(span(0, BLOCK))
    assert [window.get_page(pgoff_t(page)) for page in range(3)] == [0, 0, 0]
    assert told.asked == 5
    told.errno = ENOMEM
    assert outcome(lambda: window.get_page(pgoff_t(0))) == Errno(ENOMEM)
    told.errno = 0
    assert window.get_page(pgoff_t(0)) == 9
