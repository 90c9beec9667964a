"""The board as the guest ``churn`` sees it, from its source."""

import ctypes
import mmap
import re
from pathlib import Path
from typing import Any, Final

from restrictedmem.stress.board import Board
from restrictedmem.units import PAGE_SIZE

SOURCE: Final = (Path(__file__).parent.parent / "guests/churn.c").read_text(encoding="utf-8")
DEFINED: Final = {
    name: int(value, 0) for name, value in re.findall(r"#define (\w+)\s+(\w+)\b.*\n", SOURCE)
}
LANES, MAX_PAGES, MAX_VCPUS = (DEFINED[name] for name in ("LANES", "MAX_PAGES", "MAX_VCPUS"))
#: The members with words of each lane.
PER_LANE: Final = ("begun", "done")


class GuestBoard(ctypes.Structure):
    """``struct board`` of guests/churn.c."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("stop", "extra", "extra_users", "reserved")),
        ("steps", ctypes.c_uint64 * MAX_VCPUS),
        ("begun", ctypes.c_uint32 * MAX_PAGES * LANES),
        ("done", ctypes.c_uint32 * MAX_PAGES * LANES),
        ("exposed", ctypes.c_uint32 * MAX_PAGES),
    ]


class Both:
    """A board, and the guest's view of the same words."""

    def __init__(self, window: mmap.mmap, owner: Board | None = None) -> None:
        self.owner = owner or Board(window)
        self._window = window

    @property
    def guest(self) -> Any:
        """A copy of what the guest sees now."""
        return GuestBoard.from_buffer_copy(self._window, PAGE_SIZE)

    def write(self, member: str, value: int, index: int | None = None) -> None:
        """Write a word as the guest does."""
        words = GuestBoard.from_buffer(self._window, PAGE_SIZE)
        if index is None:
            setattr(words, member, value)
        else:
            getattr(words, member)[index] = value

    def nonzero(self) -> dict[str, dict[int, int]]:
        """Return every word that is not zero, by the member and the index in it."""
        guest, found = self.guest, dict[str, dict[int, int]]()
        for name, *_ in GuestBoard._fields_:
            value = getattr(guest, name)
            flat = (
                [value]
                if isinstance(value, int)
                else [each for part in value for each in (part if name in PER_LANE else [part])]
            )
            if words := {index: word for index, word in enumerate(flat) if word}:
                found[name] = words
        return found
