"""The command line: parse, dispatch, and one place where errors become words.

Exit status: 0, or the guest's own; 1 after ``error:``; 2 for a wrong command line; 128 + n when a
signal ended it.
"""

import argparse
import importlib
import os
import signal
import sys
from errno import EPIPE
from typing import Final, NoReturn, final

from restrictedmem.cli import hints, streams
from restrictedmem.cli.errors import CommandError, complain
from restrictedmem.failure import line_of
from restrictedmem.version import __version__

#: Modules of this package. Each is imported when it is wanted: ``exec`` is to start as fast as it
#: can.
_COMMANDS: Final = ("run", "exec", "doctor", "check", "ps", "serve", "trace", "verify")

#: The variable that has a service say what goes wrong in it, and this what went wrong here.
_DEBUG: Final = "RESTRICTEDMEM_DEBUG"


@final
class _Parser(argparse.ArgumentParser):
    """A parser whose error is one line, as all others are; subcommands' are of the same kind."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, and end."""
        self.exit(complain(message, f"{self.prog} --help", 2))


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser, of one command alone when it is named; the help texts in it are the only source of docs/reference/cli.md."""
    top = _Parser(
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
    sys.exit(main(sys.argv[1:], standalone=True))


def main(arguments: list[str], *, standalone: bool = False) -> int:
    """Run one command and return its exit status.

    ``standalone``: this process is the command's alone, its standard streams and signals too.
    """
    try:
        if standalone:
            _prepare(arguments)
        status = _run(arguments)
        streams.finish()
    except CommandError as error:
        status = complain(str(error), error.hint, error.status)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except MemoryError:
        status = complain("this process cannot have more memory", hints.of_memory())
    except OSError as error:
        gone = error.errno == EPIPE and streams.reader_is_gone()
        # End as a signal would have ended us.
        status = 128 + signal.SIGPIPE if gone else complain(line_of(error), hints.of(error))
    except Exception as error:
        if not standalone or _DEBUG in os.environ:
            raise
        status = complain(
            f"a fault of this program: {type(error).__name__}: {error}",
            f"{_DEBUG}=1 shows where; please report it",
        )
    else:
        return status
    streams.give_up()
    return status


def _prepare(arguments: list[str]) -> None:
    """Make of this process what commands take it for, however it was started."""
    streams.prepare()
    # Whoever ignores it passes that on, and no child could be waited for. A program that is
    # executed is to find it as it was.
    if arguments[:1] != ["exec"]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    try:
        args = parser(arguments[0] if arguments else None).parse_args(arguments)
        status: int = args.main(args)
    except SystemExit as ended:
        # argparse: it has said all, be it help or what is wrong.
        return ended.code if isinstance(ended.code, int) else 0
    return status
