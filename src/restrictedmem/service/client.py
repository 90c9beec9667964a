"""The owner's side of a service.

An owner finds or starts a service, creates descriptors, proves that it holds one, and starts
consumers.
"""

import atexit
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from errno import (
    EACCES,
    EBADF,
    ECONNRESET,
    EINVAL,
    ENOENT,
    ENOTCONN,
    EPROTO,
)
from typing import Any, Final, Self, cast, final
from weakref import WeakSet

from restrictedmem import sync
from restrictedmem.abi import pidfd
from restrictedmem.abi.memory import RMFD_HUGEPAGE
from restrictedmem.failure import detail_of, failed, named
from restrictedmem.fd import (
    OwnedFd,
    close_all,
    is_same_peer,
    peer_credentials,
)
from restrictedmem.fs.owner_abi import HUGEPAGE_MODE, NAME, PROVE, name_of
from restrictedmem.service import SERVER_VARIABLE, exec_service, wire
from restrictedmem.service.address import NOBODY, connect
from restrictedmem.service.ending import words_of
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Channel
from restrictedmem.units import MAX_FILE_BYTES, U64_MAX
from restrictedmem.users import is_own

#: Connections that the service may drop before this process gives up.
_TRIES: Final = 8
#: Seconds to wait for the report of a consumer's end, and seconds between two questions for it.
_ENDING_DEADLINE: Final = 1.0
_ENDING_PAUSE: Final = 0.01
#: The same for the service's own end. The kernel reports it once somebody has reaped the service.
#: If the service's parent is gone, init may never do so.
_OWN_ENDING_DEADLINE: Final = 0.1


