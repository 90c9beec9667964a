"""The control thread of a service.

It answers each request or ends its connection, whatever happens to the request.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from errno import EAGAIN, EBUSY, EIO, ENFILE, ENOMEM, ETOOMANYREFS
from types import SimpleNamespace

import pytest

from outcomes import Errno, in_child, outcome
from restrictedmem import threads
from restrictedmem.abi import fuse
from restrictedmem.abi.fuse import Opcode
from restrictedmem.fd import OwnedFd, readable, spare
from restrictedmem.fs.filesystem import Request
from restrictedmem.fs.mount_ways import Way
from restrictedmem.fs.owner_abi import NAME
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.service import daemon, sealing, status, wire
from restrictedmem.service.consumers import Consumers
from restrictedmem.service.daemon import ControlThread
from restrictedmem.service.door import Connection
from restrictedmem.service.ending import Word
from restrictedmem.service.options import Options, Origin
from restrictedmem.service.signing import Signer
from restrictedmem.service.wire import Call, Channel, Message

PATIENCE = 10.0
ASKED = Message(6, b"", [])


@pytest.fixture
def service() -> Iterator[ControlThread]:
    spawner, theirs = Channel.pair("spawner", takes_fds=True)
    endings, heard = Channel.pair("spawner")
    with theirs, heard, ExitStack() as stack:
        found = ControlThread(
            spawner, endings, Options(), Origin(1, 0), Way.OWN, Signer(), None, 1000
        )
        stack.callback(spawner.close)
        stack.callback(endings.close)
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


def nothing(*_: object, **__: object) -> None:
    """Keep this process as it is."""


def start(
    owner: Channel, monkeypatch: pytest.MonkeyPatch, seal: Callable[[], None] = nothing
) -> None:
    """Start a service in this process, on a device and a root that are none."""

    def mounted() -> tuple[Way, OwnedFd, OwnedFd]:
        return Way.OWN, spare(), spare()

    monkeypatch.setattr(daemon, "mount_first", mounted)
    monkeypatch.setattr(daemon, "drop_privileges", nothing)
    monkeypatch.setattr(sealing, "seal", seal)
    spawner, theirs = Channel.pair("spawner", takes_fds=True)
    Channel(theirs, "service").reply()
    endings, heard = Channel.pair("spawner")
    with heard:
        daemon.run(owner, spawner, endings, Options(), Origin(1, 0), Word(), None)


@pytest.mark.parametrize(
    ("place", "call", "errno"),
    [(threads, "start", EAGAIN), (Channel, "post", ETOOMANYREFS)],
    ids=["no thread", "too much in flight"],
)
def test_what_a_start_fails_of_is_said_in_the_place_of_ready(
    place: object, call: str, errno: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno, os.strerror(errno))

    owner, ours = Channel.pair("owner")
    ours.settimeout(PATIENCE)

    def body() -> None:
        monkeypatch.setattr(place, call, fail)
        start(owner, monkeypatch)

    with closing(owner), ours:
        assert in_child(body) == repr(Errno(errno))
        owner.close()
        assert (ours.recv(1000)[0], ours.recv(1)) == (errno, b"")


def test_ready_is_said_when_there_is_somebody_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, ours = Channel.pair("owner")
    ours.settimeout(PATIENCE)
    began: list[bool] = []

    def begin(_: Callable[[], object]) -> None:
        began.append(not readable([ours], 0))

    def body() -> object:
        monkeypatch.setattr(threads, "start", begin)
        monkeypatch.setattr(daemon, "FuseServer", lambda *_: SimpleNamespace(run=bool))  # pyright: ignore
        start(owner, monkeypatch)
        return began

    with closing(owner), ours:
        assert in_child(body) == "[True]"
        owner.close()
        said = ours.recv(1000)
        assert Call("READY", int.from_bytes(said[:4], "little")) == wire.READY
        about = json.loads(said[said.index(b"{") :])
        assert (about["api"], about["design"]) == ("v10", "v10")


def test_the_service_is_sealed_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, ours = Channel.pair("owner")
    sealed: list[bool] = []

    def seal() -> None:
        sealed.append(not readable([ours], 0))

    def body() -> object:
        monkeypatch.setattr(threads, "start", nothing)
        monkeypatch.setattr(daemon, "FuseServer", lambda *_: SimpleNamespace(run=bool))  # pyright: ignore
        start(owner, monkeypatch, seal)
        return sealed

    with closing(owner), ours:
        assert in_child(body) == "[True]"


def test_the_service_ends_after_its_last_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mount may go first.

    A consumer is then still at work, and the service hears how that ends.
    """

    def body() -> object:
        order: list[str] = []
        server = SimpleNamespace(run=lambda: order.append("mount"))
        monkeypatch.setattr(daemon, "FuseServer", lambda *_: server)  # pyright: ignore
        monkeypatch.setattr(Consumers, "wait_idle", lambda _: order.append("consumers"))  # pyright: ignore
        start(owner, monkeypatch)
        return order

    owner, ours = Channel.pair("owner")
    with closing(owner), ours:
        assert in_child(body) == "['mount', 'consumers']"


