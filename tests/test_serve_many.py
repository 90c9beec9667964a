"""``serve`` under many clients.

No client waits for another user's, each uid has a limit of places, and nothing is left behind.
"""

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from errno import EAGAIN, ECONNRESET, EMFILE, ETIMEDOUT
from functools import partial
from pathlib import Path
from typing import Any, final

import pytest

from outcomes import Errno, outcome
from processes import children, descriptors, exists, family, stops
from restrictedmem.fd import OwnedFd, peer_credentials, readable
from restrictedmem.service import client_services as serving
from restrictedmem.service import refusals, wire
from restrictedmem.service.client import Service
from restrictedmem.service.client_services import ClientServices
from restrictedmem.service.exec_service import START_DEADLINE, start_process
from restrictedmem.service.listener import listen
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vm
from users import ORDINARY, as_user
from waiting import PATIENCE, wait_until

pytestmark = pytest.mark.requires("fuse", "root")

#: A uid whose handshakes never end.
STUCK = ORDINARY - 2
OTHER = ORDINARY - 1
PLACES = 3


class Accepting(socket.socket):
    """A listening socket that can be out of descriptors."""

    fails = False
    calls = 0

    def accept(self) -> tuple[socket.socket, Any]:
        Accepting.calls += 1
        if Accepting.fails:
            raise OSError(EMFILE, os.strerror(EMFILE))
        return super().accept()


@final
class Running:
    """A ``ClientServices`` in a thread of this process. Starts for the uid ``STUCK`` never end."""

    def __init__(self, path: str, listener: socket.socket) -> None:
        self.path = path
        self.said: list[str] = []
        self.stuck: list[subprocess.Popen[bytes]] = []
        self.server = ClientServices(listener, Options(), PLACES, self.said.append)
        self._honest = start_process
        self._stop = os.pipe()
        self._thread = threading.Thread(target=lambda: self.server.run(self._stop[0]))
        self._thread.start()

    def start(
        self,
        theirs: socket.socket,
        options: Options,
        inherited: Sequence[int],
        *,
        own_session: bool,
        cgroup: OwnedFd | None,
    ) -> subprocess.Popen[bytes]:
        if peer_credentials(theirs)[1] != STUCK:
            return self._honest(theirs, options, inherited, own_session=own_session, cgroup=cgroup)
        keep = [theirs.fileno(), *inherited]
        self.stuck.append(subprocess.Popen(["sleep", "1000"], pass_fds=keep))
        return self.stuck[-1]

    def places(self) -> dict[int, int]:
        return {uid: user.places for uid, user in list(self.server._users.items())}

    def starting(self, uid: int) -> int:
        user = self.server._users.get(uid)
        return user.starting if user else 0

    def end(self) -> None:
        """Stop, when nothing of any client is left."""
        try:
            wait_until(lambda: not self.places(), f"the end of {self.places()}")
        finally:
            os.write(self._stop[1], b".")
            self._thread.join()
            for fd in self._stop:
                os.close(fd)
        assert not self.server._starting
        # The listener's, and what hears of refusals.
        assert len(self.server._ready) == 2
        assert not self.server._refusals._unread


@pytest.fixture
def running(place: str, monkeypatch: pytest.MonkeyPatch) -> Generator[Running, None, None]:
    with listen(place, 0o666) as (made, _), Accepting(fileno=os.dup(made.fileno())) as listener:
        listener.setblocking(False)
        found = Running(place, listener)
        monkeypatch.setattr(serving, "start_process", found.start)
        try:
            yield found
        finally:
            for process_ in found.stuck:
                process_.kill()
            found.end()


