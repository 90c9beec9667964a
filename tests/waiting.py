"""Waiting in tests for a condition, never for a time.

If the deadline passes, the error names the condition.
"""

import sys
import threading
import time
from collections.abc import Callable

#: Seconds after which an expected event counts as missing.
PATIENCE = 20.0


def wait_until(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Poll until something holds; ``what`` is what a failure says was waited for."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience:g} s for {what}"
        time.sleep(0.002)


def waits(thread: threading.Thread) -> bool:
    """Say whether a thread is inside a wait of the threading module."""
    frame = sys._current_frames().get(thread.ident or 0)  # pyright: ignore[reportPrivateUsage]
    return frame is not None and frame.f_code.co_name == "wait"
