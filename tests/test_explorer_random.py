"""The explorer against every interleaving, one by one, of random programs."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from explored import WHOLE, Base
from restrictedmem import sync
from restrictedmem.check.control import saw, touch
from restrictedmem.check.explorer import RuleBroken, explore

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
    """Follow every interleaving: (ends, results of check on the way, whether one deadlocks)."""
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
        # Both find whatever check might forbid, and in as few steps.
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
