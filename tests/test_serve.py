"""``restrictedmem serve``: services under another uid, for owners that are never trusted.

They are not trusted even while a service starts.
"""

import fcntl
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from errno import EACCES, EAGAIN, EINVAL, ENOTCONN, EPERM
from pathlib import Path
from typing import Any, final

import pytest

import restrictedmem
from attacks import ATTACKS
from outcomes import Errno, outcome
from processes import Process, exists, family, process, wait_gone
from restrictedmem import guests
from restrictedmem.abi import memory
from restrictedmem.cli.server_messages import ServerMessages
from restrictedmem.fd import OwnedFd, readable
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service import SERVER_VARIABLE, client, oom
from restrictedmem.service.client import Service, default_service
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm import elf
from restrictedmem.vmm.vm import Vm
from restrictedmem.vmm.vmm import Vmm
from users import ORDINARY, as_user
from waiting import PATIENCE, wait_until

pytestmark = pytest.mark.requires("fuse", "root")

#: The user of the services, and of those who are served.
SERVICE_USER = "nobody"
CLIENT = ORDINARY - 1
#: The first of eight uids that nobody else has, other copies of the tests included.
FIRST_UID = 3_000_000_000 + 8 * os.getpid()


@final
class Server:
    """A running ``serve``: its socket, and what it says."""

    def __init__(self, *arguments: str, socket_path: str, within: Sequence[str] = ()) -> None:
        self.socket = socket_path
        command = [
            *within,
            sys.executable,
            "-m",
            "restrictedmem",
            "serve",
            "--socket",
            socket_path,
            *arguments,
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.said() == f"listening on {socket_path}"

    def said(self) -> str:
        """Return its next line."""
        assert self.process.stderr is not None
        ready = readable([self.process.stderr], PATIENCE)
        assert ready, f"waited {PATIENCE:g} s for a line of serve"
        return self.process.stderr.readline().rstrip()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


@pytest.fixture
def place() -> Generator[str, None, None]:
    """Name a socket in a directory that every user can enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield f"{directory}/socket"


@pytest.fixture
def server(place: str) -> Generator[Server, None, None]:
    running = Server("--user", SERVICE_USER, socket_path=place)
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def served(server: Server) -> Generator[tuple[Service, int], None, None]:
    """Be a client and yield the service and a descriptor."""
    with Service.connect(server.socket) as service:
        fd = service.memfd_restricted()
        yield service, fd
        os.close(fd)


def facts(pid: int) -> dict[str, str]:
    """Return fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def identity(found: Process) -> tuple[str, str, str, str]:
    known = facts(found.pid)
    return known["Uid"], known["Groups"], known["CapPrm"], known["NoNewPrivs"]


def test_a_client_of_another_uid_can_do_everything(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Forget a service that another test may have left in this process.
    monkeypatch.setattr(client, "_default", None)
    monkeypatch.setenv(SERVER_VARIABLE, server.socket)

    def body() -> tuple[int, int, dict[str, object]]:
        fd = restrictedmem.memfd_restricted()
        os.ftruncate(fd, 4 * PAGE)
        os.posix_fallocate(fd, 0, 4 * PAGE)
        memory.fallocate(fd, memory.PUNCH, 0, PAGE)
        os.fchmod(fd, 0o600)
        seen = os.fstat(fd)
        assert (seen.st_size, seen.st_blocks * 512, seen.st_uid, seen.st_mode & 0o777) == (
            4 * PAGE,
            3 * PAGE,
            CLIENT,
            0o600,
        )
        assert outcome(lambda: os.ftruncate(fd, PAGE)) == Errno(EPERM)
        assert outcome(lambda: os.read(fd, 1)) == Errno(EINVAL)
        with Vmm(1 << 20) as vmm:
            vmm.load(elf.parse(guests.path("spin").read_bytes()), ["exit", "7"])
            ended = vmm.vcpus[0].run()
            assert isinstance(ended, exits.Hypercall)
            assert (ended.number, ended.arguments[0]) == (guest_abi.EXIT, 7)
        status = default_service().status()
        os.close(fd)
        return os.getpid(), default_service().info["pid"], status

    # Clients cannot even open /dev/fuse.
    pid, service, status = as_user(body, CLIENT, fuse=False)
    assert server.said() == f"client {pid} of uid {CLIENT}"
    assert (status["owner_pid"], status["owner_uid"], status["pid"]) == (pid, CLIENT, service)
    assert status["way"] == "own mount"


def test_it_runs_as_the_other_user_without_privileges(server: Server) -> None:
    with served(server) as (service, fd), Vmm(16 << 20, service) as vmm:
        engine = vmm.statistics()
        relatives = {found.name: identity(found) for found in family(service)}
        everyone = "\t".join([str(ORDINARY)] * 4)
        none, lock_only = f"{0:016x}", f"{1 << 14:016x}"
        assert relatives == {
            "rmem-spawner": (everyone, "", lock_only, "1"),
            "rmem-service": (everyone, "", none, "1"),
            "rmem-kvm": (everyone, "", lock_only, "1"),
        }
        # CAP_IPC_LOCK is what an engine needs to lock more than RLIMIT_MEMLOCK.
        assert engine["locked_bytes"] == 16 << 20, engine["unlocked_because"]
        assert os.fstat(fd).st_size == 0


@pytest.mark.parametrize("uid", [CLIENT, ORDINARY], ids=["its client", "its own user"])
def test_nobody_looks_into_it(server: Server, uid: int) -> None:
    with served(server) as (service, _), Vmm(1 << 20, service) as vmm:
        assert vmm.statistics()
        targets = family(service)

        def body() -> dict[str, list[str]]:
            refused = (Errno(EPERM), Errno(EACCES))
            return {
                target.name: [
                    name
                    for name, attack in ATTACKS.items()
                    if outcome(lambda: attack(target.pid)) not in refused  # noqa: B023
                ]
                for target in targets
            }

        assert as_user(body, uid) == {"rmem-spawner": [], "rmem-service": [], "rmem-kvm": []}


def test_one_service_for_each_client(server: Server) -> None:
    with served(server) as (first, fd), served(server) as (second, _):
        assert first.info["pid"] != second.info["pid"]
        assert [len(service.status()["descriptors"]) for service in (first, second)] == [1, 1]
        assert outcome(lambda: second.token_for(fd)) == Errno(EACCES)


def test_each_service_is_a_session_of_its_own(server: Server) -> None:
    """A session is a scheduling group (sched_autogroup). A busy session takes no other's share."""
    with served(server) as (first, _), served(server) as (second, _), Service.start() as private:
        sessions = [
            {os.getsid(each.pid) for each in family(one)} for one in (first, second, private)
        ]
        assert [len(found) for found in sessions] == [1, 1, 1]
        # A private service shares that of its owner.
        assert sessions[2] == {os.getsid(0)} == {os.getsid(server.process.pid)}
        assert len(sessions[0] | sessions[1] | sessions[2]) == 3


@pytest.mark.parametrize("victim", [0, 1], ids=["spawner", "service"])
def test_a_killed_service_takes_one_client_alone(server: Server, victim: int) -> None:
    with served(server) as (first, fd), served(server) as (second, others):
        victims = family(first)
        os.kill(victims[victim].pid, signal.SIGKILL)
        wait_gone(victims)
        assert outcome(lambda: os.fstat(fd)) == Errno(ENOTCONN)
        os.posix_fallocate(others, 0, PAGE)
        assert second.status()["descriptors"][0]["resident"] == PAGE
        with served(server) as (third, _):
            assert third.status()["last_error"] == ""


def test_a_client_that_hangs_up_at_once_harms_no_one(server: Server) -> None:
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
            caller.connect(server.socket)
    with served(server) as (service, _):
        assert service.status()["last_error"] == ""


def test_clients_at_the_same_time(server: Server) -> None:
    pids: list[int] = []

    def connect() -> None:
        with served(server) as (service, _):
            pids.append(service.status()["pid"])

    threads = [threading.Thread(target=connect) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pids)) == 6


def test_a_service_ends_with_its_client(server: Server) -> None:
    with served(server) as (service, _):
        relatives = family(service)
    wait_gone(relatives)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "interrupts", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"]
)
def test_it_ends_cleanly_and_its_services_go_on(
    place: str, number: signal.Signals, interrupts: Any
) -> None:
    # A shell starts what runs in the background with SIGINT ignored; that is inherited, by exec
    # too.
    before = signal.signal(signal.SIGINT, interrupts)
    server = Server("--user", SERVICE_USER, socket_path=place)
    signal.signal(signal.SIGINT, before)
    with served(server) as (service, fd):
        assert server.stop(number) == 0
        assert not os.path.exists(place)
        os.posix_fallocate(fd, 0, PAGE)
        assert all(map(exists, family(service)))


