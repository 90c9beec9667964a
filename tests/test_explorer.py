"""The explorer of interleavings.

The tests try how much it searches, what it finds, and its command. Their programs are small enough
to know the answer.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Hashable
from functools import partial
from itertools import permutations
from math import factorial
from typing import Any

import pytest

from explored import WHOLE, Base
from restrictedmem import sync
from restrictedmem.check import explorer, objects
from restrictedmem.check.control import forget, saw, touch
from restrictedmem.check.explorer import RuleBroken, explore
from restrictedmem.cli import check
from restrictedmem.cli.main import main
from waiting import wait_until

FACTORIES = ("mutex", "condition", "RwSem", "SharedWords", "shared_bytes")


# How much is searched.


class Loads(Base):
    """Actors that never meet: each reads words of its own."""

    def __init__(self, actors: int, loads: int) -> None:
        words = [sync.SharedWords(memoryview(bytearray(64))) for _ in range(actors)]
        self.bodies = [partial(self.load, each, index, loads) for index, each in enumerate(words)]

    @staticmethod
    def load(words: sync.SharedWords, index: int, loads: int) -> None:
        for _ in range(loads):
            words.read(index)


@pytest.mark.parametrize(("actors", "loads"), [(1, 5), (2, 3), (3, 2)])
def test_all_positions_are_states(actors: int, loads: int) -> None:
    result = explore(partial(Loads, actors, loads))
    assert result.holds
    assert result.states == (loads + 1) ** actors
    # Operations that do not conflict run in one order.
    reduced = explore(partial(Loads, actors, loads), reduce=True)
    assert reduced.holds
    assert (reduced.executions, reduced.transitions, reduced.states) == (
        2,
        actors * loads,
        actors + 1,
    )


class Orders(Base):
    """Each actor notes its number under a lock: as many ends as orders."""

    def __init__(self, ends: set[tuple[int, ...]], actors: int) -> None:
        self.ends = ends
        self.lock = sync.mutex()
        self.order: list[int] = []
        self.bodies = [partial(self.note, number) for number in range(actors)]

    def note(self, number: int) -> None:
        with self.lock:
            self.order.append(number)

    def state(self) -> Hashable:
        return tuple(self.order)

    def finish(self) -> None:
        self.ends.add(tuple(self.order))


@pytest.mark.parametrize("actors", [2, 3, 4])
def test_every_order_of_critical_sections_is_tried(actors: int) -> None:
    hows: list[dict[str, Any]] = [*WHOLE, {"preemptions": 0}]
    for how in hows:
        ends: set[tuple[int, ...]] = set()
        assert explore(partial(Orders, ends, actors), **how).holds
        assert ends == set(permutations(range(actors)))
    ends = set()
    reduced = explore(partial(Orders, ends, actors), reduce=True)
    # One execution for each order, but for what ends at a state met before; and those before the
    # accesses were known.
    assert reduced.executions <= 2 * factorial(actors) + actors


# Findings.


class LostUpdate(Base):
    def __init__(self, times: int = 1, lock: bool = False) -> None:
        self.lock = sync.mutex()
        self.memory = bytearray(8)
        self.words = sync.SharedWords(memoryview(self.memory))
        body = self.locked if lock else self.increment
        self.bodies = (partial(body, times), partial(body, times))
        self.times = 2 * times

    def increment(self, times: int) -> None:
        for _ in range(times):
            self.words.write(0, self.words.read(0) + 1)

    def locked(self, times: int) -> None:
        for _ in range(times):
            with self.lock:
                self.increment(1)

    def finish(self) -> None:
        if self.memory[0] != self.times:
            raise RuleBroken(f"{self.times} increments made {self.memory[0]}")


@pytest.mark.parametrize("how", WHOLE)
def test_a_lost_update(how: dict[str, Any]) -> None:
    result = explore(partial(LostUpdate, 2), **how)
    found = result.counterexample
    assert found is not None
    assert found.violation == "4 increments made 2" or found.violation.startswith(
        "4 increments made"
    )
    assert found.shortest
    assert len(found.steps) == 8
    assert {step.function for step in found.steps} == {"LostUpdate.increment"}
    assert found.steps[0].does == "reads word 0 of LostUpdate.words = 0"
    assert explore(partial(LostUpdate, 2, lock=True), **how).holds


def test_a_counterexample_is_told_in_lines_and_as_data() -> None:
    found = explore(LostUpdate).counterexample
    assert found is not None
    assert found.lines()[0] in ("a", "b")
    assert found.lines()[-1] == "violated after 4 steps, none shorter: 2 increments made 1"
    # One actor's two steps are told together, not in turns.
    numbers = [line.split()[0] for line in found.lines() if line.startswith("  ")]
    assert numbers == ["1", "2", "3", "4"]
    assert [line for line in found.lines() if line in ("a", "b")] in (
        ["a", "b", "a"],
        ["b", "a", "b"],
    )
    data = found.as_data()
    assert data["steps"][0]["file"] == "test_explorer.py"
    assert data["steps"][-1]["does"] == "writes word 0 of LostUpdate.words = 1"


class LockOrder(Base):
    def __init__(self) -> None:
        self.first = sync.mutex()
        self.second = sync.mutex()
        self.bodies = (
            partial(self.nest, self.first, self.second),
            partial(self.nest, self.second, self.first),
        )

    @staticmethod
    def nest(outer: sync.Mutex, inner: sync.Mutex) -> None:
        with outer, inner:
            pass


@pytest.mark.parametrize("how", [*WHOLE, {"preemptions": 1}])
def test_a_deadlock_says_who_holds_what(how: dict[str, Any]) -> None:
    found = explore(LockOrder, **how).counterexample
    assert found is not None
    assert found.violation == "deadlock: a and b wait"
    assert len(found.steps) == 2
    assert {step.does for step in found.stuck} == {
        "takes LockOrder.second, held by b",
        "takes LockOrder.first, held by a",
    }
    assert explore(LockOrder, preemptions=0).holds


class WakeUp(Base):
    """One actor waits for a flag, the other sets it; ``late`` reads the flag before it locks."""

    def __init__(self, *, late: bool) -> None:
        self.lock = sync.mutex()
        self.changed = sync.condition(self.lock)
        self.flag = sync.shared_bytes(1)
        self.bodies = (self.wait_late if late else self.wait, self.set)

    def wait(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: bool(self.flag[0]), timeout=1)

    def wait_late(self) -> None:
        if not self.flag[0]:
            with self.changed:
                self.changed.wait(1)

    def set(self) -> None:
        with self.changed:
            self.flag[0] = 1
            self.changed.notify_all()


@pytest.mark.parametrize("how", WHOLE)
def test_a_missed_wake_up(how: dict[str, Any]) -> None:
    assert explore(partial(WakeUp, late=False), **how).holds
    found = explore(partial(WakeUp, late=True), **how).counterexample
    assert found is not None
    assert found.violation == "deadlock: a waits"
    assert found.stuck[0].does == "has not been notified: goes on after waiting on WakeUp.changed"


class Torn(Base):
    """A writer sets two bytes that belong together. A reader reads them at once, or one by one."""

    def __init__(self, *, at_once: bool) -> None:
        self.pair = sync.shared_bytes(2)
        self.at_once = at_once
        self.bodies = (self.write, self.read)

    def write(self) -> None:
        self.pair[0:2] = b"\1\1"

    def read(self) -> None:
        seen = bytes(self.pair[0:2]) if self.at_once else bytes((self.pair[0], self.pair[1]))
        if seen.count(1) == 1:
            raise RuleBroken(f"torn: {seen.hex()}")


@pytest.mark.parametrize("how", WHOLE)
def test_a_torn_read(how: dict[str, Any]) -> None:
    assert explore(partial(Torn, at_once=True), **how).holds
    found = explore(partial(Torn, at_once=False), **how).counterexample
    assert found is not None
    assert found.violation == "torn: 0001"
    assert [step.does for step in found.steps] == [
        "reads Torn.pair[0] = 0",
        "writes Torn.pair[0:2] = 01 01",
        "reads Torn.pair[1] = 1",
    ]


class Far(Base):
    """Goes wrong soon when ``b`` is quick, and late in any case."""

    def __init__(self) -> None:
        self.bytes = sync.shared_bytes(4)
        self.bodies = (self.slow, self.quick)

    def slow(self) -> None:
        for _ in range(6):
            self.bytes[0] = (self.bytes[0] + 1) % 256
        if self.bytes[1]:
            raise RuleBroken("late")
        self.bytes[2] = 1

    def quick(self) -> None:
        if self.bytes[0] == 0:
            self.bytes[1] = 1
        if not self.bytes[2]:
            raise RuleBroken("soon")


@pytest.mark.parametrize("how", [*WHOLE, {"preemptions": 2}])
def test_the_shortest_counterexample_is_told(how: dict[str, Any]) -> None:
    found = explore(Far, **how).counterexample
    assert found is not None
    assert (found.violation, len(found.steps), found.shortest) == ("soon", 3, True)


class Twice(Base):
    """Wrong only when ``a`` is left three times, each time at the right moment."""

    def __init__(self) -> None:
        self.bytes = sync.shared_bytes(3)
        self.bodies = (self.change, self.look)

    def change(self) -> None:
        for value in (1, 0, 1, 0):
            self.bytes[0] = value

    def look(self) -> None:
        seen = [self.bytes[0] for _ in range(3)]
        if seen == [1, 0, 1]:
            raise RuleBroken("seen it come, go and come")


def test_preemptions_are_counted() -> None:
    # a is left after each of three stores, and b after each of two loads.
    assert [explore(Twice, preemptions=bound).holds for bound in range(4, 6)] == [True, False]
    assert not explore(Twice).holds


class Broken(Base):
    def __init__(self, error: Exception) -> None:
        self.lock = sync.mutex()
        self.error = error
        self.bodies = (self.fail, self.fail)

    def fail(self) -> None:
        with self.lock:
            raise self.error


def test_an_actor_that_raises_is_a_violation() -> None:
    found = explore(partial(Broken, OSError(5, "EIO: gone"))).counterexample
    assert found is not None
    assert found.violation == "a raised OSError(5, 'EIO: gone')"


# The frame of it.


def test_the_real_objects_are_back_afterwards() -> None:
    real = {name: getattr(sync, name) for name in FACTORIES}

    def fails() -> LostUpdate:
        assert all(getattr(sync, name) is not real[name] for name in FACTORIES)
        raise OSError(12, "ENOMEM: no program")

    explore(LostUpdate)
    assert {name: getattr(sync, name) for name in FACTORIES} == real
    with pytest.raises(OSError, match="ENOMEM"):
        explore(fails)
    assert {name: getattr(sync, name) for name in FACTORIES} == real
    with pytest.raises(AssertionError, match="nest"):
        explore(lambda: explore(LostUpdate))  # type: ignore[arg-type, return-value] # pyright: ignore[reportArgumentType]
    assert {name: getattr(sync, name) for name in FACTORIES} == real


class CheckFails(LostUpdate):
    def check(self) -> None:
        if self.memory[0]:
            raise LookupError("the check itself is wrong")


def test_a_check_that_fails_otherwise_is_not_a_finding() -> None:
    with pytest.raises(LookupError, match="the check itself"):
        explore(CheckFails)


def test_nothing_happens_outside_an_exploration() -> None:
    touch("anything", write=True)
    saw(1)
    forget("anywhere")
    with pytest.raises(AssertionError, match="only in an exploration"):
        objects.Mutex()


# The command.


def test_the_command_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--list", "--scenario", "punch-fault"]) == 0
    assert capsys.readouterr().out.startswith("punch-fault (2 actors)\n")
    assert main(["check", "--scenario", "no-such"]) == 1
    assert "no scenario 'no-such'" in capsys.readouterr().err
    assert main(["check", "--design", "v8"]) == 1
    assert "no design 'v8'" in capsys.readouterr().err
    assert main(["check", "--jobs", "0"]) == 2


def test_the_command_searches_in_processes_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert (
        main(["check", "--scenario", "punch-unregister", "--design", "v10+teardown", "--json"]) == 0
    )
    (case,) = json.loads(capsys.readouterr().out)
    assert (case["scenario"], case["design"], case["verdict"]) == (
        "punch-unregister",
        "v10+teardown",
        "holds",
    )
    assert case["complete"]
    assert case["states"] > 50


def test_a_verdict_says_whether_a_finding_is_news() -> None:
    bad, good = explore(LostUpdate), explore(partial(LostUpdate, lock=True))

    def verdict(expected: tuple[str, str] | None, result: explorer.Result) -> check.Verdict:
        return check.Case("lost-update", "v10", "all", expected, result).verdict

    assert verdict(None, good) is check.Verdict.HOLDS
    assert verdict(None, bad) is check.Verdict.VIOLATED
    assert verdict(("2 increments", "by nature"), bad) is check.Verdict.KNOWN
    assert verdict(("another rule", "by nature"), bad) is check.Verdict.VIOLATED
    assert verdict(("2 increments", "by nature"), good) is check.Verdict.MISSING
    assert verdict(None, explore(partial(Loads, 3, 6), limit_seconds=0)) is check.Verdict.UNFINISHED


def test_an_interrupt_ends_all_processes() -> None:
    command = [sys.executable, "-m", "restrictedmem", "check", "--jobs", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:

        def children() -> list[int]:
            with open(
                f"/proc/{process.pid}/task/{process.pid}/children", encoding="ascii"
            ) as found:
                return [int(text) for text in found.read().split()]

        wait_until(lambda: len(children()) >= 2, "the searches to begin", patience=30)
        started = children()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGINT
        wait_until(
            lambda: not any(os.path.exists(f"/proc/{child}") for child in started),
            "the searches to end",
        )
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
