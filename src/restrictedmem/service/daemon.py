"""The service: FUSE in the main thread, everything that is asked over sockets in a second one.

Neither thread is ever busy: both wait in system calls. A connection that sends something malformed gets an error and nobody else
notices; one that breaks off takes with it what it had, and no more.
"""

import json
import logging
import os
import secrets
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from errno import EACCES, EINVAL, EIO, ENOENT, EPROTO
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

from restrictedmem import sync
from restrictedmem.abi import memory, process
from restrictedmem.fd import close_all, peer_credentials
from restrictedmem.fs.filesystem import TOKEN_BYTES, FileSystem
from restrictedmem.fs.mount import Way, mount_detached, mount_fusermount
from restrictedmem.fs.server import Server
from restrictedmem.fs.usage import Usage
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.service import signing, wire
from restrictedmem.service.consumer import Consumer
from restrictedmem.service.program import Programs
from restrictedmem.service.signing import Signer
from restrictedmem.service.wire import BindFlag, BindingFlag, Channel, Message
from restrictedmem.units import PAGE_SHIFT, PageRange, pgoff_t

if TYPE_CHECKING:
    from restrictedmem.service.start import Options, Origin

log = logging.getLogger(__name__)

#: Where ``ps`` finds a service: an abstract socket of this name, which goes when the process does.
STATUS_NAME: Final = "\0restrictedmem/{pid}"
#: Descriptors that the service keeps free for sockets and sequence pages.
_SPARE_FDS: Final = 256
#: Tokens that one connection may have asked for and not used.
_MAX_TOKENS: Final = 64
#: Seconds that a consumer's process may take to end after its owner has let go of it.
_LINGER: Final = 0.2
#: Pages of the largest folio there is, 1 GiB.
_LARGEST_FOLIO: Final = 1 << 30 - PAGE_SHIFT


def run(owner: Channel, spawner: Channel, options: "Options", origin: "Origin") -> None:
    """Be the service until the mount and every consumer are gone.

    Raises:
        OSError: when the mount or a socket cannot be made; the owner was told.
    """
    way = origin.way
    try:
        device, root = mount_fusermount() if way is Way.FUSERMOUNT else mount_detached(allow_other=way is Way.OWN)
        signer = Signer() if options.signing_key is None else Signer.load(options.signing_key)
        if options.become is not None:
            # Whom it becomes may have no way to the library's files.
            signing.preload()
        drop_privileges(options.become, keep=0)
        # Another uid has reset it.
        process.prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
        service = Service(owner, spawner, options, origin, signer, max_files=process.raise_fd_limit() - _SPARE_FDS)
    except OSError as error:
        owner.reply_error(error)
        raise
    with root:
        about = {
            "pid": os.getpid(),
            "way": way.value,
            "api": options.api,
            "design": options.design or options.api,
            "signing_key": service.signing_key(),
        }
        owner.post(wire.READY, json.dumps(about).encode(), [root.fileno()])
    threading.Thread(target=service.run, name="control", daemon=True).start()
    with device:
        Server(device, service.filesystem).run()
        service.wait_idle()


def drop_privileges(become: tuple[int, int] | None, keep: int) -> None:
    """Become another user when asked, give up every capability that is not in the mask ``keep``, and gain none by exec."""
    kept = process.effective_capabilities() & keep
    if become is not None:
        uid, gid = become
        process.prctl(process.PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        # Another uid resets it (to fs.suid_dumpable).
        process.prctl(process.PR_SET_DUMPABLE, 0)
    process.set_capabilities(kept)
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)


def _unpack(message: Message, layout: struct.Struct) -> tuple[Any, ...]:
    """Decode a body that is not of numbers alone.

    Raises:
        OSError: EPROTO for another length.
    """
    if len(message.body) != layout.size:
        raise OSError(EPROTO, f"body of {len(message.body)} bytes, {layout.size} expected")
    return layout.unpack(message.body)


