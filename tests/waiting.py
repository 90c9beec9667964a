"""Waiting in tests: for a condition, with a deadline that says what was waited for; never for a time."""

import os
import sys
import threading
import time
from collections.abc import Callable


def wait_for(what: str, holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        os.sched_yield()


def waits(thread: threading.Thread) -> bool:
    """Say whether a thread is inside a wait of the threading module."""
    frame = sys._current_frames().get(thread.ident or 0)  # pyright: ignore[reportPrivateUsage]
    return frame is not None and frame.f_code.co_name == "wait"
