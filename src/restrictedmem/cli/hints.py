"""Hints for errors: they tell what the user can do, by the call that failed and its errno."""

from errno import (
    EACCES,
    EAGAIN,
    EFBIG,
    EMFILE,
    ENFILE,
    ENODEV,
    ENOENT,
    ENOEXEC,
    ENOMEM,
    ENOSYS,
    ENOTSUP,
    EPERM,
    ESRCH,
)
from typing import Final

_REFUSED: Final = (EACCES, EPERM)
_ABSENT: Final = (ENOENT, ENODEV, ENOSYS)
_DOCTOR: Final = "restrictedmem doctor says which ways to mount work here, and how to enable one"
_FORBIDDEN: Final = (
    "a seccomp filter, such as a container's, forbids the call (docker run --security-opt);"
    " restrictedmem doctor says more"
)
_BUILD: Final = "docs/use/guests.md says how to build one"
_LINKED: Final = "link it with guests/guest.ld: docs/use/guests.md"
_LARGER: Final = "give it more --memory"
_MEMORY: Final = (
    "raise the limit of this process (ulimit -v) or of its cgroup (memory.max), or free memory"
)
#: For --pin: pinning would exceed the limit.
PINNED: Final = (
    "raise this user's limit on pinned memory (ulimit -l), which all rings share; there is none"
    " with CAP_IPC_LOCK (docs/understand/pinning.md)"
)
_DESCRIPTORS: Final = "raise the limit of this process: ulimit -n"
_SERVICES_DESCRIPTORS: Final = (
    "raise the limit of the service (ulimit -Hn where it starts), or of the machine (fs.file-max)"
)
_PROCESSES: Final = (
    "raise the limit of this user (ulimit -u), or of this process's cgroup (pids.max)"
)
_FILE_SIZE: Final = "raise the limit of this process: ulimit -f"
_PROC: Final = (
    "mount the /proc of this PID namespace: unshare --fork --mount-proc, or mount -t proc proc"
    " /proc"
)
#: Calls that a limit on processes refuses.
_FORKING: Final = ("exec", "fork", "start")
#: Calls that RLIMIT_FSIZE refuses.
_SIZED: Final = ("ftruncate", "memfd_restricted", "mmap", "write")
#: Calls that need no privilege on a kernel that this package can use, and requests to a service
#: that make such calls.
_EVERYBODYS: Final = ("memfd_create", "seccomp", "memfd_restricted", "SPAWN")
_BY_ERRNO: Final = {ENOMEM: _MEMORY, EMFILE: _DESCRIPTORS, ENFILE: _SERVICES_DESCRIPTORS}


def of(error: OSError) -> str:
    """Return the hint for an error that ends a command; empty when there is none."""
    if error.filename == "/proc" and error.errno in (ENOENT, ESRCH):
        return _PROC
    call, _, detail = (error.strerror or "").partition(": ")
    if call == "exec" and error.errno == ENOEXEC:
        return _LINKED if "linked at" in detail else _LARGER if "ends at" in detail else _BUILD
    if call == "start" and error.errno in (*_REFUSED, *_ABSENT):
        return "" if "traced" in detail else _DOCTOR
    if error.errno == EAGAIN and (call in _FORKING or detail.endswith("(fork)")):
        return _PROCESSES
    if error.errno == EFBIG and call in _SIZED:
        return _FILE_SIZE
    if error.errno == ENOMEM and "RLIMIT_MEMLOCK" in detail:
        return PINNED
    if error.errno == ENOSYS and "cryptography" in detail:
        return "pip install cryptography"
    if call in _EVERYBODYS and error.errno in (*_REFUSED, ENOSYS, ENOTSUP):
        return _FORBIDDEN
    return _BY_ERRNO.get(error.errno or 0, "")


def of_memory() -> str:
    """Return the hint for a MemoryError."""
    return _MEMORY
