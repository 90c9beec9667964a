"""The explorer of interleavings, on programs small enough to know the answer."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import permutations
from math import factorial
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from restrictedmem import sync
from restrictedmem.check import explorer, model, objects
from restrictedmem.check.control import UnsoundError, forget, saw, touch, watch
from restrictedmem.check.explorer import RuleBroken, explore
from restrictedmem.cli import check
from restrictedmem.cli.main import main
from restrictedmem.sync import RwSem as ProductionRwSem
from waiting import wait_until

FACTORIES = ("mutex", "condition", "RwSem", "SharedWords", "shared_bytes")
#: Every kind of search that must find whatever there is.
WHOLE: tuple[dict[str, Any], ...] = ({}, {"reduce": True})


class Base:
    """A program of bodies, with nothing plain that is shared."""

    bodies: Sequence[Callable[[], None]] = ()

    def actors(self) -> Sequence[tuple[str, Callable[[], None]]]:
        return [(name, body) for name, body in zip("abcd", self.bodies, strict=False)]

    def state(self) -> Hashable:
        return ()

    def check(self) -> None:
        pass

    def finish(self) -> None:
        pass


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
    # What does not meet is done in one order.
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


# What is found.


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
    """One waits for a flag, the other sets it; ``late`` looks at the flag before it has the lock."""

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
    """A writer sets two bytes that belong together; a reader reads them at once, or one after the other."""

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


class Semaphore(Base):
    """Readers and writers note when they are inside; ``nested`` has a reader take the read side twice."""

    def __init__(self, kind: Callable[[], Any], *, nested: bool, readers: int = 2) -> None:
        self.sem = kind()
        self.nested = nested
        self.reading = 0
        self.writing = 0
        self.bodies = (self.write, *([self.read] * readers))

    def read(self) -> None:
        self.sem.down_read()
        self.reading += 1
        touch("inside", write=True)
        if self.nested:
            self.sem.down_read()
            self.sem.up_read()
        self.reading -= 1
        self.sem.up_read()

    def write(self) -> None:
        self.sem.down_write()
        self.writing += 1
        touch("inside", write=True)
        self.writing -= 1
        self.sem.up_write()

    def state(self) -> Hashable:
        # What production's own has behind its lock.
        inside = [
            getattr(self.sem, name)
            for name in getattr(ProductionRwSem, "__slots__", ())
            if hasattr(self.sem, name)
        ]
        return (
            self.reading,
            self.writing,
            tuple(value for value in inside if isinstance(value, int)),
        )

    def check(self) -> None:
        if self.writing > 1 or (self.writing and self.reading):
            raise RuleBroken(f"{self.writing} writers and {self.reading} readers are inside")


def controlled_rwsem() -> Any:
    return sync.RwSem()


@pytest.mark.parametrize("kind", [controlled_rwsem, ProductionRwSem])
def test_a_semaphore_keeps_writers_alone_and_puts_them_before_new_readers(
    kind: Callable[[], Any],
) -> None:
    for how in WHOLE:
        assert explore(partial(Semaphore, kind, nested=False), **how).holds
        # A writer that waits keeps the second down_read out, while the first keeps the writer out.
        found = explore(partial(Semaphore, kind, nested=True, readers=1), **how).counterexample
        assert found is not None
        assert found.violation == "deadlock: a and b wait"


class Shared(Base):
    """A reader and a writer that do not release what they took."""

    def __init__(self) -> None:
        self.sem = sync.RwSem()
        self.bodies = (self.sem.down_read, self.sem.down_write)


def test_a_semaphore_that_stays_taken_is_a_deadlock() -> None:
    found = explore(Shared).counterexample
    assert found is not None
    assert found.stuck[0].does in ("takes Shared.sem for writing", "takes Shared.sem for reading")


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


class Misuse(Base):
    def __init__(self, act: Callable[[Any, Any], None]) -> None:
        lock = sync.mutex()
        self.bodies = (partial(act, lock, sync.condition(lock)),)


def release(lock: Any, condition: Any) -> None:
    lock.release()


def wait(lock: Any, condition: Any) -> None:
    condition.wait()


def notify(lock: Any, condition: Any) -> None:
    condition.notify()


@pytest.mark.parametrize("act", [release, wait, notify])
def test_what_the_real_objects_refuse_is_refused(act: Callable[[Any, Any], None]) -> None:
    lock = threading.Lock()
    with pytest.raises(RuntimeError) as refused:
        act(lock, threading.Condition(lock))
    found = explore(partial(Misuse, act)).counterexample
    assert found is not None
    assert found.violation == f"a raised {refused.value!r}"


class Spin(Base):
    def __init__(self) -> None:
        self.words = sync.SharedWords(memoryview(bytearray(8)))
        self.bodies = (self.spin,)

    def spin(self) -> None:
        while not self.words.read(0):
            pass


@pytest.mark.parametrize("how", WHOLE)
def test_an_execution_without_an_end_is_a_violation(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "ENDLESS", 100)
    found = explore(Spin, **how).counterexample
    assert found is not None
    assert found.violation == "no end after 100 steps"


class Tries(Base):
    """Mutual exclusion by trying: who fails goes without."""

    def __init__(self, ends: set[tuple[bool, ...]]) -> None:
        self.ends = ends
        self.lock = sync.mutex()
        self.got: dict[str, bool] = {}
        self.bodies = (partial(self.hold, "a"), partial(self.hold, "b"), self.look)

    def hold(self, name: str) -> None:
        self.got[name] = self.lock.acquire(blocking=False)
        if self.got[name]:
            self.lock.release()

    def look(self) -> None:
        self.got["c"] = self.lock.locked()

    def state(self) -> Hashable:
        return tuple(sorted(self.got.items()))

    def finish(self) -> None:
        self.ends.add(tuple(value for _, value in sorted(self.got.items())))


def test_trying_and_looking_are_steps() -> None:
    found: list[set[tuple[bool, ...]]] = []
    for how in WHOLE:
        ends: set[tuple[bool, ...]] = set()
        assert explore(partial(Tries, ends), **how).holds
        found.append(ends)
    assert (
        found[0]
        == found[1]
        == {
            (x, y, z) for x in (True, False) for y in (True, False) for z in (True, False) if x or y
        }
    )


# Against every interleaving, one by one.

_LOCKS, _PLACES = 2, 2
_simple = st.one_of(
    st.tuples(st.sampled_from(["load", "add", "touch"]), st.integers(0, _PLACES - 1)),
    st.tuples(st.just("byte"), st.integers(0, 1)),
)
_item = st.one_of(
    _simple, st.tuples(st.just("lock"), st.integers(0, _LOCKS - 1), st.lists(_simple, max_size=2))
)
_body = st.lists(_item, min_size=1, max_size=3)
Item = tuple[Any, ...]
Operations = list[tuple[str, int]]


def flat(body: Sequence[Item]) -> Operations:
    """Write a body as single operations."""
    found: Operations = []
    for item in body:
        if item[0] == "lock":
            found += [("take", item[1]), *flat(item[2]), ("release", item[1])]
        elif item[0] == "add":
            found += [("load", item[1]), ("store", item[1])]
        else:
            found.append((item[0], item[1]))
    return found


Seen = tuple[tuple[int, ...], ...]


def brute_force(bodies: Sequence[Operations]) -> tuple[set[Any], set[Seen], bool]:
    """Follow every interleaving of bodies: (ends, what check sees on the way, whether one is a deadlock)."""
    ends: set[Any] = set()
    seen: set[Seen] = set()
    stuck = False
    start: Any = (
        (0,) * len(bodies),
        (None,) * _LOCKS,
        (0,) * _PLACES,
        (0,) * _PLACES,
        (0, 0),
        ((),) * len(bodies),
    )
    todo: list[Any] = [start]
    known: set[Any] = {start}
    while todo:
        at, locks, words, touched, pair, reads = todo.pop()
        seen.add((words, touched, pair))
        moved = False
        for actor, body in enumerate(bodies):
            if at[actor] == len(body):
                continue
            verb, where = body[int(at[actor])]
            if verb == "take" and locks[where] is not None:
                continue
            moved = True

            def put(values: tuple[Any, ...], index: int, value: object) -> tuple[Any, ...]:
                return (*values[:index], value, *values[index + 1 :])

            after = [put(at, actor, at[actor] + 1), locks, words, touched, pair, reads]
            match str(verb):
                case "take":
                    after[1] = put(locks, where, actor)
                case "release":
                    after[1] = put(locks, where, None)
                case "load":
                    after[5] = put(reads, actor, (*reads[actor], words[where]))
                case "store":
                    after[2] = put(words, where, reads[actor][-1] + 1)
                case "touch":
                    after[3] = put(touched, where, touched[where] * 3 + actor + 1)
                case _:
                    after[4] = put(pair, where, actor + 1)
            following = tuple(after)
            if following not in known:
                known.add(following)
                todo.append(following)
        if not moved:
            if all(place == len(body) for place, body in zip(at, bodies, strict=True)):
                ends.add((words, touched, pair, reads))
            else:
                stuck = True
    return ends, seen, stuck


class Random(Base):
    """The same bodies, on controlled objects; notes what check sees and how it ends."""

    def __init__(
        self, bodies: Sequence[Operations], ends: set[Any], seen: set[Any], forbidden: Seen | None
    ) -> None:
        self.locks = [sync.mutex() for _ in range(_LOCKS)]
        self.memory = bytearray(8 * _PLACES)
        self.words = sync.SharedWords(memoryview(self.memory))
        self.touched = [0] * _PLACES
        self.pair = sync.shared_bytes(2)
        self.reads: list[tuple[int, ...]] = [()] * len(bodies)
        self.ends, self.seen, self.forbidden = ends, seen, forbidden
        self.bodies = [partial(self.run, number, body) for number, body in enumerate(bodies)]

    def run(self, number: int, body: Operations) -> None:
        for verb, where in body:
            match verb:
                case "take":
                    self.locks[where].acquire()
                case "release":
                    self.locks[where].release()
                case "load":
                    self.reads[number] += (self.words.read(where),)
                case "store":
                    self.words.write(where, self.reads[number][-1] + 1)
                case "touch":
                    touch(("place", where), write=True)
                    self.touched[where] = self.touched[where] * 3 + number + 1
                    saw(None)
                case _:
                    self.pair[where] = number + 1

    def now(self) -> Seen:
        words = tuple(
            int.from_bytes(self.memory[8 * at : 8 * at + 8], "little") for at in range(_PLACES)
        )
        return words, tuple(self.touched), tuple(memoryview(self.pair))

    def state(self) -> Hashable:
        return tuple(self.touched)

    def check(self) -> None:
        found = self.now()
        self.seen.add(found)
        if found == self.forbidden:
            raise RuleBroken("forbidden")

    def finish(self) -> None:
        self.ends.add((*self.now(), tuple(self.reads)))


@pytest.mark.no_cover
@settings(max_examples=80, deadline=None)
@given(st.lists(_body, min_size=2, max_size=3), st.integers(0, 1 << 16))
def test_searches_find_what_every_interleaving_one_by_one_does(
    bodies: list[list[Item]], which: int
) -> None:
    operations = [flat(body) for body in bodies]
    expected_ends, expected_seen, stuck = brute_force(operations)
    for how in WHOLE:
        ends: set[Any] = set()
        seen: set[Any] = set()
        result = explore(partial(Random, operations, ends, seen, None), **how)
        assert result.complete
        if stuck:
            assert result.counterexample is not None
            assert result.counterexample.violation.startswith("deadlock")
        else:
            assert result.counterexample is None
            assert ends == expected_ends
            assert seen == expected_seen
    if not stuck:
        # Whatever check might forbid is found, by both, and in as few steps.
        forbidden = sorted(expected_seen)[which % len(expected_seen)]
        lengths = set[int]()
        for how in WHOLE:
            found = explore(
                partial(Random, operations, set(), set(), forbidden), **how
            ).counterexample
            assert found is not None
            lengths.add(len(found.steps))
        assert len(lengths) == 1


@pytest.mark.no_cover
@settings(max_examples=60, deadline=None)
@given(st.lists(_body, min_size=2, max_size=3), st.integers(0, 1 << 16), st.integers(0, 2))
def test_with_so_many_preemptions_reduction_misses_nothing(
    bodies: list[list[Item]], which: int, preemptions: int
) -> None:
    operations = [flat(body) for body in bodies]
    _, expected_seen, stuck = brute_force(operations)
    assume(not stuck)
    forbidden = sorted(expected_seen)[which % len(expected_seen)]
    found = [
        explore(
            partial(Random, operations, set(), set(), forbidden),
            preemptions=preemptions,
            reduce=reduce,
        ).counterexample
        is None
        for reduce in (False, True)
    ]
    assert found[0] is found[1]


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
    """What it has read stays in plain data that no state shows."""

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
