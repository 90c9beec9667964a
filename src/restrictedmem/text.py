"""Text of other parties, made fit for a terminal; and a progress line on a terminal."""

import os
import time
from collections.abc import Callable
from typing import Final, TextIO, final

_CLEAR: Final = "\r\x1b[K"


def plain(text: object) -> str:
    """Escape each character that a terminal would obey and not show.

    Among these are control characters, line ends, changes of direction, and halves of characters.
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text)
    )


def duration(seconds: float) -> str:
    """Format a number of seconds for a person: ``0:07``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@final
class Line:
    """The last line of a terminal, which shows progress; without a terminal, nothing."""

    def __init__(self, file: TextIO, *, show: bool = True, interval: float = 0.1) -> None:
        """Write to ``file``, if it is a terminal and ``show`` is true.

        Two updates are at least ``interval`` seconds apart.
        """
        self._file = file if show and file.isatty() else None
        self._interval = interval
        self._next = 0.0

    def update(self, text: Callable[[], str]) -> None:
        """Show what ``text`` returns, if the interval is over."""
        now = time.monotonic()
        if self._file is not None and now >= self._next:
            self._next = now + self._interval
            # A line that is wrapped cannot be cleared.
            self._file.write(f"{_CLEAR}{plain(text())[: self._columns() - 1]}")
            self._file.flush()

    def clear(self) -> None:
        """Clear the line, so that something else can be written.

        The next update shows the line again at once.
        """
        if self._file is not None:
            self._file.write(_CLEAR)
            self._file.flush()
            self._next = 0.0

    def _columns(self) -> int:
        assert self._file is not None
        try:
            # Some terminals have no size.
            return os.get_terminal_size(self._file.fileno()).columns or 80
        except OSError:
            return 80
