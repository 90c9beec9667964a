"""A counterexample as a person reads it: steps in order, with actors and code places."""

import ast
import heapq
import linecache
import re
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeAlias, cast, final

from restrictedmem.check import control, objects
from restrictedmem.check.control import Actor, Operation

_HERE: Final = Path(__file__).parent
_SOURCE: Final = _HERE.parent
#: The most combinations of the actors' progress for which a schedule is straightened; beyond this,
#: the schedule is shown as it was found.
_STRAIGHTENABLE: Final = 100_000

#: The number of steps that each actor has done, and the actor that did the last.
_Way: TypeAlias = tuple[tuple[int, ...], int]

_ASSIGNED: Final = re.compile(r"(?:\w+\.)?(\w+)\s*(?::[^=]+)?=[^=]")
_ON_CONDITION: Final = (control.WAITS, control.WAKES, control.NOTIFIES)
_SIDES: Final = {
    control.TAKES_READ: "takes {} for reading",
    control.RELEASES_READ: "releases {}, having read",
    control.ASKS_WRITE: "asks to take {} for writing",
    control.TAKES_WRITE: "takes {} for writing",
    control.RELEASES_WRITE: "releases {}, having written",
    control.LOOKS: "looks whether {} is held",
}


@final
@dataclass(frozen=True, slots=True)
class Step:
    """A step of an actor, and its place: a file below the package, a line and a function."""

    actor: str
    does: str
    file: str
    line: int
    function: str


@final
@dataclass(frozen=True, slots=True)
class Counterexample:
    """A schedule that ends in a violation."""

    violation: str
    steps: tuple[Step, ...]
    #: Whether no counterexample has fewer steps.
    shortest: bool
    #: In a deadlock, the step that each actor waits to do.
    stuck: tuple[Step, ...]

    def as_data(self) -> dict[str, Any]:
        """Return the counterexample as JSON shows it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return lines for a person: the steps in order, below the names of their actors."""
        steps = (*self.steps, *self.stuck)
        places = [f"{step.file}:{step.line}" for step in steps]
        width = max(map(len, places), default=0)
        column = max((len(step.function) for step in steps), default=0)

        def line(number: str, step: Step) -> str:
            return (
                f"  {number:>4}  {f'{step.file}:{step.line}':<{width}}  "
                f"{step.function:<{column}}  {step.does}"
            )

        found: list[str] = []
        number = 0
        for actor, group in groupby(self.steps, key=lambda step: step.actor):
            found.append(actor)
            for step in group:
                number += 1
                found.append(line(str(number), step))
        for step in self.stuck:
            found += [f"{step.actor} waits", line("", step)]
        many = f"{len(self.steps)} steps" + (
            ", none shorter" if self.shortest else ", perhaps not the shortest"
        )
        return [*found, f"violated after {many}: {self.violation}"]


@final
class Teller:
    """A listener to one execution (``control.Story``) that makes steps of it."""

    def __init__(self) -> None:
        self._labels: dict[int, str] = {}
        self._at: dict[int, tuple[Operation, str, Step]] = {}
        #: By actor: the index of the step that it is doing.
        self._doing: dict[int, int] = {}
        self.operations: list[Operation] = []
        self.steps: list[Step] = []
        self.waiting: tuple[Step, ...] = ()

    def made(self, slot: int) -> None:
        """Name an object after its maker's class and the attribute that it became."""
        frame = _caller(production=False)
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        assigned = _ASSIGNED.search(line)
        owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
        words = (
            [] if owner is None else [(owner if isinstance(owner, type) else type(owner)).__name__]
        )
        label = ".".join([*words, assigned[1] if assigned else frame.f_code.co_name])
        number = 1 + sum(other.split(" ")[0] == label for other in self._labels.values())
        self._labels[slot] = label if number == 1 else f"{label} ({number})"

    def arrives(self, actor: Actor, operation: Operation | None) -> None:
        """Add the result to the actor's last step, and prepare its next step."""
        index = self._doing.pop(actor.index, None)
        if (
            index is not None
            and actor.value is not None
            and self.operations[index][0] in (control.READS, control.WRITES, control.TRIES)
        ):
            step = self.steps[index]
            self.steps[index] = Step(
                step.actor,
                f"{step.does} = {_value(actor.value)}",
                step.file,
                step.line,
                step.function,
            )
        if operation is not None:
            frame = _caller(production=True)
            does = self._does(operation, _caller(production=False))
            step = Step(actor.name, does, _file(frame), frame.f_lineno, frame.f_code.co_qualname)
            self._at[actor.index] = operation, does, step

    def performs(self, actor: Actor) -> None:
        """Add the step that an actor does now."""
        operation, _, step = self._at[actor.index]
        self._doing[actor.index] = len(self.steps)
        self.operations.append(operation)
        self.steps.append(step)

    def tell_waiting(self, actors: Sequence[Actor], values: Sequence[Hashable]) -> None:
        """Record what each actor that has not ended waits for."""
        for actor in actors:
            if not actor.done and actor.index in self._at:
                (verb, slot, _), does, step = self._at[actor.index]
                holder = values[slot] if slot >= 0 else None
                if (
                    verb in (control.TAKES, control.WAKES)
                    and isinstance(holder, int)
                    and holder >= 0
                ):
                    does += (
                        f", held by {actors[holder].name if holder != actor.index else 'itself'}"
                    )
                elif verb == control.WAKES:
                    does = f"has not been notified: {does}"
                self.waiting += (Step(actor.name, does, step.file, step.line, step.function),)

    def _does(self, operation: Operation, frame: FrameType) -> str:
        verb, slot, where = operation
        if verb in (control.TOUCHES, control.CHANGES):
            return f"{verb} {_words(where)}"
        if verb in _ON_CONDITION:
            assert isinstance(where, int)
            return f"{verb} {self._labels[where]}"
        if verb in _SIDES:
            return _SIDES[verb].format(self._labels[slot])
        if where is None or slot in self._labels:
            return f"{verb} {self._labels[slot]}{_place(where)}"
        word: Any = where
        # In a wait until the word has changed, the word comes with its value.
        memory, index = word[0] if isinstance(word[0], tuple) else word
        return f"{verb} {_argument(frame) or f'word {index}'} of {self._labels[memory]}"