def test_descriptors_are_spared_for_sockets(service: ControlThread) -> None:
    def create() -> bool:
        body = (
            bytes(
                fuse.fuse_create_in(
                    flags=os.O_RDWR | os.O_CREAT, mode=0o100600, umask=0, open_flags=0
                )
            )
            + NAME
            + b"\0"
        )
        return (
            service.filesystem.handle(Request(Opcode.CREATE, 1, fuse.ROOT_ID, 0, 0, 0, body))
            is not None
        )

    # The fixture's service may have 1000.
    assert all(create() for _ in range(1000 - 256))
    assert outcome(create) == Errno(ENFILE)
    for file in service.filesystem.files().values():
        file.put()


def test_status_keeps_no_file(service: ControlThread) -> None:
    body = (
        bytes(
            fuse.fuse_create_in(flags=os.O_RDWR | os.O_CREAT, mode=0o100600, umask=0, open_flags=0)
        )
        + NAME
        + b"\0"
    )
    service.filesystem.handle(Request(Opcode.CREATE, 1, fuse.ROOT_ID, 0, 0, 0, body))
    ((node, file),) = service.filesystem.files().items()
    status.of_files(service.filesystem, None)
    service.filesystem.handle(Request(Opcode.RELEASE, 2, node, 0, 0, 0, bytes(24)))
    assert not file.get_unless_zero()


@pytest.mark.parametrize(
    ("failure", "errno"),
    [
        (None, 0),
        (OSError(EAGAIN, "x"), EAGAIN),
        (MemoryError(), ENOMEM),
        (ValueError("a bug"), EIO),
    ],
    ids=repr,
)
def test_what_is_done_aside_is_answered(
    failure: Exception | None,
    errno: int,
    service: ControlThread,
    asker: tuple[Connection, socket.socket],
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
    service: ControlThread, asker: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise OSError(EAGAIN, "no thread to be had")

    monkeypatch.setattr(threads, "start", refuse)
    assert outcome(lambda: service._aside(asker[0], refuse, ASKED)) == Errno(EAGAIN)
    assert not asker[0].busy


def test_a_request_that_memory_was_short_for_ends_its_connection(
    service: ControlThread, asker: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    connection, theirs = asker
    service._watch(connection.channel, lambda: None)
    monkeypatch.setattr(Channel, "receive", no_memory)
    service._serve(connection)
    assert theirs.recv(1000)[0] == ENOMEM
    assert not theirs.recv(1000)


def test_a_page_that_was_lost_keeps_no_file(
    service: ControlThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    file.get()
    monkeypatch.setattr(service._tokens, "take", lambda _: (1, file))  # pyright: ignore
    service._error_page(
        Message(wire.ERROR_PAGE.number, wire.ERROR_REQUEST.pack(bytes(16), 0, 1), [])
    )
    file.put()
    assert not file.get_unless_zero()
