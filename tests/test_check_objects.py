"""What each operation on a controlled object is to the explorer.

An execution follows a schedule, and its tale is compared: which operation each actor stops at, what
it learned of the one before, and which actors can go on. The searches are in test_explorer.py.
"""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import pytest

from restrictedmem import sync
from restrictedmem.check import control, objects
from restrictedmem.check.control import Actor, Execution, Names, Operation, UnsoundError

#: By actor: what it learned, and the operation that it stops at; None at its end.
Tale = list[tuple[str, object, Operation | None]]


class Listener:
    """A story that notes the arrivals."""

    def __init__(self) -> None:
        self.tale: Tale = []
        self.slots: list[int] = []
        self.performed: list[str] = []

    def made(self, slot: int) -> None:
        self.slots.append(slot)

    def arrives(self, actor: Actor, operation: Operation | None) -> None:
        self.tale.append((actor.name, actor.value, operation))

    def performs(self, actor: Actor) -> None:
        self.performed.append(actor.name)


class Stage:
    """An execution of bodies, which are made once the objects of ``sync`` are controlled."""

    def __init__(self) -> None:
        self.names = Names()
        self.listener = Listener()
        self.enabled: list[str] = []
        self.execution = Execution(self.names, self.arrive, self.listener)
        control.enter(self.execution)

    def arrive(self, execution: Execution) -> None:
        self.enabled = [actor.name for actor in execution.actors if execution.enabled(actor)]

    def play(self, schedule: str, **bodies: Callable[[], object]) -> Tale:
        """Run the bodies, by name, in the order of a schedule of names; return their tale."""
        names = list(bodies)
        self.listener.tale.clear()
        acts = [(name, wrapped(body)) for name, body in bodies.items()]
        self.execution.run(acts, [names.index(name) for name in schedule])
        if self.execution.broken is not None:
            raise self.execution.broken[1]
        return self.listener.tale


def wrapped(body: Callable[[], object]) -> Callable[[], None]:
    def act() -> None:
        body()

    return act


def wait_on(condition: Any) -> None:
    with condition:
        condition.wait()


@pytest.fixture
def stage() -> Generator[Stage]:
    with objects.controlled():
        yield Stage()


def test_a_mutex_is_taken_and_released_in_steps(stage: Stage) -> None:
    mutex: Any = sync.mutex()
    values = stage.execution.values

    def body() -> None:
        assert mutex.acquire()
        assert (values[mutex.slot], stage.execution.actors[0].held) == (0, frozenset({mutex.slot}))
        mutex.release()
        assert (values[mutex.slot], stage.execution.actors[0].held) == (-1, frozenset())

    tale = stage.play("aa", a=body)
    takes, releases = ((verb, mutex.slot, None) for verb in (control.TAKES, control.RELEASES))
    assert tale == [("a", None, takes), ("a", None, releases), ("a", None, None)]
    assert stage.names.tried == set()


def test_who_tries_or_looks_learns_whether_it_is_held(stage: Stage) -> None:
    mutex: Any = sync.mutex()
    found: list[object] = []

    def tries() -> None:
        found.append(mutex.acquire(blocking=False))

    def looks() -> None:
        found.append(mutex.locked())
        found.append(mutex.locked())

    tale = stage.play("bab", a=tries, b=looks)
    assert found == [False, True, True]
    assert stage.names.tried == {mutex.slot}
    looking = ("b", None, (control.LOOKS, mutex.slot, None))
    assert tale[:2] == [("a", None, (control.TRIES, mutex.slot, None)), looking]
    assert tale[2:] == [
        ("b", False, (control.LOOKS, mutex.slot, None)),
        ("a", True, None),
        ("b", True, None),
    ]


def test_who_tries_in_vain_does_not_hold_it(stage: Stage) -> None:
    mutex: Any = sync.mutex()
    found: list[object] = []
    stage.play("ab", a=mutex.acquire, b=lambda: found.append(mutex.acquire(blocking=False)))
    first, second = stage.execution.actors
    assert (found, first.held, second.held) == ([False], frozenset({mutex.slot}), frozenset())
    assert (second.value, mutex.owner) == (False, first)


