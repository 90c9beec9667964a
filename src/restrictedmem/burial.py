"""Closing a socket in whose queue a stranger may have left a descriptor.

Whoever closes it drops the descriptor, and waits as long as the stranger likes if that is a socket
that lingers (SO_LINGER): a signal alone ends the wait. A process that exits does not linger. So a
child that does nothing gets the last copy of the socket, and is killed.

For a socket that refuses descriptors (``fd.refuse_fds``), and where no message is left, ``bury`` is
close(2).
"""

import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

from restrictedmem import fd, sync
from restrictedmem.child import fork

#: Sockets for which no child was to be had so far. Numbers, which Python does not close at its end.
_unburied: Final = deque[int]()
#: Children that were killed, and may not have ended yet.
_dying: Final = set[int]()


def bury(sock: socket.socket, *, shared: bool = False) -> None:
    """Close a socket that takes no descriptors, and never wait for what is in its queue.

    Other processes go on with a ``shared`` one; any other is shut down.

    Preconditions: no other thread receives from it.
    """
    if sock.fileno() < 0 or fd.refuses_fds(sock) or not (shared or _holds_messages(sock)):
        sock.close()
        return
    _unburied.append(sock.detach())
    with suppress(IndexError):
        while True:
            oldest = _unburied.popleft()
            try:
                _take(oldest)
            except OSError:
                # The next burial tries again.
                _unburied.appendleft(oldest)
                return


def bury_elsewhere(send: Callable[[list[int]], None]) -> None:
    """Have ``send`` give another process a copy of each socket to bury: this one must not fork.

    That process keeps the copies until ``send`` gives it none: whoever closes a socket last waits.
    It raises OSError when it cannot.
    """
    global _take
    # Or another thread's socket would count as let go.
    mutex = sync.mutex()

    def take(number: int) -> None:
        with mutex:
            send([number])
            os.close(number)
            # Or with the next one.
            with suppress(OSError):
                send([])

    _take = take


def _holds_messages(sock: socket.socket) -> bool:
    """End a connection, and say whether messages are left; no other can come then."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
        # With it every message looks as if it brought descriptors, an empty one too. The end of
        # the stream does not.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        return fd.brings_fds(sock, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        # A listening socket: those that it has not accepted have queues.
        return True


def _leave_to_child(number: int) -> None:
    """Close a socket that a child still has, and kill the child.

    Raises:
        OSError: EAGAIN, ENOMEM as fork(2).
    """
    for pid in list(_dying):
        # Never waited for: what else it has inherited may hold it up.
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                continue
        _dying.discard(pid)
    child = fork(_wait_for_death, bound=True)
    try:
        os.close(number)
    finally:
        os.kill(child, signal.SIGKILL)
        _dying.add(child)


def _wait_for_death() -> NoReturn:
    while True:
        signal.pause()


_take: Callable[[int], None] = _leave_to_child
