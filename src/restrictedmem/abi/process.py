"""Calls by which a process changes or examines itself: prctl(2), unshare(2) and others."""

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from errno import ENOENT, ESRCH
from functools import partial
from itertools import pairwise
from typing import Final

from restrictedmem.abi._struct import c_struct, u32
from restrictedmem.abi._syscall import libc, raise_errno, syscall
from restrictedmem.failure import failed, named
from restrictedmem.fd import OwnedFd

CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWUSER: Final = 0x1000_0000

PR_SET_PDEATHSIG: Final = 1
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_SET_KEEPCAPS: Final = 8
PR_SET_NAME: Final = 15
PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_NO_NEW_PRIVS: Final = 39
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37

CAP_IPC_LOCK: Final = 14
CAP_SYS_ADMIN: Final = 21

SYS_capset: Final = {"x86_64": 126, "aarch64": 91}
SYS_tgkill: Final = {"x86_64": 234, "aarch64": 131}
SYS_close_range: Final = 436
_UINT_MAX: Final = 0xFFFF_FFFF
_LINUX_CAPABILITY_VERSION_3: Final = 0x2008_0522
SYS_sched_setattr: Final = {"x86_64": 314, "aarch64": 274}
#: ``struct sched_attr``: size, policy, flags, nice, priority, runtime, deadline, period, util_min,
#: util_max.
_SCHED_ATTR: Final = struct.Struct("=IIQiIQQQII")

libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
libc.unshare.argtypes = [ctypes.c_int]


def prctl(option: int, argument: int = 0) -> int:
    """Call prctl(2) with one integer argument.

    Raises:
        OSError: the kernel's errno.
    """
    result: int = libc.prctl(option, argument, 0, 0, 0)
    if result < 0:
        raise_errno(f"prctl({option})")
    return result


def is_subreaper() -> bool:
    """Say whether this process inherits orphans of its descendants (PR_SET_CHILD_SUBREAPER).

    Raises:
        OSError: EINVAL before Linux 3.4.
    """
    found = ctypes.c_int()
    prctl(PR_GET_CHILD_SUBREAPER, ctypes.addressof(found))
    return bool(found.value)


