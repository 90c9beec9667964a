"""A limit that the spawner meets fails one request.

Its caller gets an errno, and everything else goes on.
"""

import json
import os
import resource
import signal
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from errno import E2BIG, EAGAIN, EBUSY, EINVAL, EMFILE
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from mute_server import mute_file
from outcomes import Errno, outcome
from processes import descriptors, family, process, queued, wait_gone
from restrictedmem.fd import OwnedFd
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.spawner import _Spawner
from restrictedmem.vmm.vm import Vm
from users import as_user
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse", "root")

PUPPET = Path(__file__).parent / "consumers" / "puppet.py"


@contextmanager
def limited(pid: int, kind: int, value: int) -> Generator[None]:
    """Set a process's soft limit meanwhile."""
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (value, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, before)


def goes_on(service: Service, vm: Vm) -> None:
    """Check that a VM that was there before is there, and that another can be made."""
    assert vm.statistics()["engine"] == "software"
    os.close(service.memfd_restricted())
    with Vm(service) as another:
        assert another.statistics()["engine"] == "software"
    assert service.status()["last_error"] == ""


@pytest.mark.parametrize("free", [0, 1, 2, 3])
def test_without_free_descriptors_there_is_no_vm(free: int) -> None:
    with Service.start() as service, Vm(service) as vm:
        spawner = family(service)[0].pid
        before = len(descriptors(service.info["pid"]))
        with limited(spawner, resource.RLIMIT_NOFILE, len(descriptors(spawner)) + free):
            for _ in range(5):
                assert outcome(lambda: Vm(service)) == Errno(EMFILE)
        wait_until(
            lambda: len(descriptors(service.info["pid"])) <= before,
            "the service to close what it made",
        )
        goes_on(service, vm)


def test_a_limit_below_what_it_watches_ends_nobody() -> None:
    """poll(2) is EINVAL then, epoll_wait(2) is not."""
    with Service.start() as service, Vm(service) as vm:
        with limited(family(service)[0].pid, resource.RLIMIT_NOFILE, 1):
            for _ in range(3):
                assert outcome(lambda: Vm(service)) == Errno(EMFILE)
        goes_on(service, vm)


def test_without_free_processes_there_is_no_vm() -> None:
    def body() -> object:
        with Service.start() as service, Vm(service) as vm:
            with limited(family(service)[0].pid, resource.RLIMIT_NPROC, 1):
                came = [outcome(lambda: Vm(service)) for _ in range(5)]
            goes_on(service, vm)
            return came

    assert as_user(body) == [Errno(EAGAIN)] * 5


@pytest.mark.parametrize(
    ("size", "errno"),
    [
        (wire.MAX_BODY, E2BIG),
        (wire.MAX_BODY - wire.NUMBER.size + 1, E2BIG),
        (wire.MAX_BODY - wire.NUMBER.size, 0),
    ],
)
def test_arguments_of_any_length(size: int, errno: int) -> None:
    with Service.start() as service, Vm(service) as vm:
        spawn: Callable[[], object] = lambda: service.spawn("kvm", "x" * (size - len("kvm ")))  # noqa: E731
        if errno:
            assert outcome(spawn) == Errno(errno)
        else:
            # The engine refuses them.
            with closing(service.spawn("kvm", "x" * (size - len("kvm ")))) as sock:
                channel = wire.Channel(sock, "engine")
                assert outcome(lambda: channel.call(wire.Call("FIRST", 1))) == Errno(EINVAL)
        goes_on(service, vm)


def test_a_service_has_so_many_consumers() -> None:
    with Service.start(Options(max_consumers=2)) as service, Vm(service) as vm:
        with Vm(service):
            assert outcome(lambda: Vm(service)) == Errno(EAGAIN)
        wait_until(
            lambda: outcome(lambda: Vm(service).close()) is None, "the place of the VM that ended"
        )
        assert vm.statistics()["engine"] == "software"


def test_a_process_that_cannot_end_counts_as_a_consumer() -> None:
    """Otherwise an owner would fill the machine with such processes.

    It makes one with each VM to which it gives a file of a server that does not answer.
    """
    with Service.start(Options(max_consumers=1)) as service:
        with mute_file() as file:
            with Vm(service) as vm:
                given = outcome(
                    lambda: vm.set_user_memory_region(
                        slot=0, guest_phys_addr=0, memory_size=4096, shared_fd=file
                    )
                )
                assert given == Errno(EINVAL)
                engine = process(int(str(vm.statistics()["pid"])))
                assert engine is not None
            wait_gone([engine])
            assert outcome(lambda: Vm(service)) == Errno(EAGAIN)
        wait_until(
            lambda: outcome(lambda: Vm(service).close()) is None, "the end of what the server held"
        )


def test_what_consumers_leave_does_not_pile_up() -> None:
    """An engine leaves its checker, which ends when a server lets it go. Nothing else happens."""
    with Service.start() as service:
        spawner = family(service)[0]
        with mute_file() as file:
            with Vm(service) as vm:
                region = partial(
                    vm.set_user_memory_region,
                    slot=0,
                    guest_phys_addr=0,
                    memory_size=4096,
                    shared_fd=file,
                )
                assert outcome(region) == Errno(EINVAL)
            wait_until(
                lambda: [one.name for one in family(service)[2:]] == ["rmem-checker"],
                "the engine to leave its checker",
            )
        # In this order: it may end in between, and is of the family no more.
        wait_until(
            lambda: len(family(service)) == 2 and not _zombies_of(spawner.pid),
            "the spawner to reap it",
        )


