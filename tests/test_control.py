"""The control thread of a service: whatever becomes of one request, it is answered or its connection ends."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from errno import EAGAIN, EBUSY, EIO, ENOMEM

import pytest

from outcomes import Errno, outcome
from restrictedmem import threads
from restrictedmem.fs.mount import Way
from restrictedmem.service.daemon import Service
from restrictedmem.service.door import Connection
from restrictedmem.service.signing import Signer
from restrictedmem.service.start import Options, Origin
from restrictedmem.service.wire import Channel, Message

PATIENCE = 10.0
ASKED = Message(6, b"", [])


@pytest.fixture
def service() -> Iterator[Service]:
    spawner, theirs = Channel.pair("spawner", takes_fds=True)
    with theirs, ExitStack() as stack:
        found = Service(spawner, Options(), Origin(1, 0), Way.OWN, Signer(), 1000)
        stack.callback(spawner.close)
        stack.callback(found._selector.close)
        stack.callback(found._door.listener.close)
        stack.callback(found._door._spare.close)
        stack.callback(found._spawns._spare.close)
        yield found


@pytest.fixture
def asker() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(PATIENCE)
    with ours, theirs:
        yield Connection(Channel(ours, "owner"), os.getuid(), owner=True), theirs


@pytest.mark.parametrize(
    ("failure", "errno"), [(None, 0), (OSError(EAGAIN, "x"), EAGAIN), (MemoryError(), ENOMEM), (ValueError("a bug"), EIO)], ids=repr
)
def test_what_is_done_aside_is_answered(
    failure: Exception | None, errno: int, service: Service, asker: tuple[Connection, socket.socket]
) -> None:
    connection, theirs = asker
    go = threading.Event()

    def act(message: Message) -> None:
        assert message is ASKED
        assert go.wait(PATIENCE), "waited 10 s to be let go"
        if failure is not None:
            raise failure

    service._aside(connection, act, ASKED)
    assert outcome(lambda: service._aside(connection, act, ASKED)) == Errno(EBUSY)
    go.set()
    assert theirs.recv(1000)[0] == errno
    assert not connection.busy


def test_without_a_thread_nothing_is_done_aside(
    service: Service, asker: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise OSError(EAGAIN, "no thread to be had")

    monkeypatch.setattr(threads, "start", refuse)
    assert outcome(lambda: service._aside(asker[0], refuse, ASKED)) == Errno(EAGAIN)
    assert not asker[0].busy


def test_a_request_that_memory_was_short_for_ends_its_connection(
    service: Service, asker: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    connection, theirs = asker
    ended: list[Connection] = []
    service._watch(connection.channel, lambda: None)
    monkeypatch.setattr(Channel, "receive", no_memory)
    service._serve(connection.channel, no_memory, lambda: ended.append(connection))
    assert theirs.recv(1000)[0] == ENOMEM
    assert ended == [connection]
