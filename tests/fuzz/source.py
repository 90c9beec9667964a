"""Parts that targets share: input taken from its front, messages made of it, checks of errors."""

import socket
import struct
from collections.abc import Iterator, Sequence
from errno import EIO, errorcode
from typing import Final

from restrictedmem.fd import close_all, receive_with_fds
from restrictedmem.service.wire import MAX_MESSAGE

_HEAD: Final = struct.Struct("=II")
#: Kinds of message beside the known calls.
_ANY_NUMBER: Final = 0xFE
_NO_REQUEST: Final = 0xFF
#: Messages of one input.
_MOST: Final = 16
#: Seconds until an answer is missing.
_DEADLINE: Final = 10.0


class Source:
    """Input of a target; whatever is asked for beyond its end is zero, or shorter."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        self._at += count
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def rest(self) -> bytes:
        return self.take(len(self._data))


def messages(source: Source, calls: Sequence[int]) -> Iterator[bytes]:
    """Make messages: a byte for the kind, two for the size, then the body.

    The kind is an index into ``calls``, or says that the number comes first, or that this is no
    request at all.
    """
    for _ in range(_MOST):
        if not source:
            return
        kind = source.number(1)
        if kind == _NO_REQUEST:
            yield source.take(source.number(1) % _HEAD.size)
            return
        number = source.number(4) if kind == _ANY_NUMBER else calls[kind % len(calls)]
        yield _HEAD.pack(number, 0) + source.take(source.number(2))


def is_request(message: bytes) -> bool:
    return len(message) >= _HEAD.size


def number_of(message: bytes) -> int:
    return int.from_bytes(message[:4], "little")


def answer(sock: socket.socket) -> tuple[int, bytes]:
    """Take the one answer to a request: its errno, which is no bug's, and its body."""
    sock.settimeout(_DEADLINE)
    data, fds = receive_with_fds(sock, MAX_MESSAGE)
    close_all(fds)
    error, zero = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    assert not zero
    assert not error or error in errorcode
    assert error != EIO, body.decode(errors="replace")
    assert is_silent(sock), "two answers"
    return error, body


def is_silent(sock: socket.socket) -> bool:
    """Whether nothing can be received, and the other end is there."""
    sock.setblocking(False)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    return False


def check_declared(error: OSError, *errnos: int) -> None:
    """Check that the parser's docstring names an error, and that the error has a printable text."""
    assert error.errno in errnos, error
    assert error.strerror
    error.strerror.encode()
