"""The framing of packets in GDB's remote serial protocol (GDB manual, appendix E)."""

import select
import socket
from collections.abc import Iterator
from enum import Enum
from typing import Final, Self, final

#: The longest packet that is accepted, in bytes between ``$`` and ``#``. The stub tells gdb, which
#: keeps to it.
PACKET_SIZE: Final = 0x4000
_CHECKSUM: Final = 2
_START: Final = ord("$")
_ESCAPE: Final = ord("}")
_ESCAPED: Final = b"#$}*"


class Sign(Enum):
    """Signals of the protocol that stand outside packets."""

    INTERRUPT = 1
    """Ctrl-C."""
    AGAIN = 2
    """The last reply did not arrive intact."""
    BROKEN = 3
    """A packet did not arrive intact."""


_SIGNS: Final = {0x03: Sign.INTERRUPT, ord("-"): Sign.AGAIN}


def frame(payload: bytes) -> bytes:
    """Return a packet with ``payload``, which must be escaped."""
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


def escape(data: bytes) -> bytes:
    """Escape binary data for a payload."""
    return b"".join(
        bytes([_ESCAPE, byte ^ 0x20]) if byte in _ESCAPED else bytes([byte]) for byte in data
    )


def unescape(payload: bytes) -> bytes:
    """Undo ``escape``; an escape at the very end is dropped."""
    first, *rest = payload.split(b"}")
    return first + b"".join(bytes([piece[0] ^ 0x20]) + piece[1:] for piece in rest if piece)


@final
class Parser:
    """A parser that cuts a stream of bytes into packets and signs."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes | Sign]:
        """Take received bytes, and yield each complete payload (still escaped) and each sign.

        Bytes that are neither are dropped.
        """
        self._data += data
        while self._data:
            if self._data[0] == _START:
                item = self._packet()
                if item is None:
                    return
                yield item
            else:
                sign = _SIGNS.get(self._data.pop(0))
                if sign is not None:
                    yield sign

    def _packet(self) -> bytes | Sign | None:
        """Cut off a packet; return None until it is complete."""
        end = self._data.find(b"#")
        whole = end + 1 + _CHECKSUM
        if end < 0 or len(self._data) < whole:
            if len(self._data) <= PACKET_SIZE + 1 + _CHECKSUM:
                return None
            self._data.clear()
            return Sign.BROKEN
        payload, checksum = bytes(self._data[1:end]), bytes(self._data[end + 1 : whole])
        del self._data[:whole]
        return payload if checksum.lower() == b"%02x" % (sum(payload) & 0xFF) else Sign.BROKEN


@final
class RspConnection:
    """A connection to one gdb; it owns the socket."""

    def __init__(self, sock: socket.socket, over: int) -> None:
        """Use ``sock`` for the connection.

        ``over`` is a descriptor of the caller. Once it is readable, no method waits for a gdb that
        does not read.
        """
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self._writable.register(over, select.POLLIN)
        self._sock = sock
        self._parser = Parser()
        self._last = b""
        #: Whether packets are acknowledged: yes until gdb sends QStartNoAckMode.
        self.acknowledge = True

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def receive(self) -> Iterator[bytes | Sign]:
        """Read the bytes that have arrived, and yield the payloads and signs in them.

        Raises:
            ConnectionError: when gdb is gone, or does not read.
            BlockingIOError: when no bytes have arrived.
        """
        data = self._sock.recv(PACKET_SIZE)
        if not data:
            raise ConnectionError("gdb is gone")
        for item in self._parser.feed(data):
            if item is Sign.AGAIN:
                self._write(self._last)
            elif item is Sign.BROKEN:
                self._acknowledge(b"-")
            else:
                if item is not Sign.INTERRUPT:
                    self._acknowledge(b"+")
                yield item

    def _acknowledge(self, sign: bytes) -> None:
        if self.acknowledge:
            self._write(sign)

    def send(self, payload: bytes) -> None:
        """Send a packet; ``payload`` must be escaped.

        Raises:
            ConnectionError: when gdb is gone, or does not read.
        """
        self._last = frame(payload)
        self._write(self._last)

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self._sock.send(left) :]
            except BlockingIOError:
                if all(number != self._sock.fileno() for number, _ in self._writable.poll()):
                    raise ConnectionError("gdb does not read, and the guest is over") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