def set_name(name: str) -> None:
    """Set the name of this thread in ps(1) and /proc/PID/comm; at most 15 bytes count."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    if libc.prctl(PR_SET_NAME, ctypes.addressof(buffer), 0, 0, 0):
        raise_errno("prctl(PR_SET_NAME)")


def unshare(flags: int) -> None:
    """Call unshare(2).

    Raises:
        OSError: EPERM where namespaces are forbidden, ENOSPC over user.max_user_namespaces.
    """
    if libc.unshare(flags):
        raise_errno("unshare")


def setns(fd: int, kind: int) -> None:
    """Move this process into a namespace (setns(2)); ``kind`` is its CLONE_NEW*.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN in it, EINVAL for a namespace of another kind.
    """
    if libc.setns(fd, kind):
        raise_errno("setns")


@c_struct(size=24)
class cap_data(ctypes.Structure):
    """Two ``struct __user_cap_data_struct``: capabilities 0 to 31, then 32 to 63."""

    effective: u32 = 0
    permitted: u32 = 0
    inheritable: u32 = 0
    effective_high: u32 = 0
    permitted_high: u32 = 0
    inheritable_high: u32 = 0


@c_struct(size=8)
class cap_header(ctypes.Structure):
    """``struct __user_cap_header_struct``."""

    version: u32 = 0
    pid: u32 = 0


def set_capabilities(mask: int) -> None:
    """Keep only the capabilities of ``mask``, effective and permitted (capset(2)).

    The mask has a bit for each capability's number.

    Raises:
        OSError: EPERM when the mask has one that is not permitted now.
    """
    low, high = mask & 0xFFFF_FFFF, mask >> 32
    data = cap_data(effective=low, permitted=low, effective_high=high, permitted_high=high)
    header = cap_header(version=_LINUX_CAPABILITY_VERSION_3)
    number = SYS_capset[os.uname().machine]
    if libc.syscall(ctypes.c_long(number), ctypes.byref(header), ctypes.byref(data)):
        raise_errno("capset")


def effective_capabilities() -> int:
    """Return the effective capabilities of this thread as a bit mask (/proc/thread-self/status).

    Raises:
        OSError: ENOENT without /proc.
    """
    return int(_own_status("thread-self", b"CapEff:"), 16)


def set_slice(nanoseconds: int) -> None:
    """Set the time slice of this thread, 0.1 ms to 100 ms (sched_setattr(2), SCHED_OTHER).

    Since Linux 6.12 a thread with a short slice need not wait for the end of the running thread's
    slice when it wakes. Older kernels do nothing with it.

    Raises:
        OSError: EPERM where a security module forbids it.
    """
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _SCHED_ATTR.pack(
        _SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0, 0, 0
    )
    syscall("sched_setattr", SYS_sched_setattr[os.uname().machine], 0, attributes, 0)


def tracer_pid() -> int:
    """Return the pid of this process's tracer, 0 without one (/proc/self/status).

    Raises:
        OSError: ENOENT without /proc.
    """
    return int(_own_status("self", b"TracerPid:"))


def proc() -> OwnedFd:
    """Open /proc, to find other processes in it by their pids; the caller owns it.

    This /proc must number processes as this process's PID namespace does. ``unshare -pf`` leaves
    the /proc of another namespace in place, where a pid names another process. Files opened by the
    descriptor (``dir_fd``) are found even if something is mounted over /proc meanwhile.

    Raises:
        OSError: ENOENT without /proc; ESRCH where /proc belongs to another namespace.
    """
    with ExitStack() as undo:
        try:
            found = undo.enter_context(
                OwnedFd(os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            )
            os.lstat("self", dir_fd=found.fileno())
            numbers = _own_numbers(found)
        except FileNotFoundError:
            raise failed("open", ENOENT, "/proc is not mounted", "/proc") from None
        except OSError as error:
            raise named("open", error, "/proc") from None
        # In the /proc of an outer namespace, this process has a pid for each namespace from there
        # down.
        if len(numbers) != 1:
            raise failed(
                "open", ESRCH, "it numbers the processes of another PID namespace", "/proc"
            )
        undo.pop_all()
        return found


def _own_numbers(proc: OwnedFd) -> list[bytes]:
    """Return this process's pids in a /proc.

    There are none in the /proc of an inner or a sibling namespace.
    """
    try:
        return status("self", b"NSpid:", proc)
    except FileNotFoundError:
        return []


def status(whose: str | int, name: bytes, proc: OwnedFd | None = None) -> list[bytes]:
    """Return the words behind a name in /proc/PID/status; none if the kernel has no such line.

    For a pid, ``proc`` must be given.

    Raises:
        OSError: ENOENT, ESRCH when the process has ended.
    """
    opener = None if proc is None else partial(os.open, dir_fd=proc.fileno())
    # Bytes, because a line ends with "\n" alone, and the kernel leaves "\r" in a thread's name as
    # it is.
    with open(f"{'/proc/' if proc is None else ''}{whose}/status", "rb", opener=opener) as lines:
        return next((line for line in lines if line.startswith(name)), b"").split()[1:]


def _own_status(whose: str, name: bytes) -> bytes:
    try:
        return status(whose, name)[0]
    except FileNotFoundError as error:
        raise failed("open", error.errno, "/proc is not mounted", error.filename) from None


def cgroups() -> list[tuple[bytes, bytes]]:
    """Return the controllers and the path of each cgroup of this process (/proc/self/cgroup).

    A cgroup of version 2 has no controllers.

    Raises:
        OSError: ENOENT without /proc.
    """
    # Bytes, as above, because a path may contain every character but "\n".
    with open("/proc/self/cgroup", "rb") as lines:
        rows = [line.rstrip(b"\n").split(b":", 2) for line in lines]
    return [(controllers, path) for _, controllers, path in rows]


def is_dying(thread: int) -> bool:
    """Say whether SIGKILL is pending for a thread (/proc/TID/status).

    SIGKILL is pending for all threads of a process once any fatal signal has come. Return False for
    a thread that cannot be examined, and for 0.
    """
    try:
        with proc() as place:
            pending = status(thread, b"SigPnd:", place)
    except OSError:
        return False
    return bool(pending) and bool(int(pending[0], 16) & 1 << signal.SIGKILL - 1)


def raise_fd_limit() -> int:
    """Raise the soft limit on descriptors to the hard limit, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def close_others(keep: Iterable[int], first: int = 3) -> None:
    """Close every descriptor from ``first`` on that is not in ``keep`` (close_range(2)).

    The limit on descriptors does not matter: those above a lowered limit stay open (setrlimit(2)).
    """
    kept = sorted(keep)
    try:
        for below, above in pairwise(
            (first - 1, *(fd for fd in kept if fd >= first), _UINT_MAX + 1)
        ):
            if below + 1 < above:
                syscall("close_range", SYS_close_range, below + 1, above - 1, 0)
    except OSError:
        # A container's filter may not know the call.
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd >= first and fd not in kept:
                with suppress(OSError):
                    os.close(fd)


def tgkill(process: int, thread: int, number: int) -> None:
    """Send a signal to one thread by its kernel number (tgkill(2)).

    Raises:
        OSError: EINVAL for thread 0, ESRCH when it has ended.
    """
    syscall("tgkill", SYS_tgkill[os.uname().machine], process, thread, number)
