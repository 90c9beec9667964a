"""How a counterexample is told: its lines, its words, and the order of its steps."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restrictedmem import sync
from restrictedmem.check import control, objects
from restrictedmem.check.control import Execution, Names, Operation, forget, saw, touch
from restrictedmem.check.schedule import Counterexample, Step, Teller, straightened

FIRST_WORD = 1


def steps(*does: tuple[str, str]) -> tuple[Step, ...]:
    return tuple(Step(actor, text, "mm/file.py", 7, "File.call") for actor, text in does)


def test_lines_have_numbers_places_and_names_of_actors() -> None:
    found = Counterexample(
        "both were lost",
        (*steps(("a", "reads"), ("b", "writes")), Step("b", "takes it", "x.py", 1234, "f")),
        shortest=True,
        stuck=steps(("a", "takes it, held by b")),
    )
    assert found.lines() == [
        "a",
        "     1  mm/file.py:7  File.call  reads",
        "b",
        "     2  mm/file.py:7  File.call  writes",
        "     3  x.py:1234     f          takes it",
        "a waits",
        "        mm/file.py:7  File.call  takes it, held by b",
        "violated after 3 steps, none shorter: both were lost",
    ]


def test_lines_say_that_there_may_be_a_shorter_one() -> None:
    found = Counterexample("no step", (), shortest=False, stuck=())
    assert found.lines() == ["violated after 0 steps, perhaps not the shortest: no step"]
    assert found.as_data() == {"violation": "no step", "steps": (), "shortest": False, "stuck": ()}


class Everything:
    """A program with each kind of object."""

    def __init__(self) -> None:
        self.lock: Any = sync.mutex()
        self.second: Any = sync.mutex()
        self.changed: Any = sync.condition(self.lock)
        self.semaphore: Any = sync.RwSem()
        self.words: Any = sync.SharedWords(memoryview(bytearray(16)))
        self.bits: Any = sync.shared_bytes(4)

    def locks(self) -> None:
        with self.lock:
            self.lock.locked()
            self.second.acquire(blocking=False)
            self.changed.notify()

    def memory(self) -> None:
        self.semaphore.down_read()
        self.words.write(FIRST_WORD, 5)
        self.words.read(0)
        sync.relax()

    def bytes(self) -> None:
        self.bits[2] = 9
        self.bits[1:3] = b"ab"
        self.bits[:2]
        self.bits.count(9, 1)
        self.semaphore.down_write()
        self.semaphore.up_write()

    def other(self) -> None:
        with self.changed:
            self.changed.wait()

    def twice(self) -> None:
        self.lock.acquire()
        self.lock.acquire()

    def model(self) -> None:
        touch(("page", 3), write=True)
        saw(4)
        touch("the file", write=False)
        forget(1)
        self.semaphore.down_read()
        self.semaphore.up_read()


def tell(schedule: str, *methods: str) -> Teller:
    """Return what is told of an execution; each actor has the name of its method."""
    teller = Teller()

    def arrive(execution: Execution) -> None:
        teller.tell_waiting(execution.actors, execution.values)

    with objects.controlled():
        execution = Execution(Names(), arrive, teller)
        control.enter(execution)
        program = Everything()
        acts = [(name, getattr(program, name)) for name in methods]
        execution.run(acts, [[name[0] for name in methods].index(first) for first in schedule])
    return teller


@pytest.mark.parametrize(
    ("method", "does"),
    [
        (
            "locks",
            [
                "takes Everything.lock",
                "looks whether Everything.lock is held",
                "tries to take Everything.second = True",
                "notifies Everything.changed",
                "releases Everything.lock",
            ],
        ),
        (
            "memory",
            [
                "takes Everything.semaphore for reading",
                "writes first_word of Everything.words = 5",
                "reads word 0 of Everything.words = 0",
            ],
        ),
        (
            "bytes",
            [
                "writes Everything.bits[2] = 9",
                "writes Everything.bits[1:3] = 61 62",
                "reads Everything.bits[:2] = 00 61",
                "reads Everything.bits.count(9, 1) = 0",
                "asks to take Everything.semaphore for writing",
                "releases Everything.semaphore, having written",
            ],
        ),
        (
            "model",
            [
                "changes page 3",
                "looks at the file",
                "takes Everything.semaphore for reading",
                "releases Everything.semaphore, having read",
            ],
        ),
    ],
)
def test_each_operation_has_its_words(method: str, does: list[str]) -> None:
    told = tell(method[0] * len(does), method)
    assert [step.does for step in told.steps] == does
    assert {(step.actor, step.function) for step in told.steps} == {
        (method, f"Everything.{method}")
    }
    assert {step.file for step in told.steps} == {"test_check_schedule.py"}
    lines = [step.line for step in told.steps]
    first = getattr(Everything, method).__code__.co_firstlineno
    assert min(lines) > first
    assert max(lines) <= first + len(does) + 2
    assert len(told.operations) == len(does)


def test_a_poll_is_told_by_its_word() -> None:
    (waits,) = tell("mmm", "memory").waiting
    assert waits.does == "reads word 0 of Everything.words"


@pytest.mark.parametrize(
    ("schedule", "waits"),
    [
        ("l", ["looks whether Everything.lock is held", "takes Everything.lock, held by locks"]),
        ("lllll", ["takes Everything.lock"]),
        (
            "oo",
            [
                "takes Everything.lock",
                "has not been notified: goes on after waiting on Everything.changed",
            ],
        ),
        (
            "oollll",
            [
                "releases Everything.lock",
                "goes on after waiting on Everything.changed, held by locks",
            ],
        ),
    ],
)
def test_who_waits_is_told_with_the_holder(schedule: str, waits: list[str]) -> None:
    assert [step.does for step in tell(schedule, "locks", "other").waiting] == waits


def test_who_holds_what_it_takes_is_told_so() -> None:
    assert [step.does for step in tell("t", "twice").waiting] == [
        "takes Everything.lock, held by itself"
    ]


def orders(schedule: Sequence[int], operations: Sequence[Operation]) -> set[tuple[int, ...]]:
    """Return all orders of the actors' steps that swaps of neighbours lead to."""

    def meet(one: int, other: int) -> bool:
        return schedule[one] == schedule[other] or conflicts(operations[one], operations[other])

    start = tuple(range(len(schedule)))
    found, new = {start}, [start]
    while new:
        order = new.pop()
        for at in range(len(order) - 1):
            swapped = (*order[:at], order[at + 1], order[at], *order[at + 2 :])
            if not meet(order[at], order[at + 1]) and swapped not in found:
                found.add(swapped)
                new.append(swapped)
    return {tuple(schedule[index] for index in order) for order in found}


