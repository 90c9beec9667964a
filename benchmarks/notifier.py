"""The cost of notifying consumers of a punch: per notifier, per consumer process, per design."""

import fcntl
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, cast, final

from benchmarks.common import BenchError, Figure, Lab, alternate, below, one_core, service, within
from restrictedmem.abi import fuse, memory
from restrictedmem.abi.fuse import Opcode
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.fd import OwnedFd
from restrictedmem.fs.filesystem import FileSystem, Request
from restrictedmem.fs.fuse_server import FuseServer
from restrictedmem.fs.mount_ways import mount_detached
from restrictedmem.fs.owner_abi import NAME
from restrictedmem.mm.backing import make_backing
from restrictedmem.mm.designs import NAMES, make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.protocol import guest_abi
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Channel
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PAGE_SIZE, pgoff_t
from restrictedmem.vmm.vm import Vm

_KEEP: Final = int(FallocMode.KEEP_SIZE)
_MANY: Final = 16
_HUGE: Final = 2 << 20
_POOL: Final = Path(f"/sys/kernel/mm/hugepages/hugepages-{_HUGE >> 10}kB")


@final
class _Counting:
    """A notifier that counts its callbacks, and has no page."""

    __slots__ = ("heard",)

    def __init__(self) -> None:
        self.heard = 0

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.heard += 1

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        pass

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        pass

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0


def _register(file: RestrictedFile) -> _Counting:
    counting = _Counting()
    if file.design.binds:
        file.bind(pgoff_t(0), pgoff_t(MAX_FILE_BYTES >> PAGE_SHIFT), counting, exclusive=True)
    else:
        file.register_notifier(counting)
    return counting


def notifier(lab: Lab) -> Iterator[Figure]:
    """Punch a file without pages in this process, with no notifier, one, and many.

    So only the shim's own work is measured.
    """
    count = lab.amount(5000, 200)
    files: dict[int, RestrictedFile] = {}
    for notifiers in (0, 1, _MANY):
        files[notifiers] = RestrictedFile(make("v10"), make_backing("memfd"), Inode.make(0, 0))
        for _ in range(notifiers):
            _register(files[notifiers])
    taken: dict[int, list[float]] = {notifiers: [] for notifiers in files}
    for _ in range(lab.rounds(41) + 1):
        for notifiers, file in files.items():
            fallocate = file.fallocate
            # Nothing waits here, so time that other processes had the CPU does not count.
            began = time.thread_time()
            for _ in range(count):
                fallocate(PUNCH, PAGE_SIZE, PAGE_SIZE)
            taken[notifiers].append((time.thread_time() - began) * 1e6 / count)
    for file in files.values():
        file.put()
    none, one, many = (statistics.median(values[1:]) for values in taken.values())
    note = f"a punch with none {none:.2f} µs, with one {one:.2f} µs, with {_MANY} {many:.2f} µs"
    yield Figure(
        f"a further notifier of a punch, one process ({_MANY}, less none)",
        "µs",
        None,
        (many - none) / _MANY,
        None,
        _UNDER,
        note,
    )
    yield Figure("  the first one, with semaphore and sequence", "µs", None, one - none, None)


_UNDER: Final = below(0.6, "under 0.6 µs")


@final
class _OnlyPunches:
    """A file system whose FALLOCATE is only fallocate(2) of a memfd."""

    def __init__(self, memfd: OwnedFd) -> None:
        self._inner = FileSystem("v10", max_files=10)
        self._memfd = memfd.fileno()
        self.before_waiting: Callable[[int | None], bool] = lambda consumer: True

    def knows(self, opcode: int) -> bool:
        """Say whether there is such an operation."""
        return self._inner.knows(opcode)

    def handle(self, request: Request) -> bytes | None:
        """Answer a request."""
        if request.opcode != Opcode.FALLOCATE:
            return self._inner.handle(request)
        _, offset, length, mode, _ = fuse.FALLOCATE_IN.unpack_from(request.body)
        memory.fallocate(self._memfd, mode, offset, length)
        return b""


