"""Messages between owner, service and engine (docs/reference/wire-protocol.md).

Each message is one datagram over a ``SOCK_SEQPACKET`` socket. A request is a 32-bit call number, 32
bits of zero and a body. A reply is a 32-bit errno (0 for success), 32 bits of zero and a body. On
failure the body is text for a person. Descriptors are sent in SCM_RIGHTS. Integers have the
machine's byte order, because both ends are on one machine.
"""

import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntFlag
from errno import EAGAIN, EBADF, ECONNRESET, EIO, EMSGSIZE, ENOTCONN, EPIPE, EPROTO
from typing import Any, Final, Self, final

from restrictedmem import sync
from restrictedmem.failure import detail_of, failed
from restrictedmem.fd import (
    MSG_DONTWAIT,
    OwnedFd,
    all_read,
    close_all,
    receive_with_fds,
    receive_without_fds,
    refuse_fds,
    send_with_fds,
)
from restrictedmem.units import U64_MAX

_HEAD: Final = struct.Struct("=II")
#: Bytes of the longest message, header included.
MAX_MESSAGE: Final = 128 << 10
#: Bytes of a message's largest body.
MAX_BODY: Final = MAX_MESSAGE - _HEAD.size
KEY_BYTES: Final = 16
_READY_FDS: Final = 2
#: Most bytes of an error's text.
_MOST_WORDS: Final = 1000
_CANNOT: Final = "the service cannot start"
_GONE: Final = (ECONNRESET, EPIPE, ENOTCONN)


@dataclass(frozen=True, slots=True)
class Call:
    """One kind of request: its name in errors, and its number."""

    name: str
    number: int


# An owner to its service, over a connection to the listening socket that READY names.
CONNECT: Final = Call("CONNECT", 1)
"""The first call. Body: the key from READY. From then on the connection is an owner's."""
TOKEN: Final = Call("TOKEN", 2)
"""Reply: a one-time token, to be presented by ioctl on a descriptor."""
SPAWN: Final = Call("SPAWN", 3)
"""Body: name of a consumer, a space, its arguments. Reply: its number; descriptor 0 is the socket
on which it serves its owner.
"""
STATUS: Final = Call("STATUS", 4)
"""Body: none, or ``NUMBER``, the bytes of the state that the caller has. Reply: ``NUMBER``, the
bytes of the whole state, and the next of them. The state is JSON, as it was at the first piece.
"""
SIGNING_KEY: Final = Call("SIGNING_KEY", 5)
"""Reply: the public key that signs reports. It is made now if there is none yet."""
ERROR_PAGE: Final = Call("ERROR_PAGE", 6)
"""Body: ``ERROR_REQUEST``. The machine has lost pages of the file (``restrictedmem_error_page``).
The service tells the file's consumers.
"""
ENDING: Final = Call("ENDING", 7)
"""Body: ``NUMBER`` of a consumer. Reply: how its process ended, in words; empty while that is not
known.
"""

# The service to its owner, without a request, on the socket that it was started with.
READY: Final = Call("READY", 1 << 16)
"""Body: JSON that describes the service, with ``socket`` and ``key`` for CONNECT. Descriptor 0 is
the root of its mount. Descriptor 1 is its witness: a socket whose SO_PEERCRED says who the service
is.
"""

# A consumer to the service.
BIND: Final = Call("BIND", 16)
"""Body: ``BIND_REQUEST``. Registers a notifier. Reply: ``BINDING``; descriptors: the memfd, the
sequence page.
"""
UNBIND: Final = Call("UNBIND", 17)
"""Body: ``NUMBER`` of the binding. Unregisters the notifier."""
REPORT: Final = Call("REPORT", 18)
"""Body: JSON for ``ps``, which says what the consumer holds."""
LAUNCHED: Final = Call("LAUNCHED", 19)
"""Body: ``LAUNCH``. Sent once, before a guest runs. So a guest that breaks out has no say in how it
was measured.
"""
SIGN: Final = Call("SIGN", 20)
"""Body: 64 bytes of the guest's choice. Reply: a signed report over them (``report.Report``)."""
ATTRIBUTES: Final = Call("ATTRIBUTES", 21)
"""Body: ``BOUND_PAGES`` of a guest_memfd. Before the reply, the service tells the consumer by
PRIVATE which of them are private.
"""
DEVICE: Final = Call("DEVICE", 22)
"""Reply: ``NUMBER``, the device number (``st_dev``) of the files of this service."""

