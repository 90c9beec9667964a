"""A search through all interleavings of a program's actors over production code.

The search goes breadth first through a model of the program, so that counterexamples are short.
Executions fill the model (``model``). A state is identified by:

- the objects of ``sync``,
- the result of the program's ``state``,
- each actor's past: all that it did and read, except what it has forgotten (``control.forget``,
  ``control.summarized``).

**Reduced search** leaves out interleavings that differ only in the order of neighbouring steps that
do not meet. In each state it goes on with the actors of a persistent set. No step that the other
actors may do before one of the set moves meets a next step of the set.

Two accesses meet in two cases. They access one object, are not both of a kind that commutes, and no
lock that both actors hold keeps them apart. Or ``Program.check`` may see both.

The search learns on the way what an actor may still do after each of its pasts (``futures``). When
this turns out to be more than some state relied upon, the search goes on from that state again.

**Nothing is lost**: at the end, nothing is left to learn. To see this, assume steps that the search
has not seen, and take the shortest execution to one of them. This execution leaves the search in
some state: an actor moves there that the search made wait. Take the first such state. From there
until an actor of the persistent set moves, all steps are known, except the last step of the
execution. Assume that all of them commute with the next step of the set. Then that step could as
well have come first, and so on. If they do not all commute, the last step is an access that the
state relied upon not to come.

**With ``preemptions``** the search counts how often an execution leaves an actor that could go on,
and bounds this number. One part of the reduction remains. A step that nobody can meet follows the
actor's last step without a choice. An actor that would have run before this step may as well run
after it, with no more preemptions.
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

#: Random executions after a complete search, in which nothing may be new.
_SAMPLES: Final = 50
#: Seconds to look for a shorter counterexample than the first.
_SHORTENING: Final = 3.0
_NOBODY: Final = -1

#: A state, and the actor that ran last if it could go on and this matters, else ``_NOBODY``.
_Place: TypeAlias = tuple[State, int]


@final
@dataclass(frozen=True, slots=True)
class Result:
    """The result of a search."""

    states: int
    transitions: int
    executions: int
    seconds: float
    #: Whether everything that was asked for was searched.
    complete: bool
    counterexample: Counterexample | None

    @property
    def holds(self) -> bool:
        """Whether everything was searched and nothing was found."""
        return self.complete and self.counterexample is None


def explore(
    make: Callable[[], Program],
    *,
    preemptions: int | None = None,
    reduce: bool = False,
    calls: Iterable[Method] = (),
    limit_seconds: float = 600,
) -> Result:
    """Search the interleavings of a program for a violation, and then for a shortest one.

    By default this searches all interleavings. With ``reduce``, it searches all that may differ.
    With ``preemptions``, it searches those in which an actor that could go on is left at most that
    often. Actors forget ``calls`` once they have returned (``control.summarized``).
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
    """Return how much to search with so many actors: preemptions, whether to reduce, words.

    The first two are arguments of ``explore``. Two or three actors are searched in all
    interleavings that may differ, four actors in those with up to three preemptions. With
    ``exhaustive``, two actors are searched in all interleavings, and four in all that may differ.
    """
    if actors == 2 and exhaustive:
        return None, False, "all interleavings"
    if actors > 3 and not exhaustive:
        return 3, True, "up to 3 preemptions"
    return None, True, "all interleavings that may differ"


@contextmanager
def _without_collections() -> Generator[None]:
    """Keep the garbage collector from walking over all states again and again.

    The model calls the collector for new objects only.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@final
class _Search:
    """One search, in the order of preemptions first and then of steps."""

    def __init__(self, model: Model, preemptions: int | None, *, reduce: bool) -> None:
        self._model = model
        self._bounded = preemptions is not None
        self._reduces = reduce
        #: By place: the number of preemptions on the way there (``_spent``); the place before it,
        #: the actor that moved and its number of steps (``_came``).
        self._spent: dict[_Place, int] = {}
        self._came: dict[_Place, tuple[_Place, int, int] | None] = {}
        #: By preemptions: places to go on from.
        self._queues = tuple(deque[_Place]() for _ in range(1 + (preemptions or 0)))
        #: The number of mutexes that some actor is known to try or to look at.
        self._tried = 0
        #: The schedule that ends in a violation.
        self.found: list[int] | None = None

    @property
    def states(self) -> int:
        """The number of states in which the search chose an actor.

        With bounded preemptions, a state counts once for each actor that came there last and could
        have gone on without a preemption.
        """
        return len(self._came)

    def has(self, state: State) -> bool:
        """Return whether an unbounded search has seen a state."""
        return (state, _NOBODY) in self._came

    def run(self, deadline: float) -> bool:
        """Search until something is found; return whether all up to there was searched."""
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
        """Take all necessary steps from a place."""
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
        """Return the actors that have to be tried next; remember what this relies upon."""
        if not self._reduces or self._bounded or len(enabled) < 2:
            return enabled
        futures, pasts = self._model.futures, tuple(enumerate(state[1:]))
        group = futures.fewest(pasts, enabled)
        futures.rely(pasts, group)
        return [index for index in enabled if index in group]

    def _follow(self, place: _Place, index: int) -> tuple[State | None, int]:
        """Take an actor's step, and all its following steps that nobody can meet.

        Return the state that they lead to, or None for a violation, and the number of steps.
        """
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
        """Return whether nobody can meet an actor's next step; remember this reliance."""
        if not self._reduces or not self._model.can_go(state, index):
            return False
        futures, pasts = self._model.futures, tuple(enumerate(state[1:]))
        if not futures.alone(pasts, index):
            return False
        futures.rely(pasts, {index})
        return True

    def _interesting(self, state: State) -> Sequence[int]:
        """Return the actors that are worth executing on the way."""
        enabled = self._model.enabled(state)
        if not self._reduces or self._bounded or len(enabled) < 2:
            return enabled
        group = self._model.futures.fewest(tuple(enumerate(state[1:])), enabled)
        return [index for index in enabled if index in group]

    def _look_again(self) -> None:
        """Queue again the places that relied on a future of which more is known now."""
        wrong, tried = self._model.futures.wrong, len(self._model.names.tried)
        if not wrong and tried == self._tried:
            return
        # If actors try more mutexes than was known, any place may have relied on owners alone
        # touching those mutexes.
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
        """Return the schedule that leads to a place."""
        runs: list[tuple[int, int]] = []
        while (came := self._came[place]) is not None:
            place, index, steps = came
            runs.append((index, steps))
        return [index for index, steps in reversed(runs) for _ in range(steps)]


def _tell(model: Model, schedule: Sequence[int], *, shortest: bool) -> Counterexample:
    """Execute a schedule once more, in its order with the fewest changes of actor."""
    teller, _ = _retell(model, schedule)
    order = straightened(schedule[: len(teller.steps)], teller.operations, conflict)
    straight, violation = _retell(model, order)
    if violation is None:
        # Plain data made a difference, and no operation shows it.
        straight, violation = _retell(model, schedule)
    assert violation is not None, "the schedule's violation did not happen again"
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
