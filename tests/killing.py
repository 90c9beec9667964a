"""Killing, stopping and freezing a service's processes at a random moment, and what that leaves.

The rounds are for the test and for the script. The owner (``killed_owner``) is a child that uses
descriptors as fast as it can, and perhaps a VM. It is the subreaper of the processes that it
starts. So every process of the service is found below it from the first moment on.
"""

import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

import mute_server
from processes import Process, descendants, exists, process

#: Seconds within which every blocked call has to return, and everything has to be gone.
LIMIT: Final = 1.0
#: Seconds that a consumer may take to answer where processes are stopped, and how much longer than
#: that they are.
DEADLINE: Final = 0.4
_LONGER: Final = (0.1, 0.2)


class Act(Enum):
    """An action on a process."""

    KILL = "kill"
    STOP = "stop"
    """SIGSTOP for longer than a consumer may take to answer, then SIGCONT: everything goes on, but
    for an engine that alone was stopped and was waited for."""
    FREEZE = "freeze"
    """The same by the freezer of cgroup v2; by signals where there is none."""
    LAUNCH = "end of the owner"
    """The owner is killed in the middle of a VM's launch."""
    FOREIGN = "kill, with foreign descriptors in flight"
    """Files whose FUSE server never answers were sent wherever an owner can send to."""


@dataclass(frozen=True)
class Kind:
    """An action and its victim; with ``guest``, a guest runs meanwhile."""

    act: Act
    victim: str
    guest: bool = True

    def __str__(self) -> str:
        return f"{self.act.value}: {self.victim}{', a guest runs' * self.guest}"


#: Calls of a launch in which the owner is killed.
STEPS: Final = (
    "KVM_CREATE_VM",
    "KVM_SET_USER_MEMORY_REGION",
    "LAUNCH_UPDATE",
    "KVM_CREATE_VCPU",
    "KVM_RUN",
)
#: ``start`` is any process of a service that is starting, ``all`` the owner and everything below
#: it, ``server`` the FUSE server that does not answer.
KINDS: Final = (
    *(Kind(Act.KILL, victim) for victim in ("service", "spawner", "engine")),
    *(Kind(Act.KILL, victim, guest=False) for victim in ("service", "spawner", "start")),
    *(Kind(Act.STOP, victim) for victim in ("service", "spawner", "engine", "all")),
    Kind(Act.STOP, "start", guest=False),
    Kind(Act.FREEZE, "all"),
    *(Kind(Act.LAUNCH, step) for step in STEPS),
    *(Kind(Act.FOREIGN, victim) for victim in ("service", "spawner", "engine", "server")),
)
_NAMES: Final = {
    "service": "rmem-service",
    "spawner": "rmem-spawner",
    "engine": "rmem-kvm",
    "server": mute_server.NAME,
}


@dataclass(frozen=True)
class Round:
    """One round: action, victim, moment, and the owner's calls. A seed decides all of them."""

    seed: int
    kind: Kind
    delay: float

    @classmethod
    def of(cls, seed: int) -> "Round":
        kind, dice = KINDS[seed % len(KINDS)], random.Random(seed)
        if kind.act is Act.LAUNCH:
            # Calls take from a few microseconds to some milliseconds.
            return cls(seed, kind, 10 ** dice.uniform(-5, -2))
        return cls(seed, kind, dice.uniform(0, 0.15 if kind.victim == "start" else 0.02))

    @property
    def fatal(self) -> bool:
        """Whether the service ends by it."""
        return self.kind.act in (Act.KILL, Act.FOREIGN) and self.kind.victim in (
            "service",
            "spawner",
        )

    @property
    def deadline(self) -> float | None:
        """Seconds that a consumer may take to answer, where that is not what it is always."""
        return DEADLINE if self.kind.act in (Act.STOP, Act.FREEZE) else None


@dataclass
class Outcome:
    """The outcome of a round; ``faults`` is empty when all was well. Times are in seconds."""

    round: Round
    faults: list[str] = field(default_factory=list[str])
    #: From the kill to the return of the last call.
    blocked: float = 0.0
    #: From the kill, or from the owner's last close where that left the service alive, to the end
    #: of everything.
    gone: float = 0.0
    calls: int = 0
    #: Counts of the actions.
    done: Counter[str] = field(default_factory=Counter[str])
    #: All that there was of the service.
    processes: list[Process] = field(default_factory=list[Process])
    #: Leftovers when nothing should be left.
    left: list[str] = field(default_factory=list[str])


def play(round: Round) -> Outcome:
    """Play one round, and return its outcome."""
    # It knows this module.
    import killed_owner

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    cgroup = _Cgroup.make() if round.kind.act is Act.FREEZE else None
    owner = os.fork()
    if owner == 0:
        try:
            ours.close()
            if cgroup is not None:
                cgroup.enter()
            killed_owner.live(round, theirs)
        finally:
            os._exit(1)
    theirs.close()
    watcher = _Watcher(round, owner, ours, cgroup)
    with ours:
        try:
            watcher.watch()
        except TimeoutError:
            watcher.fault(
                f"the owner hangs: {_where(owner)}",
                *(f"{found.name}: {_where(found.pid)}" for found in watcher.known),
            )
        except ConnectionError:
            watcher.fault("the owner died")
        finally:
            watcher.end()
    watcher.outcome.processes = watcher.known
    return watcher.outcome


