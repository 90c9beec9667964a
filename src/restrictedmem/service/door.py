"""A service's listening socket, and the connections that have not shown the key.

A connection that shows the key from READY is an owner's from then on. Others may ask for the state
of a service of their own user. Anybody can connect, so connections without the key are few, for
each user and in all. A further one takes the place of the oldest.
"""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EAGAIN, EMFILE, ENFILE
from typing import Final, final

from restrictedmem.burial import bury
from restrictedmem.fd import hung_up, peer_credentials, refuse_fds, spare
from restrictedmem.service.wire import KEY_BYTES, Channel

#: Abstract, so that the name goes with the process. Random, so that nobody can take it beforehand,
#: and two PID namespaces have different names.
NAME: Final = "restrictedmem/{pid}/{word}"
#: Most connections without the key, of a user and in all.
_MOST_OF_A_USER: Final = 8
_MOST: Final = 64
_BACKLOG: Final = 128
#: Connections that are accepted before other events are served: a crowd has thousands.
_AT_A_TURN: Final = 16


@final
@dataclass(eq=False, slots=True)
class Connection:
    """A connection to the listening socket: its other end's uid, and what it has shown."""

    channel: Channel
    uid: int
    #: Whether the connection has shown the key.
    owner: bool = False
    #: Tokens that were given out on the connection, oldest first.
    tokens: list[bytes] = field(default_factory=list[bytes])
    #: Whether a call is under way elsewhere: in the spawner, or in a thread.
    busy: bool = False
    #: The state that is sent in pieces, as it was at the first piece.
    status: bytes = b""


@final
class Door:
    """The listening socket, for the control thread."""

    def __init__(self, most: int) -> None:
        """Listen; ``most`` connections may have shown the key at the same time."""
        self._most = most
        self._inside = 0
        self.key = secrets.token_bytes(KEY_BYTES)
        self.name = NAME.format(pid=os.getpid(), word=secrets.token_hex(8))
        kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self.listener = socket.socket(socket.AF_UNIX, kind)
        # An accepted socket inherits this.
        refuse_fds(self.listener)
        self.listener.bind("\0" + self.name)
        self.listener.listen(_BACKLOG)
        self._outside: list[Connection] = []
        self._spare = spare()

    def accept(self) -> Iterator[Connection]:
        """Accept waiting connections, ``_AT_A_TURN`` at most; drop those that have hung up.

        Raises:
            OSError: EMFILE, ENFILE when a connection could not even be turned away. It stays in the
                queue, so a caller that asks again at once asks for ever.
        """
        for _ in range(_AT_A_TURN):
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (EMFILE, ENFILE) and not self._turn_away():
                    raise
                continue
            if hung_up(sock):
                bury(sock)
                continue
            sock.setblocking(True)
            _, uid, _ = peer_credentials(sock)
            connection = Connection(Channel(sock, "owner"), uid)
            self._outside.append(connection)
            yield connection

    def _turn_away(self) -> bool:
        """Close the next connection, which has no descriptor; return false if that fails.

        The spare number may be lost, because another thread is faster.
        """
        self._spare.close()
        try:
            bury(self.listener.accept()[0])
            done = True
        except OSError as error:
            # There may be no connection: accept(2) looks for a number first.
            done = error.errno == EAGAIN
        with suppress(OSError):
            self._spare = spare()
        return done

    def surplus(self, uid: int) -> Connection | None:
        """Return the connection that has to go, now that a user has one more.

        The result is None if none has to go.
        """
        same = [other for other in self._outside if other.uid == uid]
        if len(same) > _MOST_OF_A_USER:
            return same[0]
        return self._outside[0] if len(self._outside) > _MOST else None

    def admit(self, connection: Connection, key: bytes) -> bool:
        """Make a connection an owner's if it shows the key.

        Raises:
            OSError: EMFILE while there are too many, because pages need descriptors, too.
        """
        if not secrets.compare_digest(key, self.key):
            return False
        if self._inside >= self._most:
            raise OSError(EMFILE, f"this service has {self._most} connections")
        self.forget(connection)
        self._inside += 1
        connection.owner = True
        return True

    def forget(self, connection: Connection) -> None:
        """Note that a connection has ended."""
        if connection.owner:
            self._inside -= 1
        else:
            self._outside.remove(connection)
