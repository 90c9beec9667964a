"""Waiting for another process, with a deadline that counts only time in which this one runs; and for memory."""

import select
import time
from collections.abc import Callable
from errno import EINVAL
from typing import Final, TypeVar, final

#: Seconds that one look may count.
SLICE: Final = 0.05
#: How often something is tried while memory is short, and the seconds between two tries.
_TRIES: Final = 100
_PAUSE: Final = 0.01

_T = TypeVar("_T")


@final
class Clock:
    """Counts the seconds in which this process runs.

    Whoever stops this process (SIGSTOP, a frozen cgroup, a suspended machine) stops the other one
    as well, often. So whoever waits looks at the clock every 50 ms, and what has passed since the
    last look counts as that much, however long it was.
    """

    __slots__ = ("_last", "seconds")

    def __init__(self) -> None:
        #: As of the last look.
        self.seconds = 0.0
        self._last = time.monotonic()

    def look(self) -> float:
        """Return the seconds up to now."""
        now = time.monotonic()
        self.seconds += min(now - self._last, SLICE)
        self._last = now
        return self.seconds


@final
class Patience:
    """So many seconds of a ``Clock`` to wait for another process."""

    __slots__ = ("_clock", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._clock = Clock()

    def wait(self, fd: int, events: int) -> bool:
        """Wait until a descriptor has one of some events of poll(2); false when there is no patience left."""
        poll = select.poll()
        poll.register(fd, events)
        while True:
            left = self._seconds - self._clock.seconds
            try:
                ready = poll.poll(1000 * min(SLICE, max(left, 0)))
            except OSError as error:
                if error.errno != EINVAL:
                    raise
                # The limit on descriptors is 0, where poll(2) takes not even one. It may rise
                # again.
                time.sleep(_PAUSE)
                ready = []
            if self._clock.look() >= self._seconds or ready:
                return bool(ready)


def patiently(act: Callable[[], _T]) -> _T:
    """Do something again while memory is short; the last MemoryError is raised."""
    for _ in range(_TRIES - 1):
        try:
            return act()
        except MemoryError:
            time.sleep(_PAUSE)
    return act()
