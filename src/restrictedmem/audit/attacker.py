"""What an owner holds when it tries: no capability, its descriptors, its guest, and the numbers of the processes around it."""

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Final, NoReturn

from restrictedmem.abi import process
from restrictedmem.audit.held_guest import HeldGuest, held_guest
from restrictedmem.audit.pattern import Pattern
from restrictedmem.child import fork
from restrictedmem.service.client import Service

#: Private memory of a guest that an attempt makes for itself, in bytes.
SMALL: Final = 2 << 20

_PR_CAPBSET_DROP: Final = 24
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4


@dataclass(frozen=True, slots=True)
class Attacker:
    """An owner that has a guest and would like to see into it."""

    service: Service
    guest: HeldGuest
    seed: int
    engine: str
    pattern: Pattern
    #: By name: the trusted processes.
    processes: dict[str, int]
    #: A process of the owner's that is as it was before the pattern was computed.
    twin: int
    #: A process of the owner's that holds some of the pattern and hides nothing.
    control: int
    as_root: bool

    def another(self, service: Service | None = None) -> AbstractContextManager[HeldGuest]:
        """Run another guest, smaller, that holds the same, by the same service or another."""
        return held_guest(service or self.service, SMALL, self.seed, self.engine)

    @property
    def fd(self) -> int:
        """The restricted descriptor."""
        return self.guest.vmm.restricted_fd


def drop_capabilities() -> None:
    """Give up every capability: effective, permitted, inheritable, ambient, and those that a program could bring along."""
    with suppress(OSError):
        # Who has no CAP_SETPCAP cannot make the bounding set smaller, and no_new_privs below has
        # the same effect.
        for number in range(64):
            process.prctl(_PR_CAPBSET_DROP, number)
    process.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    process.set_capabilities(0)
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)


def trusted_processes(service: Service, guest: HeldGuest) -> dict[str, int]:
    """Return the process numbers of a guest's engine, its service, and the spawner above both."""
    pid: int = service.info["pid"]
    return {"engine": guest.vmm.vm.statistics()["pid"], "service": pid, "spawner": parent_of(pid)}


def parent_of(pid: int) -> int:
    """Return the parent of a process (/proc/PID/stat)."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


def fork_twin(keep: Callable[[], object] = lambda: None) -> int:
    """Fork a process that has this one's memory and what ``keep`` returns, and does nothing; the caller kills and reaps it."""
    reader, writer = os.pipe()

    def be_twin() -> NoReturn:
        _kept = keep()
        os.write(writer, b".")
        while True:
            signal.pause()

    twin = fork(be_twin, bound=True)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return twin
