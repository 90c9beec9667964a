"""The order in which a service starts, so that its owner cannot look into it.

The owner runs this by exec. Until PR_SET_DUMPABLE is 0 a process of the same user may open
/proc/PID/mem or attach, and keeps what it opened; so this process takes neither /dev/fuse nor
memory. It forks once it is undumpable and untraced: a child's memory is new, and nobody holds a way
into it. No process of a service enters a user namespace but those that mount, for a moment
(``fs.mounter``).
"""

import os
import signal
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from errno import ENOMEM

from restrictedmem.child import fork
from restrictedmem.failure import failed, status_of
from restrictedmem.fd import peer_credentials, refuse_fds
from restrictedmem.service import spawner
from restrictedmem.service.ending import Word
from restrictedmem.service.options import Options, Origin
from restrictedmem.service.privileges import harden, refuse_tracer
from restrictedmem.service.wire import Channel


def main(arguments: list[str]) -> None:
    """Start a service: the number of a connected socket, then the options. Returns when it is ready, in processes of its own.

    What goes wrong is told to the owner over the socket, in place of READY.
    """
    # An owner that ignores SIGCHLD passes that on by exec, and nobody could wait for a child.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # The spawner hears of its children by it, and whoever administers the machine sends others.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    channel = Channel(socket.socket(fileno=int(arguments[0])), "owner")
    with _telling(channel):
        refuse_fds(channel.sock)
        options = Options.load(arguments[1])
        options.check()
        pid, uid, _ = peer_credentials(channel.sock)
        harden()
        refuse_tracer()
        os.chdir("/")
        os.umask(0o077)
        word = Word()
        # It outlives this process.
        fork(lambda: _be_spawner(channel, options, Origin(pid, uid), word))
        word.hear()


@contextmanager
def _telling(owner: Channel) -> Generator[None]:
    """Tell the owner what fails here, and end."""
    try:
        yield
    except MemoryError:
        owner.reply_error(failed("start", ENOMEM))
        sys.exit(1)
    except OSError as error:
        owner.reply_error(error)
        sys.exit(1)


def _be_spawner(owner: Channel, options: Options, origin: Origin, word: Word) -> None:
    with _telling(owner):
        # A tracer that came between its permission check and ours has the child too
        # (PTRACE_O_TRACEFORK). Later none can come.
        refuse_tracer()
        # A process group of its own: a terminal's interrupt is for its owner. But in the session of
        # its owner, who started it, and so in its scheduling group (sched_autogroup): each call of
        # the owner waits for the service, which must not queue behind other sessions for it.
        # ``serve`` has begun a session for it.
        os.setpgid(0, 0)
    word.only_tell()
    try:
        spawner.run(owner, options, origin, word)
    except BaseException as error:
        # The owner's socket is the service's by now.
        word.ended(status_of(error) << 8)
        raise
