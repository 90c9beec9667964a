"""Waiting for another process, with a deadline that counts only time in which this one runs."""

import select
import time
from typing import Final, final

#: Seconds that one look may count.
_SLICE: Final = 0.05


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
