"""The process that mounts: it does nothing else, hands /dev/fuse and the mount on, and ends.

A user namespace belongs to the user who made it. That user has every capability in it, may enter it
by a handle (open_by_handle_at on nsfs, Linux 6.18), and with it the mount namespaces that it owns.
A service in there would execute what its owner mounts over the interpreter's files. So the service
stays where its owner is. Two children enter the namespace for it, and they hold nothing else:

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
    """Mount in the first way that works; returns it with /dev/fuse and the root (``O_PATH``).

    The caller owns both descriptors, has to hand the root on, and keeps no copy of it.

    Preconditions: undumpable; no other thread.

    Raises:
        OSError: when none works, with what is wrong with each.
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
        OSError: what the kernel or the helper said; ETIMEDOUT when a child did not come to an end.
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

    ``others`` are CLONE_NEW* of namespaces that belong to it and are entered, too.

    Preconditions: dumpable, for /proc/self/uid_map belongs to root otherwise.

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
    """Make a user namespace, which lasts as long as the descriptor of it that is yielded."""
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
    """Return what a child has mounted, or raise what it failed with."""
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
    """Wait for a child's word; returns the descriptors that came with it, none unless some are due.

    Raises:
        OSError: its errno and words; EIO when it died; ETIMEDOUT.
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
    """Fork a child that runs ``body`` and tells over ``sock`` what that failed with."""

    def telling() -> None:
        try:
            body()
        except OSError as error:
            sock.send(f"{error.errno or EIO} {error.strerror}".encode()[:1000])
            raise

    return fork(telling, bound=True)
