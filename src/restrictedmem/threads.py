"""Threads in processes whose memory may run out at any time.

threading.Thread.start() waits until the thread says that it runs. One that finds no memory before
that never says so, and its starter waits for ever, with the locks that it holds. Here the starter
waits a while.
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

#: How often a starter looks for its thread, and the seconds each time: time in which this process
#: did not run counts once at most.
_PATIENCE: Final = (20, 0.25)


def start(run: Callable[[], object]) -> None:
    """Have a thread do something; what it fails with ends the process, for somebody may wait for what the thread was to do.

    Raises:
        OSError: EAGAIN when there is no thread to be had; ``run`` is not called then.
    """
    try:
        thread = _Thread(run)
        _thread.start_new_thread(thread.be, ())
    except (RuntimeError, MemoryError):
        raise _none_to_be_had() from None
    if not thread.comes():
        raise _none_to_be_had()


def begin(thread: threading.Thread) -> None:
    """Start a thread that somebody joins, in a process whose memory is its owner's affair.

    Raises:
        OSError: EAGAIN when there is no thread to be had.
    """
    try:
        thread.start()
    except RuntimeError:
        raise _none_to_be_had() from None


def _none_to_be_had() -> OSError:
    # Python does not say which limit it was.
    return failed(
        "pthread_create",
        EAGAIN,
        "no thread to be had: ulimit -u, ulimit -v, pids.max, or the machine's memory",
    )


@final
class _Thread:
    """A thread that its starter may have given up."""

    __slots__ = ("_begun", "_run", "_taken")

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        #: Taken by the thread, or by a starter that has given up.
        self._taken = _thread.allocate_lock()
        #: Held until the thread has begun.
        self._begun = _thread.allocate_lock()
        self._begun.acquire()

    def comes(self) -> bool:
        """Wait until the thread has begun; false when it did not, and never will."""
        times, seconds = _PATIENCE
        return any(
            self._begun.acquire(timeout=seconds) for _ in range(times)
        ) or not self._taken.acquire(blocking=False)

    def be(self) -> None:
        """Be the thread."""
        try:
            if self._taken.acquire(blocking=False):
                self._begun.release()
                self._run()
        except BaseException as error:
            with suppress(BaseException):
                log.exception("a thread cannot go on")
            os._exit(status_of(error))