class _Watcher:
    def __init__(
        self, round: Round, owner: int, sock: socket.socket, cgroup: "_Cgroup | None"
    ) -> None:
        self.outcome = Outcome(round)
        self.known: list[Process] = []
        self._round = round
        self._owner = owner
        self._sock = sock
        self._cgroup = cgroup
        self._dice = random.Random(round.seed + 2)
        self._killed = 0.0
        sock.settimeout(30)

    def fault(self, *faults: str) -> None:
        self.outcome.faults += faults

    def watch(self) -> None:
        act, victim = self._round.kind.act, self._round.kind.victim
        if victim != "start" and (said := self._hear()) != b"ready":
            self.fault(f"the owner was not ready: {said.decode(errors='replace')}")
            return
        if act is Act.LAUNCH:
            self._owner_dies()
            return
        time.sleep(self._round.delay)
        self.known = _below({self._owner})
        if act in (Act.KILL, Act.FOREIGN):
            self._kill()
        elif act is Act.FREEZE and self._cgroup is not None:
            self._freeze(self._cgroup)
        else:
            self._stop()
        self._finish()

    def _hear(self) -> bytes:
        said = self._sock.recv(1 << 16)
        if not said:
            raise ConnectionError
        return said

    # Actions.

    def _victims(self) -> list[Process]:
        if self._round.kind.victim == "all":
            return [*self.known, *filter(None, [process(self._owner)])]
        candidates = self.known
        if self._round.kind.victim != "start":
            every = _below({self._owner}, everyone=True)
            candidates = [found for found in every if found.name == _NAMES[self._round.kind.victim]]
        return [self._dice.choice(candidates)] if candidates else []

    def _kill(self) -> None:
        self._killed = time.monotonic()
        for victim in self._victims():
            _send(victim, signal.SIGKILL)
            self._did("killed", victim)
            if victim.name != mute_server.NAME:
                self._wait_gone([victim])

    def _stop(self) -> None:
        victims = self._victims()
        for signal_ in (signal.SIGSTOP, signal.SIGCONT):
            for victim in self._order(victims):
                _send(victim, signal_)
                if signal_ == signal.SIGSTOP and victim.name == _NAMES["engine"]:
                    # The owner's calls meanwhile wait for the engine, and the service has received
                    # them.
                    time.sleep(self._dice.uniform(0, 0.02))
            if signal_ == signal.SIGSTOP:
                time.sleep(DEADLINE + self._dice.uniform(*_LONGER))
        if self._round.kind.victim == "all":
            self.outcome.done["stopped all"] += 1
        else:
            for victim in victims:
                self._did("stopped", victim)

    def _order(self, victims: list[Process]) -> list[Process]:
        """Put processes in an order; every other time the engines come first."""
        mixed = self._dice.sample(victims, len(victims))
        if self._dice.random() < 0.5:
            mixed.sort(key=lambda victim: victim.name != _NAMES["engine"])
        return mixed

    def _freeze(self, cgroup: "_Cgroup") -> None:
        cgroup.freeze("1")
        time.sleep(DEADLINE + self._dice.uniform(*_LONGER))
        cgroup.freeze("0")
        self.outcome.done["froze all"] += 1

    def _owner_dies(self) -> None:
        self.known = _below({self._owner})
        self._sock.send(b"go")
        began = time.monotonic()
        self._wait(
            lambda: (
                [] if process(self._owner) is None else [f"left: the owner, {_where(self._owner)}"]
            ),
            30,
        )
        self.outcome.done[f"ended the owner in {self._round.kind.victim}"] += 1
        self._wait_gone(self.known)
        self.outcome.gone = time.monotonic() - began

    def _did(self, what: str, victim: Process) -> None:
        names = {name: role for role, name in _NAMES.items()}
        self.outcome.done[f"{what} {names.get(victim.name, 'at the start')}"] += 1

    # Results.

    def _finish(self) -> None:
        """Hear what the owner found, have it close all it has, and look for what is left."""
        outcome = self.outcome
        if not self._round.fatal:
            self._sock.send(b"stop")
        report: dict[str, Any] = json.loads(self._hear())
        outcome.calls = report["calls"]
        outcome.done.update(report["done"])
        self.fault(*report["faults"])
        self.known += [found for found in _below({self._owner}) if found not in self.known]
        if self._killed and self._round.kind.victim != "start":
            outcome.blocked = report["returned"] - self._killed
        if outcome.blocked > LIMIT:
            self.fault(f"a call returned {outcome.blocked:.2f} s after the kill")
        if self._round.fatal:
            # While the owner has every descriptor still, and a server that does not answer.
            self._wait_gone(self.known, stuck=True)
            outcome.gone = time.monotonic() - self._killed
        self._sock.send(b"close")
        assert self._hear() == b"closed"
        began = time.monotonic()
        self._wait_gone(self.known)
        if not self._round.fatal:
            outcome.gone = time.monotonic() - began

    def _wait_gone(self, processes: list[Process], *, stuck: bool = False) -> None:
        """Wait for the end of some processes; if they are all known ones, of whatever they left."""
        everything = processes is self.known
        self._wait(lambda: self._left(processes, everything=everything, stuck=stuck), LIMIT)

    def _wait(self, look: Callable[[], list[str]], limit: float) -> None:
        began = time.monotonic()
        while left := look():
            if time.monotonic() - began > limit:
                self.fault(*left)
                self.outcome.left += left
                return
            time.sleep(0.001)

    def _left(self, processes: list[Process], *, everything: bool, stuck: bool) -> list[str]:
        there = [found for found in processes if exists(found)]
        if everything:
            there += [
                found
                for found in _below({self._owner, *(found.pid for found in there)})
                if found not in there
            ]
        left = [
            f"left: {found} {_where(found.pid)}"
            for found in there
            if not (stuck and _is_held_checker(found))
        ]
        if left or not everything:
            return left
        names = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").split()
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        ours = tuple(f"@restrictedmem/{found.pid}/" for found in processes)
        return [f"left: {name}" for name in names if name.startswith(ours)] + ["left: a mount"] * (
            "restrictedmem" in mounts
        )

    def end(self) -> None:
        """End the owner, and what it may wait for when it ends."""
        below = _below({self._owner}, everyone=True)
        for found in below:
            if found.name == mute_server.NAME:
                _send(found, signal.SIGKILL)
        os.kill(self._owner, signal.SIGKILL)
        os.waitpid(self._owner, 0)
        if self._cgroup is not None:
            self._wait(self._cgroup.remove, LIMIT)


