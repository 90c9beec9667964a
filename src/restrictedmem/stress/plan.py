"""The plan of one VM, which follows from a seed: engine, operations, and how the VM ends."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from restrictedmem.platform import platform

#: The operations that an owner does unasked, and their relative frequencies.
OPERATIONS: Final = {
    "punch": 60,
    "punch-block": 3,
    "allocate": 10,
    "convert": 6,
    "slot": 3,
    "interrupt": 10,
    "error": 4,
}
#: The same names, and those of the owner's operations at the VM's end.
NAMES: Final = (*OPERATIONS, "wait", "account", "destroy")
#: By scenario of ``restrictedmem check``: its operations with real processes. There are always
#: faults.
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
#: Seconds that a VM lives, at least and at most (``_LIFE``). The owner of one VM in so many is
#: killed (``_KILLED``).
_LIFE: Final = (2.0, 6.0)
_KILLED: Final = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one VM."""

    seed: str
    engine: str
    #: The name of the host's platform, or "" for none (``platform.platform.NAMES``).
    platform: str
    vcpus: int
    pages: int
    #: Whether the VM has the descriptor of the VM before.
    reused: bool
    #: Number of steps in 1000 at which the guest converts its page.
    converting: int
    operations: tuple[str, ...]
    seconds: float
    #: Whether the owner is killed at the end, in the middle of its operations.
    killed: bool


def plan_of(
    seed: int,
    number: int,
    *,
    before: Plan | None,
    engines: Mapping[str, tuple[str, ...]],
    left: float,
) -> Plan:
    """Plan the VM with a number, for at most ``left`` seconds.

    ``engines`` has the engines to choose from, with the operations that are done on each.
    """
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
