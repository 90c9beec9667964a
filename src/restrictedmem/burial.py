"""Closing a socket in whose queue another party may have left a descriptor.

That descriptor may be a socket that lingers (SO_LINGER). The process that closes the queue drops
the descriptor, and then waits as long as the other party likes. Only a signal ends the wait. A
process that exits does not linger. So a child that does nothing gets the last copy of the socket,
and is killed.

``bury`` is close(2) for a socket that refuses descriptors (``fd.refuse_fds``), and for a socket
without messages in its queue.
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

#: Sockets for which no child could be forked so far. They are kept as numbers, because Python
#: closes socket objects at its end.
_unburied: Final = deque[int]()
#: Children that were killed and may not have ended yet.
_dying: Final = set[int]()


def bury(sock: socket.socket, *, shared: bool = False) -> None:
    """Close a socket that takes no descriptors, and never wait for what is in its queue.

    Other processes go on with a ``shared`` socket; any other socket is shut down.

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
    """Bury each socket in another process from now on, because this process must not fork.

    ``send`` gives that process a copy of a socket. The process keeps its copies until ``send``
    sends an empty list, because the process that closes a socket last waits. ``send`` raises
    OSError when it cannot send.
    """
    global _take
    # Without the mutex, an empty list could tell the other process to close a socket of another
    # thread.
    mutex = sync.mutex()

    def take(number: int) -> None:
        with mutex:
            send([number])
            os.close(number)
            # If this fails, the copy is closed together with the next one.
            with suppress(OSError):
                send([])

    _take = take


def _holds_messages(sock: socket.socket) -> bool:
    """Shut a connection down, and say whether messages are left; no other can come then."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
        # With SO_PASSCRED every message, even an empty one, looks as if it had descriptors. The end
        # of the stream does not.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        return fd.brings_fds(sock, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        # This is a listening socket. The connections that it has not accepted have queues.
        return True


def _leave_to_child(number: int) -> None:
    """Close a socket of which a child still has a copy, and kill the child.

    Raises:
        OSError: EAGAIN, ENOMEM as fork(2).
    """
    for pid in list(_dying):
        # Never wait for a child: something else that it has inherited may hold it up.
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