# The service to a consumer.
INVALIDATE_START: Final = Call("INVALIDATE_START", 32)
"""Body: ``INVALIDATION``."""
INVALIDATE_END: Final = Call("INVALIDATE_END", 33)
"""Body: ``INVALIDATION``. No reply, because the sequence has risen already."""
ERROR: Final = Call("ERROR", 34)
"""Body: ``INVALIDATION``. The machine has lost the pages."""
PAGE_COUNT: Final = Call("PAGE_COUNT", 35)
"""Body: ``INVALIDATION``. Reply: ``COUNT``, the number of pages to which the consumer holds a
reference.
"""
PRIVATE: Final = Call("PRIVATE", 36)
"""Body: ``INVALIDATION``. Pages of a guest_memfd are private from now on."""
SHARED: Final = Call("SHARED", 37)
"""Body: ``INVALIDATION``. Pages of a guest_memfd are shared from now on."""

# The service to its spawner. The spawner sends one reply without a request, when it has loaded all
# programs.
FORK: Final = Call("FORK", 48)
"""Body: ``NUMBER``, then the body of SPAWN. Descriptors: the consumer's ends to its owner and to
the service, and the end on which it is notified. One at a time. Reply: descriptor 0 is a pidfd of
the consumer's process.
"""
BURY: Final = Call("BURY", 50)
"""Descriptor 0 is a socket to close, whose queue may hold a socket that lingers (``burial``).
Without a descriptor: the service has closed its own copies. No reply.
"""

# The spawner to the service, without a request, on a connection of its own.
ENDED: Final = Call("ENDED", (1 << 16) + 1)
"""Body: ``NUMBER`` of a consumer, then how its process ended, in words. No reply."""

#: A token presented by ioctl, or as ``BindFlag.AGAIN`` has it; first page and page after the last
#: of the range that the consumer will use, empty to register a notifier for the whole file;
#: ``BindFlag``.
BIND_REQUEST: Final = struct.Struct("=16sQQQ")
#: A token presented by ioctl; first page and page after the last of those that the machine has
#: lost.
ERROR_REQUEST: Final = struct.Struct("=16sQQ")
NUMBER: Final = struct.Struct("=Q")
#: A binding's number, first page, page after the last.
BOUND_PAGES: Final = struct.Struct("=QQQ")


class BindFlag(IntFlag):
    """How a range is bound, where the file's design has bindings."""

    EXCLUSIVE = 1
    """No other binding may have a page of the range."""
    AGAIN = 2
    """For a file that the consumer already has. ``NUMBER`` of one of its bindings stands in the
    token's place, and no descriptors come back.
    """


class BindingFlag(IntFlag):
    """The way to take a file's pages, and the extent of its callbacks."""

    HUGEPAGE = 1
    """Take folios of 2 MiB where a block is taken whole (RMFD_HUGEPAGE)."""
    PIN = 2
    """Pin pages: take them with a reference that keeps them where they are."""
    RANGE = 4
    """Callbacks come for the bound range alone (design ``bindings``), else for the whole file."""
    GUEST_MEMFD = 8
    """The file is a guest_memfd, whose owner converts its pages in place."""


#: A binding: its number, the file's inode number, the limit on the file's bytes (0 for none),
#: ``BindingFlag``, and the order of the backing's smallest folio.
BINDING: Final = struct.Struct("=QQQII")
COUNT: Final = struct.Struct("=Q")
#: Policy, name of the engine, measurement.
LAUNCH: Final = struct.Struct("=I16s48s")
#: A binding's number, first page, page after the last, and the order of the folio that they lie in,
#: or ``NO_FOLIO``.
INVALIDATION: Final = struct.Struct("=QQQQ")
NO_FOLIO: Final = U64_MAX


