"""Every interleaving of a program's actors, or every one that may differ, over production code.

Executions are repeated from the start, for a greenlet cannot be copied; a state is known again by the objects behind ``sync``, what the
program says of its own, and each actor's past: all that it did and read.

Reduced search leaves out what only swaps neighbours that do not meet on an object:

- Sleep sets, with stored states as in Godefroid, Holzmann and Pirottin, "State-space caching revisited" (1995): a state met again with a
  smaller sleep set is taken up for the difference. By themselves they leave out no state.
- A step that nobody can meet goes first and alone: a persistent set of one (Godefroid, 1996, definition 4.1). That is what an owner does
  to its own mutex, and what is done to an object under a lock that all others hold, too, when they do anything to it that does not commute.
  Who does what under which locks is learned on the way (``_Accesses``); when it turns out that a step went alone wrongly, the search starts
  anew with what is known by then. At its end nothing is left to learn: take the shortest execution to an access that the search has not
  seen, and the first step gone alone on its way. Until that actor moves, all in the execution commutes with the step, which then could as
  well have come first, and so on; or something does not, and is an access not seen that a shorter execution leads to.
- Violations survive: every order of what conflicts is kept, and a step that may change what ``Program.check`` looks at never goes alone
  (``control.VISIBLE``). So a program must ``touch`` what its check looks at, and plain data must be behind a lock or ``touch``.

Neither is done in searches of all interleavings, or of those with so many preemptions.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Generator, Hashable, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, final

from restrictedmem.check import control, objects
from restrictedmem.check.control import COMMUTE, OWNERS, VISIBLE, Actor, Names, Operation, UnsoundError, World
from restrictedmem.check.schedule import Counterexample, Teller, straightened

_NOBODY: Final[frozenset[int]] = frozenset()
_NEVER: Final[tuple[frozenset[int] | None, int]] = None, 0
#: Executions at random after a complete search, which must end in states that it has seen.
_SAMPLES: Final = 50
#: Executions after which what they left behind is collected.
_COLLECTED: Final = 256
#: Steps after which an execution counts as one without an end.
_ENDLESS: Final = 10_000
#: Seconds to look for a shorter counterexample than the first, in each of the two searches for it.
_SHORTENING: Final = 5.0


class Violation(Exception):  # noqa: N818 what a program raises is a finding, not an error
    """A rule that was broken, and the story."""


class Program(Protocol):
    """Actors over production objects, made anew for each execution."""

    def actors(self) -> Sequence[tuple[str, Callable[[], None]]]:
        """Return names and bodies; what a body does before its first point happens before anything else."""
        ...

    def state(self) -> Hashable:
        """Return the shared state that is behind no object of ``sync``: a model's backing, content, counters that matter."""
        ...

    def check(self) -> None:
        """Look at what must always hold; called after each step.

        Raises:
            Violation: it does not.
        """
        ...

    def finish(self) -> None:
        """Look at what must hold when all actors have ended.

        Raises:
            Violation: it does not.
        """
        ...


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
    limit_seconds: float = 600,
) -> Result:
    """Search the interleavings of a program for a violation, and for the shortest one if there is any.

    All of them; with ``reduce``, all that may differ; with ``preemptions``, those in which an actor that could go on is left that often.
    """
    deadline = time.monotonic() + limit_seconds
    started = time.perf_counter()
    with objects.controlled(), _without_collections():
        search = _Search(make, preemptions, sleep=reduce, eager=reduce)
        complete = search.run(deadline)
        found = search.found
        if found is not None and reduce:
            # Steps gone alone may have made it longer.
            again = _Search(make, None, sleep=True, eager=False, cutoff=len(found) - 1)
            complete = again.run(min(deadline, time.monotonic() + _SHORTENING))
            found = found if again.found is None else again.found
            search.executions += again.executions
            search.transitions += again.transitions
        elif found is None and complete and preemptions is None:
            search.sample(_SAMPLES)
        counterexample = None if found is None else search.tell(found, shortest=complete)
    return Result(search.states, search.transitions, search.executions, time.perf_counter() - started, complete, counterexample)