def test_a_mutex_that_is_held_stops_those_who_take_it(stage: Stage) -> None:
    mutex: Any = sync.mutex()
    stage.play("a", a=lambda: [mutex.acquire(), mutex.release()], b=mutex.acquire)
    assert stage.enabled == ["a"]


def test_who_waits_is_woken_in_its_turn(stage: Stage) -> None:
    mutex: Any = sync.mutex()
    condition: Any = sync.condition(mutex)
    slot = stage.listener.slots[-1]
    wait = partial(wait_on, condition)

    waiters: list[object] = []

    def wakes() -> None:
        with condition:
            for notify in (condition.notify, condition.notify_all):
                waiters.append(stage.execution.values[slot])
                notify()
            waiters.append(stage.execution.values[slot])

    tale = stage.play("aabbccc", a=wait, b=wait, c=wakes)
    assert waiters == [(0, 1), (1,), ()]
    assert ("a", None, (control.WAITS, mutex.slot, slot)) in tale
    assert ("b", None, (control.WAKES, mutex.slot, slot)) in tale
    notifies = ("c", None, (control.NOTIFIES, mutex.slot, slot))
    assert tale[-3:] == [notifies, notifies, ("c", None, (control.RELEASES, mutex.slot, None))]


def wake(condition: Any, *counts: int) -> None:
    with condition:
        for count in counts:
            condition.notify(count)


@pytest.mark.parametrize(
    ("schedule", "counts", "enabled"),
    [
        ("aabbcc", (1, 1), ["c"]),
        ("aabbccc", (1, 1), ["c"]),
        ("aabbcccc", (1, 1), ["a", "b"]),
        # The last to come was not woken.
        ("aabbccc", (1,), ["a"]),
    ],
)
def test_a_waiter_goes_on_when_it_is_woken_and_the_mutex_is_free(
    stage: Stage, schedule: str, counts: tuple[int, ...], enabled: list[str]
) -> None:
    condition: Any = sync.condition(sync.mutex())
    wait = partial(wait_on, condition)
    stage.play(schedule, a=wait, b=wait, c=partial(wake, condition, *counts))
    assert stage.enabled == enabled


def test_a_semaphore_has_readers_or_one_writer(stage: Stage) -> None:
    semaphore: Any = sync.RwSem()
    (slot,) = stage.listener.slots
    values = stage.execution.values
    assert values[slot] == (0, 0, False)

    def reads() -> None:
        semaphore.down_read()
        semaphore.up_read()

    def writes() -> None:
        semaphore.down_write()
        assert values[slot] == (0, 1, True)
        semaphore.up_write()

    tale = stage.play("abcabcc", a=reads, b=reads, c=writes)
    verbs = [operation and operation[0] for name, _, operation in tale if name == "c"]
    # The writer asks while there are readers; so it waits for the last of them.
    assert verbs == [
        control.ASKS_WRITE,
        control.TAKES_WRITE,
        control.RELEASES_WRITE,
        None,
    ]
    assert (values[slot], stage.execution.actors[2].held) == ((0, 0, False), frozenset())


@pytest.mark.parametrize(
    ("schedule", "state", "enabled"),
    [
        ("a", (1, 0, False), ["a", "b", "c"]),
        ("ab", (2, 0, False), ["a", "b", "c"]),
        ("aba", (1, 0, False), ["b", "c"]),
        # A writer that waits keeps new readers out.
        ("ac", (1, 1, False), ["a"]),
        ("aca", (0, 1, False), ["c"]),
        ("acac", (0, 1, True), ["c"]),
        # A semaphore that nobody holds is written at once.
        ("c", (0, 1, True), ["c"]),
        ("cc", (0, 0, False), ["a", "b"]),
    ],
)
def test_writers_go_before_new_readers(
    stage: Stage, schedule: str, state: tuple[int, int, bool], enabled: list[str]
) -> None:
    semaphore: Any = sync.RwSem()

    def reads() -> None:
        semaphore.down_read()
        semaphore.up_read()

    def writes() -> None:
        semaphore.down_write()
        semaphore.up_write()

    stage.play(schedule, a=reads, b=reads, c=writes)
    (slot,) = stage.listener.slots
    assert (stage.execution.values[slot], stage.enabled) == (state, enabled)


