"""The service's resident memory: idle, and with ten thousand descriptors."""

import os
import resource
from collections.abc import Callable, Iterator
from typing import Final

from benchmarks.common import BenchError, Figure, Lab, below, service

_MANY: Final = 10_000
_KIB: Final = 1024


def resident(pid: int) -> int:
    """Return the resident bytes of a process, shared libraries included (VmRSS)."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * _KIB for line in file if line.startswith("VmRSS:"))


def footprint(lab: Lab) -> Iterator[Figure]:
    """Measure the memory that the service has: idle, with descriptors, with a page in each."""
    count = lab.amount(_MANY, 500)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 64:
        raise BenchError(
            f"{count} descriptors need RLIMIT_NOFILE of {count + 64}, but the hard limit is {hard}",
            "ulimit -Hn 20000",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    fds: list[int] = []
    with service() as started:
        pid: int = started.info["pid"]
        fds.append(started.memfd_restricted())
        idle = resident(pid)
        yield Figure("service, idle", "MB", None, idle / 1e6, None, below(30, "under 30 MB"))
        try:
            while len(fds) < count:
                fds.append(started.memfd_restricted())
            empty = resident(pid)
            for fd in fds:
                os.posix_fallocate(fd, 0, 1)
            full = resident(pid)
        finally:
            for fd in fds:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    aim = below(2, "under 2 KiB")
    yield Figure(f"a descriptor, of {count}", "KiB", None, (empty - idle) / count / _KIB, None, aim)
    yield Figure(
        f"a descriptor, of {count} with a page each",
        "KiB",
        None,
        (full - idle) / count / _KIB,
        None,
        aim,
    )
    yield Figure(
        f"service with {count} descriptors", "MB", None, full / 1e6, None, below(30, "under 30 MB")
    )


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {"memory": footprint}
