"""Taking turns: what is atomic on one emulator is not atomic beside another on the same memory, so one vCPU of a VM runs at a time.

First come, first served. Whoever is next in line stops the one that runs after its slice; an exit
or a wait gives the turn up before.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Final, final

from restrictedmem import sync

#: Seconds that a vCPU may run while others wait: some ten times what a change costs.
SLICE: Final = 0.001
#: Seconds between kicks, of which the first may be lost (``unicorn.Uc.kick``).
_KICK_INTERVAL: Final = 0.0002


@final
class Turn:
    """One vCPU's place in the line; ``stop`` ends its run soon, from any thread."""

    __slots__ = ("changed", "kicked", "stop")

    def __init__(self, lock: sync.Mutex, stop: Callable[[], None]) -> None:
        self.changed = sync.condition(lock)
        self.kicked = False
        self.stop = stop


@final
class Turns:
    """The vCPUs of one VM: which runs, and which wait."""

    def __init__(self) -> None:
        self._lock = sync.mutex()
        self._running: Turn | None = None
        self._slice_end = 0.0
        self._waiting: deque[Turn] = deque()

    def join(self, stop: Callable[[], None]) -> Turn:
        """Make the place of one more vCPU."""
        return Turn(self._lock, stop)

    def has(self, turn: Turn) -> bool:
        """Say whether it is a vCPU's turn; asked by that vCPU, for whom nobody else changes it."""
        return self._running is turn

    def take(self, turn: Turn) -> None:
        """Wait until it is the vCPU's turn, or until ``kick``."""
        with self._lock:
            if self._running is None:
                self._running = turn
                self._slice_end = time.monotonic() + SLICE
            elif self._running is not turn:
                self._waiting.append(turn)
                self._wait(turn)
            turn.kicked = False

    def _wait(self, turn: Turn) -> None:
        while self._running is not turn:
            if turn.kicked:
                self._waiting.remove(turn)
                self._wake_next()
                return
            timeout = None
            if self._waiting[0] is turn:
                timeout = self._slice_end - time.monotonic()
                if timeout <= 0:
                    assert self._running is not None
                    self._running.stop()
                    timeout = _KICK_INTERVAL
            turn.changed.wait(timeout)

    def give(self, turn: Turn) -> None:
        """Give the turn up, to whoever has waited longest."""
        with self._lock:
            assert self._running is turn
            self._running = None
            if self._waiting:
                self._running = following = self._waiting.popleft()
                self._slice_end = time.monotonic() + SLICE
                following.changed.notify()
                self._wake_next()

    def _wake_next(self) -> None:
        """Let the next in line watch the slice."""
        if self._waiting:
            self._waiting[0].changed.notify()

    def kick(self, turn: Turn) -> None:
        """End a vCPU's wait, this one or else the next."""
        with self._lock:
            turn.kicked = True
            turn.changed.notify()
