"""Consumers that were requested: if one fails, only its own caller gets an error.

The next caller's turn comes. In these tests, the test is the spawner.
"""

import os
import resource
import signal
import socket
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from errno import EAGAIN, EIO, EMFILE, ENOBUFS, ENOMEM, EPERM, EPROTO
from typing import final

import pytest

from processes import be_idle
from restrictedmem import threads
from restrictedmem.fd import KERNEL_REFUSES, OwnedFd, close_all, readable, spare
from restrictedmem.service import spawn_requests as spawns_module
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.consumers import Consumers, Troubles
from restrictedmem.service.door import Connection
from restrictedmem.service.options import Options
from restrictedmem.service.signing import Signer
from restrictedmem.service.spawn_requests import Spawns
from restrictedmem.service.tokens import Tokens
from restrictedmem.service.wire import Channel
from waiting import wait_until

PATIENCE = 10.0
_SO_PASSRIGHTS = 83


@final
class Asker:
    """An owner's connection, both ends of it."""

    def __init__(self, stack: ExitStack) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            stack.enter_context(sock)
        theirs.settimeout(PATIENCE)
        self.connection = Connection(Channel(ours, "owner"), os.getuid(), owner=True)
        self.sock = theirs

    def answer(self) -> int:
        """Wait for the answer, and return its errno."""
        return wire.Message(0, self.sock.recv(1000), []).body[0]


@final
class Spawning:
    """The object under test, with the other ends of all its connections."""

    def __init__(self, stack: ExitStack) -> None:
        ours, theirs = Channel.pair("service", takes_fds=True)
        self.spawner = ours
        self._spawns = Channel(theirs, "spawner", takes_fds=True)
        for channel in (self.spawner, self._spawns):
            stack.callback(channel.close)
        self.troubles = Troubles()
        self.consumers = Consumers(Tokens(), Options(), Signer(), self.troubles)
        self.spawns = Spawns(self._spawns, self.consumers, self.troubles)
        stack.callback(self._close_spare)
        self._given: list[OwnedFd] = []
        self._stack = stack

    def _close_spare(self) -> None:
        self.spawns._spare.close()

    def add(self, asker: Asker) -> None:
        self.spawns.add(asker.connection, "kvm", b"kvm {}")

    def asked(self) -> int:
        """Return the number of the consumer that the spawner is asked for."""
        assert readable([self.spawner], PATIENCE), "waited 10 s for a FORK"
        message = self.spawner.receive()
        assert message is not None
        self._given = message.fds
        return int(wire.NUMBER.unpack_from(message.body)[0])

    def fork(self) -> OwnedFd:
        """Answer with a process that does nothing; returns its pidfd."""
        child = os.fork()
        if child == 0:
            be_idle()
        self.keep_none()
        self._stack.callback(os.waitpid, child, 0)
        self._stack.callback(os.kill, child, signal.SIGKILL)
        pidfd = self._stack.enter_context(OwnedFd(os.pidfd_open(child)))
        self.spawner.reply(fds=[pidfd.fileno()])
        return pidfd

    def refuse(self) -> None:
        self.keep_none()
        self.spawner.reply_error(OSError(EAGAIN, "no more"))

    def keep_none(self) -> None:
        """Close what came with the last FORK."""
        close_all(self._given)

    def goes_on(self, asker: Asker, number: int) -> None:
        """Check that the turn of another asker has come; no consumer is left then."""
        assert self.asked() == number
        self.refuse()
        assert self.spawns.hear()
        assert (asker.answer(), asker.connection.busy) == (EAGAIN, False)
        for consumer in self.consumers.all():
            consumer.requests.sock.shutdown(socket.SHUT_RDWR)
        self.forgotten()

    def forgotten(self) -> None:
        wait_until(lambda: not self.consumers.all(), "the consumers to be forgotten")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


@pytest.fixture
def spawning(stack: ExitStack) -> Spawning:
    return Spawning(stack)


_FAILURES = [
    (OSError(EPERM, "sendmsg"), EPERM),
    (MemoryError(), ENOMEM),
    (ValueError("a bug"), EIO),
]


