"""The service that ``serve`` starts for each client.

No client waits for another user's. A uid has a number of places. Each client of the uid holds one
from its connection until nothing of its service is left. A few clients of a uid are started at the
same time; the others wait for these. One thread does all of this. It waits in one system call
alone, so nobody can hold it up.
"""

import os
import select
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from errno import EAGAIN, ETIMEDOUT
from functools import partial
from math import inf
from typing import Final, Protocol, final

from restrictedmem.burial import bury
from restrictedmem.fd import OwnedFd, hung_up, peer_credentials, readable
from restrictedmem.patience import SLICE, Clock
from restrictedmem.service.client_cgroups import ClientCgroups
from restrictedmem.service.exec_service import START_DEADLINE, start_process
from restrictedmem.service.options import Options
from restrictedmem.service.refusals import Refusals
from restrictedmem.service.uids import Uids
from restrictedmem.users import is_known

#: Services of one uid that are started at the same time.
_AT_ONCE: Final = 2
#: Connections that are accepted before other events are served: a crowd has thousands.
_AT_A_TURN: Final = 64
#: Seconds without accept(2) after it failed for lack of descriptors or memory.
_PAUSE: Final = 0.1


class _HasFd(Protocol):
    def fileno(self) -> int: ...


@final
@dataclass(eq=False)
class _User:
    """The clients of one uid.

    All clients whose uids are not known here are one user (``users``).
    """

    #: The uid, and gid, that only this user's services have; None if all services have the same
    #: uid.
    own: int | None = None
    waiting: "deque[_Client]" = field(default_factory=deque["_Client"])
    starting: int = 0
    #: Clients that wait, start, or have a service.
    places: int = 0
    #: Whether ``say`` was told, since the last start, that no place is left.
    full: bool = False


@final
@dataclass(eq=False)
class _Client:
    """One client's place."""

    pid: int
    uid: int
    #: Open until the client's service has started.
    sock: socket.socket
    #: The process that starts the service, and its pidfd, until that process has ended.
    process: subprocess.Popen[bytes] | None = None
    pidfd: OwnedFd | None = None
    deadline: float = inf
    #: The write end of a pipe. All processes of the service have inherited the read end. When no
    #: reader is left, nothing of the service is left.
    life: OwnedFd | None = None