class _Cgroup:
    """A cgroup of its own for a round, where cgroup v2 can be had."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def make(cls) -> "_Cgroup | None":
        mounts = [
            line.split()
            for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        ]
        places = [fields[4] for fields in mounts if fields[fields.index("-") + 1] == "cgroup2"]
        own = [
            line[3:]
            for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
            if line.startswith("0::")
        ]
        for place in places:
            path = (
                Path(f"{place}{own[0] if own else ''}") / f"restrictedmem-kill-test-{os.getpid()}"
            )
            with suppress(OSError):
                path.mkdir()
                if os.access(path / "cgroup.freeze", os.W_OK):
                    return cls(path)
                path.rmdir()
        return None

    def enter(self) -> None:
        (self._path / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    def freeze(self, value: str) -> None:
        (self._path / "cgroup.freeze").write_text(value, encoding="ascii")

    def remove(self) -> list[str]:
        """Remove it, when nobody is in it any more; returns what is left."""
        try:
            self._path.rmdir()
        except OSError as error:
            return [f"left: the cgroup: {error}"]
        return []


def _send(victim: Process, number: signal.Signals) -> None:
    # Nobody waits for the process, so its number cannot be another process's.
    with suppress(ProcessLookupError):
        os.kill(victim.pid, number)


def _below(roots: Iterable[int], *, everyone: bool = False) -> list[Process]:
    """Return the descendants of some processes; the mute FUSE server only if ``everyone``."""
    return [found for found in descendants(roots) if everyone or found.name != mute_server.NAME]


def _is_held_checker(found: Process) -> bool:
    """Say whether a process is an engine's checker that the owner's own FUSE server holds."""
    now = process(found.pid)
    return now is not None and now.name == "rmem-checker" and now.state == "D"


def _where(pid: int) -> str:
    found = process(pid)
    stacks: list[str] = []
    # It may be about to end.
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            lines = Path(f"/proc/{pid}/task/{task}/stack").read_text(encoding="ascii").splitlines()
            stacks.append(" < ".join(line.split()[-1] for line in lines))
    return f"state {found.state if found else '-'}, {'; '.join(stacks)}"


def stuck_tasks(outcomes: Iterable[Outcome]) -> list[str]:
    """Return what is left of some rounds and is in D state, now and a moment later."""
    left = [found for outcome in outcomes for found in outcome.processes if exists(found)]
    for look in range(2):
        if look and left:
            time.sleep(0.2)
        left = [found for found in left if exists(found) and _in_d_state(found.pid)]
    return [f"{found}: {_where(found.pid)}" for found in left]


def shared_memory() -> int:
    """Return the bytes of all tmpfs and memfd pages of the machine (Shmem of /proc/meminfo)."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Shmem:"))


def _in_d_state(pid: int) -> bool:
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{task}/stat").read_text(
                encoding="utf-8", errors="replace"
            )
            if text.rsplit(") ", 1)[1][0] == "D":
                return True
    return False
