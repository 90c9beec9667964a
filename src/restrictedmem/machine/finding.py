"""What a probe says, and how a probe is tried without the asking process being changed or held up by it."""

import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from errno import ECHILD, ETIMEDOUT
from pathlib import Path
from typing import Final, NoReturn, TypeVar

#: Seconds that a probe in a child may take.
DEADLINE: Final = 5.0


class State(Enum):
    """Whether a machine has something."""

    YES = "yes"
    NO = "no"
    PARTLY = "partly"
    UNKNOWN = "unknown"
    """It could not be tried here; ``detail`` says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a machine offers or lacks; ``name`` is stable, the rest is for a person."""

    name: str
    state: State
    detail: str
    consequence: str = ""
    """What follows for restrictedmem, where something is missing."""
    remedy: str = ""
    """How to get it: a command where there is one."""


T = TypeVar("T")


def in_child(probe: Callable[[], T], deadline: float = DEADLINE) -> T:
    """Return what a probe returns in a forked child, which does nothing else; the answer has to fit in a page.

    Raises:
        OSError: what the probe raised; ETIMEDOUT after ``deadline`` seconds; ECHILD when the child died of it, by a signal for instance.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(probe, writer)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], deadline)
        answer = os.read(reader, select.PIPE_BUF) if ready else None
    finally:
        os.close(reader)
    if answer is None:
        # Not waited for: a child stuck in the kernel would hold this process up too.
        os.kill(child, signal.SIGKILL)
        raise OSError(ETIMEDOUT, f"no answer within {deadline:g} s")
    _, status = os.waitpid(child, 0)
    if not answer:
        code = os.waitstatus_to_exitcode(status)
        raise OSError(ECHILD, f"the probe was killed by {signal.Signals(-code).name}" if code < 0 else "the probe failed")
    error: OSError | None
    value: T
    error, value = pickle.loads(answer)
    if error is not None:
        raise error
    return value


def _answer(probe: Callable[[], object], writer: int) -> NoReturn:
    try:
        try:
            answer = pickle.dumps((None, probe()))
        except OSError as error:
            answer = pickle.dumps((error, None))
        os.write(writer, answer)
        os._exit(0)
    except Exception:  # noqa: BLE001  a fault of the probe must not go on as a second copy of the caller
        traceback.print_exc()
    finally:
        os._exit(1)


def reason(error: OSError) -> str:
    """Return an error in words."""
    return error.strerror or str(error)


def setting(path: str) -> str | None:
    """Return the text of a file of /proc or /sys without white space around it; None where it is missing or unreadable."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
