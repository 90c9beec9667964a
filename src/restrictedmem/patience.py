"""Deadlines for another process, which count only time in which this process runs.

The module also has a retry for when memory is short.
"""

import select
import time
from collections.abc import Callable
from errno import EINVAL
from typing import Final, TypeVar, final

#: Most seconds that one look at the clock counts.
SLICE: Final = 0.05
#: How often something is tried while memory is short, and the seconds between two tries.
_TRIES: Final = 100
_PAUSE: Final = 0.01

_T = TypeVar("_T")


@final
class Clock:
    """A count of the seconds in which this process runs.

    When this process is stopped (SIGSTOP, a frozen cgroup, a suspended machine), the other process
    is often stopped as well. So a process that waits looks at the clock every 50 ms. The time since
    the last look counts as 50 ms at most, however long it was.
    """

    __slots__ = ("_last", "seconds")

    def __init__(self) -> None:
        #: The count at the last look.
        self.seconds = 0.0
        self._last = time.monotonic()

    def look(self) -> float:
        """Look at the clock, and return the seconds counted up to now."""
        now = time.monotonic()
        self.seconds += min(now - self._last, SLICE)
        self._last = now
        return self.seconds


@final
class Patience:
    """A number of seconds of a ``Clock`` to wait for another process."""

    __slots__ = ("_clock", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._clock = Clock()

    def wait(self, fd: int, events: int) -> bool:
        """Wait for events of poll(2) on a descriptor; return false when the time is over."""
        poll = select.poll()
        poll.register(fd, events)
        while True:
            left = self._seconds - self._clock.seconds
            try:
                ready = poll.poll(1000 * min(SLICE, max(left, 0)))
            except OSError as error:
                if error.errno != EINVAL:
                    raise
                # While the limit on descriptors is 0, poll(2) takes not even one. The limit may
                # rise again.
                time.sleep(_PAUSE)
                ready = []
            if self._clock.look() >= self._seconds or ready:
                return bool(ready)


def patiently(act: Callable[[], _T]) -> _T:
    """Call ``act`` again while memory is short; raise the last MemoryError."""
    for _ in range(_TRIES - 1):
        try:
            return act()
        except MemoryError:
            time.sleep(_PAUSE)
    return act()
