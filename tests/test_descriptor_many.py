"""The descriptor beyond one operation on one of them.

Many are there at once, are punched while somebody listens, and lose their service.
"""

import os
import resource
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from errno import EFBIG, EMFILE, ENOSPC, ENOTCONN, EOPNOTSUPP
from functools import partial
from pathlib import Path

import pytest

from outcomes import Errno, in_child, outcome
from own_server import OwnServer, serving
from processes import closing
from restrictedmem.abi.memory import PUNCH, FallocMode, fallocate
from restrictedmem.abi.process import tgkill
from restrictedmem.fs.mount_ways import Way
from restrictedmem.fs.mounter import mount
from restrictedmem.mm.notifier import Api
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import PAGE_SIZE
from waiting import wait_until

#: Bytes; more than are allocated at once.
LARGE = (256 << 20) + PAGE_SIZE


def held(fd: int) -> tuple[int, int]:
    """Return size and pages."""
    found = os.fstat(fd)
    return found.st_size, found.st_blocks * 512 // PAGE_SIZE


@pytest.fixture
def service() -> Iterator[Service]:
    with Service.start() as started:
        yield started


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * PAGE_SIZE


# Many.


@pytest.mark.requires("fuse")
def test_threads_create_the_same_name(service: Service) -> None:
    made: list[list[int]] = [[] for _ in range(8)]
    failures: list[OSError] = []

    def create(into: list[int]) -> None:
        try:
            into.extend(service.memfd_restricted() for _ in range(500))
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=create, args=(into,)) for into in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with closing([fd for into in made for fd in into]) as fds:
        assert not failures
        assert len(set(fds)) == 4000
        assert len({os.fstat(fd).st_ino for fd in fds}) == 4000


@pytest.mark.requires("fuse")
def test_ten_thousand_descriptors(service: Service) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 10_500:
        pytest.skip(f"the hard limit on descriptors is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pid = service.info["pid"]
    try:
        with closing([service.memfd_restricted() for _ in range(100)]) as fds:
            before = resident(pid)
            fds += [service.memfd_restricted() for _ in range(10_000)]
            each = (resident(pid) - before) / 10_000
            print(f"service: {each:.0f} bytes a descriptor, {resident(pid) >> 20} MiB in all")
            assert each < 2048
            os.ftruncate(fds[-1], PAGE_SIZE)
            assert [os.fstat(fd).st_size for fd in (fds[0], fds[-1])] == [0, PAGE_SIZE]
        wait_until(lambda: not service.status()["descriptors"], "the service to forget them")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.requires("fuse")
def test_emfile_at_the_callers_limit(service: Service) -> None:
    def fill() -> object:
        # The channel to the service is a descriptor too, made at the first call.
        known = len(service.status()["descriptors"])
        lowest = os.dup(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 10, lowest + 10))
        made: list[int] = []
        last: object = None
        while not isinstance(last, Errno):
            last = outcome(lambda: made.append(service.memfd_restricted()))
        # Room for the answer of the service, which must know of no file that was refused. It hears
        # of a close soon, not at once.
        for _ in range(3):
            os.close(made.pop())
        wait_until(
            lambda: len(service.status()["descriptors"]) == known + len(made),
            "the service to know the rest alone",
        )
        return last

    assert in_child(fill) == repr(Errno(EMFILE))


@pytest.mark.requires("fuse")
def test_identity_over_time(service: Service) -> None:
    with closing([service.memfd_restricted() for _ in range(50)]) as fds:
        before = [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in fds]
        assert len(set(before)) == 50
        for fd in fds[::2]:
            os.ftruncate(fd, 4 * PAGE_SIZE)
            fallocate(fd, 0, 0, 8 * PAGE_SIZE)
            fallocate(fd, PUNCH, 0, PAGE_SIZE)
        fds += [service.memfd_restricted() for _ in range(50)]
        after = [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in fds]
        assert after[:50] == before
        assert len(set(after)) == 100


@pytest.mark.requires("fuse")
def test_two_services_have_two_devices(service: Service) -> None:
    with (
        Service.start() as second,
        closing([service.memfd_restricted(), second.memfd_restricted()]) as fds,
    ):
        first_stat, second_stat = (os.fstat(fd) for fd in fds)
        assert first_stat.st_dev != second_stat.st_dev
        assert first_stat.st_ino == second_stat.st_ino