@pytest.fixture
def place() -> Generator[str, None, None]:
    """Name a socket in a directory that every user can enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield f"{directory}/socket"


def connect_as(uid: int, path: str, stack: ExitStack) -> socket.socket:
    """Return a socket that another user connected, which hears nothing yet."""
    ours, theirs = socket.socketpair()

    def body() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
            made.connect(path)
            socket.send_fds(theirs, [b"."], [made.fileno()])

    as_user(body, uid, fuse=False)
    with ours, theirs:
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    made = stack.enter_context(socket.socket(fileno=fds[0]))
    made.settimeout(PATIENCE)
    return made


def answer(sock: socket.socket) -> tuple[int, str]:
    """Return the errno, or call number, and the words that came in the place of READY."""
    data = sock.recv(4096)
    return int.from_bytes(data[:4], sys.byteorder), data[8:].decode()


def test_handshakes_that_never_end_delay_nobody_else(running: Running) -> None:
    with ExitStack() as stack:
        for _ in range(PLACES):
            connect_as(STUCK, running.path, stack)
        wait_until(lambda: running.starting(STUCK) == serving._AT_ONCE, "handshakes under way")
        # No more at once, however many wait.
        assert len(running.stuck) == serving._AT_ONCE < PLACES
        for _ in range(2):
            sock = connect_as(OTHER, running.path, stack)
            assert answer(sock)[0] == wire.READY.number
        assert len(running.stuck) == serving._AT_ONCE
        assert all(each.poll() is None for each in running.stuck)


def test_a_handshake_that_never_ends_is_ended(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "START_DEADLINE", 0.2)
    with ExitStack() as stack:
        clients = [connect_as(STUCK, running.path, stack) for _ in range(PLACES)]
        words = "it did not come up within 0.2 s"
        # The third, too: it is started when there is room.
        assert [answer(client) for client in clients] == [(ETIMEDOUT, words)] * PLACES
        wait_until(lambda: STUCK not in running.places(), "the places")
    assert [each.returncode for each in running.stuck] == [-signal.SIGKILL] * PLACES


def test_a_handshake_loses_no_time_while_all_is_stopped(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, leap, looks = time.monotonic, 0.0, 0

    def monotonic() -> float:
        nonlocal looks
        looks += threading.current_thread() is running._thread
        return honest() + leap

    monkeypatch.setattr(time, "monotonic", monotonic)
    with ExitStack() as stack:
        connect_as(STUCK, running.path, stack)
        wait_until(lambda: running.starting(STUCK) == 1, "the handshake")
        # Time leaps as after a suspend.
        leap, before = 10 * START_DEADLINE, looks
        wait_until(lambda: looks > before + 3, "looks at the clock")
        assert running.starting(STUCK) == 1
        assert running.stuck[0].poll() is None


def test_a_client_that_dies_in_the_handshake_frees_its_place(running: Running) -> None:
    with ExitStack() as stack:
        for _ in range(PLACES):
            connect_as(STUCK, running.path, stack)
        wait_until(lambda: running.places() == {STUCK: PLACES}, "the clients")
    # The clients that waited are gone, too.
    wait_until(lambda: running.places() == {}, "the places")
    with ExitStack() as stack:
        connect_as(STUCK, running.path, stack)
        wait_until(lambda: running.places() == {STUCK: 1}, "a client")


def test_a_uid_has_so_many_places(running: Running) -> None:
    with ExitStack() as stack:
        services = [Service.connect(running.path) for _ in range(PLACES)]
        for service in services:
            stack.enter_context(service)
        with pytest.raises(OSError) as caught:
            Service.connect(running.path)
        assert caught.value.errno == EAGAIN
        words = f"uid 0 has {PLACES} services here, as many as it may"
        assert words in str(caught.value)
        assert outcome(lambda: Service.connect(running.path)) == Errno(EAGAIN)
        assert sum(line.endswith(words) for line in running.said) == 1
        # Another user has its own.
        assert answer(connect_as(OTHER, running.path, stack))[0] == wire.READY.number
        # A descriptor holds a service, and the service its place.
        fd = services[0].memfd_restricted()
        services[0].close()
        assert outcome(lambda: Service.connect(running.path)) == Errno(EAGAIN)
        os.close(fd)
        wait_until(lambda: running.places()[0] == PLACES - 1, "a place")
        stack.enter_context(Service.connect(running.path))


def test_so_many_of_a_crowd_are_told_that_there_is_no_place(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages that they do not read are charged to serve, and so to all clients."""
    monkeypatch.setattr(refusals, "_MOST", 12)
    with ExitStack() as stack:
        for _ in range(PLACES):
            stack.enter_context(Service.connect(running.path))
        crowd = [connect_as(0, running.path, stack) for _ in range(50)]
        assert [bool(sock.recv(1, socket.MSG_PEEK)) for sock in crowd] == [True] * 8 + [False] * 42
        # To have shut it down is not to have read it.
        crowd[0].shutdown(socket.SHUT_RDWR)
        assert outcome(lambda: Service.connect(running.path)) == Errno(ECONNRESET)
        # Another uid is told, until it is too much for all.
        others = [connect_as(OTHER, running.path, stack) for _ in range(PLACES + 5)]
        assert [answer(sock)[0] for sock in others[PLACES : PLACES + 4]] == [EAGAIN] * 4
        assert not others[-1].recv(4096)
        # One that reads, or hangs up, makes room for one.
        for end in (lambda: crowd[1].recv(4096)), crowd[2].close:
            end()
            assert [answer(connect_as(0, running.path, stack))[0]] == [EAGAIN]
        assert not crowd[1].recv(4096)


