"""A listening socket at a path, in a directory where others may write."""

import os
import socket
import stat
from collections.abc import Generator
from contextlib import contextmanager
from errno import EEXIST, ENAMETOOLONG, ENOENT
from typing import Final

from restrictedmem import paths
from restrictedmem.burial import bury
from restrictedmem.failure import failed
from restrictedmem.fd import OwnedFd, refuse_fds

_BACKLOG: Final = 64
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def listen(path: str, mode: int) -> Generator[tuple[socket.socket, list[str]]]:
    """Listen at a path on a socket of permissions ``mode``, and remove it at the end.

    Yields the socket, which does not wait, and what lets other users put another in its place
    (``paths.dangers``). A socket of this user that nobody listens on any more is replaced. What is
    removed is one name in one directory, looked at just before. Whoever may write there can still
    put something else under the name in that moment; then that goes.

    Preconditions: no other thread, for the umask is the process's.

    Raises:
        OSError: EADDRINUSE when something else stands there; EEXIST when somebody exchanged it at
            once; as ``paths.resolve``.
    """
    directory, name, _ = paths.resolve(path, last=False)
    with directory, _socket() as listener:
        _remove_stale(directory, name)
        # The socket is made with its permissions. To change them later would follow whatever stands
        # there by then.
        before = os.umask(~mode & 0o777)
        try:
            listener.bind(f"/proc/self/fd/{directory.fileno()}/{name}")
        except OSError as error:
            # Python says what does not fit into the address without an errno. The directory is
            # held.
            detail = "/proc is not mounted" if error.errno == ENOENT else ""
            raise failed("bind", error.errno or ENAMETOOLONG, detail, path) from None
        finally:
            os.umask(before)
        # Held, so that nobody else's inode can have its number.
        with OwnedFd(os.open(name, _LOOK, dir_fd=directory.fileno())) as made:
            if not _is_own_socket(made):
                raise failed(
                    "bind", EEXIST, "somebody has put something else in the socket's place", path
                )
            try:
                listener.listen(_BACKLOG)
                yield listener, list(paths.dangers(directory))
            finally:
                _remove(directory, name, made)
                # Not all who are in its queue were let in.
                bury(listener)


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    # Whoever listens may have no room for us, and whoever connects may be gone.
    made.setblocking(False)
    # To drop a stranger's socket may take as long as it lingers (SO_LINGER).
    refuse_fds(made)
    return made


def _is_own_socket(entry: OwnedFd) -> bool:
    found = os.fstat(entry.fileno())
    return stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()


def _remove(directory: OwnedFd, name: str, entry: OwnedFd) -> None:
    """Remove a name if it is still that of ``entry``."""
    try:
        now = os.stat(name, dir_fd=directory.fileno(), follow_symlinks=False)
        if os.path.samestat(now, os.fstat(entry.fileno())):
            os.unlink(name, dir_fd=directory.fileno())
    except FileNotFoundError:
        return


def _remove_stale(directory: OwnedFd, name: str) -> None:
    """Remove a socket of ours that nobody listens on; bind says what else stands in the way."""
    try:
        entry = OwnedFd(os.open(name, _LOOK, dir_fd=directory.fileno()))
    except OSError:
        return
    with entry, _socket() as probe:
        if not _is_own_socket(entry):
            return
        try:
            probe.connect(f"/proc/self/fd/{entry.fileno()}")
        except ConnectionRefusedError:
            _remove(directory, name, entry)
        except OSError:
            return
