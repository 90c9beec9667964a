"""The checker's model of a file's frames: what tmpfs and hugetlbfs do to them."""

from errno import ENOMEM, ENOSPC
from typing import Final

import pytest

from checked_worlds import touches
from outcomes import Errno, outcome
from planting import noting
from restrictedmem.check import control, frames
from restrictedmem.check.frames import HUGE_PAGES, MEMORY, Frames
from restrictedmem.units import PAGE_SIZE, PageRange, pgoff_t

MIB_2: Final = 512


def span(first: int, end: int) -> PageRange:
    return PageRange(pgoff_t(first), pgoff_t(end))


class Observer:
    """What a listener heard, and how many frames there were then."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []
        self.frames: Frames

    def note(self, what: str, *of: object) -> None:
        self.heard.append((what, *of, self.frames.resident() // PAGE_SIZE))

    def before_free(self, span: PageRange) -> None:
        self.note("before", span)

    def freed(self, span: PageRange) -> None:
        self.note("freed", span)

    def zeroed(self, span: PageRange) -> None:
        self.note("zeroed", span)

    def dying(self) -> None:
        self.note("dying")


def frames_of(npages: int, kind: str = "memfd") -> tuple[Frames, Observer]:
    observer = Observer()
    observer.frames = Frames(observer, npages, kind)
    return observer.frames, observer


def allocate(of: Frames, first: int, end: int) -> None:
    of.allocate(first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def punch(of: Frames, first: int, end: int) -> None:
    of.punch(first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def present(of: Frames) -> list[tuple[int, int]]:
    """Return the ranges of pages that are there."""
    edges = [
        page
        for page in range(len(of.numbers) + 1)
        if bool(of.numbers[page : page + 1].strip(b"\0"))
        is not bool(page and of.numbers[page - 1 : page].strip(b"\0"))
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the explorer hears of accesses to frames."""
    heard: list[tuple[object, ...]] = []
    monkeypatch.setattr(frames, "touch", touches(heard))
    monkeypatch.setattr(frames, "saw", noting(heard, "saw"))
    return heard


READ: Final = [(MEMORY, "read"), ("saw", None)]
WRITE: Final = [(MEMORY, "write"), ("saw", None)]


def test_a_frame_that_is_made_again_is_another() -> None:
    made, _ = frames_of(4)
    allocate(made, 1, 3)
    assert bytes(made.numbers) == bytes([0, 1, 1, 0])
    punch(made, 2, 3)
    allocate(made, 0, 3)
    assert bytes(made.numbers) == bytes([1, 1, 2, 0])
    assert made.resident() == 3 * PAGE_SIZE


def test_parts_of_pages_are_whole_pages() -> None:
    made, _ = frames_of(4)
    made.allocate(PAGE_SIZE - 1, 2)
    assert present(made) == [(0, 2)]
    made.allocate(3 * PAGE_SIZE, 1)
    assert present(made) == [(0, 2), (3, 4)]


def test_numbers_are_compared_with_those_of_now() -> None:
    made, _ = frames_of(5)
    allocate(made, 0, 4)
    before = bytes(made.numbers)
    assert made.against(before) == bytes([1, 1, 1, 1, 0])
    punch(made, 1, 3)
    allocate(made, 2, 3)
    assert made.against(before) == bytes([1, 2, 2, 1, 0])
    assert made.against(before[2:4], 2) == bytes([2, 1])
    assert made.against(made.numbers[2:4], 2) == bytes([1, 1])
    with pytest.raises(ValueError, match="zip"):
        made.against(before, 1)
    assert made.against(b"\0", 4) == made.against(b"\0", 0) == b"\0"


def test_the_state_has_what_matters_and_no_number() -> None:
    made, other = frames_of(2 * MIB_2, "thp")[0], frames_of(2 * MIB_2, "thp")[0]
    assert made.state() == other.state()
    allocate(made, 0, 1)
    allocate(other, 0, 1)
    punch(other, 0, 1)
    punch(other, 0, MIB_2)
    allocate(other, 0, 1)
    # The numbers differ, and nothing that matters.
    assert made.numbers != other.numbers
    assert made.state() == other.state()
    states = {made.state()}
    made.exhausted = True
    states.add(made.state())
    made.content[3], made.content[1] = 5, 6
    states.add(made.state())
    allocate(made, MIB_2, MIB_2 + 1) if not made.exhausted else made.refill()
    states.add(made.state())
    punch(made, 5, 6)
    states.add(made.state())
    assert len(states) == 5
    other.content = {1: 6, 3: 5}
    punch(other, 5, 6)
    assert made.state() == other.state()


