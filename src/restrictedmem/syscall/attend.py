"""Wait for a program as if it ran in this process's place: for who has something to say when it has ended.

Both are of one process group, so a terminal's signals reach both and are not passed on; what somebody sends to this process is. When the
program stops, so does this process, for the shell that looks at it; and it ends as the program did.
"""

import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

from restrictedmem.abi import process

#: Sent by kill(2) and the like, not by the kernel (SI_USER, SI_QUEUE, SI_TKILL).
_SENT: Final = (0, -1, -6)
_UNBLOCKABLE: Final = {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


def attend(program: Callable[[], NoReturn]) -> int:
    """Run ``program`` in a child, and return its wait status when it has ended; it is killed if this process is.

    Preconditions: this process has one thread, and no other children that may end meanwhile.

    Raises:
        OSError: EAGAIN, ENOMEM: no process is to be had.
    """
    awaited = signal.valid_signals() - _UNBLOCKABLE
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    # Inherited as ignored, it would let the kernel reap what is waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    parent = os.getpid()
    child = os.fork()
    if not child:
        try:
            process.prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(128 + signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            program()
        finally:
            os._exit(1)
    try:
        return _wait(child, awaited)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(child: int, awaited: set[signal.Signals]) -> int:
    while True:
        info = signal.sigwaitinfo(awaited)
        if info.si_signo != signal.SIGCHLD:
            if info.si_code in _SENT and info.si_pid != child:
                os.kill(child, info.si_signo)
            continue
        pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if not pid:
            continue
        if not os.WIFSTOPPED(status):
            return status
        os.kill(os.getpid(), signal.SIGSTOP)
        os.kill(child, signal.SIGCONT)


def end_as(status: int) -> int:
    """Return the exit status that says a wait status, or end by the signal that it says."""
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    # The program's core is the one to look at.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number
