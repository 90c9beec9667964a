"""``restrictedmem exec``: an unmodified program with memfd_restricted(2) present."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from errno import EBUSY, EOPNOTSUPP
from typing import Any, Final, NoReturn

from restrictedmem.abi.memory import SYS_memfd_restricted
from restrictedmem.cli import jsonfile, values
from restrictedmem.cli.errors import CommandError, complain
from restrictedmem.failure import failed, line_of, status_of
from restrictedmem.service import SERVER_VARIABLE
from restrictedmem.text import plain


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "exec",
        help="run a program with the system call present",
        description="Run a program and all its descendants with memfd_restricted(2) present:"
        " syscall(451, 0)\nreturns a restricted descriptor, with the lowest free number and not"
        " close-on-exec.\n\n"
        "The program takes this process's place, so terminal, signals and exit status are the"
        "\nprogram's own. The status is 126 or 127 if the program cannot be executed, as in a"
        " shell.\nA nested exec uses the outer supervisor. The program cannot gain privileges by"
        " exec\n(sudo, ping), and cannot have a seccomp listener of its own (EBUSY).\n\n"
        "RESTRICTEDMEM_SERVER tells the program the socket of the service behind its descriptors,"
        "\nfor the C client and restrictedmem run. If the variable is set already, the server that"
        " it\nnames is used, with the server's own options.",
        epilog="examples:\n"
        "  restrictedmem exec -- ./vmm --memory 64M\n"
        "  restrictedmem exec --json used.json -- ./vmm --memory 64M\n"
        "  restrictedmem exec -- python3 -c 'import ctypes;"
        " print(ctypes.CDLL(None).syscall(451, 0))'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    values.add_api(parser)
    parser.add_argument(
        "--memory-max",
        type=values.memory_size,
        metavar="SIZE",
        help="limit on the memory of a descriptor",
    )
    parser.add_argument(
        "--syscall-number",
        type=values.call_number,
        metavar="N",
        help=f"number of the system call (default {SYS_memfd_restricted}, as in both postings)",
    )
    parser.add_argument(
        "--no-cachestat",
        dest="cachestat",
        action="store_false",
        help="refuse all unknown flags. Without this option, a call with unknown flags goes to the"
        " kernel if it can only be cachestat(2), which has this number since Linux 6.5",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="when the program has ended, write to FILE what was created, sized and punched, and"
        " the most memory that descriptors had at once. The program is then a child, which gets the"
        " signals sent to this process and is killed with it. If FILE cannot be written, print an"
        " error, and exit with the program's status, or 1 if that is 0",
    )
    parser.add_argument("program", metavar="PROG", help="program to run, found as a shell finds it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG")
    parser.set_defaults(main=main, error=parser.error)


#: Options and their defaults.
_OF_SERVICE: Final = {"api": None, "memory_max": None}
_OF_SUPERVISOR: Final = {"syscall_number": None, "cachestat": True, **_OF_SERVICE, "json": None}
_SPELLED: Final = {"cachestat": "--no-cachestat"}


def main(args: argparse.Namespace) -> int:
    """Become the program, or its parent if there is a report to write at its end."""
    from restrictedmem.syscall.exec_program import CallOptions, install

    if args.json == jsonfile.STDOUT:
        args.error("--json takes a file: stdout is the program's")
    service = _first_given(args, _OF_SERVICE)
    if service and os.environ.get(SERVER_VARIABLE):
        args.error(
            f"{service} is for a service that this command starts, and {SERVER_VARIABLE} names"
            " another"
        )
    number = SYS_memfd_restricted if args.syscall_number is None else args.syscall_number
    call = CallOptions(number, args.cachestat, args.api or values.DEFAULT_API, args.memory_max)
    command = [args.program, *args.arguments]
    own = install(call, usage=args.json is not None)
    # This check comes before the file is opened, which empties the file.
    if not own and (outers := _first_given(args, _OF_SUPERVISOR)):
        raise CommandError(
            f"{outers}: {os.strerror(EBUSY)}",
            f"an outer restrictedmem exec does the work: give it {outers}",
        )
    if args.json is None:
        _become(command)
    with jsonfile.opened(args.json) as write:
        return _run_and_say(command, write)


def _first_given(args: argparse.Namespace, options: dict[str, Any]) -> str:
    """Return the first of some options that was given, or an empty string."""
    given = (name for name, default in options.items() if getattr(args, name) != default)
    return next((_SPELLED.get(name, f"--{name.replace('_', '-')}") for name in given), "")


def _become(command: list[str]) -> NoReturn:
    """Become a program, or print an error and end with a status as a shell does."""
    from restrictedmem.syscall.exec_program import replace

    try:
        replace(command)
    except (OSError, MemoryError) as error:
        print(
            f"restrictedmem exec: {plain(command[0]) or repr('')}: {os.strerror(status_of(error))}",
            file=sys.stderr,
        )
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _run_and_say(command: list[str], write: Callable[[object], None]) -> int:
    from restrictedmem.syscall.attend import attend, end_as

    began = time.monotonic()
    status = attend(lambda: _become(command))
    report: dict[str, Any] = {"program": command, "seconds": round(time.monotonic() - began, 3)}
    if os.WIFSIGNALED(status):
        report |= {"status": None, "signal": os.WTERMSIG(status)}
    else:
        report |= {"status": os.WEXITSTATUS(status), "signal": None}
    try:
        report |= _usage()
    except OSError as error:
        report["error"] = f"the program's use of descriptors is not known: {error.strerror}"
    try:
        write(report)
    except OSError as error:
        complain(f"--json: {line_of(error)}")
        # The exit status still tells how the program ended, but must not be 0 now.
        return end_as(status) or 1
    return end_as(status)


def _usage() -> dict[str, int]:
    """Ask the service what its owners have done.

    Raises:
        OSError: the supervisor or the service is gone; EOPNOTSUPP for a server, whose services do
            not count.
    """
    from restrictedmem.service.client import Service

    with Service.connect(os.environ[SERVER_VARIABLE]) as service:
        found: dict[str, int] | None = service.status()["usage"]
    if found is None:
        raise failed("STATUS", EOPNOTSUPP, "a server's services do not count")
    return found
