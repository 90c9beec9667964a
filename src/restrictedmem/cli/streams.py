"""The standard streams of a command: never closed, able to write every character, and checked.

Text on stdout is data, so its loss is an error. Text on stderr is for people, and a command does
not fail when it cannot be written.
"""

import codecs
import fcntl
import io
import os
import select
import sys
from contextlib import suppress
from errno import EMFILE
from typing import TYPE_CHECKING, Final, TextIO, final

from restrictedmem.failure import named

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_SPELLING: Final = "restrictedmem"
#: Replacements for characters in messages that a terminal may lack.
_PLAIN: Final = {
    "→": "->",
    "…": "...",
    "µ": "u",
    "─": "-",
    "│": "|",
    "┐": "+",
    "┘": "+",
}


def prepare() -> None:
    """Replace the standard streams by those that commands rely on.

    A closed descriptor gets a placeholder, so that no other file takes its number. Reads and writes
    of it still fail with EBADF, and a program that is executed finds it closed.
    """
    codecs.register_error(_SPELLING, _spell)
    for fd, mode in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            # os.open takes the lowest free number, which is ``fd``.
            os.open(os.devnull, mode | os.O_CLOEXEC)
    stdin: TextIO | None = sys.stdin
    if stdin is None:
        closed = io.FileIO(0, closefd=False)
        closed.name = "stdin"
        sys.stdin = io.TextIOWrapper(io.BufferedReader(closed))
    sys.stdout = _text(_Data(1, "w", closefd=False), "stdout", sys.stdout)
    sys.stderr = _text(_Talk(2, "w", closefd=False), "stderr", sys.stderr)


@final
class _Data(io.FileIO):
    """Standard output, with the call and the stream's name in its errors."""

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write as much as there is room for."""
        try:
            return super().write(data)
        except OSError as error:
            raise named("write", error, self.name) from None


@final
class _Talk(io.FileIO):
    """Standard error, which drops text that cannot be written."""

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write as much as can be written."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _text(raw: io.FileIO, name: str, before: TextIO | None) -> io.TextIOWrapper:
    """Return a text stream with the encoding of Python's own stream."""
    raw.name = name
    encoding = None if before is None else before.encoding
    at_once = name == "stderr" or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, _SPELLING, line_buffering=at_once)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks by ASCII (``codecs.register_error``)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each) or _escaped(each) for each in lacking), error.end


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode()


def finish() -> None:
    """Flush stdout, and check for an error that its file system reports at close.

    Raises:
        OSError: as write(2) and close(2).
    """
    sys.stdout.flush()
    try:
        os.close(os.dup(1))
    except OSError as error:
        if error.errno != EMFILE:
            raise named("close", error, "stdout") from None


def give_up() -> None:
    """Flush stdout, or drop its content if that fails, without another error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)


def reader_is_gone() -> bool:
    """Say whether the reader of stdout or stderr, a pipe or a socket, is gone."""
    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)
    with suppress(OSError):
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return False
