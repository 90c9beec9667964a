"""Errors that end a connection, and that its other end may never read.

The kernel charges a message to the memory cgroup of its sender until it is read, even if the sender
has closed its end. So a process that strangers connect to keeps its end of a refused connection
until the error was read. It keeps some connections of each uid, and some in all. Beyond these
limits a connection ends without an error.
"""

import select
import socket
from typing import Final, final

from restrictedmem.burial import bury
from restrictedmem.fd import all_read
from restrictedmem.service.wire import Channel

#: Most errors that may be unread, of a uid and in all.
_MOST_OF_A_USER: Final = 8
_MOST: Final = 64


@final
class Refusals:
    """Refused connections whose error was not read yet, for one thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        #: By descriptor: the uid of the other end, and this end.
        self._unread: dict[int, tuple[int, socket.socket]] = {}

    def fileno(self) -> int:
        """Return a descriptor that can be read when there is something to ``hear``."""
        return self._epoll.fileno()

    def hear(self) -> None:
        """Close the connections whose error was read, or whose other end was closed."""
        for fd, _ in self._epoll.poll(0):
            _, sock = self._unread[fd]
            if all_read(sock):
                del self._unread[fd]
                # The copy that a burial makes would keep it registered.
                self._epoll.unregister(fd)
                bury(sock)

    def refuse(self, sock: socket.socket, uid: int, error: OSError) -> None:
        """Take over a connection of ``uid``, and end it with an error as an answer."""
        # A client that has read its last error is often back before its event was heard.
        self.hear()
        of_user = sum(other == uid for other, _ in self._unread.values())
        if of_user >= _MOST_OF_A_USER or len(self._unread) >= _MOST:
            bury(sock)
            return
        Channel(sock, "client").reply_error(error)
        # The other end finds the end of the stream after the error.
        sock.shutdown(socket.SHUT_WR)
        self._unread[sock.fileno()] = uid, sock
        # An event comes whenever a message was read, or the other end was shut down or closed.
        self._epoll.register(sock, select.EPOLLOUT | select.EPOLLET)

    def close(self) -> None:
        """Close all connections; unread errors stay unread."""
        for _, sock in self._unread.values():
            bury(sock, shared=True)
        self._unread.clear()
        self._epoll.close()
