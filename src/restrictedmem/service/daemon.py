"""The service: FUSE, the requests of owners, and the consumers.

FUSE runs in the main thread, and the requests of owners in the control thread. Each consumer has a
thread (``consumers``). The service takes descriptors from nobody. If it held another party's FUSE
file, it could not even be killed (FUSE_FLUSH). Owners connect to the service. The service makes the
connections to consumers itself.

No thread is ever busy: all wait in system calls. A connection that sends a malformed message gets
an error, and nobody else notices. When a connection breaks off, only its own resources go with it.
"""

import json
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from errno import E2BIG, EACCES, EBUSY, EINVAL, EIO, EPROTO
from functools import partial
from typing import Final, final

from restrictedmem import threads
from restrictedmem.abi import fuse, process, stat
from restrictedmem.burial import bury, bury_elsewhere
from restrictedmem.failure import status_of
from restrictedmem.fd import MSG_DONTWAIT, OwnedFd
from restrictedmem.fs.filesystem import FileSystem
from restrictedmem.fs.fuse_server import FuseServer
from restrictedmem.fs.invalidator import Invalidator
from restrictedmem.fs.mount_ways import Way
from restrictedmem.fs.mounter import mount_first
from restrictedmem.fs.usage import Usage
from restrictedmem.service import sealing, signing, status, wire
from restrictedmem.service.consumers import Consumers, Troubles
from restrictedmem.service.door import Connection, Door
from restrictedmem.service.ending import Word
from restrictedmem.service.oom import OomScore
from restrictedmem.service.options import Options, Origin
from restrictedmem.service.privileges import drop_privileges
from restrictedmem.service.program import Programs
from restrictedmem.service.refusals import Refusals
from restrictedmem.service.signing import Signer
from restrictedmem.service.spawn_requests import Spawns
from restrictedmem.service.tokens import Tokens
from restrictedmem.service.wire import Channel, Message
from restrictedmem.units import PAGE_SHIFT, pgoff_t
from restrictedmem.users import is_own

log = logging.getLogger(__name__)

#: Descriptors that the service keeps free for sockets and sequence pages: this number, or a quarter
#: of all if that is more.
_SPARE_FDS: Final = 256
#: Seconds until connections are accepted again after there was no descriptor for one.
_PAUSE: Final = 0.1
#: Pages of the largest folio, 1 GiB.
_LARGEST_FOLIO: Final = 1 << 30 - PAGE_SHIFT


def run(
    owner: Channel,
    spawner: Channel,
    endings: Channel,
    options: Options,
    origin: Origin,
    word: Word,
    invalidator: Invalidator | None,
) -> None:
    """Be the service until the mount and every consumer are gone.

    ``word`` is told when the service is ready.

    Raises:
        OSError: when the mount, a socket or a thread cannot be made, or READY cannot be sent; the
            owner was told.
    """
    try:
        way, device, root = mount_first()
        # Open /dev/fuse before this process becomes another user.
        if invalidator is not None:
            with fuse.clone(device) as clone:
                invalidator.give(clone)
        signing.preload()
        signer = Signer() if options.signing_key is None else Signer.load(options.signing_key)
        # Open it before this process becomes another user: the file of a process that is not
        # dumpable is root's. Huge pages do not count, because nobody else could have that memory.
        counts = options.become is not None and not options.backing.startswith("hugetlb")
        score = OomScore.open() if counts else None
        drop_privileges(options.become, keep=0)
        # The change of uid has reset it.
        process.prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
        service = ControlThread(
            spawner, endings, options, origin, way, signer, score, process.raise_fd_limit()
        )
        service.consumers.device = stat.identity(root.fileno())[0]
        sealing.seal()
        service.wait_loaded()
        if invalidator is not None:
            service.filesystem.drop_pages = invalidator.drop
        # This process must not fork, because it has threads and /dev/fuse.
        bury_elsewhere(lambda fds: spawner.post(wire.BURY, fds=fds))
        about = {
            "pid": os.getpid(),
            "way": way.value,
            "api": options.api,
            "design": options.design or options.api,
            "signing_key": service.signing_key(),
            **service.address(),
        }
        # Start the thread before READY. If there is no memory for it, the owner would find nobody.
        threads.start(service.run)
        with root:
            _say_ready(owner, about, root)
    except OSError as error:
        owner.reply_error(error)
        word.ready()
        raise
    # The owner waits for nothing more on this socket.
    bury(owner.sock)
    word.ready()
    with device:
        FuseServer(device, service.filesystem).run()
        service.consumers.wait_idle()


def _say_ready(owner: Channel, about: dict[str, str | int | None], root: OwnedFd) -> None:
    # This process makes both ends, so SO_PEERCRED of either names this process.
    witness, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with witness, other:
        owner.post(wire.READY, json.dumps(about).encode(), [root.fileno(), witness.fileno()])