@pytest.mark.requires("fuse")
def test_holes_are_never_allocated(service: Service) -> None:
    with closing([service.memfd_restricted()]) as (fd,):
        os.ftruncate(fd, 1 << 50)
        for page in (0, 1 << 20, (1 << 38) - 1):
            fallocate(fd, FallocMode.KEEP_SIZE, page * PAGE_SIZE, PAGE_SIZE)
        assert held(fd) == (1 << 50, 3)
        fallocate(fd, PUNCH, PAGE_SIZE, (1 << 50) - 2 * PAGE_SIZE)
        assert held(fd) == (1 << 50, 2)


# Limits.


@pytest.mark.requires("fuse")
def test_memory_limit() -> None:
    with (
        Service.start(Options(memory_max=4 * PAGE_SIZE)) as limited,
        closing([limited.memfd_restricted() for _ in range(2)]) as (fd, other),
    ):
        fallocate(fd, 0, 0, 4 * PAGE_SIZE)
        assert outcome(
            lambda: fallocate(fd, FallocMode.KEEP_SIZE, 8 * PAGE_SIZE, PAGE_SIZE)
        ) == Errno(ENOSPC)
        assert held(fd) == (4 * PAGE_SIZE, 4)
        fallocate(fd, FallocMode.KEEP_SIZE, 0, 4 * PAGE_SIZE)
        fallocate(fd, PUNCH, 0, PAGE_SIZE)
        fallocate(fd, FallocMode.KEEP_SIZE, 8 * PAGE_SIZE, PAGE_SIZE)
        # The limit is each descriptor's own.
        fallocate(other, 0, 0, 4 * PAGE_SIZE)
        assert outcome(lambda: fallocate(other, 0, 0, 5 * PAGE_SIZE)) == Errno(ENOSPC)
        assert held(other) == (4 * PAGE_SIZE, 4)


@pytest.mark.requires("fuse")
def test_service_started_under_a_file_size_limit() -> None:
    def start_under_limit() -> tuple[int, int]:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_SIZE, hard))
        service = Service.start()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        fd = service.memfd_restricted()
        fallocate(fd, 0, 0, 4 * PAGE_SIZE)
        return held(fd)

    assert in_child(start_under_limit) == repr((4 * PAGE_SIZE, 4))


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("limit", [4 * PAGE_SIZE, 5 * PAGE_SIZE - 1])
def test_service_under_a_hard_limit_on_file_sizes(limit: int) -> None:
    """There are descriptors, and as much of one as of a memfd."""

    def under_limit() -> list[object]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with closing([Service.start().memfd_restricted()]) as (fd,):
            tries = [(0, 5), (0, 4), (FallocMode.KEEP_SIZE, 5), (PUNCH, 1), (PUNCH, 9)]
            return [outcome(partial(fallocate, fd, mode, 0, n * PAGE_SIZE)) for mode, n in tries]

    assert in_child(under_limit) == repr([Errno(EFBIG), None, Errno(EFBIG), None, None])


# The service is gone.


@pytest.mark.requires("fuse", "root")
def test_every_call_is_enotconn_when_the_service_is_dead(service: Service) -> None:
    with closing([service.memfd_restricted()]) as (fd,):
        os.kill(service.info["pid"], signal.SIGKILL)
        wait_until(
            lambda: outcome(lambda: os.fstat(fd)) == Errno(ENOTCONN), "the mount to be aborted"
        )
        calls: list[Callable[[], object]] = [
            lambda: os.ftruncate(fd, PAGE_SIZE),
            lambda: fallocate(fd, 0, 0, PAGE_SIZE),
            lambda: fallocate(fd, PUNCH, 0, PAGE_SIZE),
            lambda: os.read(fd, 1),
            lambda: os.fchmod(fd, 0o600),
            service.memfd_restricted,
        ]
        assert [outcome(call) for call in calls] == [Errno(ENOTCONN)] * len(calls)


# Somebody listens, and the kernel is in between.


@contextmanager
def listening(api: Api) -> Generator[tuple[OwnServer, int], None, None]:
    with serving(api, partial(mount, Way.OWN)) as server, closing([server.create()]) as (fd,):
        os.ftruncate(fd, 8 * PAGE_SIZE)
        server.watch(fd)
        yield server, fd


