"""Tests' view of processes from outside: a service's relatives, their files, and their ends."""

import array
import fcntl
import os
import re
import resource
import signal
import socket
import termios
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from restrictedmem.abi.process import PR_SET_PDEATHSIG, prctl
from restrictedmem.fd import OwnedFd
from restrictedmem.service.client import Service
from waiting import PATIENCE, wait_until


@contextmanager
def closing(fds: list[int]) -> Generator[list[int], None, None]:
    """Close the descriptors that a list holds in the end."""
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@dataclass(frozen=True)
class Process:
    """The fields of /proc/PID/stat.

    The start time tells a process from a later one of the same number.
    """

    pid: int
    name: str
    state: str
    parent: int
    started: int


def process(pid: int) -> Process | None:
    """Look at a process; None when there is none, or only its exit status waits to be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = re.fullmatch(r"\d+ \((.*)\) (.*)\n", text, re.DOTALL)
    assert found is not None
    fields = found[2].split()
    # A first thread that has ended is a zombie while other threads still hold the process's
    # objects.
    return (
        None
        if fields[0] in "ZX" and int(fields[17]) <= 1
        else Process(pid, found[1], fields[0], int(fields[1]), int(fields[19]))
    )


def exists(known: Process) -> bool:
    """Say whether a process still runs."""
    now = process(known.pid)
    return now is not None and now.started == known.started


def runs(pid: int) -> bool:
    """Say whether a process has not ended."""
    return process(pid) is not None


def in_session(session: int) -> list[Process]:
    """Return the processes of a session, which may be orphans."""
    found: list[Process] = []
    for each in _every():
        with suppress(ProcessLookupError):
            if os.getsid(each.pid) == session:
                found.append(each)
    return found


def stop(pid: int) -> None:
    """Stop a process, and wait until all its threads have stopped.

    Before that, a thread may still answer.
    """
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _all_are(pid, "Tt"), f"process {pid} to stop")


def stops(pid: int) -> bool:
    """Stop a process, as ``stop``; say whether it was still there."""
    try:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: _all_are(pid, "TtZX"), f"process {pid} to stop")
        return _all_are(pid, "Tt") and process(pid) is not None
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def stopped(pid: int) -> Generator[None]:
    """Keep a process stopped meanwhile."""
    try:
        stop(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def go_on(pid: int) -> None:
    """Continue a process whose threads were all waiting, and wait until they wait again.

    Before that, a thread may not have run yet.
    """
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: _all_are(pid, "S"), f"process {pid} to wait again")


def _all_are(pid: int, states: str) -> bool:
    return all(_is(task, states) for task in Path(f"/proc/{pid}/task").iterdir())


def _is(task: Path, states: str) -> bool:
    try:
        return (task / "stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2][
            0
        ] in states
    except (FileNotFoundError, ProcessLookupError):
        # The process has ended meanwhile.
        return True


def children(pid: int) -> list[Process]:
    """Return the children of a process, the oldest first.

    Not every kernel has /proc/PID/task/TID/children.
    """
    return sorted(
        (found for found in _every() if found.parent == pid), key=lambda found: found.started
    )


def descendants(roots: Iterable[int]) -> list[Process]:
    """Return all descendants of some processes.

    Killed ancestors may have left them to other parents.
    """
    every, pids, below = _every(), set(roots), list[Process]()
    while more := [found for found in every if found.parent in pids and found.pid not in pids]:
        pids |= {found.pid for found in more}
        below += more
    return below


def _every() -> list[Process]:
    return [
        found
        for name in os.listdir("/proc")
        if name.isdigit() and (found := process(int(name))) is not None
    ]


def family(service: Service | int) -> list[Process]:
    """Return the spawner of a service and all that it forked."""
    pid = service if isinstance(service, int) else service.info["pid"]
    itself = process(pid)
    assert itself is not None, f"service {pid} is gone"
    spawner = process(itself.parent)
    assert spawner is not None, f"the spawner of service {pid} is gone"
    assert spawner.name == "rmem-spawner", spawner
    return [spawner, *children(spawner.pid)]


def wait_gone(processes: list[Process], patience: float = PATIENCE) -> None:
    """Wait until none of some processes is left."""
    wait_until(
        lambda: not any(map(exists, processes)),
        f"the end of {[p for p in processes if exists(p)]}",
        patience,
    )


def descriptors(pid: int) -> list[str]:
    """Return where a process's descriptors point to (/proc/PID/fd)."""
    found: list[str] = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(entry.path))
        except FileNotFoundError:
            continue
    return found


def queued(sock: socket.socket) -> int:
    """Return the bytes of all messages that a socket has in its queue (SIOCINQ)."""
    found = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.FIONREAD, found)
    return found[0]


def end_after(seconds: float) -> None:
    """Have a signal end this process, a child of a test, once so much time is over.

    In pytest's own process SIGALRM ends a test that takes too long. A child has that handler, too.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def be_idle() -> NoReturn:
    """Do nothing, in a child, for as long as its parent is there."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    while True:
        signal.pause()


@contextmanager
def room_for(count: int) -> Generator[None]:
    """Let this process have so many descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(count, before[0]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def high(fd: int) -> Generator[OwnedFd]:
    """Duplicate a descriptor, and get a number as high as a process with many descriptors has."""
    with room_for(2048), OwnedFd(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1024)) as found:
        yield found