def effort(actors: int, *, exhaustive: bool) -> tuple[int | None, bool, str]:
    """Return how much is searched with so many actors: preemptions and whether to reduce, as ``explore`` takes them, and in words.

    With two, all interleavings if that is asked for; with two or three, all that may differ; with four, three preemptions.
    """
    if actors > 3:
        return 3, False, "up to 3 preemptions"
    return (None, False, "all interleavings") if actors == 2 and exhaustive else (None, True, "all interleavings that may differ")


@contextmanager
def _without_collections() -> Generator[None]:
    """Keep the garbage collector from walking over all states again and again; the searches call it for what is new."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@final
class _Node:
    """A step of the execution under way: who does it, and who else is still to be tried in its place."""

    __slots__ = ("budget", "choice", "explored", "last", "pending", "sleep", "todo")

    def __init__(self, todo: list[int], sleep: frozenset[int], pending: tuple[Operation | None, ...]) -> None:
        self.todo = todo
        self.sleep = sleep
        self.pending = pending
        #: How many preemptions are left, and who ran last, if it still can.
        self.budget = 0
        self.last: int | None = None
        self.choice = todo.pop(0)
        #: Who was tried here before.
        self.explored: tuple[int, ...] = ()

    def next(self) -> None:
        """Go to the next choice."""
        self.explored += (self.choice,)
        self.choice = self.todo.pop(0)

    def sleep_after(self) -> frozenset[int]:
        """Return whose next step was searched already from a neighbour, and does not meet the chosen one."""
        chosen = self.pending[self.choice]
        return frozenset(
            other for other in (*self.sleep, *self.explored) if other != self.choice and not conflict(self.pending[other], chosen)
        )


def conflict(one: Operation | None, other: Operation | None) -> bool:
    """Say whether the order of two operations matters: same object, and not both of a kind that commutes."""
    return one is not None and other is not None and one[1] == other[1] and not (one[0] in COMMUTE and other[0] in COMMUTE)


#: An actor, whether what it does commutes with its like, and the locks it holds meanwhile.
_Access: TypeAlias = tuple[int, bool, frozenset[int]]


@final
class _Accesses:
    """Who does what to an object under which locks, as far as a search has seen; and what was decided on it."""

    def __init__(self) -> None:
        self._seen: dict[int, set[_Access]] = {}
        self._alone: dict[int, dict[tuple[_Access, tuple[int, ...]], bool]] = {}

    def see(self, actor: Actor) -> bool:
        """Take note of what an actor is about to do; returns whether a step went alone that could have met it."""
        if actor.pending is None:
            return False
        verb, place, _ = actor.pending
        access = actor.index, verb in COMMUTE, actor.held
        seen = self._seen.setdefault(place, set())
        if access in seen:
            return False
        seen.add(access)
        decided = self._alone.get(place, {})
        if not any(alone and actor.index in others and _meet(access, before) for (before, others), alone in decided.items()):
            return False
        self._alone.clear()
        return True

    def alone(self, actor: Actor, others: tuple[int, ...], tried: Set[int]) -> bool:
        """Say whether none of the others can meet an actor's next step before it is done.

        ``tried`` are mutexes that somebody may look at while another holds them.
        """
        if actor.pending is None or actor.pending[0] in VISIBLE:
            return False
        verb, place, _ = actor.pending
        if verb in OWNERS and place in actor.held and place not in tried:
            return True
        access = actor.index, verb in COMMUTE, actor.held
        decided = self._alone.setdefault(place, {})
        found = decided.get((access, others))
        if found is None:
            met = (other for other in self._seen.get(place, ()) if other[0] in others and _meet(access, other))
            found = decided[access, others] = not any(met)
        return found


def _meet(one: _Access, other: _Access) -> bool:
    return one[0] != other[0] and not (one[1] and other[1]) and one[2].isdisjoint(other[2])


@final
class _Search:
    """One search, depth first."""

    def __init__(
        self,
        make: Callable[[], Program],
        preemptions: int | None,
        *,
        sleep: bool,
        eager: bool,
        cutoff: int | None = None,
    ) -> None:
        self._make = make
        self._bound = preemptions
        self._sleeps = sleep
        self._eager = eager
        #: No execution is followed beyond so many steps: a violation of one more is known.
        self._cutoff = cutoff
        self._names = Names()
        self._program: Program
        self._stack: list[_Node] = []
        self._accesses = _Accesses()
        self._tried = 0
        self._shorten_until = math.inf
        #: Whether a step went alone that must not.
        self._stale = False
        #: What is behind ``sync`` and in the program's own state, numbered.
        self._shared: dict[Hashable, int] = {}
        #: By state: who slept there, and after how many steps it was met.
        self.visited: dict[Hashable, tuple[frozenset[int] | None, int]] = {}
        #: By state and who ran last: how many preemptions were left, and after how many steps.
        self.budgets: dict[Hashable, tuple[int, int]] = {}
        self._ends: set[Hashable] = set()
        self.transitions = 0
        self.executions = 0
        #: The shortest schedule so far that ends in a violation.
        self.found: list[int] | None = None

    @property
    def states(self) -> int:
        """How many states there were, each counted once for each actor that could have gone on without a preemption."""
        return len(self.visited) + len(self.budgets)

    def run(self, deadline: float) -> bool:
        """Search; returns whether all was."""
        while True:
            self._stale = False
            self._stack.clear()
            self.visited.clear()
            if not self._search(deadline):
                return False
            if not self._stale:
                return True

    def _search(self, deadline: float) -> bool:
        stack = self._stack
        while True:
            world = self._execute([node.choice for node in stack], self._arrive)
            self.executions += 1
            self.transitions += world.step
            if not self.executions % _COLLECTED:
                gc.collect(0)
            if self._stale:
                return True
            if world.broken is not None:
                self._violated()
            while stack and (not stack[-1].todo or (self._cutoff is not None and len(stack) > self._cutoff)):
                stack.pop()
            if not stack:
                return True
            stack[-1].next()
            if time.monotonic() > min(deadline, self._shorten_until):
                return False

    def _execute(self, schedule: Sequence[int], arrive: Callable[[World], Actor | None], story: Teller | None = None) -> World:
        world = World(self._names, arrive, story)
        control.enter(world)
        self._program = self._make()
        world.run(self._program.actors(), schedule)
        if world.broken is not None and isinstance(world.broken[1], UnsoundError):
            raise world.broken[1]
        return world

    def _violated(self) -> None:
        """Take note of the schedule under way, which is shorter than any before."""
        if self.found is None:
            self._shorten_until = time.monotonic() + _SHORTENING
        self.found = [node.choice for node in self._stack]
        self._cutoff = len(self.found) - 1

    def _arrive(self, world: World) -> Actor | None:
        """Judge the state arrived at, and choose who goes on; None to stop there."""
        stack, actors = self._stack, world.actors
        if self._cutoff is not None and len(stack) > self._cutoff:
            return None
        enabled = [actor.index for actor in actors if actor.enabled]
        if self._verdict(world, enabled) is not None:
            self._violated()
            return None
        if self._eager and self._learns(world):
            self._stale = True
            return None
        if not enabled:
            key = self._key(world)
            self._ends.add(key)
            self.visited[key] = _NOBODY, 0
            return None
        if len(stack) == self._cutoff:
            return None
        node = self._unbounded(world, enabled) if self._bound is None else self._bounded(world, enabled, self._bound)
        if node is None:
            return None
        stack.append(node)
        return actors[node.choice]

    def _learns(self, world: World) -> bool:
        """Take note of what is about to be done; returns whether what is known from now on makes the search so far worthless."""
        tried, self._tried = self._tried, len(world.names.tried)
        movers = (world.actors[self._stack[-1].choice],) if self._stack else world.actors
        return any(self._accesses.see(actor) for actor in movers) or self._tried > tried

    def _verdict(self, world: World, enabled: Sequence[int]) -> str | None:
        """Return what is wrong with a state."""
        if world.broken is not None:
            actor, error = world.broken
            return str(error) if isinstance(error, Violation) else f"{actor.name} raised {error!r}"
        try:
            self._program.check()
            if world.step > _ENDLESS:
                return f"no end after {_ENDLESS} steps"
            if not enabled:
                stuck = [actor.name for actor in world.actors if not actor.done]
                if stuck:
                    return f"deadlock: {' and '.join(stuck)} wait"
                self._program.finish()
        except Violation as violation:
            return str(violation)
        return None

    def _key(self, world: World) -> Hashable:
        values = world.values
        known = len(values)
        while known and values[known - 1] is None:
            # Which objects will be made shows only on the way, and must not tell states apart before.
            known -= 1
        shared = self._shared.setdefault((self._program.state(), *values[:known]), len(self._shared))
        return (shared, *[actor.history for actor in world.actors])

    def _unbounded(self, world: World, enabled: list[int]) -> _Node | None:
        pending = tuple(actor.pending for actor in world.actors)
        sleep = self._stack[-1].sleep_after() if self._sleeps and self._stack else _NOBODY
        enabled = self._last_first(enabled)
        if self._eager and (alone := self._alone(world, enabled)) is not None:
            return None if alone in sleep else _Node([alone], sleep, pending)
        key, depth = self._key(world), len(self._stack)
        slept, before = self.visited.get(key, _NEVER)
        if self._cutoff is not None and depth < before:
            # Whatever was beyond the end then may not be now.
            slept = None
        if slept is None:
            self.visited[key] = sleep, depth
            todo = [index for index in enabled if index not in sleep]
        else:
            self.visited[key] = slept & sleep, before
            todo = [index for index in enabled if index in slept and index not in sleep]
            sleep &= slept
        return _Node(todo, sleep, pending) if todo else None

    def _alone(self, world: World, enabled: Sequence[int]) -> int | None:
        """Return an actor whose next step nobody can meet."""
        going = tuple(actor.index for actor in world.actors if not actor.done)
        return next((index for index in enabled if self._accesses.alone(world.actors[index], going, world.names.tried)), None)

    def _bounded(self, world: World, enabled: list[int], bound: int) -> _Node | None:
        last, budget, depth = None, bound, len(self._stack)
        if self._stack:
            before = self._stack[-1]
            budget = before.budget - (before.last is not None and before.choice != before.last)
            # Who ran last matters only while it could go on.
            last = before.choice if before.choice in enabled else None
        key = self._key(world), last
        known, earlier = self.budgets.get(key, (-1, 0))
        if known >= budget and (self._cutoff is None or earlier <= depth):
            return None
        self.budgets[key] = budget, depth
        node = _Node([last] if last is not None and not budget else self._last_first(enabled), _NOBODY, ())
        node.budget, node.last = budget, last
        return node

    def _last_first(self, todo: list[int]) -> list[int]:
        if self._stack and (last := self._stack[-1].choice) in todo:
            todo.remove(last)
            todo.insert(0, last)
        return todo

    # Beside the search.

    def sample(self, executions: int) -> None:
        """Execute at random.

        Raises:
            UnsoundError: an execution came to a state that a complete search had not seen.
        """
        chance = random.Random(executions)

        def arrive(world: World) -> Actor | None:
            enabled = [actor for actor in world.actors if actor.enabled]
            wrong = self._verdict(world, [actor.index for actor in enabled])
            key = self._key(world)
            if wrong is not None or (key not in self._ends if not enabled else not self._eager and key not in self.visited):
                raise UnsoundError(
                    f"state() does not show all that matters, or not each execution does the same: {wrong or 'a state was missed'}"
                )
            return chance.choice(enabled) if enabled else None

        for _ in range(executions):
            self._execute((), arrive)

    def tell(self, schedule: Sequence[int], *, shortest: bool) -> Counterexample:
        """Execute a schedule once more, with as few changes of actors as it can be told with."""
        teller, _ = self._retell(schedule)
        order = straightened(schedule[: len(teller.steps)], teller.operations, conflict)
        straight, violation = self._retell(order)
        if violation is None:
            # Plain data made a difference that no operation shows.
            straight, violation = self._retell(schedule)
        assert violation is not None, "what was found is found again"
        return Counterexample(violation, tuple(straight.steps), shortest, straight.waiting)

    def _retell(self, schedule: Sequence[int]) -> tuple[Teller, str | None]:
        teller = Teller()
        found: list[str | None] = []

        def arrive(world: World) -> None:
            enabled = [actor.index for actor in world.actors if actor.enabled]
            found.append(self._verdict(world, enabled))
            if not enabled:
                teller.tell_waiting(world.actors, world.values)

        world = self._execute(schedule, arrive, teller)
        return teller, self._verdict(world, ()) if world.broken is not None else found[-1]
