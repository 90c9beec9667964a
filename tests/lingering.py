"""A socket that lingers (SO_LINGER): its last close waits, because its peer reads nothing."""

import array
import encodings.idna
import os
import signal
import socket
import struct
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Final

from processes import be_idle

#: Socket addresses need this module. A process that became another user may not be able to load it.
_LOADED = encodings.idna
#: Seconds that the last close takes, and in which everybody else has to be done.
LINGER: Final = 25
SOON: Final = 15


@contextmanager
def unread() -> Generator[socket.socket]:
    """Make a connection whose other end reads nothing, and yield this end."""
    with socket.socket() as listener:
        # The kernel has so much memory for all that is not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with theirs, ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(1 << 16))
        yield ours


@contextmanager
def let_linger(
    sock: socket.socket, data: bytes = b"", before: tuple[bytes, ...] = ()
) -> Generator[bool]:
    """Send a message with a socket that lingers; return whether the kernel accepted it.

    This process keeps no copy of the socket. The socket lingers until the end of the block at most.
    """
    with unread() as lingers:
        for message in before:
            sock.send(message)
        try:
            sock.sendmsg(
                [data],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [lingers.fileno()]))],
            )
        except (PermissionError, BrokenPipeError):
            # Refused, or the receiver has hung up.
            yield False
            return
        lingers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER))
        _drop(lingers)
        yield True


def _drop(lingers: socket.socket) -> None:
    """Close a socket that lingers, without waiting if the receiver has dropped it.

    A killed process does not linger.
    """
    child = os.fork()
    if child == 0:
        be_idle()
    lingers.close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