def conflicts(one: Operation, other: Operation) -> bool:
    return one[1] == other[1] and control.WRITES in (one[0], other[0])


def changes(order: Sequence[int]) -> int:
    return sum(one != other for one, other in pairwise(order))


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2), st.sampled_from([control.READS, control.WRITES]), st.integers(0, 2)
        ),
        max_size=7,
    )
)
def test_a_schedule_is_straightened_as_far_as_steps_may_be_swapped(
    taken: list[tuple[int, str, int]],
) -> None:
    schedule = [actor for actor, _, _ in taken]
    operations = [(verb, slot, None) for _, verb, slot in taken]
    straight = straightened(schedule, operations, conflicts)
    possible = orders(schedule, operations)
    assert tuple(straight) in possible
    assert changes(straight) == min(map(changes, possible))


@pytest.mark.parametrize(("each", "straight"), [(315, True), (316, False)])
def test_a_long_schedule_stays_as_it_is(each: int, straight: bool) -> None:
    """Two actors of 315 steps have 316 * 316 places, fewer than the limit of 100,000."""
    schedule = [0, 1] * each
    apart: list[Operation] = [(control.READS, actor, None) for actor in schedule]
    found = straightened(schedule, apart, conflicts)
    assert (changes(found) == 1, found == schedule) == (straight, not straight)
