"""Many programs in a row: which ran, which differed, and each difference as a reader needs it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from restrictedmem.service.client import Service
from restrictedmem.service.options import Options

from . import places
from .make import make
from .pair import Pair, differs_after, shrink
from .program import Program
from .x86 import name

#: Seconds that an engine may take to answer.
_PATIENCE: Final = 120.0
#: Differences after which it is enough.
ENOUGH: Final = 20


@dataclass(frozen=True, slots=True)
class Found:
    """A difference: where it was first seen, and the smallest programs that show it.

    The last of these differs. If there is none, the difference never showed again. If there are
    several, the earlier ones leave behind a state that the last one needs.
    """

    seed: int
    seen: str
    programs: tuple[Program, ...] = ()
    difference: str = ""

    def lines(self) -> Iterable[str]:
        """Yield the difference as text."""
        yield f"seed {self.seed}: {self.seen}"
        if not self.programs:
            yield "  not seen again, neither alone nor after the programs before it"
            return
        yield f"  made small: {self.difference}"
        for program in self.programs:
            yield from _listing(program)
        first = self.programs[0].seed
        yield f"  again: scripts/fuzz-engines --seed {first} --programs {self.seed - first + 1}"


def _listing(program: Program) -> Iterable[str]:
    registers = [
        f"{name(number, 64)}={value:#x}" for number, value in enumerate(program.registers) if value
    ]
    yield (
        f"  program {program.seed}{' in a storm' if program.storm else ''}: "
        f"{' '.join(registers)} flags={program.flags:#x}"
    )
    for page, private in places.AT_REST.items():
        if (page in program.private) != private:
            yield (
                f"    page {page} ({places.address(page):#x}) is "
                f"{'private' if not private else 'shared'}"
            )
    for page in sorted(program.punched):
        yield f"    page {page} ({places.address(page):#x}) is punched"
    for number, action in enumerate(program.actions):
        yield f"    hypercall {1000 + number}: {action}"
    for line in program.lines:
        yield f"    {line.address:x}  {line.code.hex():30}  {line.piece.text}"


@dataclass(slots=True)
class Outcome:
    """The outcome of a campaign; times are in seconds."""

    programs: int = 0
    instructions: int = 0
    exits: int = 0
    storms: int = 0
    seconds: float = 0.0
    found: list[Found] = field(default_factory=list[Found])


def start() -> Service:
    """Start a service with long deadlines: it kills no engine because the machine is busy."""
    return Service.start(Options(deadline=_PATIENCE))


def run(
    service: Service,
    first: int,
    *,
    more: Callable[[int], bool],
    told: Callable[[Outcome], None],
    small: bool = True,
) -> Outcome:
    """Run the programs of consecutive seeds, and call ``told`` after each.

    ``more`` gets the number of programs so far, and says whether to go on. ``small`` says whether
    differences are reduced. A difference in a storm, or one that earlier programs caused, takes
    long to reduce.
    """
    outcome, began, pair = Outcome(), time.monotonic(), None
    try:
        while more(outcome.programs) and len(outcome.found) < ENOUGH:
            if pair is None or pair.spent:
                if pair is not None:
                    pair.close()
                pair = Pair(service)
            program = make(first + outcome.programs)
            seen = pair.run(program)
            outcome.programs += 1
            outcome.instructions += len(program.lines)
            outcome.exits += pair.exits
            outcome.storms += program.storm
            if seen:
                outcome.found.append(
                    _small(service, pair.history, seen) if small else Found(program.seed, seen)
                )
            outcome.seconds = time.monotonic() - began
            told(outcome)
    finally:
        if pair is not None:
            pair.close()
    return outcome


def _small(service: Service, history: list[Program], seen: str) -> Found:
    """Reduce a difference to its program, or to that and as few earlier programs as it needs."""
    program = history[-1]
    before: list[Program] = []
    if not differs_after(service, before, program):
        before = history[:-1]
        if not differs_after(service, before, program):
            return Found(program.seed, seen)
        before = _needed(before, lambda some: bool(differs_after(service, some, program)))
    smallest, difference = shrink(program, partial(differs_after, service, before))
    return Found(program.seed, seen, (*before, smallest), difference)


def _needed(programs: list[Program], suffices: Callable[[list[Program]], bool]) -> list[Program]:
    """Return some of the programs that suffice, of which none can be left out."""
    size = max(1, len(programs) // 2)
    while size:
        at = 0
        while at < len(programs):
            left = programs[:at] + programs[at + size :]
            if suffices(left):
                programs = left
            else:
                at += size
        size //= 2
    return programs


def until_found(service: Service, first: int, programs: int) -> tuple[int, str]:
    """Run programs up to the first that differs; return their number and the difference, or 0."""
    seen: list[Found] = []
    outcome = run(
        service,
        first,
        more=lambda count: count < programs and not seen,
        told=lambda outcome: seen.extend(outcome.found),
        small=False,
    )
    return (outcome.programs, seen[0].seen) if seen else (0, "")
