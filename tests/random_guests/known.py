"""Differences that are known, each with its row in docs/reference/engines.md."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from restrictedmem.protocol.exits import PortIn, PortOut, Shutdown

from .machines import Event


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the two engines may say differently, the software engine's word first; a comparison ends there."""

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


#: What `mmio` and `readonly-store` allow is done away with by ``Machine``, which makes the same of
#: both.
ALLOWED: Final = (
    Allowed("general-protection", _shutdowns(lambda vector: vector == 13, 6)),
    Allowed("interrupt-number", _shutdowns(lambda vector: vector == 0x80, 6)),
    Allowed(
        "port-in-private-code",
        lambda one, other: isinstance(one.exit, PortIn | PortOut) and other.exit == Shutdown(6),
    ),
)
