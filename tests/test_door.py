"""The rules for connections to a service, and the effect of a crowd of them."""

import os
import resource
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from errno import EACCES, ECONNRESET, EMFILE, ENOTCONN, EPROTO
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest

from field import knock, works
from outcomes import Errno, in_child, outcome
from processes import descriptors, stop
from restrictedmem.fd import OwnedFd, receive_without_fds, send_with_fds
from restrictedmem.service import door as door_module
from restrictedmem.service import wire
from restrictedmem.service.address import address
from restrictedmem.service.client import Service
from restrictedmem.service.door import Connection, Door
from restrictedmem.service.wire import Call, Channel
from users import as_user
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse")


@pytest.fixture
def service() -> Iterator[Service]:
    with Service.start() as service:
        yield service


@pytest.mark.parametrize(
    "call",
    [wire.TOKEN, wire.SPAWN, wire.SIGNING_KEY, wire.ERROR_PAGE, wire.READY],
    ids=lambda call: call.name,
)
def test_without_the_key_nothing_is_done(service: Service, call: Call) -> None:
    with closing(knock(service)) as channel:
        assert outcome(lambda: channel.call(call, b"kvm {}")) == Errno(EACCES)
    assert works(service)


@pytest.mark.parametrize("size", [0, wire.KEY_BYTES - 1, wire.KEY_BYTES, 1000])
def test_a_wrong_key_opens_nothing(service: Service, size: int) -> None:
    with closing(knock(service)) as channel:
        assert outcome(lambda: channel.call(wire.CONNECT, bytes(size))) == Errno(EACCES)
        # The right one is for another connection.
        key = bytes.fromhex(service.info["key"])
        assert outcome(lambda: channel.call(wire.CONNECT, key)) == Errno(ENOTCONN)
    assert works(service)


def send(sock: socket.socket, call: Call) -> None:
    """Send a call, unless the connection is closed already."""
    with suppress(ConnectionError):
        sock.send(struct.pack("=II", call.number, 0))


@pytest.mark.requires("root")
def test_so_many_of_a_crowd_are_told_that_they_have_no_key(service: Service) -> None:
    """The cgroup of the service is charged with what they leave unread."""

    def crowd() -> tuple[list[int], object]:
        with ExitStack() as stack:
            socks = [stack.enter_context(closing(knock(service))).sock for _ in range(30)]
            told: list[int] = []
            for sock in socks:
                for _ in range(10):
                    send(sock, wire.TOKEN)
                with suppress(ConnectionError):
                    told.append(len(sock.recv(1000, socket.MSG_PEEK)))
            for sock in socks:
                with suppress(ConnectionError):
                    sock.recv(1000)
            return told, outcome(
                lambda: stack.enter_context(closing(knock(service))).call(wire.TOKEN)
            )

    assert works(service)
    before = descriptors(service.info["pid"])
    told, last = as_user(crowd)
    # A connection that a further one pushed out was never told. Of the others, this many are told.
    assert len([count for count in told if count]) == 8
    assert last == Errno(EACCES)
    wait_until(lambda: descriptors(service.info["pid"]) == before, "the crowd's end in the service")
    assert works(service)


def test_the_user_may_ask_how_a_service_is(service: Service) -> None:
    with closing(knock(service)) as channel:
        _, fds = channel.call(wire.STATUS)
        for fd in fds:
            fd.close()


@pytest.mark.requires("root")
def test_another_user_has_a_few_connections_and_no_answers(service: Service) -> None:
    def crowd() -> tuple[object, bytes]:
        with ExitStack() as stack:
            channels = [stack.enter_context(closing(knock(service))) for _ in range(30)]
            # The first had to go for the others.
            return outcome(lambda: channels[-1].call(wire.STATUS)), channels[0].sock.recv(10)

    assert works(service)
    before = len(descriptors(service.info["pid"]))
    assert as_user(crowd) == (Errno(EACCES), b"")
    wait_until(
        lambda: len(descriptors(service.info["pid"])) <= before, "the crowd's end in the service"
    )
    assert works(service)


def test_a_crowd_of_the_same_user_keeps_nobody_out(service: Service) -> None:
    """Connections come all the time and say nothing; whoever has the key is let in all the same."""
    crowd = os.fork()
    if crowd == 0:
        held: list[socket.socket] = []
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect(address(service.info["socket"]))
            held = [*held[-100:], sock]
    try:
        for _ in range(50):
            service.after_fork_in_child()
            assert works(service)
    finally:
        os.kill(crowd, 9)
        os.waitpid(crowd, 0)


