"""The findings of a run, and the time after which it calls a wait a hang."""

import time
from collections.abc import Callable
from typing import Final

#: Seconds after which a wait counts as a hang.
PATIENCE: Final = 20.0


class Finding(Exception):  # noqa: N818 a run looks for broken rules; they are no errors
    """A broken rule, in words."""


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    """Wait until ``holds`` returns true; ``what`` names this for the finding.

    Raises:
        Finding: it does not within ``PATIENCE``.
    """
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise Finding(f"hang: waited {PATIENCE:g} s for {what}")
        time.sleep(0.0005)
