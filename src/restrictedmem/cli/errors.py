"""What a command raises for the person who typed it."""

import sys

from restrictedmem.text import plain


class CommandError(Exception):
    """A message, with a hint when there is one, and the exit status that goes with it."""

    def __init__(self, message: str, hint: str = "", status: int = 1) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status


def complain(message: str, hint: str = "", status: int = 1) -> int:
    """Write one error and perhaps a hint, and return the exit status that goes with them.

    Further lines of the error are indented, so that no words of another party look like ours.
    """
    first, *others = message.split("\n")
    print(f"error: {plain(first)}", file=sys.stderr)
    for line in others:
        print(plain(line if line.startswith("  ") else f"  {line}"), file=sys.stderr)
    if hint:
        print(f"hint: {plain(hint)}", file=sys.stderr)
    return status