@final
class Service:
    """An owner's hold on a service: the mount, and a connection.

    Each process that inherited this object by fork has a connection of its own. The service lives
    as long as this object, any descriptor that it made, or any consumer, in whatever process.
    Nothing has to be shut down.
    """

    def __init__(self, first: socket.socket) -> None:
        """Wait for READY on a connected socket, and close the socket.

        Raises:
            OSError: the error of the service; ETIMEDOUT when it sends nothing; ECONNRESET when it
                died.
        """
        with first:
            body, fds = exec_service.receive_ready(first)
        try:
            self.info = _object("READY", body)
            self._key = _check(self.info)
        except OSError:
            close_all(fds)
            raise
        self._mount, witness = fds
        #: A socket whose SO_PEERCRED is the service's.
        self._witness = socket.socket(fileno=witness.detach())
        self._channel: Channel | None = None
        #: A pidfd of the service, once this process has connected. None where the service cannot be
        #: seen from here.
        self._process: OwnedFd | None = None
        #: How the service ended, once this process has asked.
        self._ending: str | None = None
        self._mutex = sync.mutex()
        #: Held from the first piece of a status to the last.
        self._status_mutex = sync.mutex()
        _services.add(self)

    @property
    def device(self) -> int:
        """The device number (``st_dev``) that only this service's descriptors have."""
        return os.fstat(self._mount.fileno()).st_dev

    def after_fork_in_child(self) -> None:
        """Drop the parent's connection and its locks.

        Two readers on one socket would steal each other's replies. Another thread may have held a
        lock at the fork.
        """
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        self._mutex = sync.mutex()
        self._status_mutex = sync.mutex()

    @classmethod
    def start(cls, options: Options | None = None) -> Self:
        """Start a private service.

        Raises:
            OSError: the error that kept it from starting, for instance EACCES for /dev/fuse;
                ``restrictedmem doctor`` says what is missing.
        """
        try:
            ours, process = exec_service.begin(options or Options())
        except OSError as error:
            raise named("start", error) from None
        try:
            return cls(ours)
        except ConnectionResetError:
            # The service has sent nothing, not even an errno.
            raise failed(
                "start",
                ECONNRESET,
                f"the service died while it started: {exec_service.ending_of(process)}",
            ) from None
        finally:
            # The process has done its work, or it hangs.
            process.kill()
            process.wait()

    @classmethod
    def connect(cls, path: str) -> Self:
        """Get a service from ``restrictedmem serve``, or share that of ``restrictedmem exec``.

        The service of ``exec`` has to be this user's.

        Raises:
            OSError: ENOENT, ECONNREFUSED, EACCES as connect(2); EACCES for an abstract name that is
                not this user's, or cannot be known to be (``users``).
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connect(sock, path)
        except OSError:
            sock.close()
            raise
        # The directory of a path says whose the socket is. An abstract name can be anybody's, once
        # the supervisor is gone.
        if path.startswith("@") and not is_own(uid := peer_credentials(sock)[1]):
            sock.close()
            raise failed("connect", EACCES, f"it belongs to uid {uid}, not to this user", path)
        return cls(sock)

    def share(self, sock: socket.socket) -> None:
        """Make the process at the other end of ``sock`` an owner of this service, too.

        That process gets the service as from ``connect``.

        Raises:
            OSError: EPIPE when the other end is gone.
        """
        Channel(sock, "another owner").post(
            wire.READY,
            json.dumps(self.info).encode(),
            [self._mount.fileno(), self._witness.fileno()],
        )

    def memfd_restricted(self, flags: int = 0) -> int:
        """Create a restricted descriptor, close-on-exec, which the caller owns.

        See ``restrictedmem.memfd_restricted``.
        """
        _check_flags(flags)
        return self._create("memfd_restricted", NAME, 0, flags and HUGEPAGE_MODE)

    def create_guest_memfd(self, size: int, flags: int) -> int:
        """Create a guest_memfd whose pages can be converted; close-on-exec, owned by the caller.

        ``size`` is in bytes, and ``flags`` are ``GUEST_MEMFD_FLAG_*``, MMAP among them. The service
        was started with ``Options(guest_memfd=True)``.

        Raises:
            OSError: EINVAL for other flags, and for a size that is not positive or not page
                aligned; EACCES from a service that makes none; ENFILE; ENOTCONN when the service is
                gone.
        """
        if not 0 < size <= MAX_FILE_BYTES or not 0 <= flags <= U64_MAX:
            raise failed("create_guest_memfd", EINVAL, f"size {size:#x}, flags {flags:#x}")
        return self._create("create_guest_memfd", name_of(size, flags), os.O_DIRECT, 0)

    def _create(self, call: str, name: bytes, flags: int, mode: int) -> int:
        mount = self._mount.fileno()
        flags |= os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, mode, dir_fd=mount)
        except OSError as error:
            ending = self._own_ending() if error.errno == ENOTCONN else ""
            raise failed(call, error.errno, ending and f"service is gone: {ending}") from None
        try:
            os.unlink(name, dir_fd=mount)
        except OSError as error:
            # The kernel never caches the name, so the look-up of unlink drops it for good.
            if error.errno != ENOENT:
                os.close(fd)
                raise
        return fd

    def token_for(self, fd: int) -> bytes:
        """Prove that this process holds a restricted descriptor; return a token.

        The token lets a consumer bind the descriptor's file, once.

        Raises:
            OSError: EBADF; ENOTTY for another kind of file; EACCES for a descriptor of another
                service.
        """
        if fd < 0:
            # For such a number fcntl raises ValueError.
            raise failed("ioctl", EBADF, f"restricted descriptor {fd}")
        token, _ = self._call(wire.TOKEN)
        try:
            fcntl.ioctl(fd, PROVE, token)
        except OSError as error:
            raise failed("ioctl", error.errno, f"restricted descriptor {fd}") from None
        return token

    def spawn(self, consumer: str, arguments: str = "") -> socket.socket:
        """Start a consumer; return the socket on which it serves the caller.

        ``consumer`` is a kind that the service trusts. The consumer reads ``arguments``.

        Raises:
            OSError: EINVAL for a kind that the service does not know; E2BIG for arguments that do
                not fit into a message; EAGAIN, ENOMEM or EMFILE when no further process can be
                made; the error of loading the consumer's program; ENOTCONN when the service is
                gone.
        """
        return self.spawn_numbered(consumer, arguments)[1]

    def spawn_numbered(self, consumer: str, arguments: str = "") -> tuple[int, socket.socket]:
        """Start a consumer as ``spawn`` does; return its number and its socket.

        ``ending`` takes the number.
        """
        number, fds = self._call(wire.SPAWN, f"{consumer} {arguments}".encode())
        return int(number), socket.socket(fileno=fds.pop().detach())

    def ending(self, number: int) -> str:
        """Return in words how a consumer's process ended; empty when nobody knows.

        The consumer's end of a socket closes before its parent hears of its end. So this waits for
        a moment.
        """

        def ask() -> str:
            words, _ = self._call(wire.ENDING, wire.NUMBER.pack(number))
            return words.decode(errors="replace")

        try:
            return _soon(ask, _ENDING_DEADLINE)
        except OSError as error:
            return (
                f"its service is gone, too ({detail_of(error)})" if error.errno == ENOTCONN else ""
            )

    def _own_ending(self) -> str:
        """Return in words how the service ended; empty where the kernel does not tell.

        Linux 6.15 and later tell it. Only the first call waits for a moment.
        """
        process = self._process
        if process is None:
            return ""

        def ask() -> str:
            status = pidfd.wait_status(process)
            return "" if status is None else words_of(status)

        if self._ending is None:
            try:
                self._ending = _soon(ask, _OWN_ENDING_DEADLINE)
            except OSError:
                self._ending = ""
        return self._ending

    def error_page(self, fd: int, start: int, end: int) -> None:
        """Act as if the machine had lost pages ``start`` to ``end`` of a descriptor.

        The pages are at most a folio's. The service tells the file's consumers
        (``restrictedmem_error_page``). They refuse the pages until these are punched.

        Raises:
            OSError: as ``token_for``; EINVAL for another range.
        """
        self._call(wire.ERROR_PAGE, wire.ERROR_REQUEST.pack(self.token_for(fd), start, end))

    def signing_key(self) -> bytes:
        """Return the public key, 32 bytes, for reports on this service's VMs.

        The service makes a key now if there is none yet.

        Raises:
            OSError: ENOSYS when the package ``cryptography`` is missing; ENOTCONN when the service
                is gone.
        """
        key, _ = self._call(wire.SIGNING_KEY)
        return key

    def status(self) -> dict[str, Any]:
        """Return what ``restrictedmem ps`` shows of this service.

        Raises:
            OSError: ENOTCONN when the service is gone.
        """
        text, total = b"", 1
        with self._status_mutex:
            while len(text) < total:
                body, _ = self._call(wire.STATUS, wire.NUMBER.pack(len(text)))
                if len(body) <= wire.NUMBER.size:
                    raise failed(wire.STATUS.name, EPROTO, "no state in the reply")
                (total,) = wire.NUMBER.unpack_from(body)
                text += body[wire.NUMBER.size :]
        return _object(wire.STATUS.name, text)

    def close(self) -> None:
        """Let go of the service; descriptors and consumers stay."""
        if self._channel is not None:
            self._channel.close()
        self._witness.close()
        if self._process is not None:
            self._process.close()
        self._mount.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, call: wire.Call, body: bytes = b"") -> tuple[bytes, list[OwnedFd]]:
        while True:
            channel = self._own_channel()
            try:
                return channel.call(call, body)
            except OSError as error:
                # An interrupted call of another thread has closed the connection before this call
                # was sent.
                if error.errno != ENOTCONN or channel.fileno() >= 0:
                    raise

    def _own_channel(self) -> Channel:
        """Return this process's connection.

        It is made at the first call, and again after an interrupted one.
        """
        with self._mutex:
            if self._channel is None or self._channel.fileno() < 0:
                self._channel = self._connect()
            return self._channel

    def _connect(self) -> Channel:
        """Connect to the service, several times if it drops the connection.

        Other processes without the key may have come between.
        """
        for _ in range(_TRIES):
            with suppress(ConnectionResetError):
                return self._knock()
        raise failed("connect", ENOTCONN, "the service drops every connection", self.info["socket"])

    def _watch(self, sock: socket.socket) -> None:
        """Keep a pidfd of the process that listens, to learn later how it ended."""
        if self._process is None and (pid := peer_credentials(sock)[0]):
            with suppress(OSError):
                self._process = OwnedFd(os.pidfd_open(pid))

    def _knock(self) -> Channel:
        """Connect, and show the key from READY to the service and to nobody else.

        Raises:
            OSError: ENOTCONN when nobody listens or somebody else does, because the service is gone
                or this process is in another network namespace; ECONNRESET when the service has
                dropped the connection.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        channel = Channel(sock, "service", takes_fds=True, why=self._own_ending)
        try:
            connect(sock, self.info["socket"])
            if not is_same_peer(sock, self._witness):
                raise ConnectionRefusedError
            self._watch(sock)
            channel.call(wire.CONNECT, self._key)
        except ConnectionRefusedError:
            channel.close()
            raise failed("connect", ENOTCONN, NOBODY, self.info["socket"]) from None
        except OSError as error:
            channel.close()
            if error.errno == ENOTCONN:
                raise failed(
                    wire.CONNECT.name, ECONNRESET, "the service drops the connection"
                ) from None
            raise
        except BaseException:
            channel.close()
            raise
        return channel


