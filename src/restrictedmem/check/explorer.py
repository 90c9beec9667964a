"""Every interleaving of a program's actors, or every one that may differ, over production code.

The search goes through a model of the program that executions fill (``model``), breadth first, so
that what it finds is short. A state is known again by the objects behind ``sync``, what the program
says of its own, and each actor's past: all that it did and read, as far as it has not forgotten it
(``control.forget``, ``control.summarized``).

Reduced search leaves out what only swaps neighbours that do not meet. In each state it goes on with
a persistent set: actors such that nothing the others may do, before one of these moves, meets what
they do next. Two accesses meet when they are to one object and not both of a kind that commutes,
unless a lock that both actors hold keeps them apart; and when ``Program.check`` may see both. What
an actor may still do after each of its pasts is learned on the way (``futures``). When it turns out
to be more than some state relied upon, that state is gone on from again.

At the end nothing is left to learn. For take the shortest execution to a step that the search has
not seen, and the first state on its way in which it leaves the search, by a step of somebody who
had to wait there. What happens from there until one of the persistent set moves is known but for
the last step of all. If all of it commutes with the step of the set that comes next, that one could
as well have come first, and so on. If not, then the last step is an access that the state relied
upon not to come.

With ``preemptions`` an actor that could go on is left that often. Of the reduction remains that a
step that nobody can meet follows the last without a choice: whoever would have run before it may as
well run after it, for no more preemptions.
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias, final

from restrictedmem.check import objects
from restrictedmem.check.control import Execution, Method, summarized
from restrictedmem.check.futures import conflict
from restrictedmem.check.model import ENDLESS, Model, Program, RuleBroken, State
from restrictedmem.check.schedule import Counterexample, Teller, straightened

__all__ = ["Program", "Result", "RuleBroken", "effort", "explore"]

#: Executions at random after a complete search, in which nothing may be new.
_SAMPLES: Final = 50
#: Seconds to look for a shorter counterexample than the first.
_SHORTENING: Final = 3.0
_NOBODY: Final = -1

#: A state, and who ran last if that one could go on and it matters.
_Place: TypeAlias = tuple[State, int]


@final
@dataclass(frozen=True, slots=True)
class Result:
    """What a search found."""

    states: int
    transitions: int
    executions: int
    seconds: float
    #: Whether all was searched that was asked for.
    complete: bool
    counterexample: Counterexample | None

    @property
    def holds(self) -> bool:
        """Whether all was searched and nothing found."""
        return self.complete and self.counterexample is None


def explore(
    make: Callable[[], Program],
    *,
    preemptions: int | None = None,
    reduce: bool = False,
    calls: Iterable[Method] = (),
    limit_seconds: float = 600,
) -> Result:
    """Search the interleavings of a program for a violation, and for the shortest one if there is any.

    All of them; with ``reduce``, all that may differ; with ``preemptions``, those in which an actor
    that could go on is left that often. ``calls`` are forgotten once they have returned
    (``control.summarized``).
    """
    started = time.monotonic()
    deadline = started + limit_seconds
    with objects.controlled(), summarized(calls), _without_collections():
        model = Model(make)
        search = _Search(model, preemptions, reduce=reduce)
        complete = search.run(deadline)
        found, transitions, executions = search.found, model.transitions, model.executions
        if found is not None and (reduce or preemptions is not None):
            again = _Search(model, None, reduce=False)
            complete = again.run(min(deadline, time.monotonic() + _SHORTENING))
            found = found if again.found is None else again.found
        elif found is None and complete and preemptions is None:
            model.sample(_SAMPLES, lambda state: reduce or search.has(state))
        counterexample = None if found is None else _tell(model, found, shortest=complete)
    return Result(
        search.states, transitions, executions, time.monotonic() - started, complete, counterexample
    )


def effort(actors: int, *, exhaustive: bool) -> tuple[int | None, bool, str]:
    """Return how much is searched with so many actors: preemptions and whether to reduce, as ``explore`` takes them, and in words.

    With two or three, all interleavings that may differ; with four, those of three preemptions.
    ``exhaustive``: all with two, and with four all that may differ.
    """
    if actors == 2 and exhaustive:
        return None, False, "all interleavings"
    if actors > 3 and not exhaustive:
        return 3, True, "up to 3 preemptions"
    return None, True, "all interleavings that may differ"


@contextmanager
def _without_collections() -> Generator[None]:
    """Keep the garbage collector from walking over all states again and again; the model calls it for what is new."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@final
