"""Targets of the service: messages of owners and consumers, and the kernel's requests on files."""

import json
import os
import socket
import struct
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from errno import EACCES, EAGAIN, EIO
from typing import Final, cast

from fuzz.source import Source, answer, is_request, is_silent, messages, number_of
from restrictedmem.abi import fuse
from restrictedmem.fd import OwnedFd, close_all
from restrictedmem.fs.filesystem import FileSystem, Request
from restrictedmem.fs.fuse_server import FuseServer
from restrictedmem.fs.mount_ways import Way
from restrictedmem.fs.usage import Usage
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.service import wire
from restrictedmem.service.consumer_process import _MAX_DEPTH
from restrictedmem.service.consumers import Consumers, Troubles
from restrictedmem.service.daemon import ControlThread
from restrictedmem.service.door import Connection
from restrictedmem.service.options import VM, Options, Origin
from restrictedmem.service.signing import Signer
from restrictedmem.service.tokens import Tokens
from restrictedmem.service.wire import Channel
from restrictedmem.units import pgoff_t

#: The token that was presented on a descriptor, of which input may make use.
TOKEN: Final = b"T" * 16
_LIMIT: Final = 1 << 20
_HEAD: Final = struct.Struct("=II")
_OWNERS: Final = (
    wire.CONNECT,
    wire.TOKEN,
    wire.SPAWN,
    wire.STATUS,
    wire.SIGNING_KEY,
    wire.ERROR_PAGE,
    wire.ENDING,
)
_CONSUMERS: Final = (wire.BIND, wire.UNBIND, wire.REPORT, wire.LAUNCHED, wire.SIGN)


@contextmanager
def _presented(tokens: Tokens) -> Generator[RestrictedFile]:
    """Make a file, of which ``TOKEN`` was presented."""
    file = RestrictedFile(make("v10"), MemfdBacking(limit=_LIMIT), Inode.make(0, 0))
    tokens._files[TOKEN] = None
    tokens.prove(TOKEN, 7, file)
    try:
        yield file
    finally:
        tokens.drop(TOKEN)
        assert not file.notifier_count
        file.put()


def _service(undo: ExitStack) -> tuple[ControlThread, Channel]:
    """Make a service that runs no thread, and the spawner's end."""
    spawner, theirs = Channel.pair("spawner", takes_fds=True)
    endings, nobody = Channel.pair("spawner")
    service = ControlThread(
        spawner,
        endings,
        Options(memory_max=_LIMIT, usage=True),
        Origin(os.getpid(), 0),
        Way.OWN,
        Signer(),
        None,
        1024,
    )
    for owned in (
        spawner,
        theirs,
        endings,
        nobody,
        service._door.listener,
        service._door._spare,
        service._refusals,
        service._selector,
    ):
        undo.callback(owned.close)

    def close_spare() -> None:
        # Another by then.
        service._spawns._spare.close()

    undo.callback(close_spare)
    return service, Channel(theirs, "service", takes_fds=True)


def control(data: bytes) -> None:
    """Send requests on a connection.

    Each has one answer, which no bug caused. No request ends the connection, and no request that
    needs the key works without it.
    """
    source, undo = Source(data), ExitStack()
    service, spawner = _service(undo)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    undo.callback(ours.close)
    kind = source.number(1)
    connection = Connection(Channel(ours, "owner"), 0 if kind & 2 else 65534)
    service._door._outside.append(connection)
    service._watch(connection.channel, lambda: None)
    ended = False
    with undo, closing(theirs), _presented(service._tokens):
        if kind & 1:
            assert service._door.admit(connection, service._door.key)
        for message in messages(source, [call.number for call in _OWNERS]):
            if not message:
                break
            theirs.send(message)
            service._serve(connection)
            ended = ours not in service._selector.get_map()
            _refuse_to_fork(service, spawner, message)
            error, body = _answer(theirs)
            assert ended == (not is_request(message) or (error == EACCES and not connection.owner))
            if not ended and not error:
                _check_reply(connection, message, body)
            if ended:
                break
        assert len(connection.tokens) <= 64
        if not ended:
            service._end(connection)
    assert not service._troubles.last, service._troubles.last


