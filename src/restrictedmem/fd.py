"""Owned file descriptors, and descriptors in the ancillary data of a socket."""

import array
import fcntl
import os
import select
import socket
import struct
import termios
import warnings
from collections.abc import Sequence
from errno import EMSGSIZE, EPROTO
from typing import Final, Protocol, Self, TypeAlias, TypeVar

from restrictedmem.failure import failed
from restrictedmem.users import is_known

#: ``struct ucred``.
_UCRED: Final = struct.Struct("=iII")
_SO_PEERPIDFD: Final = 77
_SO_PASSRIGHTS: Final = 83
#: Flag of a call that must not wait. This flag and those below are plain ints, because combining
#: two members of an enumeration takes as long as a send.
MSG_DONTWAIT: Final = int(socket.MSG_DONTWAIT)
_MSG_NOSIGNAL: Final = int(socket.MSG_NOSIGNAL)
_MSG_PEEK: Final = int(socket.MSG_PEEK)
_MSG_CMSG_CLOEXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
#: Flags by which recvmsg says that a message was cut off, and that it had descriptors.
MSG_TRUNC: Final = int(socket.MSG_TRUNC)
MSG_CTRUNC: Final = int(socket.MSG_CTRUNC)
_INT: Final = array.array("i").itemsize


class HasFileno(Protocol):
    """An object that owns a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor's number."""
        ...


Waited: TypeAlias = HasFileno | int
_W = TypeVar("_W", bound=Waited)


class OwnedFd:
    """One file descriptor with one owner.

    It is closed on exit of ``with``, by ``close``, or (with a warning) when the object is
    collected. Every function of this package that returns a new descriptor internally returns an
    OwnedFd. Only the public interface returns bare ints.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise ValueError("an owned descriptor is not negative")
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor's number.

        Raises:
            ValueError: after close or detach.
        """
        if self._fd < 0:
            raise ValueError("descriptor is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether the descriptor was closed or given away."""
        return self._fd < 0

    def detach(self) -> int:
        """Give the number away; the caller has to close it from now on."""
        fd, self._fd = self.fileno(), -1
        return fd

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        # Clear the field first. The kernel may give the number to another file, which we must never
        # close.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"descriptor {self._fd} was never closed", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._fd})"


def send_with_fds(
    sock: socket.socket, data: bytes, fds: Sequence[int] = (), flags: int = 0
) -> None:
    """Send one message with copies of ``fds``; the caller keeps its own.

    ``flags`` are sendmsg's, beside MSG_NOSIGNAL.

    Raises:
        OSError: as sendmsg(2); EPIPE when the peer is gone (no signal is raised).
    """
    if fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sock.sendmsg([data], rights, _MSG_NOSIGNAL | flags)
    else:
        sock.send(data, _MSG_NOSIGNAL | flags)


def receive_without_fds(sock: socket.socket, size: int, flags: int = 0) -> bytes:
    """Receive one message of at most ``size`` bytes; refuse its descriptors.

    This process never gets the descriptors of the message. Closing the descriptor of another
    party's file may mean to wait for that party for ever (FUSE_FLUSH). See ``receive_flags``.
    ``flags`` are recvmsg's.

    Raises:
        OSError: as recvmsg(2); EPROTO for descriptors; EMSGSIZE when the message was cut off.
    """
    data, got = receive_flags(sock, size, flags)
    if got & MSG_CTRUNC:
        raise failed("recvmsg", EPROTO, "no descriptors are taken here")
    if got & MSG_TRUNC:
        raise failed("recvmsg", EMSGSIZE, "message cut off")
    return data


def receive_flags(sock: socket.socket, size: int, flags: int = 0) -> tuple[bytes, int]:
    """Receive one message without its descriptors; return it and the flags of recvmsg.

    The message has at most ``size`` bytes. MSG_CTRUNC says that it had descriptors; then the
    connection is of no more use. Such a message stays in the queue, because dropping a socket that
    lingers (SO_LINGER) takes as long as its owner likes. ``bury`` closes such a connection. A
    socket that has refused descriptors from the first (``refuse_fds``) never has such a message.

    Raises:
        OSError: as recvmsg(2).
    """
    if not refuses_fds(sock) and brings_fds(sock, flags):
        return b"", MSG_CTRUNC
    data, _, got, _ = sock.recvmsg(size, 0, flags)
    return data, got


def brings_fds(sock: socket.socket, flags: int = 0) -> bool:
    """Say whether the next message brings descriptors; the message stays in the queue.

    The end of the stream brings none.

    Raises:
        OSError: as recvmsg(2).
    """
    return bool(sock.recvmsg(1, 0, _MSG_PEEK | flags)[2] & MSG_CTRUNC)


def refuse_fds(sock: socket.socket) -> None:
    """Make the kernel refuse descriptors that others send here (SO_PASSRIGHTS, Linux 6.16).

    The sender gets the error. Without this, descriptors lie in the queue until the message is
    received. So set it before any other process has the other end. Older kernels do not have the
    option. A socket that is accepted inherits it from the listening socket.
    """
    if KERNEL_REFUSES:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def refuses_fds(sock: socket.socket) -> bool:
    """Say whether the kernel refuses descriptors that others send to this end."""
    return KERNEL_REFUSES and not sock.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS)


