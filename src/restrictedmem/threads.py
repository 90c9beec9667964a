"""Threads in processes whose memory may run out at any time.

threading.Thread.start() waits until the thread says that it runs. A thread that finds no memory
before that never says so. Its starter then waits for ever, with the locks that it holds. Here the
starter waits for a limited time.
"""

import _thread
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from errno import EAGAIN
from typing import Final, final

from restrictedmem.failure import failed, status_of

log = logging.getLogger(__name__)

#: How often a starter looks for its thread, and the seconds of each wait. Time in which this
#: process did not run counts as one wait at most.
_PATIENCE: Final = (20, 0.25)


def start(run: Callable[[], object]) -> None:
    """Call ``run`` in a new thread; an exception there ends the process.

    The process ends because somebody may wait for the work of the thread.

    Raises:
        OSError: EAGAIN when no thread can be made; ``run`` is not called then.
    """
    try:
        thread = _Thread(run)
        _thread.start_new_thread(thread.be, ())
    except (RuntimeError, MemoryError):
        raise _none_to_be_had() from None
    if not thread.comes():
        raise _none_to_be_had()


def begin(thread: threading.Thread) -> None:
    """Start a thread that is joined later.

    Use this in a process whose owner is responsible for its memory.

    Raises:
        OSError: EAGAIN when no thread can be made.
    """
    try:
        thread.start()
    except RuntimeError:
        raise _none_to_be_had() from None


def _none_to_be_had() -> OSError:
    # Python does not say which limit was reached.
    return failed(
        "pthread_create",
        EAGAIN,
        "no thread can be made: check ulimit -u, ulimit -v, pids.max, and the machine's memory",
    )


@final
class _Thread:
    """A thread on which its starter may have given up."""

    __slots__ = ("_begun", "_run", "_taken")

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        #: Taken by the thread, or by a starter that gives up.
        self._taken = _thread.allocate_lock()
        #: Held until the thread has begun.
        self._begun = _thread.allocate_lock()
        self._begun.acquire()

    def comes(self) -> bool:
        """Wait until the thread has begun; return false if it has not, and never will."""
        times, seconds = _PATIENCE
        return any(
            self._begun.acquire(timeout=seconds) for _ in range(times)
        ) or not self._taken.acquire(blocking=False)

    def be(self) -> None:
        """Run as the new thread."""
        try:
            if self._taken.acquire(blocking=False):
                self._begun.release()
                self._run()
        except BaseException as error:
            with suppress(BaseException):
                log.exception("a thread cannot go on")
            os._exit(status_of(error))
