"""How much the explorer searches, when it stops, and what it leaves as it was."""

import gc
from functools import partial
from typing import Any, ClassVar

import pytest

from explored import Base
from restrictedmem import sync
from restrictedmem.check import explorer
from restrictedmem.check.explorer import RuleBroken, explore


class Counted(Base):
    """A program that counts how often it is made, and notes whether garbage is collected."""

    made = 0
    collects: ClassVar[set[bool]] = set()

    def __init__(self) -> None:
        words = sync.SharedWords(memoryview(bytearray(16)))
        self.bodies = [partial(self.read, words, index) for index in (0, 1)]
        Counted.made += 1
        Counted.collects.add(gc.isenabled())

    @staticmethod
    def read(words: sync.SharedWords, index: int) -> None:
        words.read(index)


@pytest.mark.parametrize(
    ("how", "samples"), [({}, 50), ({"reduce": True}, 50), ({"preemptions": 0}, 0)]
)
def test_a_complete_search_is_followed_by_fifty_executions_at_random(
    how: dict[str, Any], samples: int
) -> None:
    Counted.made = 0
    assert explore(Counted, **how).executions == Counted.made - samples


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_after_a_search_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    Counted.collects.clear()
    try:
        (gc.enable if enabled else gc.disable)()
        explore(Counted)
        assert (Counted.collects, gc.isenabled()) == ({False}, enabled)
    finally:
        (gc.enable if before else gc.disable)()


class Late(Base):
    """Wrong when ``a`` has come to its end, and soon after ``b`` comes after its first step."""

    def __init__(self) -> None:
        self.bytes = sync.shared_bytes(1)
        self.bodies = (self.change, self.look)

    def change(self) -> None:
        for value in range(1, 7):
            self.bytes[0] = value
        raise RuleBroken("late")

    def look(self) -> None:
        if self.bytes[0] == 1 and self.bytes[0]:
            raise RuleBroken("soon")


@pytest.mark.parametrize(("seconds", "violation"), [(3, "soon"), (-1, "late")])
def test_a_bounded_search_is_followed_by_one_for_a_shorter_counterexample(
    seconds: float, violation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explorer, "_SHORTENING", seconds)
    result = explore(Late, preemptions=1)
    found = result.counterexample
    assert found is not None
    assert (found.violation, found.shortest) == (violation, violation == "soon")
    assert 0 < result.seconds < 60


class WrongFromTheStart(Base):
    def check(self) -> None:
        raise RuleBroken("wrong")


def test_a_program_may_be_wrong_before_its_first_step() -> None:
    result = explore(WrongFromTheStart)
    found = result.counterexample
    assert found is not None
    assert (result.complete, found.violation, found.steps) == (True, "wrong", ())


@pytest.mark.parametrize(
    ("actors", "exhaustive", "found"),
    [
        (2, False, (None, True, "all interleavings that may differ")),
        (2, True, (None, False, "all interleavings")),
        (3, False, (None, True, "all interleavings that may differ")),
        (3, True, (None, True, "all interleavings that may differ")),
        (4, False, (3, True, "up to 3 preemptions")),
        (4, True, (None, True, "all interleavings that may differ")),
    ],
)
def test_more_actors_are_searched_less(
    actors: int, exhaustive: bool, found: tuple[int | None, bool, str]
) -> None:
    assert explorer.effort(actors, exhaustive=exhaustive) == found
