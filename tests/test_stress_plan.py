"""What a random run does: the plan of each VM, and operations on its pages."""

import os
import re
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from planting import always, stub
from restrictedmem.abi import memory
from restrictedmem.platform import platform
from restrictedmem.stress import puncher
from restrictedmem.stress.finding import Finding
from restrictedmem.stress.party import Child
from restrictedmem.stress.plan import NAMES, OPERATIONS, Plan, plan_of
from restrictedmem.stress.progress import Progress
from restrictedmem.stress.puncher import Puncher, be_second
from restrictedmem.units import PAGE_SIZE
from waiting import wait_until

PAGE: Final = Path(__file__).parent.parent / "docs/understand/check.md"
ENGINES: Final = {"software": ("punch", "convert"), "kernel": ("punch",)}


def plans(seed: int, count: int) -> list[Plan]:
    found: list[Plan] = []
    for number in range(count):
        before = found[-1] if found else None
        found.append(plan_of(seed, number, before=before, engines=ENGINES, left=60))
    return found


MANY: Final = plans(1, 2000)


def share(holds: list[bool]) -> float:
    return sum(holds) / len(holds)


# The seed is fixed, so these numbers are the same in each run.


def test_the_plans_of_a_long_run() -> None:
    assert {plan.vcpus for plan in MANY} == {1, 2, 4, 8}
    assert {plan.pages for plan in MANY} == {64, 512, 2048}
    assert {plan.engine: plan.operations for plan in MANY} == ENGINES
    assert 2 <= min(plan.seconds for plan in MANY) < max(plan.seconds for plan in MANY) <= 6
    assert share([plan.killed for plan in MANY]) == pytest.approx(1 / 4, abs=0.02)
    assert share([plan.reused for plan in MANY]) == pytest.approx(1 / 2, abs=0.03)
    assert not MANY[0].reused
    assert [plan.seed for plan in MANY[:2]] == ["1/0", "1/1"]


def test_a_plan_has_what_its_engine_can_do() -> None:
    by_engine: dict[str, list[Plan]] = {
        name: [plan for plan in MANY if plan.engine == name] for name in ENGINES
    }
    assert {plan.platform for plan in by_engine["software"]} == {"", *platform.NAMES}
    assert {plan.platform for plan in by_engine["kernel"]} == {""}
    assert {plan.converting for plan in by_engine["software"]} == {0, 2, 10}
    assert {plan.converting for plan in by_engine["kernel"]} == {0}


def test_a_reused_descriptor_has_the_pages_of_the_vm_before() -> None:
    reused = [(before, plan) for before, plan in pairwise(MANY) if plan.reused]
    assert all((b.pages, b.vcpus) == (plan.pages, plan.vcpus) for b, plan in reused)
    others = [(before, plan) for before, plan in pairwise(MANY) if not plan.reused]
    assert any(b.pages != plan.pages for b, plan in others)
    assert any(b.vcpus != plan.vcpus for b, plan in others)


def test_a_seed_makes_the_same_plans_and_another_makes_others() -> None:
    assert plans(1, 9) == MANY[:9] != plans(2, 9)


def test_a_vm_ends_with_the_run() -> None:
    assert plan_of(1, 0, before=None, engines=ENGINES, left=0.5).seconds == 0.5


def test_the_page_says_how_often_each_operation_is_done() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z-]+) \| (\d+) \|", text, re.MULTILINE)
    assert {name: int(times) for name, times in rows} == OPERATIONS
    assert f"times in {sum(OPERATIONS.values())} |" in text


# Operations on pages.

#: Of the pages in the file, in bytes.
OFFSET: Final = 3 * PAGE_SIZE


class Board:
    """A lane that notes what is announced, and what the file was at that time."""

    def __init__(self, pages: int) -> None:
        self.announced: list[tuple[range, list[int], list[int]]] = []
        self.pages = pages
        self.fd = -1

    def present(self) -> list[int]:
        """Return the pages that hold something, counted from the first of the guest's."""
        size = os.fstat(self.fd).st_size
        return [
            (at - OFFSET) // PAGE_SIZE
            for at in range(0, size, PAGE_SIZE)
            if os.pread(self.fd, PAGE_SIZE, at).strip(b"\0")
        ]

    @contextmanager
    def taking(self, pages: range) -> Generator[None]:
        before = self.present()
        yield
        self.announced.append((pages, before, self.present()))


@contextmanager
def holder(pages: int, seed: str = "seed") -> Generator[tuple[Puncher, Board]]:
    """Make a puncher of a full file: three pages, the guest's, and one."""
    with ExitStack() as stack:
        board = Board(pages)
        board.fd = stack.enter_context(memory.memfd_create("holder")).fileno()
        os.pwrite(board.fd, b"x" * (OFFSET + (pages + 1) * PAGE_SIZE), 0)
        progress = stack.enter_context(closing(Progress(NAMES)))
        ground: Any = stub(fd=board.fd, pages=pages, offset=OFFSET)
        lane: Any = board
        yield Puncher(ground, lane, progress, seed), board


def test_a_punch_is_announced_counted_and_takes_its_pages_alone() -> None:
    with holder(8) as (made, board):
        made.take(range(2, 5))
        full = list(range(-3, 9))
        without = [page for page in full if page not in range(2, 5)]
        assert board.announced == [(range(2, 5), full, without)]
        assert (made.progress.punches, made.progress.pages) == (1, 3)


