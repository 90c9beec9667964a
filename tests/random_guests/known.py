"""Differences that are known, each with its row in docs/reference/engines.md."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from restrictedmem.protocol.exits import PortIn, PortOut, Shutdown

from .machines import Event


@dataclass(frozen=True, slots=True)
class Allowed:
    """A difference that the two engines may show, the software engine's value first.

    A comparison ends there.
    """

    row: str
    tells: Callable[[Event, Event], bool]


def _shutdowns(software: Callable[[int], bool], kernel: int) -> Callable[[Event, Event], bool]:
    def tells(one: Event, other: Event) -> bool:
        return (
            isinstance(one.exit, Shutdown)
            and software(one.exit.vector)
            and other.exit == Shutdown(kernel)
        )

    return tells


#: ``Machine`` removes the differences that `mmio` and `readonly-store` allow: it makes both engines
#: do the same.
ALLOWED: Final = (
    Allowed("general-protection", _shutdowns(lambda vector: vector == 13, 6)),
    Allowed("interrupt-number", _shutdowns(lambda vector: vector == 0x80, 6)),
    Allowed(
        "port-in-private-code",
        lambda one, other: isinstance(one.exit, PortIn | PortOut) and other.exit == Shutdown(6),
    ),
)
