"""A route to the memory, and what came of trying it."""

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
    """What an attempt came to."""

    REFUSED = "refused"
    NOTHING = "nothing found"
    MEASURED = "the measurement tells"
    """It changes the launch, and whoever verifies the guest's report sees that it did."""
    OPEN = "open by design"
    """It led to the content, and docs/understand/threat-model.md says so."""
    FOUND = "FOUND"
    """It led to the content, or to power over the guest, and nothing says that it should."""
    CONTROL = "found, as it must"
    """A control: that the search can find, and that there was something to find."""
    FAILED = "FAILED"
    """It could not be tried, so nothing was shown."""

    @property
    def bad(self) -> bool:
        """Whether the proof fails by it."""
        return self in (Outcome.FOUND, Outcome.FAILED)


class MeasurementTellsError(Exception):
    """What a route raises when the guest it would look into is not the one that was measured."""


@dataclass(frozen=True, slots=True)
class Route:
    """One thing to try: it yields whatever bytes the owner gets by it, or raises OSError where it is refused."""

    target: str
    """At whom or what it aims."""
    name: str
    run: Callable[[Attacker], Iterable[Buffer]]
    power: bool = False
    """Whether not being refused is a find in itself, content or none."""
    open_by: str = ""
    """The item of docs/understand/threat-model.md that leaves it open."""
    root: bool = False
    """Whether capabilities are what it takes."""
    control: bool = False
    """Whether it must find."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What trying one route came to; ``searched`` counts the bytes that were got and searched."""

    target: str
    name: str
    outcome: Outcome
    errno: str = ""
    detail: str = ""
    searched: int = 0


def attempt(route: Route, owner: Attacker) -> Attempt:
    """Try a route, in a child of its own, so that neither a signal nor what it leaves behind reaches the next."""
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
        note = note or "the search is blind"
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
