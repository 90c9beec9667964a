"""Killing a service, its spawner or an engine at a random moment, and looking at what is left: one round of it, for test and script.

The owner is a child that uses descriptors as fast as it can, and a VM perhaps, until the first call fails. It is the subreaper of what it
starts, so that every process of the service is found below it from the first moment on.
"""

import fcntl
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from errno import EACCES, ECONNABORTED, ECONNRESET, EIO, ENOTCONN, EPERM, errorcode
from functools import partial
from pathlib import Path
from typing import Any, Final

from processes import Process, children, exists, process
from restrictedmem import guests
from restrictedmem.abi import memory
from restrictedmem.abi.memory import FallocMode
from restrictedmem.abi.process import PR_SET_CHILD_SUBREAPER, prctl
from restrictedmem.fs.filesystem import PROVE, TOKEN_BYTES
from restrictedmem.kvm import elf
from restrictedmem.kvm.vmm import Vmm
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE as PAGE

#: Seconds within which every blocked call has to return, and everything has to be gone.
LIMIT: Final = 1.0
#: Private memory of the guest, all of which it touches.
GUEST_SIZE: Final = 4 << 20
_HELD: Final = 6
# What a call gets that waits while the service dies: aborted with the connection; or EIO, when the kernel was just copying the request into
# the dying process (fuse_dev_do_read).
_DYING: Final = (ECONNABORTED, EIO)

#: Who may be killed: with a guest, and without one. ``start`` is whatever there is while a service comes up.
VICTIMS: Final = {True: ("service", "spawner", "engine"), False: ("service", "spawner", "start")}


@dataclass(frozen=True)
class Round:
    """What to kill, when, and what the owner does meanwhile: all of it follows from a seed."""

    seed: int
    victim: str
    guest: bool
    delay: float

    @classmethod
    def of(cls, seed: int) -> "Round":
        dice = random.Random(seed)
        guest = seed % 2 == 0
        victim = dice.choice(VICTIMS[guest])
        return cls(seed, victim, guest, dice.uniform(0, 0.15 if victim == "start" else 0.02))


@dataclass(frozen=True)
class Outcome:
    """What came of a round; ``faults`` is empty when all was well. Seconds."""

    round: Round
    faults: list[str]
    blocked: float
    """From the kill to the return of the last call."""
    gone: float
    """From the kill, or from the owner's last close where the kill left the service alive, to the end of everything."""
    calls: int


def play(round: Round) -> Outcome:
    """Play one round."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner = os.fork()
    if owner == 0:
        try:
            ours.close()
            _Owner(round, theirs).live()
        finally:
            os._exit(1)
    theirs.close()
    with ours:
        try:
            return _watch(round, owner, ours)
        finally:
            os.kill(owner, signal.SIGKILL)
            os.waitpid(owner, 0)


def _watch(round: Round, owner: int, sock: socket.socket) -> Outcome:
    sock.settimeout(30)
    if round.victim != "start":
        assert sock.recv(10) == b"ready"
    time.sleep(round.delay)
    known = _family(owner)
    victim = _victim(round, known)
    killed = time.monotonic()
    if victim is not None:
        # It is not waited for by anyone, so the number is its own or nobody's.
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
    fatal = round.victim in ("service", "spawner")
    if not fatal:
        sock.send(b"stop")
    gone = 0.0
    try:
        report: dict[str, Any] = json.loads(sock.recv(1 << 16))
        known += [found for found in _family(owner) if found not in known]
        blocked = report["returned"] - killed
        faults: list[str] = report["faults"]
        if fatal:
            # While the owner has every descriptor still.
            faults += _wait_gone(owner, known)
            gone = time.monotonic() - killed
        sock.send(b"close")
        assert sock.recv(10) == b"closed"
    except TimeoutError:
        return Outcome(round, [f"the owner hangs: {_where(owner)}", *(f"{found.name}: {_where(found.pid)}" for found in known)], 0, 0, 0)
    if blocked > LIMIT and (fatal or round.victim == "engine"):
        faults.append(f"a call returned {blocked:.2f} s after the kill")
    if not fatal:
        began = time.monotonic()
        faults += _wait_gone(owner, known)
        gone = time.monotonic() - began
    return Outcome(round, faults, blocked, gone, report["calls"])


def _wait_gone(owner: int, known: list[Process]) -> list[str]:
    began = time.monotonic()
    while left := _left(owner, known):
        if time.monotonic() - began > LIMIT:
            return left
        time.sleep(0.001)
    return []


def _left(owner: int, known: list[Process]) -> list[str]:
    left = [f"left: {found} {_where(found.pid)}" for found in {*known, *_family(owner)} if exists(found)]
    if left:
        return left
    sockets = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").split()
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    left += [f"left: socket of {found.pid}" for found in known if f"@restrictedmem/{found.pid}" in sockets]
    return left + ["left: a mount"] * ("restrictedmem" in mounts)


def _family(owner: int) -> list[Process]:
    found = children(owner)
    for parent in found:
        found += children(parent.pid)
    return found


def _victim(round: Round, known: list[Process]) -> Process | None:
    names = {"service": "rmem-service", "spawner": "rmem-spawner", "engine": "rmem-kvm"}
    candidates = known if round.victim == "start" else [found for found in known if found.name == names[round.victim]]
    return random.Random(round.seed).choice(candidates) if candidates else None


def _where(pid: int) -> str:
    found = process(pid)
    stacks: list[str] = []
    for task in Path(f"/proc/{pid}/task").glob("*/stack"):
        with suppress(OSError):
            stacks.append(" < ".join(line.split()[-1] for line in task.read_text(encoding="ascii").splitlines()))
    return f"state {found.state if found else '-'}, {'; '.join(stacks)}"


def stuck_tasks() -> list[str]:
    """Return the tasks of the machine that are in D state now and still are a moment later, and belong to this project."""
    found: set[int] = set()
    for look in range(2):
        now = {int(path.parts[4]) for path in Path("/proc").glob("[0-9]*/task/*/stat") if _in_d_state(path)}
        found = now if look == 0 else found & now
        time.sleep(0.2)
    return [f"{pid}: {_where(pid)}" for pid in found]


def shared_memory() -> int:
    """Return the bytes of all tmpfs and memfd pages of the machine (Shmem of /proc/meminfo)."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Shmem:"))