@pytest.mark.parametrize(("failure", "errno"), _FAILURES, ids=repr)
def test_a_reply_that_fails_is_one_askers_trouble(
    failure: Exception,
    errno: int,
    spawning: Spawning,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = Asker(stack), Asker(stack)
    reply = Channel.reply

    def fail(channel: Channel, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        if channel is first.connection.channel:
            raise failure
        reply(channel, body, fds)

    monkeypatch.setattr(Channel, "reply", fail)
    for asker in (first, second):
        spawning.add(asker)
        assert asker.connection.busy
    assert spawning.asked() == 1
    killed = spawning.fork()
    assert spawning.spawns.hear()
    assert (first.answer(), first.connection.busy) == (errno, False)
    assert readable([killed], PATIENCE), "waited 10 s for the end of a consumer that nobody has"
    assert spawning.asked() == 2
    lives = spawning.fork()
    assert spawning.spawns.hear()
    assert (second.answer(), second.connection.busy) == (0, False)
    wait_until(
        lambda: [c.number for c in spawning.consumers.all()] == [2],
        "the first consumer to be forgotten",
    )
    assert not readable([lives], 0)
    assert ("a bug" in spawning.troubles.last) == (errno == EIO)
    for consumer in spawning.consumers.all():
        consumer.requests.sock.shutdown(socket.SHUT_RDWR)
    spawning.forgotten()


@pytest.mark.parametrize(
    ("failure", "errno"),
    [(OSError(EAGAIN, "no thread"), EAGAIN), (MemoryError(), ENOMEM), (ValueError("a bug"), EIO)],
    ids=repr,
)
def test_a_consumer_that_nobody_serves_is_one_askers_trouble(
    failure: Exception,
    errno: int,
    spawning: Spawning,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = Asker(stack), Asker(stack)
    for asker in (first, second):
        spawning.add(asker)
    assert spawning.asked() == 1
    killed = spawning.fork()

    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(threads, "start", fail)
        assert spawning.spawns.hear()
    assert (first.answer(), first.connection.busy) == (errno, False)
    assert readable([killed], 0)
    spawning.goes_on(second, 2)


@pytest.mark.parametrize("errno", [0, EAGAIN], ids=["without a process", "EAGAIN"])
def test_what_the_spawner_could_not_do_is_one_askers_trouble(
    errno: int, spawning: Spawning, stack: ExitStack
) -> None:
    first, second = Asker(stack), Asker(stack)
    for asker in (first, second):
        spawning.add(asker)
    assert spawning.asked() == 1
    if errno:
        spawning.refuse()
    else:
        spawning.keep_none()
        spawning.spawner.reply()
    assert spawning.spawns.hear()
    assert (first.answer(), first.connection.busy) == (errno or EPROTO, False)
    assert spawning.asked() == 2
    spawning.refuse()
    assert spawning.spawns.hear()
    assert second.answer() == EAGAIN
    spawning.forgotten()
    assert spawning.spawns.hear()
    spawning.spawner.close()
    assert not spawning.spawns.hear()


@pytest.mark.parametrize(("failure", "errno"), _FAILURES, ids=repr)
def test_what_cannot_be_asked_for_is_one_askers_trouble(
    failure: Exception,
    errno: int,
    spawning: Spawning,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = Asker(stack), Asker(stack)
    before = len(os.listdir("/proc/self/fd"))

    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "post", fail)
        spawning.add(first)
    assert (first.answer(), first.connection.busy) == (errno, False)
    spawning.forgotten()
    assert len(os.listdir("/proc/self/fd")) == before
    spawning.add(second)
    assert spawning.asked() == 2
    spawning.refuse()
    assert spawning.spawns.hear()
    assert second.answer() == EAGAIN
    spawning.forgotten()


@contextmanager
def no_number_free() -> Generator[None]:
    """Use up this process's descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as held:
        # The lowest number is taken first: no hole is left below the last.
        while (last := held.enter_context(spare()).fileno()) < 200:
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_number_is_kept_for_the_pidfd(spawning: Spawning, stack: ExitStack) -> None:
    first, second = Asker(stack), Asker(stack)
    for asker in (first, second):
        spawning.add(asker)
    assert spawning.asked() == 1
    spawning.fork()
    with no_number_free():
        assert spawning.spawns.hear()
    assert (first.answer(), first.connection.busy) == (0, False)
    spawning.goes_on(second, 2)


def test_a_pidfd_for_which_no_number_is_left_is_one_askers_trouble(
    spawning: Spawning, stack: ExitStack
) -> None:
    first, second = Asker(stack), Asker(stack)
    for asker in (first, second):
        spawning.add(asker)
    assert spawning.asked() == 1
    spawning.fork()
    # Another thread was faster.
    spawning.spawns._spare.close()
    with no_number_free():
        assert spawning.spawns.hear()
    assert (first.answer(), first.connection.busy) == (EMFILE, False)
    spawning.goes_on(second, 2)
    assert not spawning.spawns._spare.closed


@pytest.mark.parametrize("taken", [False, True], ids=["before", "after"])
def test_memory_that_is_short_while_the_spawner_is_heard(
    taken: bool, spawning: Spawning, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Asker(stack), Asker(stack)
    for asker in (first, second):
        spawning.add(asker)
    assert spawning.asked() == 1
    spawning.fork()
    receive, short = Channel.receive, 1

    def scarce(channel: Channel, flags: int = 0) -> wire.Message | None:
        nonlocal short
        if channel is not spawning._spawns or not short:
            return receive(channel, flags)
        short -= 1
        if taken:
            message = receive(channel, flags)
            assert message is not None
            close_all(message.fds)
        raise MemoryError

    monkeypatch.setattr(Channel, "receive", scarce)
    assert spawning.spawns.hear()
    if not taken:
        assert first.connection.busy
        assert spawning.spawns.hear()
    assert (first.answer(), first.connection.busy) == (ENOMEM if taken else 0, False)
    spawning.goes_on(second, 2)


def test_where_it_is_not_known_what_the_spawner_said_the_service_ends(
    spawning: Spawning, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(Channel, "receive", no_memory)
            monkeypatch.setattr(spawns_module, "speaks", no_memory)
            spawning.spawns.hear()
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ENOMEM


@pytest.mark.parametrize("failure", [OSError(ENOBUFS, "send"), MemoryError()], ids=repr)
def test_who_cannot_be_answered_finds_the_end(
    failure: Exception, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    asker = Asker(stack)
    monkeypatch.setattr(wire, "send_with_fds", fail)
    asker.connection.channel.reply_error(OSError(EAGAIN, "no more"))
    assert asker.sock.recv(1) == b""


@pytest.mark.requires("fuse")
@pytest.mark.skipif(not KERNEL_REFUSES, reason="the kernel has no SO_PASSRIGHTS (Linux 6.16)")
def test_an_owner_that_takes_no_descriptors_keeps_nobody_waiting() -> None:
    with Service.start() as service, ExitStack() as stack:
        channels = [service._connect() for _ in range(4)]
        for channel in channels:
            stack.callback(channel.close)
            channel.sock.settimeout(PATIENCE)
        channels[0].sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        for channel in channels:
            channel.post(wire.SPAWN, b"kvm {}")
        answers = [channel.sock.recv(1000)[0] for channel in channels]
        assert answers == [EPERM, 0, 0, 0]
        with service.spawn("kvm", "{}"):
            assert service.status()["last_error"] == ""
