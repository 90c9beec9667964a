"""The order in which a service starts, so that its owner cannot look into it.

The owner runs this by exec. Until PR_SET_DUMPABLE is 0, a process of the same user may open
/proc/PID/mem or attach, and keeps what it has opened. So this process takes neither /dev/fuse nor
memory. It forks once it is undumpable and untraced. A child's memory is new, and nobody holds a way
into it. No process of a service enters a user namespace, except those that mount, for a moment
(``fs.mounter``).
"""

import os
import signal
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from errno import ENOMEM
from functools import partial

from restrictedmem.child import fork
from restrictedmem.failure import failed, status_of
from restrictedmem.fd import peer_credentials, refuse_fds
from restrictedmem.fs.invalidator import Invalidator
from restrictedmem.service import sealing, spawner
from restrictedmem.service.ending import Word
from restrictedmem.service.options import Options, Origin
from restrictedmem.service.privileges import drop_privileges, harden, refuse_tracer
from restrictedmem.service.wire import Channel


def main(arguments: list[str]) -> None:
    """Start a service, and return when it is ready, in processes of its own.

    ``arguments`` are the number of a connected socket, and the options. An error is sent to the
    owner over the socket, in place of READY.
    """
    # An owner that ignores SIGCHLD passes that on by exec. Then nobody could wait for a child.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Unblock all signals: the spawner learns of its children by SIGCHLD, and administrators send
    # others.
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
        invalidator = (
            Invalidator.start(partial(_settle, channel, options)) if options.guest_memfd else None
        )
        word = Word()
        # The child is not bound, because it outlives this process.
        fork(lambda: _be_spawner(channel, options, Origin(pid, uid), word, invalidator))
        if invalidator is not None:
            invalidator.close()
        word.hear()


@contextmanager
def _telling(owner: Channel) -> Generator[None]:
    """Send an error of the block to the owner, and end."""
    try:
        yield
    except MemoryError:
        owner.reply_error(failed("start", ENOMEM))
        sys.exit(1)
    except OSError as error:
        owner.reply_error(error)
        sys.exit(1)


def _settle(owner: Channel, options: Options) -> None:
    """Keep nothing of the owner's, nor its user."""
    owner.close()
    # Its process group is its own for the spawner's reason below.
    os.setpgid(0, 0)
    spawner.drop_stdio()
    drop_privileges(options.become, keep=0)
    sealing.seal()


def _be_spawner(
    owner: Channel,
    options: Options,
    origin: Origin,
    word: Word,
    invalidator: Invalidator | None,
) -> None:
    with _telling(owner):
        # A tracer that came between its permission check and our check has the child too
        # (PTRACE_O_TRACEFORK). Later none can come.
        refuse_tracer()
        # A process group of its own, because an interrupt from a terminal is for the owner. But it
        # stays in the session of the owner that started it, and so in the owner's scheduling group
        # (sched_autogroup). Each call of the owner waits for the service, which must not queue
        # behind other sessions for that. If ``serve`` is the owner, it has begun a session for
        # this.
        os.setpgid(0, 0)
    word.only_tell()
    try:
        spawner.run(owner, options, origin, word, invalidator)
    except BaseException as error:
        # By now the owner's socket is the service's.
        word.ended(status_of(error) << 8)
        raise