def test_a_second_writer_waits_for_the_first(stage: Stage) -> None:
    semaphore: Any = sync.RwSem()
    (slot,) = stage.listener.slots

    def writes() -> None:
        semaphore.down_write()
        semaphore.up_write()

    stage.play("ab", a=writes, b=writes)
    first, second = stage.execution.actors
    assert (stage.execution.values[slot], stage.enabled) == ((0, 2, True), ["a"])
    assert (first.held, second.held) == (frozenset({slot}), frozenset())


def test_words_are_read_and_written_one_at_a_time(stage: Stage) -> None:
    memory = bytearray(24)
    words: Any = sync.SharedWords(memoryview(memory))
    again: Any = sync.SharedWords(memoryview(memory))
    words.write(1, 3)

    def body() -> None:
        assert words.read(1) == 3
        again.write(2, 1 << 40)
        assert words.read(2) == 1 << 40

    tale = stage.play("aaa", a=body)
    (number,) = stage.listener.slots
    places = [stage.names.place(("word", index)) for index in (1, 2)]
    assert tale == [
        ("a", None, (control.READS, places[0], (number, 1))),
        ("a", 3, (control.WRITES, places[1], (number, 2))),
        ("a", 1 << 40, (control.READS, places[1], (number, 2))),
        ("a", 1 << 40, None),
    ]
    assert places[0] < 0 > places[1]
    assert stage.execution.values[stage.execution.slot((number, 2))] == 1 << 40


@pytest.mark.parametrize(("written", "enabled"), [(0, ["b"]), (5, ["a", "b"])])
def test_a_poll_goes_on_when_its_word_has_changed(
    stage: Stage, written: int, enabled: list[str]
) -> None:
    words: Any = sync.SharedWords(memoryview(bytearray(16)))
    number = stage.listener.slots[-1]
    words.write(1, 0)

    def polls() -> None:
        while not words.read(1):
            sync.relax()

    def writes() -> None:
        words.write(1, written)
        words.read(0)

    tale = stage.play("ab", a=polls, b=writes)
    assert stage.enabled == enabled
    polled = [operation for name, _, operation in tale[2:] if name == "a"]
    assert polled == [(control.READS, stage.names.place(("word", 1)), ((number, 1), 0))]


def test_who_has_polled_knows_that_the_word_changed(stage: Stage) -> None:
    words: Any = sync.SharedWords(memoryview(bytearray(16)))

    def polls() -> None:
        words.read(1)
        sync.relax()

    stage.play("aba", a=polls, b=lambda: words.write(1, 1))
    assert stage.execution.actors[0].value is True


def test_a_word_that_was_never_written_is_not_another(stage: Stage) -> None:
    words: Any = sync.SharedWords(memoryview(bytearray(16)))

    def polls() -> None:
        words.read(0)
        sync.relax()

    stage.play("ab", a=polls, b=lambda: words.write(1, 1))
    assert stage.enabled == []


def test_who_has_read_no_word_polls_nothing(stage: Stage) -> None:
    assert stage.play("", a=sync.relax) == [("a", None, None)]