def _zombies_of(parent: int) -> list[str]:
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            text = path.read_text(encoding="utf-8", errors="replace")
            state, ppid = text.rpartition(")")[2].split()[:2]
            found += [text] if (state, int(ppid)) == ("Z", parent) else []
    return found


def test_a_consumer_hears_of_its_children_as_any_process() -> None:
    options = Options(consumers=(("puppet", str(PUPPET)),))
    with (
        Service.start(options) as service,
        closing(wire.Channel(service.spawn("puppet"), "the puppet")) as puppet,
    ):
        pid, wakes = (
            json.loads(puppet.call(wire.Call(name, 1), json.dumps([name]).encode())[0])
            for name in ("pid", "wakes")
        )
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        assert (wakes, int(caught, 16) >> signal.SIGCHLD - 1 & 1) == (-1, 0)
        assert not [one for one in descriptors(pid) if one.startswith("pipe:")]


def test_a_consumer_has_none_of_the_spawners_sockets() -> None:
    """Through them it would ask for consumers, or say that another has ended."""
    with Service.start() as service, Vm(service) as vm:
        spawners = sockets(family(service)[0].pid)
        assert len(spawners) >= 2
        engine = int(str(vm.statistics()["pid"]))
        assert not spawners & sockets(engine)


def test_a_consumer_has_a_session_of_its_own() -> None:
    """Its guest's processor time is shared with nobody's (sched_autogroup)."""
    with Service.start() as service, Vm(service) as vm:
        engine = int(str(vm.statistics()["pid"]))
        assert os.getsid(engine) == engine


def sockets(pid: int) -> set[str]:
    return {one for one in descriptors(pid) if one.startswith("socket:")}


def test_what_has_ended_does_not_count_as_a_consumer() -> None:
    """A process that a consumer left, or one of a burial, has the place of none."""
    children = {7, 8, 9}

    def reap_left() -> None:
        children.discard(9)

    spawner = SimpleNamespace(_reap_left=reap_left, _children=lambda: children, _service=7)
    assert _Spawner._descendants(cast(_Spawner, spawner)) == 1


def test_a_consumer_that_was_reaped_by_its_number_is_forgotten() -> None:
    """A burial reaps by numbers, and a consumer may have one that was a burial's."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    pidfd = OwnedFd(os.pidfd_open(child))
    os.waitpid(child, 0)
    pidfds = {child: pidfd}
    _Spawner._reap(
        cast(_Spawner, SimpleNamespace(_pidfds=pidfds, _numbers={child: 1})), pidfd.fileno()
    )
    assert (pidfds, pidfd.closed) == ({}, True)


def test_a_consumer_is_made_for_who_reads_the_answers() -> None:
    """Each unread answer has a descriptor in flight.

    The kernel counts these for all services of a uid together.
    """
    with Service.start() as service, closing(service._connect()) as connection:
        sock = connection.sock
        connection.post(wire.SPAWN, b"kvm {}")
        wait_until(lambda: queued(sock), "the first answer")
        first = queued(sock)
        connection.post(wire.SPAWN, b"kvm {}")
        wait_until(lambda: queued(sock) > first, "the second answer")
        assert [sock.recv(1000)[0] for _ in range(2)] == [0, EAGAIN]
        connection.post(wire.SPAWN, b"kvm {}")
        assert sock.recv(1000)[0] == 0


def test_many_at_once() -> None:
    """Requests of several connections wait for the spawner in turn.

    A request whose caller has gone ends.
    """
    with Service.start() as service, Vm(service) as vm:
        connections = [service._connect() for _ in range(20)]
        for connection in connections:
            connection.post(wire.SPAWN, b'kvm {"engine": "software"}')
        for connection in connections[::2]:
            connection.close()
        for connection in connections[1::2]:
            # The VM's socket, which came along, is dropped.
            assert connection.sock.recv(8) == bytes(8)
            connection.close()
        wait_until(lambda: len(family(service)) == 3, "the end of all engines but one")
        goes_on(service, vm)


def test_a_connection_asks_for_one_at_a_time() -> None:
    with Service.start() as service, Vm(service) as vm, closing(service._connect()) as connection:
        for _ in range(100):
            connection.post(wire.SPAWN, b'kvm {"engine": "software"}')
        numbers = [int.from_bytes(connection.sock.recv(4), "little") for _ in range(100)]
        # One is under way, or its answer has not been read.
        assert {0} < set(numbers) <= {0, EBUSY, EAGAIN}
        goes_on(service, vm)


def test_it_ends_while_a_consumer_is_asked_for() -> None:
    service = Service.start()
    everybody = family(service)
    connection = service._connect()
    connection.post(wire.SPAWN, b'kvm {"engine": "software"}')
    os.kill(everybody[0].pid, 9)
    wait_gone(everybody)
    connection.close()
    service.close()
