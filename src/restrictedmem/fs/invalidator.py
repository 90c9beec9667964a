"""The process that drops pages from the page cache of the service's files.

Such a call waits, in a way that no signal ends, until the service has answered READ and WRITE. If
the service were killed while it waits itself, nobody would answer, and the kernel would keep it. So
this process waits. It has a clone of /dev/fuse (``abi.fuse.clone``). When the service is gone, the
kernel fails what the service had read, and this process fails the rest until its call returns.
"""

import os
import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from errno import EINTR, EIO, ENODEV, ENOENT, ENOTCONN
from functools import partial
from typing import Final, Self, final

from restrictedmem import sync, threads
from restrictedmem.abi import fuse
from restrictedmem.child import fork
from restrictedmem.failure import FAULT, failed
from restrictedmem.fd import OwnedFd, receive_with_fds, refuse_fds, send_with_fds
from restrictedmem.fs.guest_memfd_requests import REQUEST_BUFFER

_NAME: Final = "rmem-invalidate"
_READY: Final = b"r"
_ASKED: Final = fuse.NOTIFY_INVAL_INODE_OUT
_ANSWER: Final = struct.Struct("=I")
_LENGTH: Final = fuse.OUT_HEADER.size + _ASKED.size


@final
class Invalidator:
    """The service's end. Calls of several threads take turns."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._turn = sync.mutex()

    @classmethod
    def start(cls, settle: Callable[[], None]) -> Self:
        """Fork the process, which calls ``settle`` and then waits for ``give``.

        The caller is no ancestor of the service that goes on: when the service ends, its ancestors
        end its children.

        Raises:
            OSError: EAGAIN, ENOMEM as fork(2); EMFILE.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        refuse_fds(ours)

        def be_invalidator() -> None:
            ours.close()
            settle()
            _, devices = receive_with_fds(theirs, 1)
            for device in devices:
                _serve(theirs, device.fileno())

        with theirs:
            try:
                # It is not bound to its parent, whose end it has to outlive.
                fork(be_invalidator, name=_NAME)
            except BaseException:
                ours.close()
                raise
        return cls(ours)

    def give(self, device: OwnedFd) -> None:
        """Give the process its clone of /dev/fuse, which the caller then closes.

        Raises:
            OSError: EPIPE when the process is gone.
        """
        send_with_fds(self._sock, _READY, [device.fileno()])

    def close(self) -> None:
        """Close this process's end."""
        self._sock.close()

    def drop(self, nodeid: int, offset: int, length: int) -> None:
        """Drop a range of bytes of a file from the page cache, and from every mapping.

        Changed pages are written back first. Preconditions: other threads answer requests.

        Raises:
            OSError: EIO when the process is gone; the kernel's errno.
        """
        with self._turn:
            self._sock.send(_ASKED.pack(nodeid, offset, length), socket.MSG_NOSIGNAL)
            answer = self._sock.recv(_ANSWER.size)
        (errno,) = _ANSWER.unpack(answer) if answer else (EIO,)
        if errno:
            raise failed("drop", errno, "the pages could not be dropped from the page cache")


def _serve(sock: socket.socket, device: int) -> None:
    threads.start(partial(_drop_all, sock, device))
    gone = select.poll()
    # POLLHUP comes without being asked for.
    gone.register(sock, 0)
    gone.poll()
    _fail_all(device)


def _drop_all(sock: socket.socket, device: int) -> None:
    """Make the calls that the service asks for; end this process when the service is gone."""
    try:
        while asked := sock.recv(_ASKED.size):
            sock.send(_ANSWER.pack(_drop(device, asked)), socket.MSG_NOSIGNAL)
        os._exit(0)
    finally:
        os._exit(FAULT)


def _drop(device: int, asked: bytes) -> int:
    head = fuse.OUT_HEADER.pack(_LENGTH, fuse.FUSE_NOTIFY_INVAL_INODE, 0)
    try:
        os.write(device, head + asked)
    except OSError as error:
        # ENOENT: the kernel has no such file any more.
        return 0 if error.errno == ENOENT else error.errno or EIO
    return 0


def _fail_all(device: int) -> None:
    """Fail every request, because nobody else does."""
    while True:
        try:
            request = os.read(device, REQUEST_BUFFER)
        except OSError as error:
            if error.errno == ENODEV:
                return
            if error.errno not in (ENOENT, EINTR):
                raise
            continue
        _, _, unique, *_ = fuse.IN_HEADER.unpack_from(request)
        # ENOENT: the request has no reply.
        with suppress(OSError):
            os.write(device, fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size, -ENOTCONN, unique))