@contextmanager
def _only_punches() -> Generator[tuple[int, int]]:
    """Serve a mount from a child with the service's own loop and ``_OnlyPunches``.

    Yields the child's pid and a descriptor.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        status = 1
        with suppress(OSError):
            device, root = mount_detached(allow_other=True)
            with root:
                socket.send_fds(theirs, [b"root"], [root.fileno()])
            with memory.memfd_create("floor") as memfd:
                os.ftruncate(memfd.fileno(), MAX_FILE_BYTES)
                FuseServer(device, cast(FileSystem, _OnlyPunches(memfd))).run()
            status = 0
        os._exit(status)
    theirs.close()
    with ours:
        _, fds, _, _ = socket.recv_fds(ours, 16, 1)
    if not fds:
        os.waitpid(child, 0)
        raise BenchError("the floor's mount is refused", "run as root, with /dev/fuse")
    fd = os.open(NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, dir_fd=fds[0])
    try:
        yield child, fd
    finally:
        os.close(fd)
        os.close(fds[0])
        os.waitpid(child, 0)


def _punches(lab: Lab, fd: int) -> float:
    """Allocate and punch pages in turns, from C; return the median of the punches in µs."""
    taken = lab.run(
        "fallocate", fd, 0, PAGE_SIZE, lab.amount(500, 20), 0, _KEEP, PUNCH, pass_fds=[fd]
    )
    return statistics.median(taken[1::2]) / 1e3


def unheard(lab: Lab) -> Iterator[Figure]:
    """Punch through a descriptor without a consumer.

    The floor is the same server with fallocate(2) in place of the shim.
    """
    with (
        _only_punches() as (floor_pid, floor),
        service() as started,
        OwnedFd(started.memfd_restricted()) as file,
        one_core(floor_pid, started.info["pid"]),
    ):
        pairs = alternate(
            lambda: _punches(lab, floor), lambda: _punches(lab, file.fileno()), lab.rounds(31)
        )
    yield pairs.figure(
        "punch of a page, no consumer (floor: server without shim)", "µs", within(1.1)
    )


@contextmanager
def _listener(started: Service, size: int) -> Generator[tuple[int, int]]:
    """Let an engine bind ``size`` bytes of a new descriptor, without running a guest.

    Yields the engine's pid and the descriptor.
    """
    with (
        OwnedFd(started.memfd_restricted()) as file,
        memory.memfd_create("shared") as shared,
        Vm(started, engine="software") as vm,
    ):
        for fd in (file.fileno(), shared.fileno()):
            os.ftruncate(fd, size)
        vm.set_user_memory_region(
            slot=0,
            guest_phys_addr=guest_abi.PRIVATE_BASE,
            memory_size=size,
            restricted_fd=file.fileno(),
            shared_fd=shared.fileno(),
        )
        yield vm.statistics()["pid"], file.fileno()


@contextmanager
def _echo(lab: Lab) -> Generator[tuple[int, Channel]]:
    """Start a program in C that answers each message with an empty reply.

    Yields its pid and a channel to it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        echo = subprocess.Popen(
            [lab.program("echo"), str(theirs.fileno()), "8"], pass_fds=[theirs.fileno()]
        )
    channel = Channel(ours, "echo")
    try:
        yield echo.pid, channel
    finally:
        channel.close()
        echo.wait()


def heard(lab: Lab) -> Iterator[Figure]:
    """Punch a page that a consumer process has bound.

    The floor is a punch without a consumer and two round trips to a program in C.
    """
    count, body = lab.amount(500, 20), wire.INVALIDATION.pack(1, 0, 1, wire.NO_FOLIO)
    with (
        service() as started,
        OwnedFd(started.memfd_restricted()) as alone,
        _listener(started, 4 << 20) as (engine, file),
        _echo(lab) as (echo, channel),
    ):

        def floor() -> float:
            began = time.perf_counter()
            for _ in range(2 * count):
                channel.call(wire.INVALIDATE_START, body)
            return _punches(lab, alone.fileno()) + (time.perf_counter() - began) * 1e6 / count

        with one_core(started.info["pid"], engine, echo):
            pairs = alternate(floor, lambda: _punches(lab, file), lab.rounds(21))
    yield pairs.figure("punch of a page, one consumer process", "µs")


