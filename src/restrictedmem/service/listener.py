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

    Yields the socket, which does not block, and what lets other users put another in its place
    (``paths.dangers``). A socket of this user on which nobody listens any more is replaced.

    At the end this looks at the name in its directory, and then removes the name. Between the two,
    a user who may write there can put something else under the name. Then that is removed.

    Preconditions: no other thread, because the umask is the process's.

    Raises:
        OSError: EADDRINUSE when something else stands there; EEXIST when somebody exchanged it at
            once; as ``paths.resolve``.
    """
    directory, name, _ = paths.resolve(path, last=False)
    with directory, _socket() as listener:
        _remove_stale(directory, name)
        # bind(2) makes the socket with its permissions. A later chmod(2) would follow whatever
        # stands there by then.
        before = os.umask(~mode & 0o777)
        try:
            listener.bind(f"/proc/self/fd/{directory.fileno()}/{name}")
        except OSError as error:
            # Python reports a path that does not fit into the address without an errno. ENOENT is
            # not about the directory, which is held.
            detail = "/proc is not mounted" if error.errno == ENOENT else ""
            raise failed("bind", error.errno or ENAMETOOLONG, detail, path) from None
        finally:
            os.umask(before)
        # Hold the socket, so that no other inode can have its number.
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
                # Some connections in its queue were not accepted.
                bury(listener)


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    # A listening process may have no room for us, and a connecting process may be gone.
    made.setblocking(False)
    # Dropping a stranger's socket may take as long as it lingers (SO_LINGER).
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
    """Remove a socket of this user on which nobody listens.

    If something else stands there, bind(2) fails.
    """
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