def _soon(ask: Callable[[], str], seconds: float) -> str:
    """Ask again for some ``seconds`` until there is an answer; return it, or an empty one."""
    deadline = time.monotonic() + seconds
    while not (words := ask()) and time.monotonic() < deadline:
        time.sleep(_ENDING_PAUSE)
    return words


def _check(info: dict[str, Any]) -> bytes:
    """Check the parts of READY that are used here; return the key for CONNECT.

    Raises:
        OSError: EPROTO.
    """
    try:
        if all(isinstance(info[name], str) for name in ("way", "api", "design", "socket")):
            return bytes.fromhex(info["key"])
    except (KeyError, TypeError, ValueError):
        pass
    raise failed("READY", EPROTO, "it lacks fields that every service sends")


def _object(call: str, text: bytes) -> dict[str, Any]:
    """Return the JSON object in an answer.

    The answer is not trusted: the owner may have got a socket with any process behind it.

    Raises:
        OSError: EPROTO for anything else.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise failed(call, EPROTO, "its answer is not an object in JSON")
    return cast("dict[str, Any]", found)


_services: Final = WeakSet[Service]()
_default: Service | None = None
_default_mutex = sync.mutex()


def default_service() -> Service:
    """Return this process's service.

    The first call starts the service, or connects to it (``SERVER_VARIABLE``). Children inherit it
    by fork.

    Raises:
        OSError: the error that kept it from starting.
    """
    global _default
    with _default_mutex:
        if _default is None:
            path = os.environ.get(SERVER_VARIABLE)
            _default = Service.connect(path) if path else Service.start()
            atexit.register(_default.close)
        return _default


def memfd_restricted(flags: int = 0) -> int:
    """Create a descriptor with this process's service.

    The public interface is ``restrictedmem.memfd_restricted``.
    """
    # v9 and v10 test the flags before anything else, too.
    _check_flags(flags)
    return default_service().memfd_restricted(flags)


def _check_flags(flags: int) -> None:
    if flags & ~RMFD_HUGEPAGE:
        raise failed("memfd_restricted", EINVAL)


def _after_fork_in_child() -> None:
    global _default_mutex
    _default_mutex = sync.mutex()
    for service in _services:
        service.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
