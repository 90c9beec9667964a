"""Children of the supervisor's, which do what may wait, and hold nothing beside what they are given."""

import os
import signal
from collections.abc import Callable, Iterable

from restrictedmem.abi import process


def fork(name: str, keep: Iterable[int], body: Callable[[], None]) -> int:
    """Run ``body`` in a child, with standard descriptors and those of ``keep``; returns its process id, which the caller reaps.

    It is killed if this process is.

    Raises:
        OSError: EAGAIN, ENOMEM: no process is to be had.
    """
    parent = os.getpid()
    child = process.fork()
    if child:
        return child
    try:
        process.prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            process.set_name(name)
            process.close_others(keep)
            body()
    finally:
        os._exit(0)
