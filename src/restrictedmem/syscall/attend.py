"""Waiting for a program as if it ran in this process's place.

This is for a process that has something to say when the program has ended. Both are in one process
group, so a terminal's signals reach both and are not passed on. A signal that another process sends
to this process is passed on. So is the signal by which a terminal tells the leader of its session
alone that it is gone. When the program stops, this process stops too, for the shell that looks at
it. It goes on with the program, and ends as the program did.
"""

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

from restrictedmem.abi import process
from restrictedmem.child import end_child, fork
from restrictedmem.fd import OwnedFd, readable

#: Codes of signals sent by kill(2) and the like, not by the kernel (SI_USER, SI_QUEUE, SI_TKILL).
_SENT: Final = (0, -1, -6)
#: Code of the kernel's own signals (SI_KERNEL).
_KERNEL: Final = 0x80
#: Signals that the kernel sends to the leader of a session whose terminal is gone, and to no other
#: process.
_HANG_UP: Final = (signal.SIGHUP, signal.SIGCONT)
#: Seconds between two looks at a stopped program.
_LOOK: Final = 0.05
_TIMERS: Final = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_UNBLOCKABLE: Final = {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
}


def attend(program: Callable[[], NoReturn]) -> int:
    """Run ``program`` in a child, and return its wait status when it has ended.

    The child is killed if this process ends. Signals are blocked from then on: a signal that was
    sent to the program after its end must not keep this process from reporting the end. ``end_as``
    ends this process as the program did.

    Preconditions: this process has one thread, and no other children that may end meanwhile.

    Raises:
        OSError: EAGAIN, ENOMEM when no process can be made.
    """
    awaited = signal.valid_signals() - _UNBLOCKABLE
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    # If SIGCHLD was inherited as ignored, the kernel would reap the child that is waited for. The
    # program inherits the old setting.
    inherited = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Timers stay with a process in execve(2), and are not inherited by its child.
    timers = [signal.setitimer(timer, 0) for timer in _TIMERS]
    subreaper = process.is_subreaper()

    def be_program() -> NoReturn:
        try:
            process.prctl(process.PR_SET_CHILD_SUBREAPER, subreaper)
            for timer, (seconds, interval) in zip(_TIMERS, timers, strict=True):
                signal.setitimer(timer, seconds, interval)
            signal.signal(signal.SIGCHLD, inherited)
            # Until exec the child has Python's handler, and nobody would hear of the exception.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            program()
        finally:
            # An errno could be taken for an exit status of the program.
            os._exit(1)

    try:
        child = fork(be_program, bound=True)
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    # Processes that the program's children leave are the program's, not this process's.
    process.prctl(process.PR_SET_CHILD_SUBREAPER, 0)
    guard = _guard(child)
    try:
        return _wait(child, awaited)
    finally:
        if guard > 0:
            end_child(guard)


def _guard(child: int) -> int:
    """Start a process that kills the program when this process ends; return its pid, or -1.

    The kernel does that by itself (PR_SET_PDEATHSIG), but forgets it when the program changes its
    user or group (commit_creds). So if there is no guard, only such a program lives on.
    """
    guard = -1
    with (
        suppress(OSError),
        OwnedFd(os.pidfd_open(os.getpid())) as this,
        OwnedFd(os.pidfd_open(child)) as program,
    ):
        guard = fork(lambda: _kill_after(this, program), name="rmem-guard")
    return guard


def _kill_after(attendant: OwnedFd, program: OwnedFd) -> None:
    # A kill of this process's group must not kill the guard with it.
    os.setsid()
    readable([attendant])
    signal.pidfd_send_signal(program.fileno(), signal.SIGKILL)


def _wait(child: int, awaited: set[signal.Signals]) -> int:
    while True:
        info = signal.sigwaitinfo(awaited)
        sent = info.si_code in _SENT and info.si_pid != child
        if sent or (info.si_code == _KERNEL and info.si_signo in _HANG_UP and _leads()):
            _send(child, info.si_signo)
        # A sent SIGCHLD may stand for the kernel's, too: one of a kind is pending at a time.
        if info.si_signo != signal.SIGCHLD:
            continue
        pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if not pid:
            continue
        if not os.WIFSTOPPED(status):
            return status
        _stop_with(child)


def _leads() -> bool:
    """Say whether this process leads its session."""
    return os.getsid(0) == os.getpid()


def _send(child: int, number: int) -> None:
    # Root without CAP_KILL may not, once the program is another user.
    with suppress(PermissionError):
        os.kill(child, number)


def _stop_with(child: int) -> None:
    """Stop until another process continues this process, or continues the program alone.

    A watcher process has to see the latter.
    """
    parent, watcher = os.getpid(), -1
    # Without a watcher, the stop ends only when another process continues this one.
    with suppress(OSError):
        watcher = fork(lambda: _watch(parent, child), bound=True)
    os.kill(parent, signal.SIGSTOP)
    if watcher > 0:
        end_child(watcher)
    _send(child, signal.SIGCONT)


def _watch(parent: int, child: int) -> NoReturn:
    while True:
        if _is_stopped(parent) and not _is_stopped(child):
            os.kill(parent, signal.SIGCONT)
        time.sleep(_LOOK)


def _is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return stat.read().rpartition(b") ")[2][:1] in b"Tt"


def end_as(status: int) -> int:
    """Return the exit status in a wait status, or end by the signal in it."""
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    # The core to look at is the program's.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError):
        signal.signal(number, signal.SIG_DFL)
    # Two signals are the C library's, and are never blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number} & signal.valid_signals())
    os.kill(os.getpid(), number)
    return 128 + number