# Single pages.


def test_a_punch_frees_its_pages_alone(steps: list[tuple[object, ...]]) -> None:
    made, observer = frames_of(5)
    allocate(made, 0, 5)
    assert steps == READ
    steps.clear()
    made.content = dict.fromkeys(range(5), 7)
    punch(made, 1, 3)
    assert present(made) == [(0, 1), (3, 5)]
    assert list(made.content) == [0, 3, 4]
    assert observer.heard == [("before", span(1, 3), 5), ("freed", span(1, 3), 5)]
    assert steps == WRITE
    # A hole may be larger than the file.
    punch(made, 4, 9)
    assert present(made) == [(0, 1), (3, 4)]
    assert observer.heard[2] == ("before", span(4, 5), 3)


def test_a_punch_that_fails_frees_nothing() -> None:
    made, observer = frames_of(2)
    allocate(made, 0, 2)
    made.refuses = True
    assert outcome(lambda: punch(made, 0, 1)) == Errno(ENOMEM)
    assert present(made) == [(0, 2)]
    assert observer.heard == [("before", span(0, 1), 2)]
    made.close()
    assert observer.heard[1:] == [
        ("dying", 2),
        ("before", span(0, 2), 2),
        ("freed", span(0, 2), 2),
    ]
    assert made.resident() == 0


def test_a_shortage_meets_only_what_is_missing(steps: list[tuple[object, ...]]) -> None:
    made, _ = frames_of(3)
    allocate(made, 0, 1)
    made.exhausted = True
    allocate(made, 0, 1)
    assert outcome(lambda: allocate(made, 0, 2)) == Errno(ENOSPC)
    assert present(made) == [(0, 1)]
    steps.clear()
    made.refill()
    assert steps == WRITE
    allocate(made, 0, 2)
    assert present(made) == [(0, 2)]


def test_a_file_that_is_renewed_is_empty() -> None:
    made, _ = frames_of(3)
    allocate(made, 0, 3)
    made.renew()()
    assert present(made) == []


@pytest.mark.parametrize(
    ("kind", "base_order", "hugepage", "blksize"),
    [
        ("memfd", 0, False, PAGE_SIZE),
        ("thp", 0, True, MIB_2 * PAGE_SIZE),
        ("hugetlb", 9, False, MIB_2 * PAGE_SIZE),
    ],
)
def test_a_kind_says_what_the_real_file_would(
    kind: str, base_order: int, hugepage: bool, blksize: int
) -> None:
    made, _ = frames_of(MIB_2, kind)
    assert (made.base_order, made.hugepage, made.blksize) == (base_order, hugepage, blksize)
    assert (made.fileno(), made.limit, made.exhausted, made.refuses) == (-1, None, False, False)
    assert HUGE_PAGES == MIB_2


# Huge folios.

FOLIOS: Final = 3 * MIB_2


@pytest.mark.parametrize("kind", ["thp", "hugetlb"])
@pytest.mark.parametrize(
    ("first", "end", "there"),
    [
        (0, 1, (0, MIB_2)),
        (MIB_2 - 1, MIB_2, (0, MIB_2)),
        (MIB_2 - 1, MIB_2 + 1, (0, 2 * MIB_2)),
        (MIB_2, 2 * MIB_2, (MIB_2, 2 * MIB_2)),
    ],
)
def test_a_fault_brings_whole_folios(
    kind: str, first: int, end: int, there: tuple[int, int]
) -> None:
    made, _ = frames_of(FOLIOS, kind)
    allocate(made, first, end)
    assert present(made) == [there]
    orders = [made.order_of(pgoff_t(page)) for page in (there[0], there[1] - 1)]
    assert orders == [9, 9]
    outside = there[1] if there[1] < FOLIOS else 0
    assert made.order(outside) == 0


def test_a_punch_splits_the_folios_that_it_meets() -> None:
    made, _ = frames_of(FOLIOS, "thp")
    allocate(made, 0, FOLIOS)
    punch(made, MIB_2 - 1, MIB_2)
    assert [made.order(page) for page in (0, MIB_2, 2 * MIB_2)] == [0, 9, 9]
    punch(made, MIB_2, MIB_2 + 1)
    assert [made.order(page) for page in (0, MIB_2, 2 * MIB_2)] == [0, 0, 9]
    assert present(made) == [(0, MIB_2 - 1), (MIB_2 + 1, FOLIOS)]
    # There is no room for a folio among the pages that are left.
    allocate(made, MIB_2 - 1, MIB_2)
    assert present(made) == [(0, MIB_2), (MIB_2 + 1, FOLIOS)]
    assert made.order(0) == 0


