"""A model of a program: its known states, and the state that each actor's next step leads to.

Production code cannot be copied in the middle of a call. So a state is reached by executing all
steps that led to it, which takes a hundred times as long as a look-up in the model. But the effect
of a step depends only on the shared state and on the actor's own past, not on how far the others
are. So each step is executed once, and looked up wherever the same combination occurs again.

Each execution begins with a schedule put together of known steps. The model checks that it arrives
in the state that these steps lead to.
"""

import gc
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Protocol, TypeAlias, final

from restrictedmem.check import control
from restrictedmem.check.control import Actor, Execution, Gate, Names, Story, UnsoundError
from restrictedmem.check.futures import Futures

#: The number of the shared state, and the number of each actor's past.
State: TypeAlias = tuple[int, ...]

_UNSOUND: Final = (
    "state() does not show all data that matter, or two executions of one schedule differ"
)
#: Executions after which their garbage is collected.
_COLLECTED: Final = 256
#: Steps after which an execution counts as endless.
ENDLESS: Final = 10_000


class RuleBroken(Exception):  # noqa: N818 a finding about the program, not an error
    """The violation of a rule: the rule, and how it was broken."""


class Program(Protocol):
    """Actors over production objects, made anew for each execution."""

    def actors(self) -> Sequence[tuple[str, Callable[[], None]]]:
        """Return the names and the bodies of the actors.

        The code of a body before its first point runs before anything else.
        """
        ...

    def state(self) -> Hashable:
        """Return the shared state that no object of ``sync`` holds.

        Examples are a model's backing, content, and counters that matter.
        """
        ...

    def check(self) -> None:
        """Check the rules that always hold; called at least once after each different step.

        Raises:
            RuleBroken: a rule does not hold.
        """
        ...

    def finish(self) -> None:
        """Check the rules that hold when all actors have ended.

        Raises:
            RuleBroken: a rule does not hold.
        """
        ...


@final
class Model:
    """The executed states of a program, and the steps between them."""

    def __init__(self, make: Callable[[], Program]) -> None:
        """Make a model that knows no state yet."""
        self._make = make
        self.names = Names()
        self.futures = Futures(self.names)
        self._program: Program
        self._left: dict[str, object] = {}
        #: By shared state: its number (``_shared``). By this number: the states of all objects
        #: (``_values``).
        self._shared: dict[Hashable, int] = {}
        self._values: list[tuple[Hashable, ...]] = []
        #: By actor and past: the gate of its next operation; None: it can always go on.
        self._gates: list[dict[int, Gate | None]] = []
        #: By the numbers of a shared state, an actor and its past: the shared state and the past
        #: after its step, or how this step violates a rule.
        self._after: dict[tuple[int, int, int], tuple[int, int] | str] = {}
        #: By state in which no actor can go on: the violation there; None: there is none.
        self._ends: dict[State, str | None] = {}
        self.executions = 0
        self.transitions = 0

    def start(self) -> State | str:
        """Return the state before the first step, or the violation there."""
        found: list[State | str] = []

        def arrive(execution: Execution) -> None:
            self._gates = self._gates or [{} for _ in execution.actors]
            for actor in execution.actors:
                self.futures.see(actor, None)
            state = self._read(execution)
            found.append(self._verdict(execution) or state)

        execution = self.execute((), arrive)
        return found[0] if found else str(self._verdict(execution))

    def enabled(self, state: State) -> list[int]:
        """Return the actors that can go on."""
        values = self._values[state[0]]
        enabled: list[int] = []
        for index, gates in enumerate(self._gates):
            past = state[index + 1]
            # An actor that has ended has no gate.
            if past in gates and ((gate := gates[past]) is None or gate(values)):
                enabled.append(index)
        return enabled

    def can_go(self, state: State, index: int) -> bool:
        """Return whether one actor can go on."""
        gates, past = self._gates[index], state[index + 1]
        return past in gates and ((gate := gates[past]) is None or gate(self._values[state[0]]))

    def after(self, state: State, index: int) -> State | str | None:
        """Return the state after a step, or how it violates a rule; None: not known yet."""
        after = self._after.get((state[0], index, state[index + 1]))
        if after is None or isinstance(after, str):
            return after
        shared, past = after
        return (shared, *state[1 : index + 1], past, *state[index + 2 :])

    def end(self, state: State, schedule: Sequence[int]) -> str | None:
        """Return the violation, if any, in a state in which no actor can go on.

        ``schedule`` leads to this state.
        """
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
        """Execute a schedule to the state ``before``, then an unknown step of an actor.

        Then execute further unknown steps, as long as there are any. ``go_on`` returns the actors
        that are of interest in a state.

        Raises:
            UnsoundError: the schedule leads to another state than the model says.
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
        """Record the state that a step led to; return it, or None if it breaks a rule."""
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
            # It shows only later which objects an execution makes. Objects that are not made yet
            # must not tell states apart.
            known -= 1
        present = tuple(values[:known])
        shared = self._shared.setdefault((self._program.state(), present), len(self._shared))
        if shared == len(self._values):
            self._values.append(present)
        for actor, gates in zip(execution.actors, self._gates, strict=True):
            if not actor.done:
                gates[actor.history] = actor.gate
        return (shared, *[actor.history for actor in execution.actors])

    # Violations.

    def _verdict(self, execution: Execution) -> str | None:
        """Return the violation after a step, if any."""
        if execution.broken is not None:
            actor, error = execution.broken
            return str(error) if isinstance(error, RuleBroken) else f"{actor.name} raised {error!r}"
        try:
            self._program.check()
        except RuleBroken as violation:
            return str(violation)
        return f"no end after {ENDLESS} steps" if execution.step > ENDLESS else None

    def _verdict_at_end(self, execution: Execution) -> str | None:
        """Return the violation where no actor can go on, if any."""
        stuck = [actor.name for actor in execution.actors if not actor.done]
        if stuck:
            return f"deadlock: {' and '.join(stuck)} {'wait' if len(stuck) > 1 else 'waits'}"
        try:
            self._program.finish()
        except RuleBroken as violation:
            return str(violation)
        return None

    def wrong(self, execution: Execution) -> str | None:
        """Return the violation in the state that an execution has come to, if any."""
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
        """Execute the program; after the schedule, ``arrive`` chooses the next actor."""
        execution = Execution(self.names, arrive, story)
        control.enter(execution)
        # A program is full of reference cycles. Once they are cut here, most of it is freed without
        # the collector.
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
        """Execute at random, and compare each step with the model.

        Raises:
            UnsoundError: a step led to another state than before; there was a violation; or an end
                is new, or a state for which ``seen`` returns false.
        """
        chance = random.Random(executions)
        for _ in range(executions):
            self.execute((), _Sampler(self, chance, seen).arrive)

    def compare(
        self, execution: Execution, before: State | None, index: int, seen: Callable[[State], bool]
    ) -> State:
        """Compare one step of an execution with the model, and return the state it led to.

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
        """Choose any actor that can go on."""
        self._before = self._model.compare(execution, self._before, self._index, self._seen)
        enabled = self._model.enabled(self._before)
        if not enabled:
            return None
        self._index = self._chance.choice(enabled)
        return execution.actors[self._index]
