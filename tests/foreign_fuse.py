"""A FUSE file system that is not this project's; its server can be stopped and killed.

Every name is a file of one page; attributes are never cached.
"""

import os
import signal
import socket
import struct
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import ENOSYS
from typing import Final, NoReturn

from restrictedmem.abi import fuse
from restrictedmem.abi.fuse import Opcode
from restrictedmem.fd import OwnedFd, receive_with_fds, send_with_fds
from restrictedmem.fs.mount_ways import mount_detached

_FILE: Final = 2
_PAGE: Final = 4096
_SILENT: Final = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}
_EMPTY: Final = {Opcode.FLUSH, Opcode.RELEASE, Opcode.UNLINK}
#: Offset of the length in a request to write, header included.
_WRITE_SIZE: Final = fuse.IN_HEADER.size + 16


@dataclass
class Foreign:
    """The root of the mount, and its server."""

    root: int
    pid: int
    events: socket.socket

    def asked(self) -> list[int]:
        """Return the opcodes of the requests since this was asked last."""
        found: list[int] = []
        with suppress(BlockingIOError):
            while message := self.events.recv(1):
                found += message
        return found

    def stop(self) -> None:
        """Stop the server; returns when it does nothing any more."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def kill(self) -> None:
        """Kill the server: every call that waits for it ends."""
        os.kill(self.pid, signal.SIGKILL)


@contextmanager
def foreign(
    before: Callable[[int], object] = lambda opcode: None, failing: Mapping[int, int] | None = None
) -> Generator[Foreign]:
    """Mount a foreign file system, detached, as root; kill its server at the end.

    The server calls ``before`` with each request's opcode first. It drops all data written. It
    answers the opcodes in ``failing`` with the errnos there.
    """
    events, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        events.close()
        _run(theirs, before, failing or {})
    theirs.close()
    try:
        events.settimeout(10)
        _, fds = receive_with_fds(events, 16)
        with fds[0] as root:
            events.setblocking(False)
            yield Foreign(root.fileno(), pid, events)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        events.close()


def _run(
    events: socket.socket, before: Callable[[int], object], failing: Mapping[int, int]
) -> NoReturn:
    try:
        device, root = mount_detached(allow_other=False)
        with root:
            send_with_fds(events, b"root", [root.fileno()])
        _serve(device, events, before, failing)
    finally:
        os._exit(1)


def _serve(
    device: OwnedFd,
    events: socket.socket,
    before: Callable[[int], object],
    failing: Mapping[int, int],
) -> None:
    while data := os.read(device.fileno(), 1 << 20):
        _, opcode, unique, node, *_ = fuse.IN_HEADER.unpack_from(data)
        with suppress(BlockingIOError):
            events.send(bytes([opcode]), socket.MSG_DONTWAIT)
        if opcode in _SILENT:
            continue
        before(opcode)
        body = None if opcode in failing else _answer(opcode, node, data)
        errno = failing.get(opcode, ENOSYS) if body is None else 0
        header = fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + len(body or b""), -errno, unique)
        # The caller may have been killed.
        with suppress(FileNotFoundError):
            os.write(device.fileno(), header + (body or b""))


def _answer(opcode: int, node: int, request: bytes) -> bytes | None:
    match opcode:
        case Opcode.INIT:
            init = fuse.fuse_init_out(
                major=7,
                minor=31,
                max_readahead=0,
                flags=0,
                max_background=16,
                congestion_threshold=12,
                max_write=_PAGE,
                time_gran=1,
            )
            return bytes(init)
        case Opcode.LOOKUP:
            return fuse.ENTRY_OUT.pack(_FILE, 0, 0, 0, 0, 0) + _attributes(_FILE)
        case Opcode.GETATTR | Opcode.SETATTR:
            return fuse.ATTR_OUT.pack(0, 0, 0) + _attributes(node)
        case Opcode.OPEN:
            return fuse.OPEN_OUT.pack(0, 0, 0)
        case Opcode.READ:
            return bytes(_PAGE)
        case Opcode.WRITE:
            (size,) = struct.unpack_from("=I", request, _WRITE_SIZE)
            return struct.pack("=II", size, 0)
        case Opcode.STATFS:
            return bytes(80)
        case _:
            return b"" if opcode in _EMPTY else None


def _attributes(node: int) -> bytes:
    mode = 0o100644 if node == _FILE else 0o40755
    return fuse.ATTR.pack(node, _PAGE, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, _PAGE, 0)