@pytest.mark.requires("root")
def test_a_service_without_free_descriptors_turns_away_and_goes_on(service: Service) -> None:
    assert works(service)
    pid, key = service.info["pid"], bytes.fromhex(service.info["key"])
    limit = len(descriptors(pid)) + 3
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    with ExitStack() as stack:
        channels = [stack.enter_context(closing(knock(service))) for _ in range(10)]
        answers = [outcome(partial(channel.call, wire.CONNECT, key)) for channel in channels]
        assert answers.count(Errno(ENOTCONN)) >= 7
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert works(service)


def test_a_newcomer_for_whom_nothing_is_left_is_no_reason_to_spin() -> None:
    """Another thread has taken the number that was kept to turn newcomers away."""

    def body() -> tuple[object, bool]:
        door = Door(1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect("\0" + door.name)
            # The lowest number is taken first: no hole is left below the last.
            while (last := os.open(os.devnull, os.O_RDONLY)) < 100:
                pass
            resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, last + 1))
            spare = door._spare
            door._spare = cast(OwnedFd, SimpleNamespace(close=lambda: None))
            first = outcome(lambda: list(door.accept()))
            spare.close()
            return first, next(door.accept()).owner

    assert in_child(body) == repr((Errno(EMFILE), False))


def test_no_newcomer_and_no_descriptor_is_no_trouble() -> None:
    """The kernel looks for a number before it looks whether anybody is there."""

    def body() -> object:
        door = Door(1)
        while (last := os.open(os.devnull, os.O_RDONLY)) < 100:
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, last + 1))
        return list(door.accept())

    assert in_child(body) == "[]"


def test_so_many_connections_have_the_key() -> None:
    door = Door(1)
    made: list[Connection] = []
    with ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.connect("\0" + door.name)
            (connection,) = door.accept()
            stack.enter_context(closing(connection.channel))
            made.append(connection)
        assert door.admit(made[0], door.key)
        assert outcome(partial(door.admit, made[1], door.key)) == Errno(EMFILE)
        door.forget(made[0])
        assert door.admit(made[1], door.key)
    door.listener.close()
    door._spare.close()


def test_a_turn_takes_some_of_a_crowd_and_drops_who_hung_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door_module, "_AT_A_TURN", 4)
    door = Door(1)
    with ExitStack() as stack:
        for number in range(6):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.connect("\0" + door.name)
            if number not in (2, 3, 5):
                sock.close()
        for found in 2, 1:
            made = list(door.accept())
            assert len(made) == found
            for connection in made:
                stack.enter_context(closing(connection.channel))
                # The door does not know dropped connections.
                door.forget(connection)
        assert door._outside == []
        assert list(door.accept()) == []
    door.listener.close()
    door._spare.close()


def test_who_has_to_go_in_the_round_in_which_it_speaks_is_no_fault(service: Service) -> None:
    pid = service.info["pid"]
    with ExitStack() as stack:
        channels = [stack.enter_context(closing(knock(service))) for _ in range(8)]
        for channel in channels:
            _, fds = channel.call(wire.STATUS)
            assert not fds
        stop(pid)
        stack.enter_context(closing(knock(service)))
        channels[0].post(wire.TOKEN)
        os.kill(pid, signal.SIGCONT)
        assert outcome(lambda: channels[0].sock.recv(10)) == Errno(ECONNRESET)
    assert service.status()["last_error"] == ""


@pytest.mark.requires("root")
def test_a_paused_door_opens_again(service: Service) -> None:
    """Descriptors are gone for a moment, the spare one too."""
    assert works(service)
    pid = service.info["pid"]
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    # This is below the descriptors in use, so even a spare one does not help.
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    late = knock(service)
    wait_until(lambda: outcome(service.status) != Errno(ENOTCONN), "the service to go on")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    with closing(late):
        late.call(wire.CONNECT, bytes.fromhex(service.info["key"]))
    assert works(service)


# Descriptors.


def test_a_channel_without_descriptors_never_has_them() -> None:
    # A socket that refuses nothing, as on kernels that cannot.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours, "stranger")
    reader, writer = os.pipe()
    with closing(channel), theirs:
        held = len(os.listdir("/proc/self/fd"))
        send_with_fds(theirs, struct.pack("=II", 1, 0), [writer] * 5)
        os.close(writer)
        assert outcome(channel.receive) == Errno(EPROTO)
        assert len(os.listdir("/proc/self/fd")) == held - 1
    # It went with the queue: nobody has the pipe's other end any more.
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_the_sender_is_refused_where_the_kernel_can(service: Service) -> None:
    with closing(knock(service)) as channel:
        try:
            send_with_fds(channel.sock, struct.pack("=II", wire.STATUS.number, 0), [0])
        except PermissionError:
            return
        number, _ = struct.unpack_from("=II", receive_without_fds(channel.sock, 1000))
        assert number == EPROTO
