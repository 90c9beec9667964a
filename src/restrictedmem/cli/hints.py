"""What a person can do about an error, by what failed and not by the errno alone."""

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
_DOCTOR: Final = "restrictedmem doctor says which way to mount is open here, and how to open one"
_FORBIDDEN: Final = "a seccomp filter forbids the call, a container's for one (docker run --security-opt); restrictedmem doctor says more"
_BUILD: Final = "docs/use/guests.md says how to build one"
_LINKED: Final = "link it with guests/guest.ld: docs/use/guests.md"
_LARGER: Final = "give it more --memory"
_MEMORY: Final = (
    "a limit of this process (ulimit -v), of its cgroup (memory.max), or of the machine"
)
#: For --pin: more was to be pinned than may be.
PINNED: Final = "a limit of this user on pinned memory (ulimit -l), which all rings share; who has CAP_IPC_LOCK has none (docs/understand/pinning.md)"
_DESCRIPTORS: Final = "a limit of this process: ulimit -n"
_SERVICES_DESCRIPTORS: Final = (
    "a limit of the service (ulimit -Hn where it starts), or of the machine (fs.file-max)"
)
_PROCESSES: Final = "a limit of this user (ulimit -u), or of this process's cgroup (pids.max)"
_FILE_SIZE: Final = "a limit of this process: ulimit -f"
_PROC: Final = "mount that of this PID namespace there: unshare --fork --mount-proc, or mount -t proc proc /proc"
#: Calls that a limit on processes refuses.
_FORKING: Final = ("exec", "fork", "start")
#: Calls that RLIMIT_FSIZE refuses.
_SIZED: Final = ("ftruncate", "memfd_restricted", "mmap", "write")
#: Calls that a kernel with this package's needs lets anybody make, and those of a service that come
#: down to such.
_EVERYBODYS: Final = ("memfd_create", "seccomp", "memfd_restricted", "SPAWN")
_BY_ERRNO: Final = {ENOMEM: _MEMORY, EMFILE: _DESCRIPTORS, ENFILE: _SERVICES_DESCRIPTORS}


def of(error: OSError) -> str:
    """Return a hint for an error that a command ends with; empty when there is none."""
    if error.filename == "/proc" and error.errno in (ENOENT, ESRCH):
        return _PROC
    call, _, detail = (error.strerror or "").partition(": ")
    if call == "exec" and error.errno == ENOEXEC:
        return _LINKED if "linked at" in detail else _LARGER if "ends at" in detail else _BUILD
    if call == "start" and error.errno in (*_REFUSED, *_ABSENT):
        return "" if "traced" in detail else _DOCTOR
    if call in _FORKING and error.errno == EAGAIN:
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
