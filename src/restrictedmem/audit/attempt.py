"""A route to the memory, and the outcome of an attempt on it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from errno import ECHILD, ETIMEDOUT, errorcode
from typing import Final

from restrictedmem.audit.attacker import Attacker
from restrictedmem.audit.pattern import Buffer
from restrictedmem.probe import in_child

#: Seconds that one attempt may take.
DEADLINE: Final = 20.0


class Outcome(Enum):
    """The outcome of an attempt."""

    REFUSED = "refused"
    NOTHING = "nothing found"
    MEASURED = "the measurement tells"
    """It changes the launch, and a verifier of the guest's report sees the change."""
    OPEN = "open by design"
    """It led to the content, and docs/understand/threat-model.md says that it does."""
    FOUND = "FOUND"
    """It led to the content, or to power over the guest, and no document says that it does."""
    CONTROL = "found, as it must"
    """A control: the search can find the pattern, and there was a pattern to find."""
    FAILED = "FAILED"
    """It could not be tried, so nothing was shown."""

    @property
    def bad(self) -> bool:
        """Whether this outcome makes the proof fail."""
        return self in (Outcome.FOUND, Outcome.FAILED)


class MeasurementTellsError(Exception):
    """The guest that a route looks into has another measurement than an honest guest."""


@dataclass(frozen=True, slots=True)
class Route:
    """A route to try: it yields the bytes that the owner gets; OSError means refused."""

    target: str
    """The process, file or interface that it attacks."""
    name: str
    run: Callable[[Attacker], Iterable[Buffer]]
    power: bool = False
    """Whether it is a find if the route is not refused, even without content."""
    open_by: str = ""
    """The item of docs/understand/threat-model.md by which the route is open; "" for none."""
    root: bool = False
    """Whether capabilities open the route."""
    control: bool = False
    """Whether it is a control, which must find the pattern."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The result of trying one route; ``searched`` is the number of bytes got and searched."""

    target: str
    name: str
    outcome: Outcome
    errno: str = ""
    detail: str = ""
    searched: int = 0


def attempt(route: Route, owner: Attacker) -> Attempt:
    """Try a route in a child of its own.

    So no signal and nothing that the attempt leaves behind affects the next attempt.
    """
    try:
        outcome, searched, note = in_child(lambda: _look(route, owner), DEADLINE)
    except OSError as error:
        if error.errno in (ECHILD, ETIMEDOUT):
            return Attempt(route.target, route.name, Outcome.FAILED, detail=str(error.strerror))
        outcome = Outcome.FAILED if route.control else Outcome.REFUSED
        return Attempt(
            route.target,
            route.name,
            outcome,
            errorcode.get(error.errno or 0, str(error.errno)),
            str(error.strerror),
        )
    if route.control:
        outcome = Outcome.CONTROL if outcome is Outcome.FOUND else Outcome.FAILED
        note = note or "the search did not find the pattern"
    elif outcome is Outcome.NOTHING and route.power:
        outcome, note = Outcome.FOUND, "accepted"
    open_by = route.open_by or ("Root" if route.root and owner.as_root else "")
    if outcome is Outcome.FOUND and open_by:
        outcome, note = Outcome.OPEN, f"{note} ({open_by})"
    return Attempt(route.target, route.name, outcome, detail=note, searched=searched)


def _look(route: Route, owner: Attacker) -> tuple[Outcome, int, str]:
    searched = 0
    try:
        for chunk in route.run(owner):
            searched += len(chunk)
            place = owner.pattern.find(chunk)
            if place is not None:
                return Outcome.FOUND, searched, f"the guest's {place:#x}"
    except MeasurementTellsError:
        return Outcome.MEASURED, searched, ""
    return Outcome.NOTHING, searched, ""
