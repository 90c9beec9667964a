"""The result of a probe."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class State(Enum):
    """Whether a machine has something."""

    YES = "yes"
    NO = "no"
    PARTLY = "partly"
    UNKNOWN = "unknown"
    """It could not be tried here; ``detail`` says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a machine offers or lacks.

    ``name`` is stable; the other texts are for people.
    """

    name: str
    state: State
    detail: str
    consequence: str = ""
    """The consequence for restrictedmem, where something is missing."""
    remedy: str = ""
    """How to get the missing thing: a command where there is one."""


def reason(error: OSError) -> str:
    """Return an error in words."""
    return error.strerror or str(error)


def setting(path: str) -> str | None:
    """Return the text of a file of /proc or /sys without white space around it.

    None where the file is missing or unreadable.
    """
    try:
        # Bytes, because a line ends with "\n" alone, and "\r" may be part of a name.
        return Path(path).read_bytes().decode("ascii", "replace").strip()
    except OSError:
        return None
