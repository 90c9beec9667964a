"""What a server says on stderr, whose reader may not read."""

import os
import queue
import sys
import threading
from contextlib import suppress
from typing import Final, final

#: Lines that wait for the reader.
_MOST: Final = 256


@final
class Said:
    """Lines for stderr that a thread writes: whoever says one never waits for the reader.

    While too many wait, further ones are dropped; a line says so once there is room. The thread is
    a daemon, which keeps no process from its end.
    """

    def __init__(self) -> None:
        self._lines = queue.Queue[str](_MOST)
        self._dropped = 0
        # Something else may have the number of one that was closed.
        self._fd = -1 if sys.__stderr__ is None else sys.__stderr__.fileno()
        threading.Thread(target=self._write, name="said", daemon=True).start()

    def __call__(self, line: str) -> None:
        """Say a line; one thread alone does."""
        try:
            if self._dropped:
                self._lines.put_nowait(f"{self._dropped} lines were dropped: nobody read them")
                self._dropped = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def flush(self, seconds: float) -> None:
        """Wait until all is written, no longer than a reader may take."""
        done = self._lines.all_tasks_done
        with done:
            done.wait_for(lambda: not self._lines.unfinished_tasks, seconds)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            # Not through sys.stderr, whose lock the interpreter wants at its end. Whoever read this
            # may be gone; clients are not.
            with suppress(OSError):
                os.write(self._fd, f"{line}\n".encode(errors="backslashreplace"))
            self._lines.task_done()
