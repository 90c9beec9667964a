"""What is known of a program: its states, and where each actor's next step leads from there.

Production code cannot be copied in the middle of a call, so a state is reached by executing all
that led to it. That takes a hundred times as long as to look up where a step leads; but what a step
does depends on what is shared and on the past of the actor alone, not on how far the others are. So
it is executed once, and known from then on wherever the same meets again.

Each execution begins with a schedule put together of steps that are known, and finds out whether it
really leads where it should.
"""

import gc
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Protocol, TypeAlias, final

from restrictedmem.check import control
from restrictedmem.check.control import Actor, Execution, Gate, Names, Story, UnsoundError
from restrictedmem.check.futures import Futures

#: The number of what is shared, and of each actor's past.
State: TypeAlias = tuple[int, ...]

_UNSOUND: Final = "state() does not show all that matters, or not each execution does the same"
#: Executions after which what they left behind is collected.
_COLLECTED: Final = 256
#: Steps after which an execution counts as one without an end.
ENDLESS: Final = 10_000


class RuleBroken(Exception):  # noqa: N818 what a program raises is a finding, not an error
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
        """Look at what must always hold; called after steps, once for each that there is.

        Raises:
            RuleBroken: it does not.
        """
        ...

    def finish(self) -> None:
        """Look at what must hold when all actors have ended.

        Raises:
            RuleBroken: it does not.
        """
        ...


