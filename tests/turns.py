"""Tests side by side: in processes of one run, and in runs of several copies of the repository.

Most tests do not need the machine for themselves. A test that is marked ``alone`` does. Such a test
looks at, or changes, something that all processes share, or measures a time that a busy neighbour
would stretch.
"""

import fcntl
import os
import time
from typing import Final, final

#: Directories that every copy finds, whoever runs it, and that nothing else locks. A test that
#: wants the machine for itself holds the gate while it waits for the others to end. So none of them
#: begins anew.
_GATE: Final = "/sys/kernel"
_MACHINE: Final = "/sys/kernel/mm"
#: Seconds that tests of other processes may take until it is this one's turn.
_PATIENCE = 1800
_PAUSE: Final = 0.002


@final
class Turns:
    """The turns of one process: locks on two directories."""

    def __init__(self, gate: str = _GATE, machine: str = _MACHINE) -> None:
        self._gate, self._machine = (
            os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in (gate, machine)
        )
        self._alone = False

    def begin(self, *, alone: bool) -> None:
        """Wait for a test's turn."""
        if alone and self._alone:
            return
        _lock(self._gate, fcntl.LOCK_EX)
        try:
            _lock(self._machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        self._alone = alone

    def end(self, *, more: bool) -> None:
        """Let others have theirs, unless this process stays alone for one ``more`` test."""
        if not (self._alone and more):
            # Children that a test has left have the same open file: closing it would not do.
            fcntl.flock(self._machine, fcntl.LOCK_UN)
            self._alone = False

    def close(self) -> None:
        """Take no more turns."""
        os.close(self._gate)
        os.close(self._machine)


def _lock(fd: int, how: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            assert time.monotonic() < deadline, (
                f"waited {_PATIENCE} s for tests of other processes (see /proc/locks)"
            )
            time.sleep(_PAUSE)
