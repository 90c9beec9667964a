"""Waiting in tests: for a condition, with a deadline that says what was waited for; never for a time."""

import sys
import threading
import time
from collections.abc import Callable

#: Seconds after which something that was to happen did not.
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