def _kernel_refuses() -> bool:
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


#: Whether ``refuse_fds`` does anything.
KERNEL_REFUSES: Final = _kernel_refuses()


def receive_with_fds(
    sock: socket.socket, size: int, max_fds: int = 4, flags: int = 0
) -> tuple[bytes, list[OwnedFd]]:
    """Receive one message and the descriptors with it, which the caller then owns.

    The message has at most ``size`` bytes. ``flags`` are recvmsg's. An empty message means that the
    peer is gone. A message or a set of descriptors that was cut off counts as malformed.

    Raises:
        OSError: as recvmsg(2); EMSGSIZE when something was cut off (what did arrive is closed).
    """
    data, ancillary, got, _ = sock.recvmsg(
        size, socket.CMSG_SPACE(max_fds * _INT), _MSG_CMSG_CLOEXEC | flags
    )
    fds: list[OwnedFd] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % _INT])
            fds += [OwnedFd(number) for number in numbers]
    if got & (MSG_TRUNC | MSG_CTRUNC):
        close_all(fds)
        raise failed("recvmsg", EMSGSIZE, "message or descriptors cut off")
    return data, fds


def readable(files: Sequence[_W], seconds: float | None = None) -> list[_W]:
    """Wait until some of ``files`` can be read or have hung up, and return those.

    The list is empty after ``seconds``. This uses poll(2), because select(2) takes no number above
    1023.
    """
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    ready = {number for number, _ in poll.poll(None if seconds is None else 1000 * seconds)}
    return [file for file in files if (file if isinstance(file, int) else file.fileno()) in ready]


def speaks(sock: socket.socket) -> bool:
    """Say whether a message, or the end of the stream, can be received at once; it stays."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True


def hung_up(sock: socket.socket) -> bool:
    """Say whether the other end of a connection is closed (POLLHUP).

    This end may still have messages to receive.
    """
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def all_read(sock: socket.socket) -> bool:
    """Say whether the other end of a socket has received every message (SIOCOUTQ)."""
    waiting = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, waiting)
    return not waiting[0]


def spare() -> OwnedFd:
    """Open a descriptor that is closed later, when its number is needed.

    Raises:
        OSError: EMFILE, ENFILE.
    """
    return OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def above_standard(fd: int) -> OwnedFd:
    """Return a duplicate with a number above those of the standard descriptors.

    Where these were closed before, ``fd`` may have one of their numbers. Opening them again would
    replace it.

    Raises:
        OSError: EMFILE.
    """
    return OwnedFd(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))


def close_all(fds: Sequence[OwnedFd]) -> None:
    """Close every descriptor of a list."""
    for fd in fds:
        fd.close()


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of the process that made the other end (SO_PEERCRED)."""
    pid, uid, gid = _UCRED.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    return pid, uid, gid


def is_same_peer(one: socket.socket, other: socket.socket) -> bool:
    """Say whether one user's process has made the other ends of two connections.

    Both ends must have the same SO_PEERCRED. Where that user's uid is not known here (``users``),
    another user's process may have got the same pid meanwhile. Only pidfs (Linux 6.9) tells
    processes apart for good. On older kernels the answer is then no.
    """
    found = peer_credentials(one)
    if found != peer_credentials(other):
        return False
    if is_known(found[1]):
        return True
    try:
        mine, ones, others = map(
            _inode, (os.pidfd_open(os.getpid()), *(_peer_pidfd(sock) for sock in (one, other)))
        )
    except OSError:
        return False
    # Before pidfs all pidfds have the same inode.
    return ones == others != mine


def _peer_pidfd(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)


def _inode(fd: int) -> int:
    with OwnedFd(fd) as owned:
        return os.fstat(owned.fileno()).st_ino
