"""Routes by the trusted processes: the kernel's interfaces of one process to another."""

import os
import resource
import stat
from collections.abc import Callable, Iterable, Iterator
from errno import EBADF, ENOENT
from functools import partial
from typing import Final

from restrictedmem.abi.process import CLONE_NEWNS, CLONE_NEWUSER
from restrictedmem.audit import syscalls
from restrictedmem.audit.attacker import Attacker
from restrictedmem.audit.attempt import Route
from restrictedmem.audit.pattern import Buffer
from restrictedmem.audit.reading import by_process_vm_readv, of_file, of_process
from restrictedmem.fd import OwnedFd
from restrictedmem.units import PAGE_SIZE

NAMES: Final = ("engine", "service", "spawner")
#: Descriptors below this number are tried in another process.
_DESCRIPTORS: Final = 64
_MOST: Final = 1 << 20
_NAMESPACES: Final = {
    "user": CLONE_NEWUSER,
    "mnt": CLONE_NEWNS,
    "cgroup": 0x0200_0000,
    "uts": 0x0400_0000,
    "ipc": 0x0800_0000,
    "pid": 0x2000_0000,
    "net": 0x4000_0000,
    "time": 0x80,
}

Look = Callable[[int], Iterable[Buffer]]


def _nothing(call: Callable[[int], object]) -> Look:
    """Return a look by a call that gives no content."""

    def look(pid: int) -> Iterator[Buffer]:
        call(pid)
        yield b""

    return look


def _attach(pid: int) -> None:
    syscalls.ptrace(syscalls.PTRACE_ATTACH, pid)
    os.waitpid(pid, syscalls.WALL)
    # Otherwise the process would stay stopped.
    syscalls.ptrace(syscalls.PTRACE_DETACH, pid)


def _each(tries: Iterable[Callable[[], Iterable[Buffer]]]) -> Iterator[Buffer]:
    """Yield the content that several tries give.

    If all are refused, raise the error of the last one that did not fail because something is
    missing (EBADF, ENOENT).
    """
    refusal: OSError | None = None
    allowed = False
    for one in tries:
        try:
            yield from one()
            allowed = True
        except OSError as error:
            if refusal is None or error.errno not in (EBADF, ENOENT):
                refusal = error
    if refusal is not None and not allowed:
        raise refusal


def _getfd(pid: int) -> Iterator[Buffer]:
    def one(number: int) -> Iterator[Buffer]:
        with syscalls.pidfd_getfd(pid, number) as fd:
            if stat.S_ISREG(os.fstat(fd.fileno()).st_mode):
                yield from of_file(fd.fileno())

    return _each(partial(one, number) for number in range(_DESCRIPTORS))


def _proc_file(name: str) -> Look:
    def look(pid: int) -> Iterator[Buffer]:
        path = f"/proc/{pid}/{name}"
        if stat.S_ISDIR(os.stat(path).st_mode):
            yield "\0".join(os.listdir(path)).encode(errors="surrogateescape")
        else:
            with OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as fd:
                yield os.read(fd.fileno(), _MOST)

    return look


def _opened(directory: str) -> Look:
    """Return a look at the files behind the links in a directory of /proc/PID."""

    def one(path: str, seen: set[tuple[int, int]]) -> Iterator[Buffer]:
        with OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as fd:
            found = os.fstat(fd.fileno())
            if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                yield from of_file(fd.fileno())

    def look(pid: int) -> Iterator[Buffer]:
        place = f"/proc/{pid}/{directory}"
        seen = set[tuple[int, int]]()
        return _each(partial(one, f"{place}/{name}", seen) for name in os.listdir(place))

    return look


_PROC_LINKS: Final = ("fd", "map_files")
_SPECIAL: Final = ("mem", "task", "net", "attr", *_PROC_LINKS)


def _proc() -> Iterator[tuple[str, Look]]:
    yield "mem", of_process
    yield "task/PID/mem", lambda pid: of_process(pid, f"task/{pid}/")
    for name in sorted(set(os.listdir("/proc/self")) - set(_SPECIAL)):
        yield f"{name}", _proc_file(name)
    for name in _PROC_LINKS:
        yield f"{name}/", _proc_file(name)
        yield f"{name}/*", _opened(name)


def _calls() -> Iterator[tuple[str, Look]]:
    yield "process_vm_readv", by_process_vm_readv


def powers() -> Iterator[tuple[str, Look]]:
    """Yield calls that give power over a process, or a look that an owner must not have."""
    yield "PTRACE_ATTACH", _nothing(_attach)
    yield "PTRACE_SEIZE", _nothing(partial(syscalls.ptrace, syscalls.PTRACE_SEIZE))
    yield f"pidfd_getfd 0 to {_DESCRIPTORS - 1}", _getfd
    for name, kind in _NAMESPACES.items():
        yield f"setns {name}", _nothing(partial(_setns, kind))
    yield (
        "open /proc/PID/mem to write",
        _nothing(lambda pid: os.close(os.open(f"/proc/{pid}/mem", os.O_WRONLY))),
    )
    yield "kcmp", _nothing(syscalls.kcmp)
    yield "move_pages", _nothing(syscalls.move_pages)
    yield "get_robust_list", _nothing(syscalls.get_robust_list)
    yield "process_madvise", _nothing(lambda pid: syscalls.process_madvise(pid, PAGE_SIZE))
    yield "perf_event_open", _nothing(lambda pid: syscalls.perf_event_open(pid).close())
    yield (
        "prlimit, RLIMIT_CORE",
        _nothing(lambda pid: resource.prlimit(pid, resource.RLIMIT_CORE, (1 << 30, 1 << 30))),
    )


def _setns(kind: int, pid: int) -> None:
    syscalls.setns(pid, kind)


def routes() -> Iterator[Route]:
    """Yield the routes by each of the trusted processes."""
    for process in NAMES:
        for target, power, found in (
            (f"{process} /proc", False, _proc()),
            (process, False, _calls()),
            (process, True, powers()),
        ):
            for name, look in found:
                yield Route(target, name, partial(_at, process, look), power=power, root=True)


def _at(process: str, look: Look, owner: Attacker) -> Iterable[Buffer]:
    return look(owner.processes[process])