def _in_d_state(path: Path) -> bool:
    with suppress(OSError):
        name, rest = path.read_text(encoding="utf-8", errors="replace").split(" (", 1)[1].rsplit(") ", 1)
        return rest[0] == "D" and name.startswith(("rmem", "python"))
    return False


_CALLS: Final[dict[str, Callable[[int], object]]] = {
    "fstat": os.fstat,
    "ftruncate": lambda fd: os.ftruncate(fd, PAGE),
    "fallocate": lambda fd: memory.fallocate(fd, FallocMode.KEEP_SIZE, GUEST_SIZE // 2, PAGE),
    "punch": lambda fd: memory.fallocate(fd, memory.PUNCH, GUEST_SIZE // 2, PAGE),
    "ioctl": lambda fd: fcntl.ioctl(fd, PROVE, bytes(TOKEN_BYTES)),
}


def _errno(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def _create(service: Service) -> None:
    os.close(service.memfd_restricted())


class _Owner:
    """The child: uses a service until it fails or all is said to be over, then tries every call on every descriptor that it has."""

    def __init__(self, round: Round, sock: socket.socket) -> None:
        self._round = round
        self._sock = sock
        self._dice = random.Random(round.seed + 1)
        self._service: Service | None = None
        self._vmm: Vmm | None = None
        self._guest: threading.Thread | None = None
        self._fds: list[int] = []
        self._faults: list[str] = []
        self._calls = 0

    def live(self) -> None:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            self._use()
        except OSError as error:
            returned = time.monotonic()
            if error.errno not in (ENOTCONN, *_DYING) and not (error.errno == ECONNRESET and self._service is None):
                self._faults.append(f"a call failed with {error!r}")
            self._check(ENOTCONN)
        else:
            returned = time.monotonic()
            # The kill may take a moment to arrive where it may hit anything.
            self._check(0 if self._round.victim == "engine" else None)
        if self._guest is not None:
            self._guest.join(LIMIT)
            if self._guest.is_alive():
                self._faults.append("KVM_RUN did not return")
        self._sock.send(json.dumps({"faults": self._faults, "returned": returned, "calls": self._calls}).encode())
        self._sock.recv(10)
        self._close()
        self._sock.send(b"closed")
        signal.pause()

    def _use(self) -> None:
        self._service = Service.start()
        if self._round.guest:
            self._start_guest(self._service)
        if self._round.victim != "start":
            self._sock.send(b"ready")
        while not self._told_to_stop():
            self._calls += 1
            if not self._fds or (len(self._fds) < _HELD and self._dice.random() < 0.3):
                self._fds.append(self._service.memfd_restricted())
            else:
                self._touch(self._dice.choice(self._fds))

    def _touch(self, fd: int) -> None:
        assert self._service is not None
        # Beyond the guest's image and below its stack.
        offset, length = GUEST_SIZE // 2 + self._dice.randrange(64) * PAGE, self._dice.randint(1, 64) * PAGE
        match self._dice.randrange(6):
            case 0:
                os.fstat(fd)
            case 1:
                memory.fallocate(fd, FallocMode.KEEP_SIZE, offset, length)
            case 2 | 3:
                memory.fallocate(fd, memory.PUNCH, offset, length)
            case 4 if fd != self._fds[0]:
                self._fds.remove(fd)
                os.close(fd)
            case _:
                self._service.status()

    def _start_guest(self, service: Service) -> None:
        self._vmm = vmm = Vmm(GUEST_SIZE, service)
        self._fds.append(os.dup(vmm.restricted_fd))
        vmm.load(elf.parse(guests.path("spin").read_bytes()), ["loop"])

        def run() -> None:
            with suppress(OSError):
                vmm.vcpus[0].run()

        self._guest = threading.Thread(target=run, daemon=True)
        self._guest.start()

    def _told_to_stop(self) -> bool:
        with suppress(BlockingIOError):
            return self._sock.recv(10, socket.MSG_DONTWAIT) == b"stop"
        return False

    def _check(self, expected: int | None) -> None:
        """Make every call on every descriptor, and expect one errno of all (0: success; None: either)."""
        for fd in self._fds:
            for name, call in _CALLS.items():
                self._expect(f"{name} on {fd}", partial(call, fd), expected)
        if self._service is not None:
            self._expect("create", partial(_create, self._service), expected)
            self._expect("status", self._service.status, expected)

    def _expect(self, name: str, call: Callable[[], object], expected: int | None) -> None:
        began = time.monotonic()
        found = _errno(call)
        while expected and found in _DYING and time.monotonic() - began < LIMIT:
            found = _errno(call)
        if time.monotonic() - began > LIMIT:
            self._faults.append(f"{name} took {time.monotonic() - began:.2f} s")
        # What a service refuses because it is the wrong moment or the wrong token is an answer of one that works.
        if found in (EPERM, EACCES):
            found = 0
        if expected is not None and found != expected:
            self._faults.append(f"{name}: {errorcode.get(found, 'worked')}, expected {errorcode.get(expected, 'to work')}")

    def _close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        if self._vmm is not None:
            self._vmm.close()
        if self._service is not None:
            self._service.close()