#: What reads bytes, the part that the explorer is told of, and what the actor learns.
READINGS: list[tuple[Callable[[Any], object], object, object]] = [
    (lambda found: found[1], 1, 7),
    (lambda found: found[1:3], ("slice", 1, 3, None), b"\x07\0"),
    (list, ("slice", None, None, None), b"\0\7\0\7"),
    (lambda found: 7 in found, ("slice", None, None, None), b"\0\7\0\7"),
    (bytes, ("slice", None, None, None), b"\0\7\0\7"),
    (lambda found: found.count(7), ("count", 7), 2),
    (lambda found: found.find(7, 2), ("find", 7, 2), 3),
    (lambda found: found.find(9), ("find", 9), -1),
    (lambda found: found.index(0, 1), ("find", 0, 1), 2),
]


@pytest.mark.parametrize(("act", "where", "learned"), READINGS)
def test_bytes_are_read_in_one_step(
    stage: Stage, act: Callable[[Any], object], where: object, learned: object
) -> None:
    found: Any = sync.shared_bytes(4)
    assert stage.execution.values[found.slot] == bytes(4)
    found[1] = found[3] = 7
    plain = bytearray(b"\0\7\0\7")
    results: list[object] = []
    tale = stage.play("a", a=lambda: results.append(act(found)))
    assert tale == [("a", None, (control.READS, found.slot, where)), ("a", learned, None)]
    assert results == [act(plain)]


def test_bytes_are_written_in_one_step(stage: Stage) -> None:
    found: Any = sync.shared_bytes(3)

    def body() -> None:
        found[2] = 5
        found[0:2] = bytearray(b"\1\2")

    tale = stage.play("aa", a=body)
    assert tale == [
        ("a", None, (control.WRITES, found.slot, 2)),
        ("a", 5, (control.WRITES, found.slot, ("slice", 0, 2, None))),
        ("a", b"\1\2", None),
    ]
    assert stage.execution.values[found.slot] == b"\1\2\5"


def test_bytes_without_the_value_have_no_index_of_it(stage: Stage) -> None:
    with pytest.raises(ValueError, match="not found"):
        stage.play("a", a=lambda: sync.shared_bytes(3).index(1))


def test_the_number_of_an_object_depends_on_its_maker_alone(stage: Stage) -> None:
    def slots(schedule: str) -> list[tuple[Any, ...]]:
        made: dict[str, list[int]] = {"a": [], "b": []}

        def makes(name: str) -> None:
            for _ in range(2):
                mutex: Any = sync.mutex()
                made[name].append(mutex.slot)
                mutex.acquire()

        stage.execution = Execution(stage.names, stage.arrive)
        control.enter(stage.execution)
        stage.play(schedule, a=lambda: makes("a"), b=lambda: makes("b"))
        return [tuple(made["a"]), tuple(made["b"])]

    one, other = slots("aabb"), slots("bbaa")
    assert one == other
    assert len({*one[0], *one[1]}) == 4


def test_a_schedule_with_a_step_too_many_is_found_out(stage: Stage) -> None:
    words: Any = sync.SharedWords(memoryview(bytearray(8)))
    with pytest.raises(UnsoundError, match=r"^a had one step more in an earlier execution$"):
        stage.play("aa", a=lambda: words.read(0))


def test_a_schedule_that_goes_on_where_an_actor_waits_is_found_out(stage: Stage) -> None:
    mutex: Any = sync.mutex()
    with pytest.raises(UnsoundError, match=r"^b did not have to wait in an earlier execution$"):
        stage.play("ab", a=mutex.acquire, b=mutex.acquire)


def test_actors_that_are_dropped_do_no_more_steps(stage: Stage) -> None:
    words: Any = sync.SharedWords(memoryview(bytearray(8)))
    done: list[str] = []

    def body() -> None:
        try:
            words.read(0)
            done.append("read")
        finally:
            words.write(0, 1)
            done.append("written")

    tale = stage.play("", a=body)
    assert (done, words.read(0), len(tale)) == ([], 0, 1)
    assert stage.execution.actors[0].gate is None
    assert (stage.execution.running, stage.execution.step) == (None, 0)
    # The greenlet is as good as new.
    again = Execution(stage.names, stage.arrive)
    again.run([("a", lambda: done.append("again"))], [])
    assert done == ["again"]