def _answer(sock: socket.socket) -> tuple[int, bytes]:
    """Take the answer; behind that to what is no request is the end of the stream."""
    sock.setblocking(True)
    peeked = sock.recv(_HEAD.size, socket.MSG_PEEK)
    assert len(peeked) == _HEAD.size
    error, _ = _HEAD.unpack(peeked)
    assert error != EIO
    data = sock.recv(wire.MAX_MESSAGE)
    assert is_silent(sock) or error
    return error, data[_HEAD.size :]


def _refuse_to_fork(service: ControlThread, spawner: Channel, message: bytes) -> None:
    """Be the spawner: it hears what the owner said, and cannot fork."""
    if is_silent(spawner.sock):
        return
    spawner.sock.setblocking(True)
    asked = spawner.receive()
    assert asked is not None
    assert asked.number == wire.FORK.number
    assert len(asked.fds) == 3
    assert asked.body[wire.NUMBER.size :] == message[_HEAD.size :]
    close_all(asked.fds)
    spawner.reply_error(OSError(EAGAIN, os.strerror(EAGAIN)))
    service._forked()


def _check_reply(connection: Connection, message: bytes, body: bytes) -> None:
    """Check what a call that succeeded has answered."""
    assert connection.owner or number_of(message) in (wire.CONNECT.number, wire.STATUS.number)
    match number_of(message):
        case wire.TOKEN.number:
            assert body == connection.tokens[-1]
        case wire.STATUS.number:
            (size,) = wire.NUMBER.unpack_from(body)
            start = int.from_bytes(message[_HEAD.size :], "little")
            piece = body[wire.NUMBER.size :]
            assert start + len(piece) <= size
            assert start or json.loads(piece if len(piece) == size else b"{}") is not None
        case wire.SIGNING_KEY.number:
            assert len(body) == 32
        case wire.ERROR_PAGE.number:
            token, start, end = wire.ERROR_REQUEST.unpack(message[_HEAD.size :])
            assert token == TOKEN
            assert 0 < end - start <= 1 << 18
        case _:
            pass


def consumer(data: bytes) -> None:
    """Send a consumer's requests, and then its answer to PAGE_COUNT.

    The service keeps nothing that it could not show, and trusts no count.
    """
    source = Source(data)
    tokens, troubles = Tokens(), Troubles()
    consumers = Consumers(tokens, Options(memory_max=_LIMIT), Signer(), troubles)
    made = consumers.add(VM if source.number(1) & 1 else "dma")
    theirs, notify = made.give_sockets()
    with closing(theirs), closing(notify), _presented(tokens) as file, ExitStack() as end:
        end.callback(consumers.end, made)
        for message in messages(source, [call.number for call in _CONSUMERS]):
            if not message:
                break
            theirs.send(message)
            try:
                found = made.requests.receive()
            except OSError:
                assert not is_request(message)
                break
            assert found is not None
            troubles.answer(made.requests, lambda asked: consumers._dispatch(made, asked), found)
            error, body = answer(theirs)
            assert (
                error
                or made.name == VM
                or found.number not in (wire.LAUNCHED.number, wire.SIGN.number)
            )
            if found.number == wire.SIGN.number and not error:
                assert found.body in body
        _check_shown(made.report, _MAX_DEPTH)
        assert file.notifier_count == len(made.bindings)
        assert not troubles.last, troubles.last
        reply = source.take(32)
        if made.bindings and reply:
            notify.send(reply)
            binding = next(iter(made.bindings.values()))
            count = binding.page_count(pgoff_t(0), pgoff_t(16))
            assert (
                count
                == (
                    int.from_bytes(reply[8:], "little")
                    if reply[:4] == bytes(4) and len(reply) == 16
                    else 0
                )
                or troubles.last
            )
            assert 0 <= count <= 16


