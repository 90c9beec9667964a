"""Text of other parties, made fit for a terminal; and a line there that is written again and again."""

import os
import time
from collections.abc import Callable
from typing import Final, TextIO, final

_CLEAR: Final = "\r\x1b[K"


def plain(text: object) -> str:
    """Write each character that a terminal would obey, and not show, as its escape.

    Among them: control characters, line ends, changes of direction, halves of characters.
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text)
    )


def duration(seconds: float) -> str:
    """Write a time for a person: ``0:07``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@final
class Line:
    """The last line of a terminal, which says how far something is; nothing where there is no terminal."""

    def __init__(self, file: TextIO, *, show: bool = True, interval: float = 0.1) -> None:
        """Write to ``file``, if it is a terminal and ``show`` is true, no more often than each ``interval`` seconds."""
        self._file = file if show and file.isatty() else None
        self._interval = interval
        self._next = 0.0

    def update(self, text: Callable[[], str]) -> None:
        """Show what ``text`` returns, if it is time to."""
        now = time.monotonic()
        if self._file is not None and now >= self._next:
            self._next = now + self._interval
            # One that is wrapped cannot be cleared.
            self._file.write(f"{_CLEAR}{plain(text())[: self._columns() - 1]}")
            self._file.flush()

    def clear(self) -> None:
        """Take the line away, for something else to be written; the next update shows it again at once."""
        if self._file is not None:
            self._file.write(_CLEAR)
            self._file.flush()
            self._next = 0.0

    def _columns(self) -> int:
        assert self._file is not None
        try:
            # Some have no size.
            return os.get_terminal_size(self._file.fileno()).columns or 80
        except OSError:
            return 80
