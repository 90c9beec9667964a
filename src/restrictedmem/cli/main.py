"""The command line: it parses, dispatches, and prints every error in one place.

Exit status: 0, or the guest's own; 1 after ``error:``; 2 for a wrong command line; 128 + n when
signal n ended the command.
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

#: Modules of this package. Each is imported only when it is needed, so that ``exec`` starts fast.
_COMMANDS: Final = (
    "run",
    "exec",
    "conformance",
    "doctor",
    "check",
    "ps",
    "serve",
    "trace",
    "verify",
)

#: With this variable set, services and commands show the traceback of an internal error.
_DEBUG: Final = "RESTRICTEDMEM_DEBUG"


@final
class _Parser(argparse.ArgumentParser):
    """A parser whose errors look like all other errors; subcommands use it too."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the command line, and end."""
        self.exit(complain(message, f"{self.prog} --help", 2))


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; for one command alone if it is named.

    docs/reference/cli.md is generated from the help texts in it, which are its only source.
    """
    top = _Parser(
        prog="restrictedmem",
        description="memfd_restricted(2), as proposed for Linux in 2022, on a stock kernel, and"
        " guests that run on such memory. The owner of a descriptor can create, size, preallocate,"
        " punch and close it, but can never read, write or map it.",
    )
    top.add_argument("--version", action="version", version=f"restrictedmem {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in (command,) if command in _COMMANDS else _COMMANDS:
        importlib.import_module(f"restrictedmem.cli.{name}").add_parser(commands)
    return top


def run() -> NoReturn:
    """Run the command as the console script does."""
    sys.exit(main(sys.argv[1:], standalone=True))


def main(arguments: list[str], *, standalone: bool = False) -> int:
    """Run one command and return its exit status.

    ``standalone`` says that the process belongs to the command alone, with its standard streams and
    signals.
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
        status = complain("this process is out of memory", hints.of_memory())
    except OSError as error:
        gone = error.errno == EPIPE and streams.reader_is_gone()
        # The status is that of a death by the signal.
        status = 128 + signal.SIGPIPE if gone else complain(line_of(error), hints.of(error))
    except Exception as error:
        if not standalone or _DEBUG in os.environ:
            raise
        status = complain(
            f"internal error: {type(error).__name__}: {error}",
            f"{_DEBUG}=1 shows a traceback; please report it",
        )
    else:
        return status
    streams.give_up()
    return status


def _prepare(arguments: list[str]) -> None:
    """Set up streams and signals, however the process was started."""
    streams.prepare()
    # A parent that ignores SIGCHLD passes this on, and then no child could be waited for. A program
    # that ``exec`` executes must find the signal unchanged.
    if arguments[:1] != ["exec"]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    try:
        args = parser(arguments[0] if arguments else None).parse_args(arguments)
        status: int = args.main(args)
    except SystemExit as ended:
        # argparse has printed everything, the help or the error.
        return ended.code if isinstance(ended.code, int) else 0
    return status