def _check_shown(report: dict[str, object], depth: int) -> None:
    """Check that a report can be in STATUS, and on a terminal."""
    text = json.dumps({"consumers": [report]}, allow_nan=False)
    assert text.isprintable()
    assert json.loads(text) == {"consumers": [report]}
    assert max(0, *(_depth(value) for value in report.values()), 0) < depth + 1
    assert all(name.isprintable() for name in report)
    assert all(value.isprintable() for value in report.values() if isinstance(value, str))


def _depth(value: object) -> int:
    match value:
        case dict() | list():
            items = cast("list[object]", [*value.values()] if isinstance(value, dict) else value)
            return 1 + max(map(_depth, items), default=0)
        case _:
            return 0


_OPCODES: Final = tuple(fuse.Opcode)
_NO_REPLY: Final = (fuse.Opcode.FORGET, fuse.Opcode.BATCH_FORGET, fuse.Opcode.INTERRUPT)
_MAX_FILES: Final = 3


def fuse_bodies(data: bytes) -> None:
    """Send the kernel's requests whose body a program can choose.

    Each has one reply, and a forgotten node is gone.
    """
    source, usage = Source(data), Usage()
    tokens = Tokens()
    tokens._files[TOKEN] = None
    filesystem = FileSystem(
        "v10", memory_max=_LIMIT, max_files=_MAX_FILES, prove=tokens.prove, usage=usage
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with closing(theirs), OwnedFd(ours.detach()) as device:
        server = FuseServer(device, filesystem)
        server._filesystem.before_waiting = lambda _: True
        unique, files = 0, set[RestrictedFile]()
        while source and unique < 24:
            unique += 1
            kind = source.number(1)
            opcode = _OPCODES[kind % len(_OPCODES)] if kind < 0xF0 else source.number(4)
            request = Request(
                opcode, unique, source.number(1), 1000, 1000, 0, source.take(source.number(1))
            )
            server._answer(request)
            _check_fuse_reply(theirs, request, filesystem)
            assert len(filesystem._nodes) <= _MAX_FILES
            files |= {node.file for node in filesystem._nodes.values()}
    tokens.drop(TOKEN)
    for number in [*filesystem._nodes]:
        filesystem._drop(number)
    assert not filesystem.files()
    assert not any(file._references for file in files)
    assert not usage._known


def _check_fuse_reply(sock: socket.socket, request: Request, filesystem: FileSystem) -> None:
    if request.opcode in _NO_REPLY:
        assert is_silent(sock) or _fuse_error(sock.recv(8192), request)
        return
    sock.settimeout(10)
    reply = sock.recv(8192)
    error = _fuse_error(reply, request)
    assert is_silent(sock)
    known = filesystem.knows(request.opcode)
    assert known != (error == 38), "ENOSYS is for ever"
    body = reply[fuse.OUT_HEADER.size :]
    if (
        request.opcode in (fuse.Opcode.GETATTR, fuse.Opcode.SETATTR)
        and not error
        and request.nodeid != fuse.ROOT_ID
    ):
        number, size, blocks, *_ = fuse.ATTR.unpack(body[fuse.ATTR_OUT.size :])
        assert number == request.nodeid
        assert size == filesystem._nodes[number].file.size < 1 << 63
        assert blocks * 512 <= _LIMIT
    if error:
        assert not body
    elif request.opcode == fuse.Opcode.FALLOCATE:
        _, offset, length, *_ = fuse.FALLOCATE_IN.unpack_from(request.body)
        assert offset + length < 1 << 63


def _fuse_error(reply: bytes, request: Request) -> int:
    error: int
    size, error, unique = fuse.OUT_HEADER.unpack_from(reply)
    assert size == len(reply)
    assert unique == request.unique
    assert -512 < error <= 0
    assert error != -EIO, "a bug, or an errno that is none"
    return -error
