"""The process that mounts: it hands /dev/fuse and the mount on, and ends.

A user namespace belongs to the user who made it. That user has every capability in it, and may
enter it by a handle (open_by_handle_at on nsfs, Linux 6.18). The same holds for the mount
namespaces that the user namespace owns. If the service ran in there, the user could mount other
files over the interpreter's, and the service would execute them. So the service stays in its
owner's namespaces. Two children enter the namespace for it, and they hold nothing else:

- The first makes the namespace. It has to be dumpable to write its own maps, so any process of the
  same user may look into it.
- The second, never dumpable, moves in, opens /dev/fuse there and mounts.
"""

import os
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EIO, ENOENT, EPERM, ETIMEDOUT
from typing import Final

from restrictedmem.abi import process
from restrictedmem.child import end_child, fork
from restrictedmem.fd import (
    OwnedFd,
    close_all,
    readable,
    receive_with_fds,
    receive_without_fds,
    refuse_fds,
    send_with_fds,
)
from restrictedmem.fs.mount_ways import Way, mount_detached, mount_fusermount

#: Seconds that a child may take for its part.
_DEADLINE: Final = 5
_LONGEST: Final = 2000
#: What a child says when all went well; else its errno and words.
_DONE: Final = b"0 "

Mounted = tuple[OwnedFd, OwnedFd]


def mount_first() -> tuple[Way, OwnedFd, OwnedFd]:
    """Mount in the first way that works; return it with /dev/fuse and the root (``O_PATH``).

    The caller owns both descriptors. It has to hand the root on, and keeps no copy of it.

    Preconditions: this process is undumpable and has no other thread.

    Raises:
        OSError: when no way works, with the failure of each.
    """
    number, words = EPERM, ""
    for way in Way:
        try:
            return way, *mount(way)
        except OSError as error:
            # A helper that is not installed says less than the kernel's refusal before it.
            number = number if error.errno == ENOENT else error.errno or EIO
            said = str(error.strerror).removeprefix(f"{way.value}: ")
            words += f"{'; ' if words else ''}{way.value}: {said}"
    raise OSError(number, words)


def mount(way: Way) -> Mounted:
    """Mount in one way; see ``mount_first``.

    Raises:
        OSError: the error of the kernel or the helper; ETIMEDOUT when a child did not end.
    """
    match way:
        case Way.OWN:
            return _in_child(lambda: mount_detached(allow_other=True))
        case Way.USERNS:
            with _user_namespace() as namespace:
                return _in_child(lambda: _mount_inside(namespace))
        case Way.FUSERMOUNT:
            return _in_child(mount_fusermount)


def enter_user_namespace(others: int = 0) -> None:
    """Become uid 0 of a new user namespace, in which only this user is mapped.

    ``others`` are CLONE_NEW* flags. This process also enters new namespaces of these kinds, which
    belong to the user namespace.

    Preconditions: this process is dumpable. Otherwise /proc/self/uid_map belongs to root.

    Raises:
        OSError: EPERM, EACCES, ENOSPC when the namespace cannot be had.
    """
    uid, gid = os.geteuid(), os.getegid()
    process.unshare(process.CLONE_NEWUSER | others)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _mount_inside(namespace: OwnedFd) -> Mounted:
    process.setns(namespace.fileno(), process.CLONE_NEWUSER)
    # The mount API asks for a capability over the mount namespace.
    process.unshare(process.CLONE_NEWNS)
    return mount_detached(allow_other=False)


@contextmanager
def _user_namespace() -> Generator[OwnedFd]:
    """Make a user namespace and yield a descriptor of it, which keeps it alive."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Whoever copies the child's end may send some.
    refuse_fds(ours)
    with ours, theirs:
        child = _fork(lambda: _make_namespace(theirs), theirs)
        try:
            theirs.close()
            _hear(ours, "user namespace", 0)
            with process.proc() as proc:
                namespace = OwnedFd(
                    os.open(f"{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc.fileno())
                )
        finally:
            end_child(child)
    with namespace:
        yield namespace


def _make_namespace(sock: socket.socket) -> None:
    # What is open in a dumpable process, any process of the same user may copy (pidfd_getfd).
    process.close_others([sock.fileno()], first=0)
    process.prctl(process.PR_SET_DUMPABLE, 1)
    enter_user_namespace()
    sock.send(_DONE)
    signal.pause()


def _in_child(attempt: Callable[[], Mounted]) -> Mounted:
    """Return the mount that a child has made, or raise the child's error."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = _fork(lambda: _hand_on(theirs, *attempt()), theirs)
        try:
            theirs.close()
            device, root = _hear(ours, "mount", 2)
        finally:
            end_child(child)
    return device, root


def _hand_on(sock: socket.socket, device: OwnedFd, root: OwnedFd) -> None:
    send_with_fds(sock, _DONE, [device.fileno(), root.fileno()])


def _hear(sock: socket.socket, what: str, max_fds: int) -> list[OwnedFd]:
    """Wait for a child's message; return the ``max_fds`` descriptors that came with it.

    Raises:
        OSError: the errno and text of the message; EIO when the child died; ETIMEDOUT.
    """
    if not readable([sock], _DEADLINE):
        raise OSError(ETIMEDOUT, f"{what}: no end within {_DEADLINE} s")
    if max_fds:
        said, fds = receive_with_fds(sock, _LONGEST, max_fds)
    else:
        said, fds = receive_without_fds(sock, _LONGEST), []
    number, _, words = said.decode(errors="replace").partition(" ")
    if number == "0" and len(fds) == max_fds:
        return fds
    close_all(fds)
    known = int(number) if number.isdecimal() else 0
    raise OSError(known or EIO, words or f"{what}: the process that makes it died")


def _fork(body: Callable[[], None], sock: socket.socket) -> int:
    """Fork a child that runs ``body``, and sends its error over ``sock``."""

    def telling() -> None:
        try:
            body()
        except OSError as error:
            sock.send(f"{error.errno or EIO} {error.strerror}".encode()[:1000])
            raise

    return fork(telling, bound=True)