@final
class ClientServices:
    """The server for the clients of a listening socket, which does not block.

    Each uid has ``most`` places. ``say`` is told what happens. If there are ``uids``, the services
    of each client's uid run as one of them (``uids``). If there are ``cgroups``, they run in one.
    """

    def __init__(
        self,
        listener: socket.socket,
        options: Options,
        most: int,
        say: Callable[[str], None],
        uids: Sequence[int] = (),
        cgroups: ClientCgroups | None = None,
    ) -> None:
        self._listener = listener
        self._options = options
        self._most = most
        self._say = say
        self._uids = Uids(uids)
        self._cgroups = cgroups
        #: Whether ``say`` was told, since a uid came free, that all uids are taken.
        self._crowded = False
        self._users: dict[int, _User] = {}
        #: Clients whose socket is open.
        self._clients: set[_Client] = set()
        self._refusals = Refusals()
        #: Clients that start, in the order of their deadlines.
        self._starting: dict[_Client, None] = {}
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[], None]] = {}
        #: For deadlines: the time of a suspended machine does not count.
        self._clock = Clock()
        self._resume = inf
        #: Whether ``say`` was told that accept(2) fails.
        self._short = False

    def run(self, stop: int) -> None:
        """Serve until the descriptor ``stop`` can be read; running services go on."""
        self._epoll.register(stop, select.EPOLLIN)
        self._watch(self._listener, select.EPOLLIN, self._accept)
        self._watch(self._refusals, select.EPOLLIN, self._refusals.hear)
        while True:
            # Serve one event at a time: that may close another event's descriptor, or have its
            # number used again.
            for fd, _ in self._epoll.poll(self._patience(), 1):
                if fd == stop:
                    for client in list(self._clients):
                        self._hang_up(client, shared=True)
                    self._refusals.close()
                    return
                self._ready[fd]()
            self._expire()

    def _watch(self, file: _HasFd, events: int, ready: Callable[[], None]) -> None:
        """Call ``ready`` at some events, and at a hang-up or an error in any case."""
        self._ready[file.fileno()] = ready
        self._epoll.register(file.fileno(), events)

    def _forget(self, file: _HasFd) -> None:
        if self._ready.pop(file.fileno(), None) is not None:
            self._epoll.unregister(file.fileno())

    # Time.

    def _patience(self) -> float | None:
        first = next((client.deadline for client in self._starting), inf)
        until = min(first, self._resume)
        if until == inf:
            return None
        return min(SLICE, max(0.0, until - self._clock.look()))

    def _expire(self) -> None:
        now = self._clock.look()
        if now >= self._resume:
            self._resume = inf
            self._watch(self._listener, select.EPOLLIN, self._accept)
        for client in [client for client in self._starting if client.deadline <= now]:
            self._kill(client)
            words = f"it did not come up within {START_DEADLINE:g} s"
            self._refuse(client, OSError(ETIMEDOUT, words))

    # One client, from its connection to the end of its service.

    def _accept(self) -> None:
        for _ in range(_AT_A_TURN):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue
            except OSError as error:
                # Without a free number, accept(2) fails even if no connection waits.
                if not readable([self._listener], 0):
                    return
                # The connection stays in the queue, and the event would come again at once.
                if not self._short:
                    self._say(f"clients have to wait: {error.strerror}")
                self._short = True
                self._forget(self._listener)
                self._resume = self._clock.look() + _PAUSE
                return
            self._short = False
            if hung_up(sock):
                bury(sock)
            else:
                self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        pid, uid, _ = peer_credentials(sock)
        client = _Client(pid, uid, sock)
        user = self._users.get(uid) or self._new_user(client)
        if user is None or user.places >= self._most:
            self._turn_away(client, user)
            return
        user.places += 1
        self._clients.add(client)
        user.waiting.append(client)
        self._watch(sock, 0, partial(self._hung_up, client))
        self._start_next(user)

    def _new_user(self, client: _Client) -> _User | None:
        """Make a user; return None when all uids for services are taken."""
        own = None
        if self._uids:
            own = self._uids.give(client.uid, self._users)
            if own is None:
                return None
        self._users[client.uid] = user = _User(own)
        return user

    def _turn_away(self, client: _Client, user: _User | None) -> None:
        if user is None:
            words = f"all {len(self._uids)} uids of services are taken"
        else:
            words = f"{_whose(client.uid)} has {user.places} services here, as many as it may"
        if not (self._crowded if user is None else user.full):
            self._say(f"client {client.pid}: {words}")
        if user is None:
            self._crowded = True
        else:
            user.full = True
        self._refusals.refuse(client.sock, client.uid, OSError(EAGAIN, words))

    def _start_next(self, user: _User) -> None:
        while user.waiting and user.starting < _AT_ONCE:
            client = user.waiting.popleft()
            if hung_up(client.sock):
                self._hang_up(client)
                self._leave(client)
                continue
            # Do not log earlier: a client that connects and hangs up, again and again, must not
            # fill the log.
            self._say(f"client {client.pid} of {_whose(client.uid)}")
            user.full = False
            try:
                self._start(client)
            except OSError as error:
                # The error is this client's alone, for instance that no process can be made now.
                self._refuse(client, error)
                self._leave(client)
            else:
                user.starting += 1
                self._starting[client] = None

    def _start(self, client: _Client) -> None:
        reader, writer = map(OwnedFd, os.pipe())
        try:
            with reader, self._cgroup_for(client) as cgroup:
                # A session of its own gives each client its own share of the processor, for the
                # start of its service, too.
                process = start_process(
                    client.sock,
                    self._options_for(client),
                    [reader.fileno()],
                    own_session=True,
                    cgroup=cgroup,
                )
            try:
                pidfd = OwnedFd(os.pidfd_open(process.pid))
            except OSError:
                process.kill()
                process.wait()
                raise
        except BaseException:
            writer.close()
            raise
        client.process, client.pidfd, client.life = process, pidfd, writer
        client.deadline = self._clock.look() + START_DEADLINE
        self._watch(pidfd, select.EPOLLIN, partial(self._started, client))
        self._watch(writer, 0, partial(self._ended, client))

    def _options_for(self, client: _Client) -> Options:
        own = self._users[client.uid].own
        return self._options if own is None else replace(self._options, become=(own, own))

    def _cgroup_for(self, client: _Client) -> AbstractContextManager[OwnedFd | None]:
        return nullcontext() if self._cgroups is None else self._cgroups.open(client.uid)

    def _refuse(self, client: _Client, error: OSError) -> None:
        self._say(f"client {client.pid}: {error.strerror}")
        self._forget(client.sock)
        self._clients.discard(client)
        self._refusals.refuse(client.sock, client.uid, error)

    def _kill(self, client: _Client) -> None:
        """Kill the process that starts a service.

        A child that it has forked by then finds no client, and ends.
        """
        self._starting.pop(client, None)
        if client.process is not None:
            client.process.kill()

    def _hung_up(self, client: _Client) -> None:
        self._hang_up(client)
        if client.process is not None:
            self._kill(client)
            return
        self._users[client.uid].waiting.remove(client)
        self._leave(client)

    def _hang_up(self, client: _Client, *, shared: bool = False) -> None:
        self._forget(client.sock)
        self._clients.discard(client)
        bury(client.sock, shared=shared)

    def _started(self, client: _Client) -> None:
        """Note that the starting process has ended: the service runs, or never will."""
        assert client.process is not None
        assert client.pidfd is not None
        self._forget(client.pidfd)
        client.pidfd.close()
        client.process.wait()
        client.process = client.pidfd = None
        self._starting.pop(client, None)
        if client in self._clients:
            # A child of the starting process answers the client.
            self._hang_up(client, shared=True)
        user = self._users[client.uid]
        user.starting -= 1
        if client.life is None:
            self._leave(client)
        self._start_next(user)

    def _ended(self, client: _Client) -> None:
        """Note that nothing of the service is left."""
        assert client.life is not None
        self._forget(client.life)
        client.life.close()
        client.life = None
        if client.process is None:
            self._leave(client)

    def _leave(self, client: _Client) -> None:
        user = self._users[client.uid]
        user.places -= 1
        if not user.places:
            del self._users[client.uid]
            self._crowded = False
            if user.own is not None:
                self._uids.rest(client.uid)
            if self._cgroups is not None:
                self._cgroups.leave(client.uid)


def _whose(uid: int) -> str:
    return f"uid {uid}" if is_known(uid) else "an unknown uid"