@dataclass(frozen=True, slots=True)
class Message:
    """A request as it arrived.

    A caller that takes a descriptor out of ``fds`` owns it. The rest is closed after the reply.
    """

    number: int
    body: bytes
    fds: list[OwnedFd]

    def take_fd(self) -> OwnedFd:
        """Take the next descriptor.

        Raises:
            OSError: EPROTO when there is none.
        """
        if not self.fds:
            raise OSError(EPROTO, "a descriptor is missing")
        return self.fds.pop(0)

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Decode a body that has exactly the layout's length.

        Raises:
            OSError: EPROTO for another length.
        """
        if len(self.body) != layout.size:
            raise OSError(EPROTO, f"body of {len(self.body)} bytes, {layout.size} expected")
        return layout.unpack(self.body)


@final
class Channel:
    """One end of a connection, which owns its socket. Calls of several threads take turns."""

    __slots__ = ("_mutex", "_why", "peer", "sock", "takes_fds")

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        *,
        takes_fds: bool = False,
        why: Callable[[], str] | None = None,
    ) -> None:
        """Speak over ``sock``; ``peer`` names the other end in errors.

        ``why`` says how the other end ended when it is gone. Set ``takes_fds`` for a peer that this
        process trusts. Descriptors of any other peer never get here, because closing one may mean
        to wait for that peer for ever.
        """
        self.sock = sock
        self.peer = peer
        self.takes_fds = takes_fds
        self._why = why
        self._mutex = sync.mutex()

    @classmethod
    def pair(cls, peer: str, *, takes_fds: bool = False) -> tuple[Self, socket.socket]:
        """Make a connection; return this end, and the socket for the other end.

        The other end can receive descriptors. This end can with ``takes_fds``.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if not takes_fds:
            refuse_fds(ours)
        return cls(ours, peer, takes_fds=takes_fds), theirs

    def _receive(self, flags: int = 0) -> tuple[bytes, list[OwnedFd]]:
        if self.takes_fds:
            return receive_with_fds(self.sock, MAX_MESSAGE, flags=flags)
        return receive_without_fds(self.sock, MAX_MESSAGE, flags), []

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 after close."""
        return self.sock.fileno()

    def call(
        self, call: Call, body: bytes = b"", fds: Sequence[int] = ()
    ) -> tuple[bytes, list[OwnedFd]]:
        """Send a request and wait for its reply; the caller owns the descriptors in it.

        Raises:
            OSError: the errno of the reply, with the call's name; ENOTCONN when the other end is
                gone; TimeoutError past the socket's timeout. If the reply may still come, the
                connection is closed.
        """
        with self._mutex:
            if self.fileno() < 0:
                raise failed(call.name, ENOTCONN, f"the connection to {self.peer} is closed")
            data, received = self._make_round_trip(_HEAD.pack(call.number, 0) + body, fds)
        if len(data) < _HEAD.size:
            close_all(received)
            why = self._why() if self._why is not None else ""
            raise failed(call.name, ENOTCONN, f"{self.peer} is gone" + (f": {why}" if why else ""))
        error_number, _ = _HEAD.unpack_from(data)
        if error_number:
            close_all(received)
            detail = data[_HEAD.size :].decode(errors="replace")
            raise failed(call.name, error_number, detail)
        return data[_HEAD.size :], received

    def _make_round_trip(self, message: bytes, fds: Sequence[int]) -> tuple[bytes, list[OwnedFd]]:
        """Send a request and wait for its reply, which is empty when the other end is gone."""
        sent = False
        try:
            send_with_fds(self.sock, message, fds)
            sent = True
            return self._receive()
        except OSError as error:
            if error.errno in _GONE:
                return b"", []
            # With EMSGSIZE a reply has come, and was cut off.
            if sent and error.errno != EMSGSIZE:
                self.close()
            raise
        except BaseException:
            # For instance, there was no memory, or a signal's handler raised an error. The reply is
            # still to come, and the next call would take it for its own.
            self.close()
            raise

    def post(
        self, call: Call, body: bytes = b"", fds: Sequence[int] = (), *, wait: bool = True
    ) -> None:
        """Send a request that has no reply.

        With ``wait``, wait for room for the message.

        Raises:
            OSError: EPIPE when the other end is gone; EAGAIN.
        """
        send_with_fds(
            self.sock, _HEAD.pack(call.number, 0) + body, fds, 0 if wait else socket.MSG_DONTWAIT
        )

    def receive(self, flags: int = 0) -> Message | None:
        """Wait for a request; return None when the other end is gone.

        ``flags`` are recvmsg's.

        Raises:
            OSError: EPROTO for a message that is no request, or has descriptors that are not taken;
                EMSGSIZE for one that is too long; EAGAIN with MSG_DONTWAIT.
        """
        try:
            data, fds = self._receive(flags)
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise
        if not data:
            close_all(fds)
            return None
        if len(data) < _HEAD.size:
            close_all(fds)
            raise OSError(EPROTO, f"message of {len(data)} bytes")
        number, _ = _HEAD.unpack_from(data)
        return Message(number, data[_HEAD.size :], fds)

    def reply(self, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Answer a request with success; a peer that is gone is not an error."""
        self._send_reply(_HEAD.pack(0, 0) + body, fds)

    def reply_error(self, error: OSError) -> None:
        """Answer a request with an errno and the error's text; hang up if even that fails."""
        number = error.errno or EIO
        try:
            # The text includes the path.
            words = ": ".join(
                filter(None, (error.filename and str(error.filename), detail_of(error)))
            )
            self._send_reply(
                _HEAD.pack(number, 0) + words.encode(errors="replace")[:_MOST_WORDS], ()
            )
        except (OSError, MemoryError):
            # The caller would wait for ever.
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def check_read(self) -> None:
        """Check that the peer has received every answer, before one that brings a descriptor.

        Descriptors in flight count for the uid of their sender (unix(7)). A peer that leaves them
        there would make everybody else's fail.

        Raises:
            OSError: EAGAIN while the peer has not.
        """
        if not all_read(self.sock):
            raise failed("sendmsg", EAGAIN, "the answers before this one have not been read")

    def _send_reply(self, data: bytes, fds: Sequence[int]) -> None:
        # Never wait: a peer that asks without reading the answers must not stop a process that
        # serves others too.
        try:
            send_with_fds(self.sock, data, fds, MSG_DONTWAIT)
        except OSError as error:
            if error.errno == EAGAIN:
                self.sock.shutdown(socket.SHUT_RDWR)
            elif error.errno not in (*_GONE, EBADF):
                raise

    def close(self) -> None:
        """Close the socket.

        The other end notices once no thread waits in a call, and no child has a copy.
        """
        self.sock.close()


def parse_ready(received: tuple[bytes, list[OwnedFd]]) -> tuple[bytes, list[OwnedFd]]:
    """Check the first message of a service; return its body and both descriptors.

    Raises:
        OSError: the errno of the service's failure; ECONNRESET when it died without a word, or when
            many of this uid have not read why ``serve`` refused them; EPROTO without a descriptor.
    """
    data, fds = received
    if len(data) < _HEAD.size:
        raise failed(
            "start",
            ECONNRESET,
            "the service died while it started, or serve has turned away many of this uid",
        )
    number, _ = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if number != READY.number:
        close_all(fds)
        # The service's own errors name the same call.
        words = body.decode(errors="replace").removeprefix("start: ")
        raise failed("start", number, _CANNOT + (f": {words}" if words else ""))
    if len(fds) != _READY_FDS:
        close_all(fds)
        raise failed("READY", EPROTO, f"{len(fds)} descriptors")
    return body, fds