@final
class ControlThread:
    """The work of the control thread: connections, tokens, status, and new consumers.

    ``Consumers`` has a consumer once it exists.
    """

    def __init__(
        self,
        spawner: Channel,
        endings: Channel,
        options: Options,
        origin: Origin,
        way: Way,
        signer: Signer,
        score: OomScore | None,
        most_fds: int,
    ) -> None:
        spare = max(_SPARE_FDS, most_fds // 4)
        self._usage = Usage() if options.usage else None
        self._tokens = Tokens()
        self.filesystem = FileSystem(
            options.design or options.api,
            backing=options.backing,
            memory_max=options.memory_max,
            max_files=most_fds - spare,
            prove=self._tokens.prove,
            usage=self._usage,
            account=None if score is None else score.account,
        )
        self._options = options
        self._programs = Programs(options.consumers)
        self._origin = origin
        self._way = way
        self._spawner = spawner
        self._signer = signer
        self._selector = selectors.DefaultSelector()
        self._troubles = Troubles()
        self.consumers = Consumers(self._tokens, options, signer, self._troubles)
        self._spawns = Spawns(spawner, self.consumers, self._troubles)
        # One half is for owners' connections, the rest for what consumers need.
        self._door = Door(spare // 2)
        self._refusals = Refusals()
        self._paused_until: float | None = None
        self._watch(self._refusals, self._refusals.hear)
        self._watch(self._door.listener, self._accept)
        self._watch(spawner, self._forked)
        self._watch(endings, partial(self._ended, endings))

    def address(self) -> dict[str, str]:
        """Return what READY says of the listening socket."""
        return {"socket": f"@{self._door.name}", "key": self._door.key.hex()}

    def wait_loaded(self) -> None:
        """Wait until the spawner has loaded all programs that consumers execute.

        Raises:
            OSError: EIO when the spawner has died.
        """
        if self._spawner.receive() is None:
            raise OSError(EIO, "the process that forks consumers died")

    def signing_key(self) -> str | None:
        """Return the public key of reports, in hexadecimal; None while there is none."""
        key = self._signer.public_key
        return None if key is None else key.hex()

    def run(self) -> None:
        """Serve every connection, one request at a time."""
        try:
            while True:
                for key, _ in self._selector.select(self._pause()):
                    self._do(key.data)
        except BaseException as error:  # noqa: BLE001
            # For instance, there is no memory. Callers would wait for ever.
            os._exit(status_of(error))

    def _do(self, ready: Callable[[], None]) -> None:
        try:
            ready()
        except Exception as error:
            # An error of one connection concerns no other.
            log.exception("control")
            self._troubles.last = f"{type(error).__name__}: {error}"

    def _pause(self) -> float | None:
        """Return how long newcomers have to wait; accept them again when that is over."""
        if self._paused_until is None:
            return None
        left = self._paused_until - time.monotonic()
        if left > 0:
            return left
        self._paused_until = None
        self._watch(self._door.listener, self._accept)
        return None

    def _watch(self, sock: socket.socket | Channel | Refusals, ready: Callable[[], None]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, ready)

    def _serve(self, connection: Connection) -> None:
        """Serve the next request of a connection."""
        channel = connection.channel
        if channel.fileno() < 0:
            # A newcomer in the same round of the selector has taken the place of this connection.
            return
        try:
            # Never wait: another request in the same round of the selector may have ended the
            # connection.
            message = channel.receive(MSG_DONTWAIT)
        except BlockingIOError:
            return
        except (OSError, MemoryError) as error:
            # The request may be lost.
            self._end(connection, self._troubles.of("a request", error))
            return
        if message is None:
            self._end(connection)
        else:
            self._troubles.answer(channel, partial(self._dispatch, connection), message)

    # Connections.

    def _accept(self) -> None:
        try:
            for connection in self._door.accept():
                self._take(connection)
        except OSError:
            self._selector.unregister(self._door.listener)
            self._paused_until = time.monotonic() + _PAUSE

    def _take(self, connection: Connection) -> None:
        self._watch(connection.channel, partial(self._serve, connection))
        surplus = self._door.surplus(connection.uid)
        if surplus is not None:
            self._end(surplus)

    def _end(self, connection: Connection, error: OSError | None = None) -> None:
        """End a connection; ``error`` is sent in the place of the next answer."""
        sock = connection.channel.sock
        self._selector.unregister(sock)
        self._door.forget(connection)
        if error is None:
            bury(sock)
        else:
            self._refusals.refuse(sock, connection.uid, error)
        for token in connection.tokens:
            self._tokens.drop(token)

    def _dispatch(self, connection: Connection, message: Message) -> None:
        if connection.owner:
            self._dispatch_owner(connection, message)
        elif message.number == wire.CONNECT.number and self._door.admit(connection, message.body):
            connection.channel.reply()
        elif message.number == wire.STATUS.number and (
            connection.uid == 0 or is_own(connection.uid)
        ):
            self._reply_status(connection, message)
        else:
            # Otherwise the other end could ask for the error for ever, and read nothing.
            self._end(connection, OSError(EACCES, "the key of this service was not shown"))

    def _dispatch_owner(self, connection: Connection, message: Message) -> None:
        match message.number:
            case wire.TOKEN.number:
                connection.channel.reply(self._tokens.issue(connection.tokens))
            case wire.SPAWN.number:
                self._spawn(connection, message.body)
            case wire.STATUS.number:
                self._reply_status(connection, message)
            case wire.SIGNING_KEY.number:
                connection.channel.reply(self._signer.make_key())
            case wire.ENDING.number:
                connection.channel.reply(
                    self.consumers.endings.of(*message.unpack(wire.NUMBER)).encode()
                )
            case wire.ERROR_PAGE.number:
                self._aside(connection, self._error_page, message)
            case _:
                raise OSError(EPROTO, f"no such call: {message.number}")

    def _aside(
        self, connection: Connection, act: Callable[[Message], None], message: Message
    ) -> None:
        """Run ``act``, which may wait for consumers, in a thread, and answer then.

        A connection has one such thread at most.

        Raises:
            OSError: EBUSY while the connection has one; EAGAIN when there can be none.
        """
        if connection.busy:
            raise OSError(EBUSY, "the call before it is still under way")
        connection.busy = True

        def done(message: Message) -> None:
            try:
                act(message)
            finally:
                connection.busy = False
            connection.channel.reply()

        try:
            threads.start(partial(self._troubles.answer, connection.channel, done, message))
        except OSError:
            connection.busy = False
            raise

    # Consumers.

    def _spawn(self, connection: Connection, body: bytes) -> None:
        """Have a consumer forked; the reply comes once it was forked, or could not be.

        Raises:
            OSError: EINVAL for an unknown consumer; E2BIG for arguments that are too long; EMFILE;
                EBUSY while the call before it is still under way; EAGAIN while answers have not
                been read.
        """
        if connection.busy:
            raise OSError(EBUSY, "the call before it is still under way")
        name = body.partition(b" ")[0].decode(errors="replace")
        if name not in self._programs:
            raise OSError(EINVAL, f"no such consumer: {name}")
        if len(body) > wire.MAX_BODY - wire.NUMBER.size:
            raise OSError(E2BIG, f"arguments of {len(body)} bytes")
        connection.channel.check_read()
        self._spawns.add(connection, name, body)

    def _forked(self) -> None:
        if not self._spawns.hear():
            # The kernel kills this process, too.
            self._selector.unregister(self._spawner)

    def _ended(self, endings: Channel) -> None:
        message = endings.receive(MSG_DONTWAIT)
        if message is None:
            self._selector.unregister(endings)
            return
        (consumer,) = wire.NUMBER.unpack_from(message.body)
        self.consumers.endings.note(
            consumer, message.body[wire.NUMBER.size :].decode(errors="replace")
        )

    def _error_page(self, message: Message) -> None:
        token, start, end = message.unpack(wire.ERROR_REQUEST)
        _, file = self._tokens.take(token)
        try:
            if not 0 < end - start <= _LARGEST_FOLIO:
                raise OSError(EINVAL, f"pages {start:#x} to {end:#x} are not part of a folio")
            file.error_page(pgoff_t(start), pgoff_t(end))
        finally:
            file.put()

    # Status.

    def _reply_status(self, connection: Connection, message: Message) -> None:
        # Send the state in messages: a caller should have no descriptor of ours to look into, and
        # none to close.
        (start,) = message.unpack(wire.NUMBER) if message.body else (0,)
        if start == 0:
            connection.status = json.dumps(self._status()).encode()
        text = connection.status
        if start and start >= len(text):
            raise OSError(EINVAL, f"the state has {len(text)} bytes, none from {start} on")
        piece = text[start : start + wire.MAX_BODY - wire.NUMBER.size]
        if start + len(piece) == len(text):
            connection.status = b""
        connection.channel.reply(wire.NUMBER.pack(len(text)) + piece)

    def _status(self) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "owner_pid": self._origin.pid,
            "owner_uid": self._origin.uid,
            "api": self._options.api,
            "way": self._way.value,
            "memory_max": self._options.memory_max,
            "signing_key": self.signing_key(),
            **status.of_files(self.filesystem, self._usage),
            "consumers": [status.of_consumer(consumer) for consumer in self.consumers.all()],
            "last_error": self._troubles.last,
        }