def _words(name: Any) -> str:
    """Return the name of a model's object in words."""
    return (
        " ".join(map(str, cast("tuple[object, ...]", name)))
        if isinstance(name, tuple)
        else str(name)
    )


def _place(where: Any) -> str:
    """Return the part of shared bytes that is meant, as Python code."""
    match where:
        case None:
            return ""
        case ("slice", start, stop, None):
            return f"[{'' if start is None else start}:{'' if stop is None else stop}]"
        case (str() as method, *_):
            return f".{method}({', '.join(map(str, where[1:]))})"
        case _:
            return f"[{where}]"


def _value(value: Hashable) -> str:
    return value.hex(" ") if isinstance(value, bytes) else str(value)


def _caller(*, production: bool) -> FrameType:
    """Return the frame that called into the controlled objects.

    With ``production``, return the innermost frame of production code, if there is one.
    """
    frames = [sys._getframe(1)]  # pyright: ignore[reportPrivateUsage]
    while (outer := frames[-1].f_back) is not None:
        frames.append(outer)
    own = (__file__, control.__file__, objects.__file__)
    callers = [frame for frame in frames if frame.f_code.co_filename not in own] or frames[-1:]
    paths = [Path(frame.f_code.co_filename) for frame in callers] if production else []
    return next(
        (
            frame
            for frame, path in zip(callers, paths, strict=False)
            if _SOURCE in path.parents and path.parent != _HERE
        ),
        callers[0],
    )


def _file(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(_SOURCE)) if _SOURCE in path.parents else path.name


def _argument(frame: FrameType) -> str:
    """Return the name of the constant that is the present call's first argument, else ""."""
    positions = list(frame.f_code.co_positions())
    line, end_line, start, end = positions[frame.f_lasti // 2]
    if line is None or line != end_line:
        return ""
    text = linecache.getline(frame.f_code.co_filename, line).encode()[start:end].decode()
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        return ""
    if (
        isinstance(call, ast.Call)
        and call.args
        and isinstance(name := call.args[0], ast.Name)
        and name.id.isupper()
    ):
        return name.id.strip("_").lower()
    return ""


def straightened(
    schedule: Sequence[int],
    operations: Sequence[Operation],
    conflict: Callable[[Operation, Operation], bool],
) -> list[int]:
    """Return the same steps in the order with the fewest changes of actor.

    Only neighbours that do not conflict are swapped. This is the shortest path through all orders
    in which each step comes after the earlier steps that it conflicts with.
    """
    actors = sorted(set(schedule))
    own = [[index for index, other in enumerate(schedule) if other == actor] for actor in actors]
    if prod(len(steps) + 1 for steps in own) > _STRAIGHTENABLE:
        return list(schedule)

    def needed(mine: int, others: Sequence[int]) -> int:
        return max(
            (
                n
                for n, index in enumerate(others, 1)
                if index < mine and conflict(operations[index], operations[mine])
            ),
            default=0,
        )

    needs = [[needed(mine, others) for others in own] for mine in range(len(schedule))]
    end = tuple(map(len, own))
    start: _Way = tuple(0 for _ in own), -1
    best: dict[_Way, int] = {start: 0}
    came: dict[_Way, _Way] = {}
    heap: list[tuple[int, tuple[int, ...], int]] = [(0, *start)]
    while heap:
        changes, at, last = heapq.heappop(heap)
        if at == end:
            return _way(came, (at, last), actors)
        for mine in range(len(own)):
            if at[mine] == end[mine] or any(map(int.__lt__, at, needs[own[mine][at[mine]]])):
                continue
            reached = (*at[:mine], at[mine] + 1, *at[mine + 1 :]), mine
            cost = changes + (mine != last)
            if cost < best.get(reached, cost + 1):
                best[reached] = cost
                came[reached] = at, last
                heapq.heappush(heap, (cost, *reached))
    raise AssertionError("no order found, not even the schedule's own")


def _way(came: dict[_Way, _Way], at: _Way, actors: Sequence[int]) -> list[int]:
    found: list[int] = []
    while at in came:
        found.append(actors[at[1]])
        at = came[at]
    return found[::-1]
