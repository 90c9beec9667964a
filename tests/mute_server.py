"""An owner's FUSE server that opens files, and then answers no FLUSH, STATFS, GETATTR or WRITE.

A file named ``fifo`` is a FIFO, and the server answers no GETATTR of it.
"""

import os
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Final, final

from restrictedmem.abi import fuse, process
from restrictedmem.abi.fuse import Opcode
from restrictedmem.fd import OwnedFd, receive_with_fds, send_with_fds
from restrictedmem.fs.mounter import mount_first

#: The server's name among processes.
NAME: Final = "mute-server"
_KNOWN: Final = 3600
_FILE: Final = 2
_FIFO: Final = 3


@final
class MuteServer:
    """A child that serves the mount.

    It inherits all descriptors, and ends with the thread that makes it.

    Nobody can close a file of it as long as it lives: not by ``close``, nor by ``exec``, nor by
    ending.
    """

    def __init__(self) -> None:
        """Mount in the first way that works.

        Raises:
            OSError: EPERM where none does.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                _serve(theirs)
            finally:
                os._exit(1)
        theirs.close()
        self._files: list[int] = []
        with ours:
            _, fds = receive_with_fds(ours, 10)
        if not fds:
            os.waitpid(self.pid, 0)
            raise PermissionError(1, "the mute server could not mount")
        self._root = fds[0]
        #: The root of its mount, which this closes in the end.
        self.root = fds[0].fileno()

    def open(self) -> int:
        """Return a descriptor of a file, which this closes in the end."""
        self._files.append(os.open("f", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, dir_fd=self.root))
        return self._files[-1]

    def fifo(self) -> int:
        """Return a descriptor of a FIFO, which this closes in the end."""
        self._files.append(
            os.open("fifo", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.root)
        )
        return self._files[-1]

    def kill(self) -> None:
        """End the server: every call that waits for it fails."""
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the server and close its files."""
        self.kill()
        os.waitpid(self.pid, 0)
        for file in self._files:
            # With the server gone FLUSH fails, and does not wait.
            with suppress(OSError):
                os.close(file)
        self._root.close()


@contextmanager
def mute_file() -> Generator[int]:
    """Yield a file that nobody can close meanwhile, not even by exit or exec in a child."""
    server = MuteServer()
    try:
        yield server.open()
    finally:
        server.close()


def _serve(sock: socket.socket) -> None:
    process.prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
    process.set_name(NAME)
    _, device, root = mount_first()
    with root:
        # A file of the own mount it must not have: its end would wait for itself.
        send_with_fds(sock, b"root", [root.fileno()])
    sock.close()
    opened = False
    while True:
        request = os.read(device.fileno(), 1 << 20)
        _, operation, unique, node, *_ = fuse.IN_HEADER.unpack_from(request)
        name = request[fuse.IN_HEADER.size :] if operation == Opcode.LOOKUP else b""
        answer = _answer(operation, node, name, opened=opened)
        opened |= operation == Opcode.OPEN
        if answer is not None:
            _reply(device, unique, answer)


def _reply(device: OwnedFd, unique: int, answer: bytes) -> None:
    # The caller may have been killed.
    with suppress(FileNotFoundError):
        os.write(
            device.fileno(),
            fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + len(answer), 0, unique) + answer,
        )


def _answer(operation: int, node: int, name: bytes, *, opened: bool) -> bytes | None:
    match operation:
        case Opcode.INIT:
            init = {
                "major": 7,
                "minor": 31,
                "max_readahead": 0,
                "flags": 0,
                "max_background": 16,
                "congestion_threshold": 12,
            }
            return bytes(fuse.fuse_init_out(**init, max_write=4096, time_gran=1))
        case Opcode.LOOKUP:
            # A GETATTR reaches the server, which does not answer.
            ino = _FIFO if name == b"fifo\0" else _FILE
            return fuse.ENTRY_OUT.pack(ino, 0, _KNOWN, 0, 0, 0) + _attr(ino)
        case Opcode.GETATTR if node != _FIFO and not opened:
            return fuse.ATTR_OUT.pack(0, 0, 0) + _attr(node)
        case Opcode.OPEN:
            return fuse.OPEN_OUT.pack(0, 1, 0)
        case _:
            return None


def _attr(ino: int) -> bytes:
    mode = {_FILE: 0o100666, _FIFO: 0o010666}.get(ino, 0o40777)
    return fuse.ATTR.pack(ino, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
