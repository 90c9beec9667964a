"""Forked children: how each child of this package begins and ends.

No other module calls fork(2). A child never comes back into its parent's code. There it would go on
as a second copy of the parent, with the parent's descriptors and the parent's work.
"""

import os
import select
import signal
from collections.abc import Callable, Iterable

from restrictedmem.abi import process
from restrictedmem.failure import FAULT, named, status_of
from restrictedmem.fd import OwnedFd
from restrictedmem.patience import Patience


def fork(
    body: Callable[[], object],
    *,
    bound: bool = False,
    name: str | None = None,
    keep: Iterable[int] | None = None,
) -> int:
    """Run ``body`` in a child, which ends with it; return the child's pid.

    The caller reaps the child. The child exits with 0 when ``body`` has returned, else with
    ``status_of`` the error; it prints nothing. A ``bound`` child is killed when this process ends
    (``die_with``). ``name`` is as in ``process.set_name``. With ``keep`` the child has the standard
    descriptors and those alone; else it has all that this process has.

    Raises:
        OSError: EAGAIN, ENOMEM when no process can be made.
    """
    parent, pid = os.getpid(), -1
    # A handler that raises between the fork and the child's try would bring the child back.
    # Functions that run at a fork (os.register_at_fork) would swallow KeyboardInterrupt.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
    except OSError as error:
        raise named("fork", error) from None
    finally:
        # The child lets signals through below, where an exception ends it.
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if pid:
        return pid
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if bound:
            die_with(parent)
        if name is not None:
            process.set_name(name)
        if keep is not None:
            process.close_others(keep)
        body()
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  the child must not go on as a second copy of its parent
        # End here, where the error still holds the body's variables. Closing their sockets may take
        # as long as a stranger likes (``burial``); the end of a process does not.
        os._exit(status_of(error))
    finally:
        # An error in the lines above, such as a signal handler's, must not bring the child back.
        os._exit(FAULT)


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends (PR_SET_PDEATHSIG).

    If the parent has ended already, this process ends at once. The kernel takes the end of the
    thread that forked this process for the end of the parent. The kernel forgets the setting when
    this process gets another user or group, or more capabilities (commit_creds).
    """
    process.prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before the prctl.
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def ends(pid: int, patience: Patience) -> bool:
    """Say whether a child ends in time, without reaping it.

    The end includes what the kernel has to undo for the child.

    Raises:
        OSError: EMFILE, ENOMEM as pidfd_open(2).
    """
    with OwnedFd(os.pidfd_open(pid)) as pidfd:
        return patience.wait(pidfd.fileno(), select.POLLIN)


def end_child(pid: int) -> None:
    """Kill a child, which may have ended by itself, and reap it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
