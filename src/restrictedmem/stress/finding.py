"""What a run finds wrong, and how long it waits before it calls something a hang."""

import time
from collections.abc import Callable
from typing import Final

#: Seconds after which something that was to happen has not.
PATIENCE: Final = 20.0


class Finding(Exception):  # noqa: N818 a broken rule is what a run looks for, not an error
    """A rule that was broken, in words."""


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    """Wait for something to hold.

    Raises:
        Finding: when it does not in time.
    """
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise Finding(f"hang: waited {PATIENCE:g} s for {what}")
        time.sleep(0.0005)