def callbacks(server: OwnServer, call: Callable[[], object]) -> tuple[object, list[str]]:
    """Make a call in a thread, let every callback go on, and return outcome and callbacks."""
    found: list[object] = []
    heard: list[str] = []
    thread = threading.Thread(target=lambda: found.append(outcome(call)), daemon=True)
    thread.start()
    while True:
        wait_until(
            lambda: server.has_event() or not thread.is_alive(), "a callback or the call's end"
        )
        if not server.has_event():
            break
        heard.append(server.next_event())
        server.go_on()
    thread.join()
    return found[0], heard


@pytest.mark.requires("fuse", "root")
@pytest.mark.parametrize(
    ("mode", "errno", "v9", "v10"),
    [
        pytest.param(PUNCH, 0, True, True, id="punch"),
        pytest.param(0, 0, True, False, id="allocate"),
        pytest.param(int(FallocMode.KEEP_SIZE), 0, True, False, id="keep_size"),
        pytest.param(int(FallocMode.ZERO_RANGE), EOPNOTSUPP, True, False, id="zero_range"),
        # v9 as posted notifies for these three as well; FUSE answers them itself.
        pytest.param(int(FallocMode.COLLAPSE_RANGE), EOPNOTSUPP, False, False, id="collapse_range"),
        pytest.param(int(FallocMode.INSERT_RANGE), EOPNOTSUPP, False, False, id="insert_range"),
        pytest.param(int(FallocMode.UNSHARE_RANGE), EOPNOTSUPP, False, False, id="unshare_range"),
    ],
)
@pytest.mark.parametrize("api", list(Api))
def test_which_modes_notify(api: Api, mode: int, errno: int, v9: bool, v10: bool) -> None:
    with listening(api) as (server, fd):
        result, heard = callbacks(server, lambda: fallocate(fd, mode, PAGE_SIZE, 2 * PAGE_SIZE))
    assert result == (Errno(errno) if errno else None)
    notifies = v9 if api is Api.V9 else v10
    assert heard == (["start 1 3", "end 1 3"] if notifies else [])


@pytest.mark.requires("fuse", "root")
def test_one_fallocate_of_a_file_at_a_time() -> None:
    with ExitStack() as stack, listening(Api.V10) as (server, fd):
        tids: dict[int, int] = {}
        threads: list[threading.Thread] = []

        def punch(page: int) -> None:
            tids[page] = threading.get_native_id()
            fallocate(fd, PUNCH, page * PAGE_SIZE, PAGE_SIZE)

        def start(page: int) -> None:
            threads.append(threading.Thread(target=punch, args=(page,)))
            threads[-1].start()
            stack.callback(threads[-1].join)

        start(1)
        heard = [server.next_event()]
        start(2)
        wait_until(
            lambda: 2 in tids and _state(tids[2]) == "D",
            "the second punch to wait for the inode's lock",
        )
        assert not server.has_event()
        # Looking is not locked out meanwhile.
        assert os.fstat(fd).st_size == 8 * PAGE_SIZE
        for _ in range(3):
            server.go_on()
            heard.append(server.next_event())
        server.go_on()
        # Before the server is killed, they have their answers.
        for thread in threads:
            thread.join(10)
    assert heard == ["start 1 2", "end 1 2", "start 2 3", "end 2 3"]


@pytest.mark.requires("fuse", "root")
@pytest.mark.parametrize(
    ("number", "status", "allocated"),
    [(signal.SIGKILL, -signal.SIGKILL, 0), (signal.SIGUSR1, 0, LARGE)],
    ids=["killed", "handled"],
)
def test_a_large_allocation_is_given_up_for_a_caller_that_dies(
    number: int, status: int, allocated: int
) -> None:
    """As tmpfs does (Linux 6.18); on older kernels any signal ended it."""
    with listening(Api.V9) as (server, fd):
        child = os.fork()
        if child == 0:
            try:
                signal.signal(signal.SIGUSR1, _ignore)
                fallocate(fd, FallocMode.KEEP_SIZE, PAGE_SIZE, LARGE)
                os._exit(0)
            finally:
                os._exit(1)
        heard = [server.next_event()]
        tgkill(child, child, number)
        server.go_on()
        heard.append(server.next_event())
        server.go_on()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
        assert os.fstat(fd).st_blocks * 512 == allocated
    assert heard == ["start 1 65538", "end 1 65538"]


def _ignore(number: int, frame: object) -> None:
    """Handle a signal."""


def _state(tid: int) -> str:
    text = Path(f"/proc/self/task/{tid}/stat").read_text(encoding="ascii")
    return text.rpartition(")")[2].split()[0]
