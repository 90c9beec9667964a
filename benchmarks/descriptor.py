"""fallocate(2) through a restricted descriptor, beside a FUSE server in C that does nothing."""

import os
import statistics
import subprocess
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from benchmarks.common import (
    BenchError,
    Figure,
    Lab,
    Pairs,
    below,
    one_core,
    percentile,
    service,
    within,
)
from benchmarks.faulting import FaultingGuest
from benchmarks.guest import HEAP_OFFSET
from restrictedmem.abi import memory
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.fs.mount_ways import mount_detached
from restrictedmem.fs.owner_abi import NAME
from restrictedmem.units import PAGE_SIZE

_ALLOCATE: Final = int(FallocMode.KEEP_SIZE)
_SIZE: Final = 1 << 30
#: Pages allocated and punched at a time while guests run: few enough to finish before the guests
#: have faulted everything in.
_AMONG: Final = 500


@contextmanager
def served_by_c(lab: Lab, *, real: bool = False) -> Generator[int]:
    """Mount as the service does, with a server in C; yield a descriptor of the mount's root.

    The server does nothing at FALLOCATE; with ``real`` it allocates and punches.

    Raises:
        BenchError: this process may not mount.
    """
    with _mounted(lab, real=real) as (_, root):
        yield root


@contextmanager
def _floor(lab: Lab, *, real: bool = False) -> Generator[tuple[int, int]]:
    """Yield the pid of a server in C, and a restricted descriptor of it."""
    with _mounted(lab, real=real) as (pid, root):
        fd = os.open(NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, dir_fd=root)
        try:
            yield pid, fd
        finally:
            os.close(fd)


@contextmanager
def _mounted(lab: Lab, *, real: bool) -> Generator[tuple[int, int]]:
    program = lab.program("fuse")
    try:
        device, root = mount_detached(allow_other=True)
    except OSError as error:
        raise BenchError(
            f"the floor's mount: {error.strerror}", "run as root, with /dev/fuse"
        ) from None
    with root:
        with device, memory.memfd_create("floor") as backing:
            os.ftruncate(backing.fileno(), _SIZE)
            inherited = [device.fileno(), backing.fileno()][: 1 + real]
            server = subprocess.Popen([program, *map(str, inherited)], pass_fds=inherited)
        yield server.pid, root.fileno()
    server.wait()


@contextmanager
def _ours() -> Generator[tuple[int, int]]:
    """Start a service; yield its pid and a descriptor."""
    with service() as started:
        fd = started.memfd_restricted()
        try:
            os.ftruncate(fd, _SIZE)
            yield started.info["pid"], fd
        finally:
            os.close(fd)


def _calls(
    lab: Lab, fd: int, count: int, start: int = 0, pause: int = 0
) -> tuple[list[float], list[float]]:
    """Allocate and punch ``count`` pages in turns, from C.

    Returns the microseconds of each allocation, and of each punch.
    """
    taken = [
        value / 1e3
        for value in lab.run(
            "fallocate", fd, start, PAGE_SIZE, count, pause, _ALLOCATE, PUNCH, pass_fds=[fd]
        )
    ]
    return taken[::2], taken[1::2]


def _compare(lab: Lab, floor: int, ours: int, rounds: int) -> tuple[Pairs, Pairs]:
    """Measure both servers in turns.

    Returns the pairs of allocations and of punches. Each value is a median of many calls.
    """
    allocations, punches = Pairs([], []), Pairs([], [])
    for counts in [False, *[True] * rounds]:
        measured = [
            [statistics.median(part) for part in _calls(lab, fd, lab.amount(500, 20))]
            for fd in (floor, ours)
        ]
        if counts:
            for pairs, (floors, own) in zip(
                (allocations, punches), zip(*measured, strict=True), strict=True
            ):
                pairs.floor.append(floors)
                pairs.ours.append(own)
    return allocations, punches


