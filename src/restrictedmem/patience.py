"""Waiting for another process, with a deadline that counts only time in which this one runs; and for memory."""

import select
import time
from collections.abc import Callable
from typing import Final, TypeVar, final

#: Seconds that one look may count.
_SLICE: Final = 0.05
#: How often something is tried while memory is short, and the seconds between two tries.
_TRIES: Final = 100
_PAUSE: Final = 0.01

_T = TypeVar("_T")


@final
class Patience:
    """So many seconds to wait for another process.

    Whoever stops this process (SIGSTOP, a frozen cgroup, a suspended machine) stops the other one as well, often. So the clock is
    looked at every 50 ms, and what has passed since the last look counts as that much, however long it was.
    """

    __slots__ = ("_last", "_left")

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._last = time.monotonic()

    def wait(self, fd: int, events: int) -> bool:
        """Wait until a descriptor has one of some events of poll(2); false when there is no patience left."""
        poll = select.poll()
        poll.register(fd, events)
        while True:
            ready = poll.poll(1000 * min(_SLICE, max(self._left, 0)))
            now = time.monotonic()
            self._left -= min(now - self._last, _SLICE)
            self._last = now
            if ready or self._left <= 0:
                return bool(ready)


def patiently(act: Callable[[], _T]) -> _T:
    """Do something again while memory is short; the last MemoryError is raised."""
    for _ in range(_TRIES - 1):
        try:
            return act()
        except MemoryError:
            time.sleep(_PAUSE)
    return act()
