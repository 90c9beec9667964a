"""Ways of one process to look into another.

Each is a function that returns the data, or raises OSError.
"""

import ctypes
import os
import resource
import struct
from collections.abc import Callable, Iterator
from typing import Final

from outcomes import checked
from restrictedmem.abi.process import CLONE_NEWNS, CLONE_NEWUSER

PTRACE_CONT, PTRACE_ATTACH, PTRACE_SEIZE = 7, 16, 0x4206
#: __WALL of waitpid(2).
WALL = 0x4000_0000
PTRACE_O_TRACEFORK = 2
_SYS_GET_ROBUST_LIST, _SYS_MOVE_PAGES, _SYS_PERF_EVENT_OPEN, _SYS_KCMP = 274, 279, 298, 312
_SYS_PIDFD_GETFD, _SYS_PROCESS_MADVISE = 438, 440
_MADV_COLD = 20
_CLONE_FLAGS: Final = {
    "user": CLONE_NEWUSER,
    "mnt": CLONE_NEWNS,
    "pid": 0x2000_0000,
    "net": 0x4000_0000,
    "ipc": 0x0800_0000,
    "uts": 0x0400_0000,
    "cgroup": 0x0200_0000,
    "time": 0x80,
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_writev.restype = ctypes.c_ssize_t
_libc.syscall.restype = ctypes.c_long

Attack = Callable[[int], object]


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def ptrace(request: int, pid: int, data: int = 0) -> None:
    """Call ptrace(2) without an address."""
    checked(_libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), None, ctypes.c_void_p(data)))


def seize(pid: int) -> None:
    """Become the tracer of a process, and of all that it forks."""
    ptrace(PTRACE_SEIZE, pid, PTRACE_O_TRACEFORK)


def attach_and_stop(pid: int) -> None:
    """Become the tracer of one process, which stops it."""
    ptrace(PTRACE_ATTACH, pid)


def _syscall(number: int, *arguments: int | bytes) -> int:
    wide = [
        ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments
    ]
    return checked(_libc.syscall(ctypes.c_long(number), *wide))


def _process_vm(call: str) -> Attack:
    def attack(pid: int) -> int:
        buffer = ctypes.create_string_buffer(8)
        local = _Iovec(ctypes.addressof(buffer), 8)
        # A process with access gets EFAULT: nothing is mapped there.
        remote = _Iovec(8, 8)
        return checked(
            getattr(_libc, call)(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        )

    return attack


def _pidfd_getfd(number: int) -> Attack:
    def attack(pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        try:
            os.close(_syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
        finally:
            os.close(pidfd)

    return attack


def _setns(flag: int) -> Attack:
    def attack(pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        try:
            checked(_libc.setns(pidfd, flag))
        finally:
            os.close(pidfd)

    return attack


def _open(name: str, flags: int = os.O_RDONLY) -> Attack:
    def attack(pid: int) -> bytes:
        # It may be a pipe, in which there is nothing.
        fd = os.open(f"/proc/{pid}/{name}", flags | os.O_NONBLOCK)
        try:
            return b"" if flags & os.O_ACCMODE == os.O_WRONLY else os.read(fd, 16)
        finally:
            os.close(fd)

    return attack


def _list(name: str) -> Attack:
    return lambda pid: os.listdir(f"/proc/{pid}/{name}")


def _readlink(name: str) -> Attack:
    return lambda pid: os.readlink(f"/proc/{pid}/{name}")


def _process_madvise(pid: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        return _syscall(
            _SYS_PROCESS_MADVISE, pidfd, bytes(_Iovec(0x1000, 0x1000)), 1, _MADV_COLD, 0
        )
    finally:
        os.close(pidfd)


def _perf_event_open(pid: int) -> None:
    # struct perf_event_attr: PERF_TYPE_SOFTWARE, its size, PERF_COUNT_SW_TASK_CLOCK; exclude_kernel
    # and exclude_hv at byte 40.
    attr = struct.pack("=IIQ24xQ16x", 1, 64, 1, 0x60)
    os.close(_syscall(_SYS_PERF_EVENT_OPEN, attr, pid, -1, -1, 0))


#: By name; each takes the pid.
ATTACKS: Final[dict[str, Attack]] = {
    "process_vm_readv": _process_vm("process_vm_readv"),
    "process_vm_writev": _process_vm("process_vm_writev"),
    **{f"pidfd_getfd {number}": _pidfd_getfd(number) for number in range(3, 12)},
    **{f"setns {name}": _setns(flag) for name, flag in _CLONE_FLAGS.items()},
    "open mem": _open("mem"),
    "open mem to write": _open("mem", os.O_WRONLY),
    **{
        f"open {name}": _open(name)
        for name in ("maps", "smaps", "pagemap", "environ", "auxv", "syscall", "io", "stack")
    },
    "open task's mem": lambda pid: _open(f"task/{pid}/mem")(pid),
    **{f"list {name}": _list(name) for name in ("fd", "fdinfo", "map_files", "root/", "cwd/")},
    **{f"open fd {number}": _open(f"fd/{number}") for number in range(3, 12)},
    **{
        f"readlink {name}": _readlink(name)
        for name in ("exe", "cwd", "root", "fd/3", "ns/user", "ns/mnt")
    },
    **{f"open ns {name}": _open(f"ns/{name}") for name in ("user", "mnt", "pid", "net")},
    "kcmp": lambda pid: _syscall(_SYS_KCMP, os.getpid(), pid, 0, 0, 0),
    "move_pages": lambda pid: _syscall(_SYS_MOVE_PAGES, pid, 0, b"", b"", b"", 0),
    "get_robust_list": lambda pid: _syscall(_SYS_GET_ROBUST_LIST, pid, bytes(8), bytes(8)),
    "process_madvise": _process_madvise,
    "perf_event_open": _perf_event_open,
    "raise RLIMIT_CORE": lambda pid: resource.prlimit(
        pid, resource.RLIMIT_CORE, (1 << 20, 1 << 20)
    ),
    "PTRACE_ATTACH": attach_and_stop,
    "PTRACE_SEIZE": seize,
}


def search(pid: int, pattern: bytes, memory: int | None = None, maps: str | None = None) -> bool:
    """Look for a pattern in a process's memory, by /proc/PID/mem or a descriptor opened before."""
    if maps is None:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
            maps = file.read()
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY) if memory is None else memory
    try:
        return any(pattern in chunk for chunk in _chunks(fd, maps))
    finally:
        if memory is None:
            os.close(fd)


def _chunks(fd: int, maps: str) -> Iterator[bytes]:
    for line in maps.splitlines():
        span, rights = line.split()[:2]
        if rights[0] != "r" or "[v" in line:
            continue
        start, end = (int(number, 16) for number in span.split("-"))
        # A huge mapping is sparse as a rule, so this reads only its beginning.
        end = min(end, start + (64 << 20))
        while start < end:
            try:
                chunk = os.pread(fd, min(end - start, 1 << 20), start)
            except OSError:
                break
            if not chunk:
                break
            yield chunk
            start += len(chunk)