def designs(lab: Lab) -> Iterator[Figure]:
    """Punch much memory with one call, with each design, beside the punch alone.

    A figure's note counts the callbacks that the design makes.
    """
    size = lab.amount(1 << 30, 4 << 20)
    kinds = {"memfd": "4 KiB pages", "thp": "2 MiB folios", "hugetlb-2m": "hugetlb pages"}
    with _huge_pages(2 * size // _HUGE) as huge:
        for kind, what in kinds.items():
            for name in NAMES:
                # ``lazy`` is for pages that cannot be split. The other designs behave with hugetlb
                # pages as they do with folios.
                if kind != "hugetlb-2m" or (name == "lazy" and huge):
                    yield _design(
                        lab, name, kind, f"{name}: {size >> 20} MiB of {what}, one punch", size
                    )
        for name in NAMES:
            kind = "hugetlb-2m" if name == "lazy" else "thp"
            if name != "folio-poc" and (huge or kind == "thp"):
                yield _design_heard(
                    lab,
                    name,
                    kind,
                    f"  {name}: {size >> 20} MiB of {kinds[kind]}, one consumer process",
                    size,
                )


def _design(lab: Lab, name: str, kind: str, what: str, size: int) -> Figure:
    file = RestrictedFile(make(name), make_backing(kind), Inode.make(0, 0))
    counting = _register(file)

    def measure(punch: Callable[[], None]) -> float:
        file.backing.allocate(0, size)
        counting.heard = 0
        began = time.perf_counter()
        punch()
        return (time.perf_counter() - began) * 1e3

    try:
        pairs = alternate(
            lambda: measure(lambda: file.backing.punch(0, size)),
            lambda: measure(lambda: file.fallocate(PUNCH, 0, size)),
            lab.rounds(3),
        )
    finally:
        file.put()
    return pairs.figure(what, "ms", note=f"{counting.heard} callbacks")


def _design_heard(lab: Lab, name: str, kind: str, what: str, size: int) -> Figure:
    bare = make_backing(kind)
    with ExitStack() as stack:
        stack.callback(bare.close)
        started = stack.enter_context(Service.start(Options(design=name, backing=kind)))
        pid, fd = stack.enter_context(_listener(started, size))
        stack.enter_context(one_core(started.info["pid"], pid))

        def measure(allocate: Callable[[], None], punch: Callable[[], None]) -> float:
            allocate()
            began = time.perf_counter()
            punch()
            return (time.perf_counter() - began) * 1e3

        pairs = alternate(
            lambda: measure(lambda: bare.allocate(0, size), lambda: bare.punch(0, size)),
            lambda: measure(
                lambda: memory.fallocate(fd, _KEEP, 0, size),
                lambda: memory.fallocate(fd, PUNCH, 0, size),
            ),
            lab.rounds(3),
        )
    return pairs.figure(what, "ms")


@contextmanager
def _huge_pages(count: int) -> Generator[bool]:
    """Reserve huge pages of 2 MiB, as root; yield whether they are there.

    Tests and benchmarks that reserve huge pages lock this file, so they wait for each other.
    """
    with ExitStack() as stack:
        there = False
        with suppress(OSError):
            setting = stack.enter_context((_POOL / "nr_hugepages").open("r+"))
            fcntl.flock(setting, fcntl.LOCK_EX)
            before = int(setting.read())
            stack.callback((_POOL / "nr_hugepages").write_text, str(before))
            (_POOL / "nr_hugepages").write_text(str(before + count))
            there = int((_POOL / "free_hugepages").read_text()) >= count
        yield there


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {
    "notifier": notifier,
    "punch-unheard": unheard,
    "punch-heard": heard,
    "design-punch": designs,
}