def idle(lab: Lab) -> Iterator[Figure]:
    """Call while the service has no other requests: on one core, then on any cores."""
    with (
        _floor(lab) as (floor_pid, floor),
        _floor(lab, real=True) as (real_pid, real),
        _ours() as (pid, ours),
    ):
        with one_core(floor_pid, real_pid, pid):
            allocations, punches = _compare(lab, floor, ours, lab.rounds(31))
            yield allocations.figure(
                "fallocate of a page through the descriptor, idle", "µs", within(2)
            )
            yield punches.figure("punch of a page through the descriptor, idle", "µs", within(2))
            allocations, punches = _compare(lab, real, ours, lab.rounds(31))
            yield allocations.figure("  fallocate, floor that really allocates", "µs")
            yield punches.figure("  punch, floor that really punches", "µs")
        allocations, punches = _compare(lab, floor, ours, lab.rounds(31))
        yield allocations.figure(
            "  fallocate, caller and server where the scheduler puts them", "µs"
        )
        yield punches.figure("  punch, caller and server where the scheduler puts them", "µs")


def busy(lab: Lab) -> Iterator[Figure]:
    """Call while two guests of the same service fault as fast as they can.

    The guests fault in new memory, then in memory that their owners punch meanwhile. For each, one
    caller calls once a millisecond, and one calls without a pause. The second needs a CPU together
    with the server, and the guests need both CPUs. So it waits for its turn.
    """
    with _floor(lab, real=True) as (_, floor), service() as started, ExitStack() as stack:
        fd = started.memfd_restricted()
        stack.callback(os.close, fd)
        os.ftruncate(fd, _SIZE)
        for punched, heap in ((False, lab.amount(2 << 30, 64 << 20)), (True, 16 << 20)):
            where = "in punched memory" if punched else "in new memory"
            for pause, pace, count in (
                (1_000_000, "at 1 kHz", _AMONG // 4),
                (0, "without rest", _AMONG),
            ):
                with ExitStack() as running:
                    guests = [
                        running.enter_context(FaultingGuest(started, heap, punched=punched))
                        for _ in range(2)
                    ]
                    calls = lab.amount(count, 20)
                    rounds = [
                        (
                            _calls(lab, floor, calls, pause=pause),
                            _calls(lab, fd, calls, pause=pause),
                        )
                        for _ in range(lab.rounds(5))
                    ]
                    own = (
                        _calls(lab, guests[0].descriptor.fileno(), calls, HEAP_OFFSET, pause)
                        if punched
                        else None
                    )
                    load = _load(guests)
                for kind, name in enumerate(("fallocate", "punch")):
                    theirs, ours = (
                        [value for one in rounds for value in one[side][kind]] for side in (0, 1)
                    )
                    yield _tail(
                        f"{name}, {pace}, while two guests fault {where}, p99",
                        ours,
                        theirs,
                        load if kind else "",
                    )
                if own is not None:
                    yield _tail(f"  punch of a faulting guest's own page, {pace}, p99", own[1])


def _tail(
    what: str, ours: Sequence[float], floor: Sequence[float] | None = None, more: str = ""
) -> Figure:
    """Return the 99th percentile as a figure, with an aim if there is a floor."""
    note = (
        f"median {statistics.median(ours):.0f} µs, mean {statistics.mean(ours):.0f} µs, "
        f"largest {max(ours):.0f} µs"
    )
    tail = percentile(ours, 99)
    if floor is None:
        return Figure(what, "µs", None, tail, None, None, note)
    least = percentile(floor, 99)
    return Figure(
        what,
        "µs",
        least,
        tail,
        tail / least,
        below(500, "p99 under 500 µs"),
        f"{note}; {more}" if more else note,
    )


def _load(guests: Sequence[FaultingGuest]) -> str:
    """Stop the guests, and describe how fast they were."""
    found: list[dict[str, Any]] = [guest.stop() for guest in guests]
    faults, pages, fills = (
        sum(one[key] / one["seconds"] for one in found)
        for key in ("faults_private", "pages_taken", "tlb_fills")
    )
    return f"both guests: {faults:.0f} faults/s for {pages:.0f} pages/s, {fills:.0f} TLB fills/s"


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {
    "descriptor-idle": idle,
    "descriptor-busy": busy,
}
