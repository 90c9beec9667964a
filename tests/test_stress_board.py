"""The words that a random owner and the guest ``churn`` share."""

import ctypes
import mmap
import re
from collections.abc import Generator
from contextlib import closing
from typing import Final

import pytest

from churn_board import DEFINED, LANES, MAX_PAGES, MAX_VCPUS, SOURCE, Both, GuestBoard
from restrictedmem.protocol import guest_abi
from restrictedmem.stress import board
from restrictedmem.stress.board import Board, place
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.boot import SHARED_SIZE


@pytest.fixture
def both() -> Generator[Both]:
    with mmap.mmap(-1, SHARED_SIZE) as window:
        found = Both(window)
        with closing(found.owner):
            yield found


def test_owner_and_guest_agree_about_sizes() -> None:
    for name in ("LANES", "MAX_PAGES", "MAX_VCPUS", "EXTRA_BASE", "EXTRA_PAGES"):
        assert getattr(board, name) == DEFINED[name], name
    stated = re.search(r"sizeof\(struct board\) == (\d+)", SOURCE)
    assert stated is not None
    assert ctypes.sizeof(GuestBoard) == int(stated[1])


def test_the_owner_writes_the_words_that_the_guest_reads(both: Both) -> None:
    owner = both.owner
    assert both.nonzero() == {}
    owner.stop()
    owner.extra = 9
    assert both.nonzero() == {"stop": {0: 1}, "extra": {0: 9}}
    assert owner.extra == 9


def test_the_owner_reads_the_words_that_the_guest_writes(both: Both) -> None:
    both.write("extra_users", 3)
    assert (both.owner.extra_users, both.owner.extra) == (3, 0)
    last = MAX_VCPUS - 1
    for vcpu, steps in ((0, 1 << 40), (last, 5)):
        both.write("steps", steps, vcpu)
    assert [both.owner.steps(vcpu) for vcpu in (0, 1, last)] == [1 << 40, 0, 5]
    with pytest.raises(IndexError):
        both.owner.steps(MAX_VCPUS)


def test_an_exposed_page_has_an_odd_count_meanwhile(both: Both) -> None:
    last = MAX_PAGES - 1
    with both.owner.exposing(range(2, 4)):
        assert both.nonzero() == {"exposed": {2: 1, 3: 1}}
    with both.owner.exposing(range(last, MAX_PAGES)):
        assert both.nonzero() == {"exposed": {2: 2, 3: 2, last: 1}}


@pytest.mark.parametrize("number", range(LANES))
def test_a_lane_announces_a_punch_before_and_after(number: int, both: Both) -> None:
    lane, first = both.owner.lane(number), number * MAX_PAGES
    with lane.taking(range(3, 5)):
        assert both.nonzero() == {"begun": {first + 3: 1, first + 4: 1}}
    last = first + MAX_PAGES - 1
    with lane.taking(range(MAX_PAGES - 1, MAX_PAGES)):
        pass
    words = {first + 3: 1, first + 4: 1, last: 2}
    assert both.nonzero() == {"begun": words, "done": words}


def test_a_punch_that_fails_is_not_done(both: Both) -> None:
    lane = both.owner.lane(0)
    with pytest.raises(ZeroDivisionError), lane.taking(range(1)):
        raise ZeroDivisionError
    with lane.taking(range(1, 2)):
        pass
    assert both.nonzero() == {"begun": {0: 1, 1: 2}, "done": {1: 2}}


def test_the_next_process_of_a_lane_goes_on_with_its_generations(both: Both) -> None:
    for number, generations in ((0, 2), (1, 1)):
        lane = both.owner.lane(number)
        for page in range(generations):
            with lane.taking(range(page, page + 1)):
                pass
    for number, generation in ((0, 3), (1, 2)):
        with both.owner.lane(number).taking(range(7, 8)):
            pass
        assert both.guest.begun[number][7] == generation


def test_another_guest_finds_the_generations_and_nothing_else(both: Both) -> None:
    owner = both.owner
    with owner.exposing(range(4)), owner.lane(1).taking(range(1)):
        owner.extra = 9
    owner.stop()
    both.write("extra_users", 3)
    for vcpu in range(MAX_VCPUS):
        both.write("steps", 7, vcpu)
    owner.begin_anew(3)
    words = {MAX_PAGES: 1}
    # The guest has three pages.
    assert both.nonzero() == {"begun": words, "done": words, "exposed": {3: 2}}


def test_a_closed_board_leaves_the_window() -> None:
    with mmap.mmap(-1, SHARED_SIZE) as window:
        Board(window).close()
    assert window.closed


MIB_2: Final = 1 << 21


@pytest.mark.parametrize(
    ("pages", "image", "vcpus", "offset"),
    [(64, MIB_2, 1, MIB_2), (512, MIB_2 + 1, 4, 2 * MIB_2), (1, 5, 64, MIB_2)],
)
def test_the_pages_lie_behind_the_image_and_before_the_stacks(
    pages: int, image: int, vcpus: int, offset: int
) -> None:
    stacks = vcpus * 16 * PAGE_SIZE
    assert place(pages, image_end=guest_abi.PRIVATE_BASE + image, vcpus=vcpus) == (
        offset + pages * PAGE_SIZE + stacks,
        offset,
    )
