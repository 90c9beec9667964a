"""Turns of vCPUs: one vCPU of a VM runs at a time.

An instruction that is atomic on one emulator is not atomic beside another emulator on the same
memory. The first vCPU to come is the first to run. The next in line stops the vCPU that runs after
its slice. An exit or a wait gives the turn up earlier.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Final, final

from restrictedmem import sync

#: Seconds that a vCPU may run while others wait: some ten times the cost of a change of turns.
SLICE: Final = 0.001
#: Seconds between kicks, of which the first may be lost (``uc.Uc.kick``).
_KICK_INTERVAL: Final = 0.0002


@final
class Turn:
    """One vCPU's place in the line. ``stop`` ends its run soon, and any thread may call it."""

    __slots__ = ("changed", "kicked", "stop")

    def __init__(self, lock: sync.Mutex, stop: Callable[[], None]) -> None:
        self.changed = sync.condition(lock)
        self.kicked = False
        self.stop = stop


@final
class Turns:
    """The vCPUs of one VM: the one that runs, and those that wait."""

    def __init__(self) -> None:
        self._lock = sync.mutex()
        self._running: Turn | None = None
        self._slice_end = 0.0
        self._waiting: deque[Turn] = deque()

    def join(self, stop: Callable[[], None]) -> Turn:
        """Make the place of a new vCPU."""
        return Turn(self._lock, stop)

    def has(self, turn: Turn) -> bool:
        """Say whether it is a vCPU's turn.

        Only that vCPU asks, and meanwhile no other thread changes the answer.
        """
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
        """Give the turn up, to the vCPU that has waited longest."""
        with self._lock:
            assert self._running is turn
            self._running = None
            if self._waiting:
                self._running = following = self._waiting.popleft()
                self._slice_end = time.monotonic() + SLICE
                following.changed.notify()
                self._wake_next()

    def _wake_next(self) -> None:
        """Let the next in line watch the slice of the vCPU that runs."""
        if self._waiting:
            self._waiting[0].changed.notify()

    def kick(self, turn: Turn) -> None:
        """End a vCPU's wait: the present one, or else the next."""
        with self._lock:
            turn.kicked = True
            turn.changed.notify()
