"""The messages of a server on stderr, which its reader may not read."""

import os
import queue
import sys
import threading
from contextlib import suppress
from typing import Final, final

#: The most lines that wait for the reader.
_MOST: Final = 256


@final
class ServerMessages:
    """A queue of lines for stderr, which a thread writes.

    No caller waits for the reader. If too many lines wait, further ones are dropped. A line says so
    once there is room. The thread is a daemon, so it does not keep the process from ending.
    """

    def __init__(self) -> None:
        self._lines = queue.Queue[str](_MOST)
        self._dropped = 0
        # If stderr was closed, its number may belong to another file.
        self._fd = -1 if sys.__stderr__ is None else sys.__stderr__.fileno()
        threading.Thread(target=self._write, name="messages", daemon=True).start()

    def __call__(self, line: str) -> None:
        """Queue a line; only one thread may call this."""
        try:
            if self._dropped:
                self._lines.put_nowait(f"{self._dropped} lines were dropped: nobody read them")
                self._dropped = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def flush(self, seconds: float) -> None:
        """Wait until all lines are written, for at most ``seconds``."""
        done = self._lines.all_tasks_done
        with done:
            done.wait_for(lambda: not self._lines.unfinished_tasks, seconds)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            # sys.stderr has a lock that the interpreter takes at its end. The reader of stderr may
            # be gone, while clients are not, so errors do not matter.
            with suppress(OSError):
                os.write(self._fd, f"{line}\n".encode(errors="backslashreplace"))
            self._lines.task_done()
