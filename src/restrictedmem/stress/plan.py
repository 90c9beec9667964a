"""What the processes of one VM do, as it follows from a seed: engine, operations, and how the VM ends."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from restrictedmem.platform import platform

#: Everything an owner does by its own will, and how often beside the others.
OPERATIONS: Final = {
    "punch": 60,
    "punch-block": 3,
    "allocate": 10,
    "convert": 6,
    "slot": 3,
    "interrupt": 10,
    "error": 4,
}
#: The same, and what an owner does at the VM's end.
NAMES: Final = (*OPERATIONS, "wait", "account", "destroy")
#: Which operations make a scenario of ``restrictedmem check`` with real processes; faults are always
#: there.
MIXES: Final[dict[str, tuple[str, ...]]] = {
    "punch-fault": ("punch",),
    "punch-block-fault": ("punch", "punch-block"),
    "huge-page-in-parts": ("punch", "punch-block", "allocate"),
    "allocate-fault": ("punch", "allocate"),
    "punch-register": ("punch", "slot"),
    "punch-unregister": ("punch", "slot"),
    "convert-fault": ("convert",),
    "punch-convert-fault": ("punch", "convert"),
    "error-fault": ("error",),
    "error-punch-fault": ("punch", "error"),
    "interrupt-fault": ("interrupt",),
    "interrupt-punch-fault": ("punch", "interrupt"),
}

_VCPUS: Final = (1, 2, 4, 8)
_PAGES: Final = (64, 512, 2048)
_CONVERTING: Final = (0, 2, 10)
#: Seconds that one VM lives; one in so many is killed.
_LIFE: Final = (2.0, 6.0)
_KILLED: Final = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """One VM's life, as the seed has it."""

    seed: str
    engine: str
    #: What the host keeps in step, if anything (``platform.platform.NAMES``).
    platform: str
    vcpus: int
    pages: int
    #: Whether on the descriptor of the VM before.
    reused: bool
    #: Of 1000 steps of the guest, so many convert their page.
    converting: int
    operations: tuple[str, ...]
    seconds: float
    #: Whether its owner is killed at the end, in the middle of whatever it does.
    killed: bool


def plan_of(
    seed: int,
    number: int,
    *,
    before: Plan | None,
    engines: Mapping[str, tuple[str, ...]],
    left: float,
) -> Plan:
    """Plan the VM of a number: on an engine of those, with the operations that are done there, and for no more than ``left`` seconds."""
    words = f"{seed}/{number}"
    chosen = random.Random(words)
    engine = chosen.choice(list(engines))
    reused = before is not None and bool(chosen.randrange(2))
    return Plan(
        seed=words,
        engine=engine,
        platform=chosen.choice(("", *platform.NAMES)) if engine == "software" else "",
        vcpus=before.vcpus if before and reused else chosen.choice(_VCPUS),
        pages=before.pages if before and reused else chosen.choice(_PAGES),
        reused=reused,
        converting=chosen.choice(_CONVERTING) if "convert" in engines[engine] else 0,
        operations=engines[engine],
        seconds=min(chosen.uniform(*_LIFE), left),
        killed=not chosen.randrange(_KILLED),
    )
