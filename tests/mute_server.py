"""A FUSE server of an owner's own that opens files and then does not answer: neither FLUSH, nor STATFS, GETATTR or WRITE."""

import os
import signal
import socket
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress

from restrictedmem.abi import fuse
from restrictedmem.fd import receive_with_fds, send_with_fds
from restrictedmem.fs.mount import mount_detached

_KNOWN = 3600


def _attr(ino: int) -> bytes:
    return fuse.ATTR.pack(ino, 0, 0, 0, 0, 0, 0, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)


def _answer(operation: int) -> bytes | None:
    match operation:
        case 26:
            init = {"major": 7, "minor": 31, "max_readahead": 0, "flags": 0, "max_background": 16, "congestion_threshold": 12}
            return bytes(fuse.fuse_init_out(**init, max_write=4096, time_gran=1))
        case 1:
            return fuse.ENTRY_OUT.pack(2, 0, _KNOWN, _KNOWN, 0, 0) + _attr(2)
        case 14:
            return fuse.OPEN_OUT.pack(0, 1, 0)
        case _:
            return None


def _serve(sock: socket.socket) -> None:
    device, root = mount_detached(allow_other=True)
    with root:
        # A file of the own mount it must not have: its end would wait for itself.
        send_with_fds(sock, b"root", [root.fileno()])
    while True:
        request = os.read(device.fileno(), 1 << 20)
        _, operation, unique, *_ = fuse.IN_HEADER.unpack_from(request)
        answer = _answer(operation)
        if answer is not None:
            os.write(device.fileno(), fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + len(answer), 0, unique) + answer)


def _close_dead(file: int) -> None:
    with suppress(OSError):
        os.close(file)


@contextmanager
def mute_file() -> Generator[int]:
    """Yield a file that nobody can close as long as this lasts, a child that exits or runs a program neither."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            _serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    with ExitStack() as after:
        try:
            with ours:
                _, fds = receive_with_fds(ours, 10)
            with fds[0]:
                file = os.open("f", os.O_WRONLY | os.O_APPEND, dir_fd=fds[0].fileno())
            # With the server gone FLUSH fails, and does not wait.
            after.callback(_close_dead, file)
            yield file
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
