"""The command line: parse, dispatch, and one place where errors become words.

Exit status: 0, or the guest's own; 1 after ``error:``; 2 for a wrong command line; 128 + n when a signal ended it.
"""

import argparse
import importlib
import os
import signal
import sys
from errno import EACCES, EPERM, EPIPE
from typing import Final, NoReturn

from restrictedmem import __version__
from restrictedmem.cli.errors import CommandError
from restrictedmem.cli.text import plain

#: Modules of this package. Each is imported when it is wanted: ``exec`` is to start as fast as it can.
_COMMANDS: Final = ("run", "exec", "doctor", "check", "ps", "serve", "trace", "verify")

_HINTS = {
    EACCES: "restrictedmem doctor says which way to mount is open here, and how to open one",
    EPERM: "restrictedmem doctor says which way to mount is open here, and how to open one",
}


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser, of one command alone when it is named; the help texts in it are the only source of docs/cli.md."""
    top = argparse.ArgumentParser(
        prog="restrictedmem",
        description="Memory that its owner can create, size, preallocate, punch and close, but never read, write or map: "
        "memfd_restricted(2) as proposed for Linux in 2022, and guests that run on it, on a stock kernel.",
    )
    top.add_argument("--version", action="version", version=f"restrictedmem {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in (command,) if command in _COMMANDS else _COMMANDS:
        importlib.import_module(f"restrictedmem.cli.{name}").add_parser(commands)
    return top


def run() -> NoReturn:
    """Be the console script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Run one command and return its exit status."""
    args = parser(arguments[0] if arguments else None).parse_args(arguments)
    try:
        status: int = args.main(args)
        sys.stdout.flush()
    except CommandError as error:
        return complain(str(error), error.hint)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno == EPIPE:
            # The reader of our output is gone: end as a signal would have ended us. Nothing may be flushed to it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 128 + signal.SIGPIPE
        return complain(_words(error), _HINTS.get(error.errno or 0, ""))
    return status


def complain(message: str, hint: str = "") -> int:
    """Write one error and perhaps a hint, and return the exit status that goes with them.

    Further lines of the error are indented, so that no words of another party look like ours.
    """
    first, *others = message.split("\n")
    print(f"error: {plain(first)}", file=sys.stderr)
    for line in others:
        print(plain(line if line.startswith("  ") else f"  {line}"), file=sys.stderr)
    if hint:
        print(f"hint: {plain(hint)}", file=sys.stderr)
    return 1


def _words(error: OSError) -> str:
    text = error.strerror or str(error)
    return text if error.filename is None else f"{error.filename}: {text}"
