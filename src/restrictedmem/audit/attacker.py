"""The owner as an attacker: no capabilities, its descriptors, its guest, and some pids."""

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

#: Bytes of private memory of a guest that an attempt makes for itself.
SMALL: Final = 2 << 20

_PR_CAPBSET_DROP: Final = 24
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4


@dataclass(frozen=True, slots=True)
class Attacker:
    """An owner that has a guest and tries to see into it."""

    service: Service
    guest: HeldGuest
    seed: int
    engine: str
    pattern: Pattern
    #: By name: pids of the trusted processes.
    processes: dict[str, int]
    #: Pid of a process of the owner's, with its memory from before the pattern was computed.
    twin: int
    #: Pid of a process of the owner's that holds some of the pattern and hides nothing.
    control: int
    as_root: bool

    def another(self, service: Service | None = None) -> AbstractContextManager[HeldGuest]:
        """Run another, smaller guest with the same pattern, by the same service or another."""
        return held_guest(service or self.service, SMALL, self.seed, self.engine)

    @property
    def fd(self) -> int:
        """The restricted descriptor; the guest's VMM owns it."""
        return self.guest.vmm.restricted_fd


def drop_capabilities() -> None:
    """Give up every capability, and those that an executed program could bring along.

    These are the effective, permitted, inheritable and ambient capabilities, and the bounding set.
    """
    with suppress(OSError):
        # A process without CAP_SETPCAP cannot make the bounding set smaller. For it, no_new_privs
        # below has the same effect.
        for number in range(64):
            process.prctl(_PR_CAPBSET_DROP, number)
    process.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    process.set_capabilities(0)
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)


def trusted_processes(service: Service, guest: HeldGuest) -> dict[str, int]:
    """Return the pids of a guest's engine, its service and the spawner, the parent of both."""
    pid: int = service.info["pid"]
    return {"engine": guest.vmm.vm.statistics()["pid"], "service": pid, "spawner": parent_of(pid)}


def parent_of(pid: int) -> int:
    """Return the pid of a process's parent (/proc/PID/stat)."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


def fork_twin(keep: Callable[[], object] = lambda: None) -> int:
    """Fork a process that has this process's memory and the result of ``keep``.

    It only waits. The caller kills and reaps it.
    """
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
