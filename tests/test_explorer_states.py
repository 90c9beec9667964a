"""How the explorer tells states apart, on programs that hide state, forget it, or look at it."""

from collections.abc import Hashable
from functools import partial
from typing import Any

import pytest

from explored import WHOLE, Base
from restrictedmem import sync
from restrictedmem.check import objects
from restrictedmem.check.control import UnsoundError, forget, watch
from restrictedmem.check.explorer import RuleBroken, explore


class Hidden(Base):
    """Keeps something in plain data that no state shows."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self.lock = sync.mutex()
        self.order = ""
        self.bodies = (partial(self.note, "a"), partial(self.note, "b"))

    def note(self, name: str) -> None:
        with self.lock:
            self.order += name
        with self.lock:
            pass
        if self.order == "ba":
            with self.lock, sync.mutex():
                pass

    def state(self) -> Hashable:
        return self.order if self.shown else ""


def test_a_program_that_hides_state_is_found_out() -> None:
    assert explore(partial(Hidden, shown=True)).holds
    with pytest.raises(UnsoundError):
        explore(partial(Hidden, shown=False))


class Changes(Base):
    made = 0

    def __init__(self) -> None:
        Changes.made += 1
        self.bytes = sync.shared_bytes(4)
        self.bodies = (self.some, self.some)

    def some(self) -> None:
        for index in range(1 + Changes.made % 3):
            self.bytes[index] = 1


def test_a_program_that_is_another_each_time_is_found_out() -> None:
    with pytest.raises(UnsoundError):
        explore(Changes)


class Retry(Base):
    """Tries again until nobody came between; what it read before does not matter then."""

    def __init__(self, *, forgets: bool) -> None:
        self.forgets = forgets
        self.words = sync.SharedWords(memoryview(bytearray(8)))
        self.bodies = (self.change, self.retry)

    def change(self) -> None:
        for value in range(1, 6):
            self.words.write(0, value)

    def retry(self) -> None:
        while True:
            if self.forgets:
                forget("start")
            before = self.words.read(0)
            if self.words.read(0) == before:
                return


def test_what_is_forgotten_does_not_tell_states_apart() -> None:
    whole, less = explore(partial(Retry, forgets=False)), explore(partial(Retry, forgets=True))
    assert whole.holds
    assert less.holds
    assert less.states < whole.states


class Looks(Base):
    """Looks twice whether anything was written, and does not care what."""

    def __init__(self) -> None:
        self.words = sync.SharedWords(memoryview(bytearray(8)))
        self.bodies = (self.change, self.look)

    def change(self) -> None:
        for value in range(1, 6):
            self.words.write(0, value)

    def look(self) -> None:
        for _ in range(2):
            self.written()

    def written(self) -> bool:
        return self.words.read(0) > 0


def test_of_a_call_that_is_summarized_only_the_result_tells_states_apart() -> None:
    whole, less = explore(Looks), explore(Looks, calls=[(Looks, "written")])
    assert whole.holds
    assert less.holds
    assert less.states < whole.states
    assert Looks.written.__name__ == "written"
    assert not hasattr(Looks.written, "__wrapped__")


class Keeps(Base):
    """A program that keeps a value it read in plain data, which no state shows."""

    def __init__(self) -> None:
        self.words = sync.SharedWords(memoryview(bytearray(8)))
        self.lock = sync.mutex()
        self.kept = 0
        self.bodies = (partial(self.words.write, 0, 1), self.look)

    def look(self) -> None:
        self.keep()
        with self.lock:
            pass
        if self.kept:
            with self.lock:
                pass

    def keep(self) -> None:
        self.kept = self.words.read(0)


def test_a_call_that_keeps_something_is_found_out() -> None:
    assert explore(Keeps).holds
    with pytest.raises(UnsoundError):
        explore(Keeps, calls=[(Keeps, "keep")])


class Watched(Base):
    """Two write a byte each; its check looks at both, and says so."""

    def __init__(self, first: int) -> None:
        watch("something else")
        self.bytes = [sync.shared_bytes(1), sync.shared_bytes(1)]
        self.first = first
        for one in self.bytes:
            assert isinstance(one, objects.SharedBytes)
            one.watch()
        self.bodies = [partial(self.set, one) for one in self.bytes]

    @staticmethod
    def set(one: bytearray) -> None:
        one[0] = 1

    def check(self) -> None:
        if self.bytes[self.first][0] and not self.bytes[1 - self.first][0]:
            raise RuleBroken("the first before the second")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("how", WHOLE)
def test_what_a_check_looks_at_is_written_in_every_order(how: dict[str, Any], first: int) -> None:
    found = explore(partial(Watched, first), **how).counterexample
    assert found is not None
    assert found.violation == "the first before the second"