def test_a_block_with_pages_has_no_room_for_a_folio() -> None:
    made, _ = frames_of(FOLIOS, "thp")
    allocate(made, 0, FOLIOS)
    punch(made, MIB_2, 2 * MIB_2 - 1)
    allocate(made, MIB_2, MIB_2 + 1)
    assert present(made) == [(0, MIB_2 + 1), (2 * MIB_2 - 1, FOLIOS)]
    assert [made.order(page) for page in (0, MIB_2, 2 * MIB_2)] == [9, 0, 9]


def test_a_range_over_several_blocks_fills_holes_with_folios() -> None:
    made, _ = frames_of(FOLIOS, "thp")
    allocate(made, 0, MIB_2)
    punch(made, 3, 4)
    # The first block has pages, so only the pages asked for come; a whole hole is a folio.
    allocate(made, 3, 2 * MIB_2)
    assert [made.order(page) for page in (0, MIB_2)] == [0, 9]
    assert present(made) == [(0, 2 * MIB_2)]


@pytest.mark.parametrize(
    ("first", "end", "heard", "content"),
    [
        (0, 1, [("zeroed", 0, 1)], [511, 512, 1023, 1024]),
        (0, MIB_2, [("before", 0, 512), ("freed", 0, 512)], [512, 1023, 1024]),
        (
            MIB_2 - 1,
            2 * MIB_2 + 1,
            [
                ("zeroed", 511, 512),
                ("before", 512, 1024),
                ("freed", 512, 1024),
                ("zeroed", 1024, 1025),
            ],
            [0],
        ),
        (1, MIB_2 - 1, [("zeroed", 1, 511)], [0, 511, 512, 1023, 1024]),
        (MIB_2 - 1, MIB_2 + 1, [("zeroed", 511, 513)], [0, 1023, 1024]),
    ],
)
def test_a_hole_in_a_hugetlb_page_is_zeroed(
    first: int,
    end: int,
    heard: list[tuple[str, int, int]],
    content: list[int],
    steps: list[tuple[object, ...]],
) -> None:
    made, observer = frames_of(FOLIOS, "hugetlb")
    allocate(made, 0, FOLIOS)
    steps.clear()
    made.content = dict.fromkeys((0, 511, 512, 1023, 1024), 7)
    punch(made, first, end)
    assert [(what, of) for what, of, _ in observer.heard] == [
        (what, span(*of)) for what, *of in heard
    ]
    assert list(made.content) == content
    whole = [of for what, *of in heard if what == "freed"]
    assert FOLIOS - sum(end - first for first, end in whole) == made.resident() // PAGE_SIZE
    assert [made.order(page) for page in (0, MIB_2)] == [
        0 if [page, page + MIB_2] in whole else 9 for page in (0, MIB_2)
    ]
    assert steps == WRITE * sum(what != "before" for what, *_ in heard)


def test_folios_and_holes_are_listed(steps: list[tuple[object, ...]]) -> None:
    made, _ = frames_of(2 * MIB_2, "thp")
    allocate(made, MIB_2, MIB_2 + 1)
    punch(made, 0, 1)
    made.numbers[1:3] = b"\1\1"
    steps.clear()
    found = list(made.folios(span(0, 3 * MIB_2)))
    assert found == [
        (0, 1, None),
        (1, 2, 0),
        (2, 3, 0),
        (3, MIB_2, None),
        (MIB_2, 2 * MIB_2, 9),
        (2 * MIB_2, 3 * MIB_2, None),
    ]
    assert steps == [(MEMORY, "read"), ("saw", tuple(found))]
    assert list(made.folios(span(2, 5))) == [(2, 3, 0), (3, 5, None)]
    assert list(made.folios(span(MIB_2 + 3, MIB_2 + 4))) == [(MIB_2, 2 * MIB_2, 9)]


def test_the_order_of_a_page_is_looked_at(steps: list[tuple[object, ...]]) -> None:
    made, _ = frames_of(MIB_2, "thp")
    allocate(made, 0, 1)
    steps.clear()
    made.order_of(pgoff_t(5))
    assert steps == [(MEMORY, "read"), ("saw", 9)]
    made.order(5)
    assert len(steps) == 2


def test_outside_a_search_nothing_is_a_step() -> None:
    assert control._execution is None
    made, _ = frames_of(1)
    allocate(made, 0, 1)
    punch(made, 0, 1)
    assert made.resident() == 0