def _fill(pipe: int) -> None:
    """Write into a pipe, any end of it, what there is room for."""
    with (
        OwnedFd(os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK)) as writer,
        suppress(BlockingIOError),
    ):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PAGE)
        while True:
            os.write(writer.fileno(), b"\n")


def test_who_does_not_read_what_it_says_holds_up_nobody(place: str) -> None:
    server = Server("--user", SERVICE_USER, socket_path=place)
    try:
        assert server.process.stderr is not None
        _fill(server.process.stderr.fileno())
        for _ in range(2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(place)
                assert sock.recv(1), "no service"
        assert server.stop() == 0
    finally:
        server.process.kill()


def test_lines_that_nobody_reads_are_dropped_which_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(reader, encoding="ascii") as lines, open(writer, "w", encoding="ascii") as stderr:
        _fill(reader)
        monkeypatch.setattr(sys, "__stderr__", stderr)
        say = ServerMessages()
        for number in range(1000):
            say(f"line {number}")
        numbers = [line for line in (lines.readline() for _ in range(PAGE + 256)) if line != "\n"]
        say.flush(PATIENCE)
        say("the last")
        rest = iter(lines.readline, "the last\n")
        said = numbers + list(rest)
    assert said[:256] == [f"line {number}\n" for number in range(256)]
    # More than once where the thread that writes was between two lines as the queue filled up.
    dropped = [
        int(line.split()[0])
        for line in said
        if re.fullmatch("[0-9]+ lines were dropped: nobody read them\n", line)
    ]
    assert dropped
    assert len(said) - len(dropped) + sum(dropped) == 1000


def test_a_stale_socket_is_replaced(place: str) -> None:
    server = Server(socket_path=place)
    server.stop(signal.SIGKILL)
    assert os.path.exists(place)
    server = Server(socket_path=place)
    with served(server) as (service, _):
        assert process(service.info["pid"]) is not None
    assert server.stop() == 0


def _fails(*arguments: str) -> str:
    command = [sys.executable, "-m", "restrictedmem", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 1, done
    return done.stderr


def test_a_socket_in_use_stays_its_owners(server: Server) -> None:
    assert "Address already in use" in _fails("--socket", server.socket)
    with served(server) as (service, _):
        assert service.status()["last_error"] == ""


def test_a_file_in_the_way_stays(place: str) -> None:
    Path(place).write_text("mine", encoding="ascii")
    assert "Address already in use" in _fails("--socket", place)
    assert Path(place).read_text(encoding="ascii") == "mine"


@pytest.mark.parametrize("text", ["0-5", "7-6", "5-4294967295"])
def test_no_range_of_uids(place: str, text: str) -> None:
    said = _fails("--socket", place, "--user", text)
    assert re.search(rf"error: --user: {text} is not a range of uids\nhint: ", said)


def test_each_user_has_services_of_a_uid_of_its_own(place: str) -> None:
    """The kernel counts some things by uid, for instance descriptors in flight (unix(7)).

    So the counts of two users are separate.
    """
    server = Server("--user", f"{FIRST_UID}-{FIRST_UID + 2}", socket_path=place)

    def uids() -> list[str]:
        with served(server) as (service, fd), Vmm(1 << 20, service) as vmm:
            assert vmm.statistics()
            os.posix_fallocate(fd, 0, PAGE)
            return [facts(found.pid)[kind] for found in family(service) for kind in ("Uid", "Gid")]

    def of(uid: int) -> list[str]:
        return ["\t".join([str(uid)] * 4)] * 6

    # Where it begins to look follows from the uid.
    assert as_user(uids, 1001) == of(FIRST_UID + 2)
    with served(server) as (service, _):
        assert [facts(found.pid)["Uid"] for found in family(service)] == of(FIRST_UID)[:2]
        # A uid that nobody had comes before one that nobody has now.
        assert as_user(uids, 1004) == of(FIRST_UID + 1)
        assert as_user(uids, 1001) == of(FIRST_UID + 2)
    assert server.stop() == 0


def test_a_user_for_whom_no_uid_is_left_is_turned_away(place: str) -> None:
    server = Server("--user", f"{FIRST_UID + 3}-{FIRST_UID + 3}", socket_path=place)
    words = "all 1 uids of services are taken"
    try:
        with served(server):
            assert server.said().endswith(" of uid 0")
            for _ in range(2):
                with pytest.raises(AssertionError, match=words):
                    as_user(lambda: Service.connect(place), CLIENT)
            assert server.said().endswith(words)
        wait_until(
            lambda: (
                as_user(lambda: outcome(lambda: Service.connect(place).close()), CLIENT) is None
            ),
            "the uid",
        )
        # While it was still taken nothing more was said.
        assert server.said().endswith(f" of uid {CLIENT}")
    finally:
        assert server.stop() == 0


def test_the_service_that_holds_the_most_is_killed_first(server: Server) -> None:
    """This is about running out of memory (oom_score_adj).

    A memfd's pages count for no process that does not map them.
    """
    unit = oom._memory() // 1000 // PAGE * PAGE + PAGE
    # The tests may have inherited any value: 1000 is the most there is.
    Path(f"/proc/{server.process.pid}/oom_score_adj").write_text("0", encoding="ascii")

    def score(service: Service) -> int:
        return int(Path(f"/proc/{service.info['pid']}/oom_score_adj").read_text(encoding="ascii"))

    with served(server) as (first, fd), served(server) as (second, _):
        before = score(first)
        for count in (1, 3):
            os.posix_fallocate(fd, 0, count * unit)
            assert score(first) == before + count
        memory.fallocate(fd, memory.PUNCH, unit, unit)
        assert score(first) == before + 2
        assert score(second) == before
        other = first.memfd_restricted()
        os.posix_fallocate(other, 0, unit)
        assert score(first) == before + 3
        # The engine has it still.
        with Vm(first) as vm:
            vm.set_user_memory_region(
                slot=0,
                guest_phys_addr=guest_abi.PRIVATE_BASE,
                memory_size=PAGE,
                restricted_fd=other,
            )
            os.close(other)
            assert score(first) == before + 3
        wait_until(lambda: score(first) == before + 2, "the other file's end")


def test_a_limit_on_tasks_is_each_clients_own(place: str) -> None:
    """Each client's services may have as many tasks as ``serve`` (RLIMIT_NPROC).

    Each client has a uid of its own.
    """
    # Others than those of tests above, whose processes init may not have reaped.
    server = Server("--user", f"{FIRST_UID + 4}-{FIRST_UID + 5}", socket_path=place)
    resource.prlimit(server.process.pid, resource.RLIMIT_NPROC, (24, 24))

    def one() -> bool:
        with Service.connect(place) as service, Vm(service) as vm:
            return bool(vm.statistics())

    with ExitStack() as stack:
        service = stack.enter_context(Service.connect(place))
        # Four tasks are a service's, and four or more each VM's.
        made = [outcome(lambda: stack.enter_context(Vm(service)).statistics()) for _ in range(6)]
        assert made[0] != made[-1] == Errno(EAGAIN)
        assert as_user(one, CLIENT)
    assert server.stop() == 0


def test_an_unknown_user(place: str) -> None:
    said = _fails("--socket", place, "--user", "no-such-user")
    assert re.search(r"error: no user named no-such-user\nhint: ", said)
    assert not os.path.exists(place)


def test_who_may_connect(place: str) -> None:
    server = Server("--mode", "600", socket_path=place)
    assert as_user(lambda: outcome(lambda: Service.connect(place)), CLIENT) == Errno(EACCES)
    with served(server) as (service, _):
        assert service.info["way"] == "own mount"
    assert server.stop() == 0


def test_options_reach_the_service(place: str) -> None:
    server = Server("--api", "v9", "--memory-max", "16K", socket_path=place)
    with served(server) as (service, fd):
        assert (service.status()["api"], service.status()["memory_max"]) == ("v9", 16384)
        assert outcome(lambda: os.posix_fallocate(fd, 0, 5 * PAGE)) == Errno(28)
    assert server.stop() == 0
