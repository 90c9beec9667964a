"""A FUSE server in a child of the test, whose file system records what its notifiers hear.

For what a service does not show from outside: the kernel's side of notification, and each way of
mounting. The child forks before the mount exists and holds no file of it, so it can be killed.
"""

import array
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import final

import users
from restrictedmem.fd import OwnedFd, readable, receive_with_fds
from restrictedmem.fs.filesystem import FileSystem
from restrictedmem.fs.fuse_server import FuseServer
from restrictedmem.fs.mount_ways import mount_detached
from restrictedmem.fs.owner_abi import NAME, PROVE, TOKEN_BYTES
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import pgoff_t


@final
class _Recorder:
    """A notifier that writes each callback to a socket and waits there for leave to go on."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def _tell(self, what: str, start: int, end: int) -> None:
        self._sock.send(f"{what} {start} {end}".encode())
        self._sock.recv(1)

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self._tell("start", start, end)

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self._tell("end", start, end)

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("no page was lost")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0


@final
class OwnServer:
    """The root of the mount, and the socket on which the child tells what its notifiers hear."""

    def __init__(self, root: OwnedFd, events: socket.socket) -> None:
        self.root = root
        self._events = events

    def create(self) -> int:
        fd = os.open(
            NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, dir_fd=self.root.fileno()
        )
        # Names are never cached: the look-up that unlink begins with finds none and drops it for
        # good.
        with suppress(FileNotFoundError):
            os.unlink(NAME, dir_fd=self.root.fileno())
        return fd

    def watch(self, fd: int) -> None:
        """Register the recorder on a file."""
        fcntl.ioctl(fd, PROVE, bytes(TOKEN_BYTES))

    def has_event(self) -> bool:
        return bool(readable([self._events], 0))

    def next_event(self) -> str:
        """Return the next callback, which waits until ``go_on``."""
        self._events.settimeout(10)
        return self._events.recv(100).decode()

    def go_on(self) -> None:
        self._events.send(b".")


Mount = Callable[[], tuple[OwnedFd, OwnedFd]]


@contextmanager
def serving(api: Api, mount: Mount, uid: int | None = None) -> Generator[OwnServer, None, None]:
    """Serve a mount from a child, which is root or becomes ``uid`` before it mounts."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            _serve(theirs, api, mount, uid)
        finally:
            os._exit(0)
    with ours:
        theirs.close()
        said, fds = receive_with_fds(ours, 500)
        try:
            if not fds:
                raise RuntimeError(f"server: {said.decode()}")
            with fds[0]:
                yield OwnServer(fds[0], ours)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _serve(sock: socket.socket, api: Api, mount: Mount, uid: int | None) -> None:
    def register(_token: bytes, _ino: int, file: RestrictedFile) -> None:
        file.register_notifier(_Recorder(sock))

    try:
        if uid is not None:
            users.become(uid, fuse=True)
        device, root = mount()
    except Exception as error:
        sock.send(repr(error).encode())
        return
    with root:
        rights = array.array("i", [root.fileno()])
        sock.sendmsg([b"root"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    FuseServer(device, FileSystem(api.value, max_files=100, prove=register)).run()
    device.close()


def mount_for_one_user(uid: int) -> Mount:
    """Mount as set-uid fusermount3 does: as root, in the initial user namespace, for one user."""

    def mount() -> tuple[OwnedFd, OwnedFd]:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, 0, 0)
        return mount_detached(allow_other=False)

    return mount