class _Search:
    """One search, by preemptions first and then by steps."""

    def __init__(self, model: Model, preemptions: int | None, *, reduce: bool) -> None:
        self._model = model
        self._bounded = preemptions is not None
        self._reduces = reduce
        #: By place: how many preemptions it took to come there, and from where by how many steps of
        #: whom.
        self._spent: dict[_Place, int] = {}
        self._came: dict[_Place, tuple[_Place, int, int] | None] = {}
        #: By preemptions: places to go on from.
        self._queues = tuple(deque[_Place]() for _ in range(1 + (preemptions or 0)))
        #: How many mutexes somebody is known to try or look at.
        self._tried = 0
        #: The schedule that ends in a violation.
        self.found: list[int] | None = None

    @property
    def states(self) -> int:
        """How many states there were to choose in, each counted once for each actor that could have gone on without a preemption."""
        return len(self._came)

    def has(self, state: State) -> bool:
        """Say whether an unbounded search has seen a state."""
        return (state, _NOBODY) in self._came

    def run(self, deadline: float) -> bool:
        """Search until something is found; returns whether all was searched up to there."""
        start = self._model.start()
        if isinstance(start, str):
            self.found = []
            return True
        self._reach((start, _NOBODY), 0, None)
        while (place := self._take()) is not None and self.found is None:
            if time.monotonic() > deadline:
                return False
            self._go_on(place)
            self._look_again()
        return True

    def _take(self) -> _Place | None:
        """Return the next place to go on from."""
        for spent, queue in enumerate(self._queues):
            while queue:
                place = queue.popleft()
                if self._spent[place] == spent:
                    return place
        return None

    def _reach(self, place: _Place, spent: int, came: tuple[_Place, int, int] | None) -> None:
        if spent < self._spent.get(place, len(self._queues)):
            self._spent[place], self._came[place] = spent, came
            self._queues[spent].append(place)

    def _go_on(self, place: _Place) -> None:
        """Take all steps from a place that are to be taken."""
        state, last = place
        enabled = self._model.enabled(state)
        if not enabled and self._model.end(state, self._schedule(place)) is not None:
            self.found = self._schedule(place)
        for index in self._choose(state, enabled):
            spent = self._spent[place] + (last not in (_NOBODY, index))
            if spent < len(self._queues):
                after, steps = self._follow(place, index)
                if after is None:
                    self.found = self._schedule(place) + [index] * steps
                    return
                following = index if self._bounded and self._model.can_go(after, index) else _NOBODY
                self._reach((after, following), spent, (place, index, steps))

    def _choose(self, state: State, enabled: list[int]) -> Sequence[int]:
        """Return who has to be tried next, and remember what that relies upon."""
        if not self._reduces or self._bounded or len(enabled) < 2:
            return enabled
        futures, pasts = self._model.futures, tuple(enumerate(state[1:]))
        group = futures.fewest(pasts, enabled)
        futures.rely(pasts, group)
        return [index for index in enabled if index in group]

    def _follow(self, place: _Place, index: int) -> tuple[State | None, int]:
        """Take an actor's step and all of its next that nobody can meet; returns what they lead to, None for a violation, and how many."""
        state, steps = place[0], 0
        while True:
            after = self._model.after(state, index)
            if after is None:
                self._model.learn(
                    self._schedule(place) + [index] * steps, state, index, self._interesting
                )
                after = self._model.after(state, index)
            steps += 1
            if after is None or isinstance(after, str) or steps > ENDLESS:
                return None, steps
            state = after
            if not self._alone(state, index):
                return state, steps

    def _alone(self, state: State, index: int) -> bool:
        """Say whether an actor has a next step that nobody can meet, and remember what that relies upon."""
        if not self._reduces or not self._model.can_go(state, index):
            return False
        futures, pasts = self._model.futures, tuple(enumerate(state[1:]))
        if not futures.alone(pasts, index):
            return False
        futures.rely(pasts, {index})
        return True

    def _interesting(self, state: State) -> Sequence[int]:
        """Return who is worth executing on the way."""
        enabled = self._model.enabled(state)
        if not self._reduces or self._bounded or len(enabled) < 2:
            return enabled
        group = self._model.futures.fewest(tuple(enumerate(state[1:])), enabled)
        return [index for index in enabled if index in group]

    def _look_again(self) -> None:
        """Go on once more from places that relied on a future without what is known of it now."""
        wrong, tried = self._model.futures.wrong, len(self._model.names.tried)
        if not wrong and tried == self._tried:
            return
        # With mutexes that only their owner was thought to touch, any may have.
        places = [
            place
            for place in self._came
            if tried > self._tried or not wrong.isdisjoint(enumerate(place[0][1:]))
        ]
        self._tried = tried
        wrong.clear()
        for place in places:
            self._queues[self._spent[place]].append(place)

    def _schedule(self, place: _Place) -> list[int]:
        """Return whose steps lead to a place."""
        runs: list[tuple[int, int]] = []
        while (came := self._came[place]) is not None:
            place, index, steps = came
            runs.append((index, steps))
        return [index for index, steps in reversed(runs) for _ in range(steps)]


def _tell(model: Model, schedule: Sequence[int], *, shortest: bool) -> Counterexample:
    """Execute a schedule once more, with as few changes of actors as it can be told with."""
    teller, _ = _retell(model, schedule)
    order = straightened(schedule[: len(teller.steps)], teller.operations, conflict)
    straight, violation = _retell(model, order)
    if violation is None:
        # Plain data made a difference that no operation shows.
        straight, violation = _retell(model, schedule)
    assert violation is not None, "what was found is found again"
    return Counterexample(violation, tuple(straight.steps), shortest, straight.waiting)


def _retell(model: Model, schedule: Sequence[int]) -> tuple[Teller, str | None]:
    teller = Teller()
    found: list[str | None] = []

    def arrive(execution: Execution) -> None:
        found.append(model.wrong(execution))
        if not any(execution.enabled(actor) for actor in execution.actors):
            teller.tell_waiting(execution.actors, execution.values)

    execution = model.execute(schedule, arrive, teller)
    return teller, model.wrong(execution) if execution.broken is not None else found[-1]