def test_an_allocation_fills_holes_and_announces_nothing() -> None:
    with holder(8) as (made, board):
        made.take(range(8))
        used = os.fstat(board.fd).st_blocks
        made.random = stub(choice=always(2), randrange=always(3))
        made.allocate()
        assert os.fstat(board.fd).st_blocks == used + 2 * PAGE_SIZE // 512
        # Pages 3 and 4 are there now.
        for page, freed in ((2, 0), (3, 1), (4, 1), (5, 0)):
            used = os.fstat(board.fd).st_blocks
            made.take(range(page, page + 1))
            assert os.fstat(board.fd).st_blocks == used - freed * PAGE_SIZE // 512
        assert made.progress.punches == len(board.announced) == 5


def test_an_allocation_keeps_content_and_size() -> None:
    with holder(8) as (made, board):
        os.ftruncate(board.fd, OFFSET + 4 * PAGE_SIZE)
        made.random = stub(choice=always(2), randrange=always(3))
        made.allocate()
        assert board.present() == list(range(-3, 4))
        assert os.fstat(board.fd).st_size == OFFSET + 4 * PAGE_SIZE


def test_half_of_the_punches_are_of_a_single_page() -> None:
    made = Puncher(stub(pages=1 << 20), stub(), stub(), "seed")
    found = [made.some() for _ in range(6000)]
    assert {len(pages) for pages in found} == {1, 2, 8, 32}
    shares = {length: times / 6000 for length, times in Counter(map(len, found)).items()}
    assert shares == pytest.approx({1: 1 / 2, 2: 1 / 6, 8: 1 / 6, 32: 1 / 6}, abs=0.02)
    assert {len(made.some(5)) for _ in range(100)} == {1, 2, 8, 5}


def test_pages_are_picked_among_the_guests() -> None:
    made = Puncher(stub(pages=3), stub(), stub(), "seed")
    found = {made.some() for _ in range(400)}
    assert found == {range(start, end) for start in range(3) for end in range(start + 1, 4)}


def test_punch_takes_some_pages() -> None:
    with holder(8) as (made, board):
        made.random = stub(choice=always(2), randrange=always(3))
        made.punch()
    assert [pages for pages, *_ in board.announced] == [range(3, 5)]


@pytest.mark.parametrize(
    ("pages", "blocks"),
    [
        (64, {range(64)}),
        (512, {range(512)}),
        (513, {range(512), range(512, 513)}),
        (1024, {range(512), range(512, 1024)}),
    ],
)
def test_a_block_is_2_mib_or_what_there_is_of_it(
    pages: int, blocks: set[range], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Puncher(stub(pages=pages), stub(), stub(), "seed")
    found = set[range]()
    monkeypatch.setattr(made, "take", found.add)
    for _ in range(32):
        made.punch_block()
    assert found == blocks


def test_operations_come_as_often_as_planned_and_with_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    naps, left = list[float](), iter(range(9600))
    monkeypatch.setattr(puncher, "time", stub(sleep=naps.append))
    done = Counter[str]()
    with closing(Progress(NAMES)) as progress:

        def note(name: str) -> None:
            assert progress.stuck(-1) == name
            done[name] += 1

        made = Puncher(stub(), stub(), progress, "seed")
        methods = {name: lambda name=name: note(name) for name in ("punch", "error", "slot")}
        made.go_on(methods, lambda: next(left, None) is None)
        assert progress.operations == done.total() == 9600
    weights = {name: OPERATIONS[name] / 67 for name in methods}
    assert {name: done[name] / 9600 for name in methods} == pytest.approx(weights, abs=0.01)
    assert len(naps) / 9600 == pytest.approx(1 / 8, abs=0.006)
    assert (min(naps), max(naps)) == pytest.approx((0, 0.002), abs=0.0001)


def test_a_seed_makes_the_same_operations() -> None:
    def some(seed: str) -> list[range]:
        made = Puncher(stub(pages=512), stub(), stub(), seed)
        return [made.some() for _ in range(9)]

    assert some("1/0 owner") == some("1/0 owner") != some("1/0 second")


# The second process.


def second(board: Board, operations: tuple[str, ...]) -> Child:
    lanes: list[int] = []

    def lane(number: int) -> Board:
        lanes.append(number)
        # The owner has the other lane.
        assert lanes == [1]
        return board

    plan: Any = stub(operations=operations, seed="1/0")
    ground: Any = stub(pages=board.pages, fd=board.fd, offset=OFFSET, board=stub(lane=lane))
    return Child("second process", lambda progress, sock: be_second(ground, plan, progress, sock))


@pytest.mark.parametrize("name", ["punch", "punch-block", "allocate"])
def test_the_second_process_works_until_it_is_stopped(name: str) -> None:
    with holder(8) as (_, board), closing(second(board, ("slot", name))) as child:
        wait_until(lambda: child.progress.operations > 20, "operations")
        child.poll()
        child.stop()
        child.take_report()
        assert child.report == {}
        assert (child.progress.punches > 0) == (name != "allocate")
        assert (board.present() != list(range(-3, 9))) == (name != "allocate")


def test_the_second_process_waits_where_it_has_nothing_to_do() -> None:
    said = list[object]()
    parent: Any = stub(recv=said.append, send=said.append)
    board: Any = stub(lane=always(stub()))
    plan: Any = stub(operations=("slot", "interrupt"), seed="1/0")
    be_second(stub(board=board), plan, stub(), parent)
    assert said == [1, b"{}"]


def test_the_second_process_reports_an_error() -> None:
    with holder(8) as (_, board):
        os.ftruncate(board.fd, 0)
        board.pages = 0
        with (
            closing(second(board, ("punch",))) as child,
            pytest.raises(Finding, match=r"^second process: ValueError"),
        ):
            child.take_report()
