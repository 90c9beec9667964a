"""The error that a command raises for its user, and the printing of errors."""

import sys

from restrictedmem.text import plain


class CommandError(Exception):
    """An error message, an optional hint, and the exit status."""

    def __init__(self, message: str, hint: str = "", status: int = 1) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status


def complain(message: str, hint: str = "", status: int = 1) -> int:
    """Print an error and its hint, and return the exit status.

    Further lines of the error are indented, so that no text of another party looks like ours.
    """
    first, *others = message.split("\n")
    print(f"error: {plain(first)}", file=sys.stderr)
    for line in others:
        print(plain(line if line.startswith("  ") else f"  {line}"), file=sys.stderr)
    if hint:
        print(f"hint: {plain(hint)}", file=sys.stderr)
    return status