@final
@dataclass(eq=False)
class _Connection:
    """An owner's connection and the tokens that were given out on it."""

    channel: Channel
    tokens: set[bytes] = field(default_factory=set[bytes])


@final
class Service:
    """What the control thread does: tokens, consumers, status."""

    def __init__(self, owner: Channel, spawner: Channel, options: "Options", origin: "Origin", signer: Signer, max_files: int) -> None:
        self._usage = Usage() if options.usage else None
        self.filesystem = FileSystem(
            options.design or options.api,
            backing=options.backing,
            memory_max=options.memory_max,
            max_files=max_files,
            prove=self._prove,
            usage=self._usage,
        )
        self._options = options
        self._programs = Programs(options.consumers)
        self._origin = origin
        self._spawner = spawner
        self._signer = signer
        self._selector = selectors.DefaultSelector()
        self._consumers: dict[int, Consumer] = {}
        self._next_consumer = 1
        self._last_error = ""
        self._idle = threading.Condition(sync.mutex())
        self._mutex = sync.mutex()
        # Under _mutex: tokens given out and not bound yet, with the file whose holder presented one (held by a reference).
        self._tokens: dict[bytes, tuple[int, RestrictedFile] | None] = {}
        self._connect(owner)
        self._listen()

    def signing_key(self) -> str | None:
        """Return the public key of reports, in hexadecimal; None while there is none."""
        key = self._signer.public_key
        return None if key is None else key.hex()

    def run(self) -> None:
        """Serve every connection, one request at a time."""
        while True:
            for key, _ in self._selector.select():
                ready: Callable[[], None] = key.data
                try:
                    ready()
                except Exception as error:
                    # One connection's trouble stays its own.
                    log.exception("control")
                    self._last_error = f"{type(error).__name__}: {error}"

    def wait_idle(self) -> None:
        """Wait until no consumer is left."""
        with self._idle:
            self._idle.wait_for(lambda: not self._consumers)

    def _watch(self, sock: socket.socket | Channel, ready: Callable[[], None]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, ready)

    def _serve(self, channel: Channel, dispatch: Callable[[Message], None], end: Callable[[], None]) -> None:
        """Serve the next request of a connection: ``dispatch`` answers it; ``end`` is called when there will be no other."""
        try:
            # Never waits: whoever sent us our end may have kept a copy of it and take the request away from us.
            message = channel.receive(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            channel.reply_error(error)
            message = None
        if message is None:
            self._selector.unregister(channel)
            end()
            return
        try:
            dispatch(message)
        except OSError as error:
            channel.reply_error(error)
        except Exception as error:
            # A bug must not hang the caller: it gets EIO, ps and the log have the rest.
            log.exception("call %d", message.number)
            self._last_error = f"call {message.number}: {error!r}"
            channel.reply_error(OSError(EIO, os.strerror(EIO)))
        finally:
            close_all(message.fds)

    # Owners.

    def _connect(self, channel: Channel) -> None:
        connection = _Connection(channel)

        def end() -> None:
            channel.close()
            for token in connection.tokens:
                self._drop_token(token)

        self._watch(channel, lambda: self._serve(channel, lambda message: self._dispatch_owner(connection, message), end))

    def _dispatch_owner(self, connection: _Connection, message: Message) -> None:
        if message.number == wire.CONNECT.number:
            self._connect(Channel(message.take_socket(), "owner", takes_fds=True))
        elif message.number == wire.TOKEN.number:
            connection.channel.reply(self._token(connection))
        elif message.number == wire.SPAWN.number:
            number = self._spawn(message.body.decode(errors="replace"), message.take_socket())
            connection.channel.reply(str(number).encode())
        elif message.number == wire.STATUS.number:
            self._reply_status(connection.channel)
        elif message.number == wire.SIGNING_KEY.number:
            connection.channel.reply(self._signer.make_key())
        elif message.number == wire.ERROR_PAGE.number:
            self._error_page(message)
            connection.channel.reply()
        else:
            raise OSError(EPROTO, f"no such call: {message.number}")

    def _token(self, connection: _Connection) -> bytes:
        with self._mutex:
            connection.tokens &= self._tokens.keys()
            if len(connection.tokens) >= _MAX_TOKENS:
                raise OSError(EINVAL, "too many tokens that were never bound")
            token = secrets.token_bytes(TOKEN_BYTES)
            connection.tokens.add(token)
            self._tokens[token] = None
        return token

    def _prove(self, token: bytes, ino: int, file: RestrictedFile) -> None:
        # Called by FUSE: whoever presents the token holds the descriptor.
        with self._mutex:
            if self._tokens.get(token, file) is not None:
                raise OSError(EACCES, "prove: not a token of this service, or presented before")
            self._tokens[token] = ino, file
            file.get()

    def _drop_token(self, token: bytes) -> None:
        with self._mutex:
            proved = self._tokens.pop(token, None)
        if proved is not None:
            proved[1].put()

    # Consumers.

    def _spawn(self, name_and_arguments: str, owner: socket.socket) -> int:
        name, _, arguments = name_and_arguments.partition(" ")
        with owner:
            if name not in self._programs:
                raise OSError(EINVAL, f"no such consumer: {name}")
            number = self._next_consumer
            self._next_consumer += 1
            consumer = Consumer(name, number, self._options.deadline, self._consumer_failed)
            self._consumers[number] = consumer
            self._watch(consumer.requests, lambda: self._serve_consumer(consumer))
            requests, notify = consumer.give_sockets()
            with requests, notify:
                self._spawner.post(wire.FORK, f"{number} {name} {arguments}".encode(), [owner.fileno(), requests.fileno(), notify.fileno()])
        return number

    def _serve_consumer(self, consumer: Consumer) -> None:
        # Another request of the same round of the selector may have ended it.
        if consumer.number in self._consumers:
            dispatch = partial(self._dispatch_consumer, consumer)
            self._serve(consumer.requests, dispatch, lambda: self._end_consumer(consumer))

    def _dispatch_consumer(self, consumer: Consumer, message: Message) -> None:
        if message.number == wire.BIND.number:
            self._bind(consumer, message)
        elif message.number == wire.UNBIND.number:
            (number,) = message.unpack(wire.NUMBER)
            if number not in consumer.bindings:
                raise OSError(ENOENT, f"no binding {number}")
            consumer.unbind(number)
            consumer.requests.reply()
        elif message.number == wire.REPORT.number:
            consumer.report = json.loads(message.body)
            consumer.requests.reply()
        elif message.number == wire.LAUNCHED.number:
            consumer.launched(*wire.LAUNCH.unpack(message.body))
            consumer.requests.reply()
        elif message.number == wire.SIGN.number:
            body = consumer.report_over(message.body, self._options.api, self._signer.make_key()).pack()
            consumer.requests.reply(body + self._signer.sign(body))
        else:
            raise OSError(EPROTO, f"no such call: {message.number}")

    def _bind(self, consumer: Consumer, message: Message) -> None:
        token, start, end, flags = _unpack(message, wire.BIND_REQUEST)
        ino, file = self._take(token)
        try:
            self._let_end(consumer, file)
            backing = file.backing
            fds = [backing.fileno(), file.sequence().fd.fileno()]
            span = PageRange(pgoff_t(start), pgoff_t(end))
            binding = consumer.bind(ino, file, span, exclusive=bool(flags & BindFlag.EXCLUSIVE))
            how = (
                (BindingFlag.HUGEPAGE if backing.hugepage else 0)
                | (BindingFlag.PIN if self._options.pin else 0)
                | (BindingFlag.RANGE if file.design.binds else 0)
            )
            consumer.requests.reply(wire.BINDING.pack(binding.number, ino, backing.limit or 0, how, backing.base_order), fds)
        finally:
            file.put()

    def _let_end(self, consumer: Consumer, file: RestrictedFile) -> None:
        """Serve other consumers of a file that are about to end: their owner let go of them a moment ago."""
        for other in list(self._consumers.values()):
            deadline = time.monotonic() + _LINGER
            while other is not consumer and other.number in self._consumers and other.holds(file):
                if not other.has_word(max(0.0, deadline - time.monotonic())):
                    break
                self._serve_consumer(other)

    def _take(self, token: bytes) -> tuple[int, RestrictedFile]:
        """Use up a token; the caller has the file's reference from now on.

        Raises:
            OSError: EACCES for one that was never presented.
        """
        with self._mutex:
            proved = self._tokens.get(token)
            if proved is None:
                raise OSError(EACCES, "the token was never presented on a descriptor")
            del self._tokens[token]
        return proved

    def _error_page(self, message: Message) -> None:
        token, start, end = _unpack(message, wire.ERROR_REQUEST)
        _, file = self._take(token)
        try:
            if not 0 < end - start <= _LARGEST_FOLIO:
                raise OSError(EINVAL, f"pages {start:#x} to {end:#x} are no folio")
            file.error_page(pgoff_t(start), pgoff_t(end))
        finally:
            file.put()

    def _consumer_failed(self, consumer: Consumer, reason: str) -> None:
        # Called by a FUSE thread in the middle of an invalidation, which holds the file's semaphore: the rest is the control thread's.
        self._last_error = reason
        self._spawner.post(wire.KILL, str(consumer.number).encode())

    def _end_consumer(self, consumer: Consumer) -> None:
        consumer.close()
        with self._idle:
            del self._consumers[consumer.number]
            self._idle.notify_all()

    # Status.

    def _listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            listener.bind(STATUS_NAME.format(pid=os.getpid()))
        except OSError as error:
            # Abstract names are anybody's to take. Who takes ours hides this service from ps, and must not keep it from starting.
            listener.close()
            self._last_error = f"ps cannot reach this service: {error.strerror}"
            return
        listener.listen(8)
        self._watch(listener, lambda: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        _, uid, _ = peer_credentials(sock)
        if uid not in (os.getuid(), 0):
            sock.close()
            return
        channel = Channel(sock, "ps")
        self._watch(channel, lambda: self._serve(channel, lambda message: self._dispatch_status(channel, message), channel.close))

    def _dispatch_status(self, channel: Channel, message: Message) -> None:
        if message.number != wire.STATUS.number:
            raise OSError(EPROTO, f"no such call: {message.number}")
        self._reply_status(channel)

    def _reply_status(self, channel: Channel) -> None:
        text = json.dumps(self._status()).encode()
        with memory.memfd_create("restrictedmem-status") as fd:
            os.pwrite(fd.fileno(), text, 0)
            channel.reply(fds=[fd.fileno()])

    def _status(self) -> dict[str, object]:
        # They may be closed while we look.
        held = {ino: file for ino, file in self.filesystem.files().items() if file.get_unless_zero()}
        try:
            files = [
                {"ino": ino, "size": file.size, "resident": file.backing.resident(), "notifiers": file.notifier_count}
                for ino, file in held.items()
            ]
            usage = None if self._usage is None else self._usage.report(list(held.values()))
        finally:
            for file in held.values():
                file.put()
        consumers = [
            {
                "name": consumer.name,
                "number": consumer.number,
                "files": sorted(binding.ino for binding in consumer.bindings.values()),
                "invalidations": consumer.invalidations,
                "in_progress": consumer.in_progress,
                "report": consumer.report,
            }
            for consumer in self._consumers.values()
        ]
        return {
            "pid": os.getpid(),
            "owner_pid": self._origin.pid,
            "owner_uid": self._origin.uid,
            "api": self._options.api,
            "way": self._origin.way.value,
            "memory_max": self._options.memory_max,
            "signing_key": self.signing_key(),
            "descriptors": files,
            "usage": usage,
            "consumers": consumers,
            "last_error": self._last_error,
        }