@final
class Model:
    """The states of a program that were executed, and the steps between them."""

    def __init__(self, make: Callable[[], Program]) -> None:
        """Know nothing yet."""
        self._make = make
        self.names = Names()
        self.futures = Futures(self.names)
        self._program: Program
        self._left: dict[str, object] = {}
        #: By what is shared: its number; and by that, the states of all objects.
        self._shared: dict[Hashable, int] = {}
        self._values: list[tuple[Hashable, ...]] = []
        #: By actor, whether it can go on after a past of its own: whenever it likes if None.
        self._gates: list[dict[int, Gate | None]] = []
        #: By what is shared, an actor and its past: the same after its step; or how that violates a
        #: rule.
        self._after: dict[tuple[int, int, int], tuple[int, int] | str] = {}
        #: What is wrong with states in which nobody can go on; None: nothing.
        self._ends: dict[State, str | None] = {}
        self.executions = 0
        self.transitions = 0

    def start(self) -> State | str:
        """Return the state before the first step, or what is wrong with it."""
        found: list[State | str] = []

        def arrive(execution: Execution) -> None:
            self._gates = self._gates or [{} for _ in execution.actors]
            for actor in execution.actors:
                self.futures.see(actor, None)
            state = self._read(execution)
            found.append(self._verdict(execution) or state)
            if not self.enabled(state):
                self._ends[state] = self._verdict_at_end(execution)

        execution = self.execute((), arrive)
        return found[0] if found else str(self._verdict(execution))

    def enabled(self, state: State) -> list[int]:
        """Return the actors that can go on."""
        values = self._values[state[0]]
        enabled: list[int] = []
        for index, gates in enumerate(self._gates):
            past = state[index + 1]
            # Who is done has no gate.
            if past in gates and ((gate := gates[past]) is None or gate(values)):
                enabled.append(index)
        return enabled

    def can_go(self, state: State, index: int) -> bool:
        """Say whether one actor can go on."""
        gates, past = self._gates[index], state[index + 1]
        return past in gates and ((gate := gates[past]) is None or gate(self._values[state[0]]))

    def after(self, state: State, index: int) -> State | str | None:
        """Return the state after a step, or how that violates a rule; None: not known yet."""
        after = self._after.get((state[0], index, state[index + 1]))
        if after is None or isinstance(after, str):
            return after
        shared, past = after
        return (shared, *state[1 : index + 1], past, *state[index + 2 :])

    def end(self, state: State, schedule: Sequence[int]) -> str | None:
        """Return what is wrong with a state in which nobody can go on, to which a schedule leads."""
        if state not in self._ends:

            def arrive(execution: Execution) -> None:
                self._ends[state] = self._verdict(execution) or self._verdict_at_end(execution)

            self.execute(schedule, arrive)
        return self._ends[state]

    def learn(
        self,
        schedule: Sequence[int],
        before: State,
        index: int,
        go_on: Callable[[State], Sequence[int]],
    ) -> None:
        """Execute a schedule, which leads to the state ``before``, then a step from there that is not known, and further such steps.

        ``go_on`` says who is of interest in a state.

        Raises:
            UnsoundError: the schedule leads to another state than it should by what is known.
        """
        state: State | None = None

        def arrive(execution: Execution) -> Actor | None:
            nonlocal state, index
            if state is None:
                state = self._read(execution)
                if state != before:
                    raise UnsoundError(_UNSOUND)
                return execution.actors[index]
            state = self._take_note(execution, state, index)
            unknown = (
                []
                if state is None
                else [other for other in go_on(state) if self.after(state, other) is None]
            )
            if not unknown:
                return None
            index = index if index in unknown else unknown[0]
            return execution.actors[index]

        execution = self.execute(schedule, arrive)
        if execution.broken is not None:
            assert state is not None
            self._take_note(execution, state, index)

    def _take_note(self, execution: Execution, before: State, index: int) -> State | None:
        """Remember where a step has led, and return it unless a rule is broken there."""
        key = before[0], index, before[index + 1]
        wrong = self._verdict(execution)
        if wrong is not None:
            self._after[key] = wrong
            return None
        state, actor = self._read(execution), execution.actors[index]
        self.futures.see(actor, before[index + 1])
        self._after[key] = state[0], actor.history
        if not self.enabled(state):
            self._ends[state] = self._verdict_at_end(execution)
        return state

    def _read(self, execution: Execution) -> State:
        """Return the state that an execution is in."""
        values = execution.values
        known = len(values)
        while known and values[known - 1] is None:
            # Which objects will be made shows only on the way, and must not tell states apart
            # before.
            known -= 1
        present = tuple(values[:known])
        shared = self._shared.setdefault((self._program.state(), present), len(self._shared))
        if shared == len(self._values):
            self._values.append(present)
        for actor, gates in zip(execution.actors, self._gates, strict=True):
            if not actor.done:
                gates[actor.history] = actor.gate
        return (shared, *[actor.history for actor in execution.actors])

    # What is right and wrong.

    def _verdict(self, execution: Execution) -> str | None:
        """Return what is wrong after a step."""
        if execution.broken is not None:
            actor, error = execution.broken
            return str(error) if isinstance(error, RuleBroken) else f"{actor.name} raised {error!r}"
        try:
            self._program.check()
        except RuleBroken as violation:
            return str(violation)
        return f"no end after {ENDLESS} steps" if execution.step > ENDLESS else None

    def _verdict_at_end(self, execution: Execution) -> str | None:
        """Return what is wrong where nobody can go on."""
        stuck = [actor.name for actor in execution.actors if not actor.done]
        if stuck:
            return f"deadlock: {' and '.join(stuck)} {'wait' if len(stuck) > 1 else 'waits'}"
        try:
            self._program.finish()
        except RuleBroken as violation:
            return str(violation)
        return None

    def wrong(self, execution: Execution) -> str | None:
        """Return what is wrong with what an execution has come to."""
        found = self._verdict(execution)
        if found is None and not any(execution.enabled(actor) for actor in execution.actors):
            found = self._verdict_at_end(execution)
        return found

    # Executing.

    def execute(
        self,
        schedule: Sequence[int],
        arrive: Callable[[Execution], Actor | None],
        story: Story | None = None,
    ) -> Execution:
        """Execute the program; ``arrive`` is asked who goes on at the end of the schedule."""
        execution = Execution(self.names, arrive, story)
        control.enter(execution)
        # A program is full of circles. Cut open, most of it goes without the collector.
        self._left.clear()
        self._program = self._make()
        self._left = vars(self._program)
        execution.run(self._program.actors(), schedule)
        self.executions += 1
        self.transitions += execution.step
        if not self.executions % _COLLECTED:
            gc.collect(0)
        if execution.broken is not None and isinstance(execution.broken[1], UnsoundError):
            raise execution.broken[1]
        return execution

    def sample(self, executions: int, seen: Callable[[State], bool]) -> None:
        """Execute at random, and compare what happens with what is known.

        Raises:
            UnsoundError: a step led elsewhere than it did before; or an end, or any state that
                ``seen`` denies, is new.
        """
        chance = random.Random(executions)
        for _ in range(executions):
            self.execute((), _Sampler(self, chance, seen).arrive)

    def compare(
        self, execution: Execution, before: State | None, index: int, seen: Callable[[State], bool]
    ) -> State:
        """Compare one step of an execution with what is known, and return the state it has led to.

        Raises:
            UnsoundError: see ``sample``.
        """
        state = self._read(execution)
        known = None if before is None else self.after(before, index)
        wrong = self.wrong(execution)
        if (
            wrong is not None
            or known not in (None, state)
            or not seen(state)
            or (not self.enabled(state) and state not in self._ends)
        ):
            raise UnsoundError(f"{_UNSOUND}: {wrong or 'a state was missed'}")
        return state


@final
class _Sampler:
    """One execution at random."""

    def __init__(self, model: Model, chance: random.Random, seen: Callable[[State], bool]) -> None:
        self._model = model
        self._chance = chance
        self._seen = seen
        self._before: State | None = None
        self._index = 0

    def arrive(self, execution: Execution) -> Actor | None:
        """Go on with anybody."""
        self._before = self._model.compare(execution, self._before, self._index, self._seen)
        enabled = self._model.enabled(self._before)
        if not enabled:
            return None
        self._index = self._chance.choice(enabled)
        return execution.actors[self._index]