def test_whoever_reads_that_there_is_no_place_is_told_each_time(running: Running) -> None:
    with ExitStack() as stack:
        for _ in range(PLACES):
            stack.enter_context(Service.connect(running.path))
        for _ in range(100):
            assert outcome(lambda: Service.connect(running.path)) == Errno(EAGAIN)


def test_a_killed_service_frees_its_place(running: Running) -> None:
    with Service.connect(running.path) as service, Vm(service) as vm:
        assert vm.statistics()
        wait_until(lambda: running.places() == {0: 1}, "a place")
        os.kill(family(service)[0].pid, signal.SIGKILL)
        wait_until(lambda: running.places() == {}, "the place")


def test_a_start_that_fails_is_told_and_frees_its_place(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(EMFILE, os.strerror(EMFILE))

    for module, name in (serving, "start_process"), (os, "pidfd_open"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            assert outcome(lambda: Service.connect(running.path)) == Errno(EMFILE)
        wait_until(lambda: running.places() == {}, "the place")
    with Service.connect(running.path) as service:
        assert service.status()["last_error"] == ""


def test_so_many_are_told_that_no_service_starts(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has used up its tasks gets no service.

    It could connect for ever, and read nothing.
    """

    def fail(*_: object, **__: object) -> None:
        raise OSError(EAGAIN, os.strerror(EAGAIN))

    monkeypatch.setattr(serving, "start_process", fail)
    with ExitStack() as stack:
        crowd = [connect_as(0, running.path, stack) for _ in range(20)]
        assert [bool(sock.recv(1, socket.MSG_PEEK)) for sock in crowd] == [True] * 8 + [False] * 12


def test_no_descriptor_for_a_client_neither_ends_nor_spins_it(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accepting, "fails", True)
    before, began = Accepting.calls, time.monotonic()
    with ExitStack() as stack:
        sock = connect_as(OTHER, running.path, stack)
        wait_until(lambda: Accepting.calls == before + 4, "further attempts")
        assert time.monotonic() - began > 3 * serving._PAUSE
        assert running.said == [f"clients have to wait: {os.strerror(EMFILE)}"]
        monkeypatch.setattr(Accepting, "fails", False)
        assert answer(sock)[0] == wire.READY.number


def test_a_turn_takes_some_of_a_crowd_and_starts_nothing_for_who_hung_up(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[socket.socket] = []

    def fail(theirs: socket.socket, *_: object, **__: object) -> None:
        started.append(theirs)
        raise OSError(EMFILE, os.strerror(EMFILE))

    def gone() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(place)

    monkeypatch.setattr(serving, "start_process", fail)
    monkeypatch.setattr(serving, "_AT_A_TURN", PLACES + 2)
    said: list[str] = []
    with (
        listen(place, 0o600) as (listener, _),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
    ):
        server = ClientServices(listener, Options(), PLACES, said.append)
        # More than a uid has places.
        for _ in range(PLACES + 1):
            gone()
        client.connect(place)
        gone()
        server._accept()
        assert answer(client)[0] == EMFILE
        assert len(started) == 1
        assert [line.partition(":")[0] for line in said] == [
            f"client {os.getpid()} of uid 0",
            f"client {os.getpid()}",
        ]
        assert server._users == {}
        # The last is for another turn.
        listener.accept()[0].close()
        server._refusals.close()
        assert not readable([listener], 0)


def test_who_hangs_up_while_it_waits_has_no_service_started(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "start_process", partial(pytest.fail, "a service was started"))
    with listen(place, 0o600) as (listener, _):
        said: list[str] = []
        server = ClientServices(listener, Options(), PLACES, said.append)
        with (
            monkeypatch.context() as patch,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
        ):
            patch.setattr(serving, "_AT_ONCE", 0)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as gone:
                gone.connect(place)
            client.connect(place)
            server._accept()
        # A client that hung up before has no place.
        (user,) = server._users.values()
        assert user.places == 1
        server._start_next(user)
        assert (said, server._users, server._clients) == ([], {}, set())


def test_no_client_and_no_descriptor_is_no_trouble(place: str) -> None:
    said: list[str] = []
    with listen(place, 0o600) as (made, _), Accepting(fileno=os.dup(made.fileno())) as listener:
        Accepting.fails = True
        try:
            ClientServices(listener, Options(), PLACES, said.append)._accept()
        finally:
            Accepting.fails = False
    assert said == []


# The command.


@pytest.fixture
def command(place: str) -> Generator[subprocess.Popen[str], None, None]:
    arguments = ["serve", "--socket", place, "--max-per-user", "2"]
    started = subprocess.Popen(
        [sys.executable, "-m", "restrictedmem", *arguments], stderr=subprocess.PIPE, text=True
    )
    with started:
        assert started.stderr is not None
        assert started.stderr.readline() == f"listening on {place}\n"
        try:
            yield started
        finally:
            started.kill()


def test_nothing_piles_up(place: str, command: subprocess.Popen[str]) -> None:
    before = sorted(descriptors(command.pid))
    for _ in range(5):
        with Service.connect(place), Service.connect(place):
            assert outcome(lambda: Service.connect(place)) == Errno(EAGAIN)

        def free() -> bool:
            try:
                Service.connect(place).close()
            except BlockingIOError:
                return False
            return True

        wait_until(free, "a place")
        for _ in range(5):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
                caller.connect(place)
        wait_until(free, "a place")
    wait_until(lambda: sorted(descriptors(command.pid)) == before, "the end of descriptors")
    # Zombies included, which ``children`` leaves out.
    stats = (entry / "stat" for entry in Path("/proc").iterdir() if entry.name.isdigit())
    parents = [text.rsplit(")", 1)[1].split()[1] for stat in stats if (text := _text(stat))]
    assert str(command.pid) not in parents


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_out_of_descriptors_it_goes_on(place: str, command: subprocess.Popen[str]) -> None:
    limits = resource.prlimit(command.pid, resource.RLIMIT_NOFILE)
    low = len(descriptors(command.pid)) + 1
    resource.prlimit(command.pid, resource.RLIMIT_NOFILE, (low, limits[1]))
    # One more can be accepted, and not started.
    assert outcome(lambda: Service.connect(place)) == Errno(EMFILE)
    resource.prlimit(command.pid, resource.RLIMIT_NOFILE, limits)
    with Service.connect(place) as service:
        assert service.status()["last_error"] == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_in_the_middle_of_a_handshake(
    place: str, command: subprocess.Popen[str], number: signal.Signals
) -> None:
    with Service.connect(place) as service, ExitStack() as callers:
        wait_until(lambda: not children(command.pid), "the end of the first start")
        starters: list[int] = []

        def caught() -> bool:
            """Stop the process of a handshake; on a busy machine, the last may be over by now."""
            starters[:] = [
                child.pid
                for child in children(command.pid)
                # Until execve(2), serve waits for its child.
                if b"service.start" in cmdline(child.pid) and stops(child.pid)
            ]
            if not children(command.pid):
                caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                callers.enter_context(caller).connect(place)
            return bool(starters)

        wait_until(caught, "a handshake")
        try:
            command.send_signal(number)
            assert command.wait(PATIENCE) == 0
            assert not os.path.exists(place)
        finally:
            for pid in starters:
                os.kill(pid, signal.SIGKILL)
        assert all(map(exists, family(service)))
