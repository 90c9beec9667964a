"""The standard streams of a command: they are there, take every character, and say what they lost.

What is written to stdout is data: what of it is lost is an error. What is said on stderr is for
people: a command does not fail because nobody can be told.
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
#: Characters that messages have, for terminals that lack them.
_PLAIN: Final = {"→": "->", "…": "...", "µ": "u"}


def prepare() -> None:
    """Make the standard streams what the rest of a command takes them for.

    A descriptor that was closed gets a placeholder, so that no other file is in its place; to read
    or write it is EBADF still, and a program that is executed finds it closed.
    """
    codecs.register_error(_SPELLING, _spell)
    for fd, mode in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            # The lowest number that is free.
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
    """Standard output; its errors have the call and the name."""

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write as much as there is room for."""
        try:
            return super().write(data)
        except OSError as error:
            raise named("write", error, self.name) from None


@final
class _Talk(io.FileIO):
    """Standard error; what nobody can be told is dropped."""

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write what can be written."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _text(raw: io.FileIO, name: str, before: TextIO | None) -> io.TextIOWrapper:
    """Return a stream of text, with the encoding of that which Python made."""
    raw.name = name
    encoding = None if before is None else before.encoding
    at_once = name == "stderr" or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, _SPELLING, line_buffering=at_once)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Write what an encoding lacks in ASCII (``codecs.register_error``)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each) or _escaped(each) for each in lacking), error.end


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode()


def finish() -> None:
    """Write out what stdout holds, and hear what its file system says when it is closed.

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
    """Write out what stdout holds if that can be done, else drop it: nothing more is said about it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)


def reader_is_gone() -> bool:
    """Say whether nobody reads stdout any more, or stderr: a pipe, or a socket."""
    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)
    with suppress(OSError):
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return False
