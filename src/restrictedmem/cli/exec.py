"""``restrictedmem exec``: a program nobody changed, with memfd_restricted(2) present."""

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
        description="Run a program and all its descendants with memfd_restricted(2) present: syscall(451, 0) returns a restricted "
        "descriptor, lowest free number and not close-on-exec. The program takes this process's place, so its terminal, signals and exit "
        "status are its own; 126 and 127 as a shell. A nested exec uses the outer supervisor. What the program cannot do: gain privileges "
        "by exec (sudo, ping), or have a seccomp listener of its own (EBUSY). RESTRICTEDMEM_SERVER names, to the program, the socket of "
        "the service behind its descriptors, for the C client and restrictedmem run; set before, the server it names is used, with the "
        "server's own options.",
        epilog="examples:\n"
        "  restrictedmem exec -- ./vmm --memory 64M\n"
        "  restrictedmem exec --json used.json -- ./vmm --memory 64M\n"
        "  restrictedmem exec -- python3 -c 'import ctypes; print(ctypes.CDLL(None).syscall(451, 0))'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    values.add_api(parser)
    parser.add_argument(
        "--memory-max",
        type=values.memory_size,
        metavar="SIZE",
        help="what a descriptor may hold at most",
    )
    parser.add_argument(
        "--syscall-number",
        type=values.call_number,
        metavar="N",
        help=f"number of the call (default {SYS_memfd_restricted}, as in both postings)",
    )
    parser.add_argument(
        "--no-cachestat",
        dest="cachestat",
        action="store_false",
        help="judge flags strictly; without this, a call of the number with other flags goes to the kernel if it can only be cachestat(2), "
        "whose number it is since Linux 6.5",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write, when the program has ended, what was created, sized and punched, and the most memory that descriptors had at once; "
        "the program is then a child, which gets the signals sent to this process and is killed with it. If it cannot be written, that "
        "is said, and the exit status is the program's, or 1 in place of 0",
    )
    parser.add_argument("program", metavar="PROG", help="found as a shell finds it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG")
    parser.set_defaults(main=main, error=parser.error)


#: Options by their names here, with what they are when they were not given.
_OF_SERVICE: Final = {"api": None, "memory_max": None}
_OF_SUPERVISOR: Final = {"syscall_number": None, "cachestat": True, **_OF_SERVICE, "json": None}
_SPELLED: Final = {"cachestat": "--no-cachestat"}


def main(args: argparse.Namespace) -> int:
    """Become the program, or its parent if there is something to say at its end."""
    from restrictedmem.syscall.exec_program import CallOptions, install

    if args.json == jsonfile.STDOUT:
        args.error("--json takes a file: stdout is the program's")
    service = _first_given(args, _OF_SERVICE)
    if service and os.environ.get(SERVER_VARIABLE):
        args.error(f"{service} is for a service of one's own, and {SERVER_VARIABLE} names another")
    number = SYS_memfd_restricted if args.syscall_number is None else args.syscall_number
    call = CallOptions(number, args.cachestat, args.api or values.DEFAULT_API, args.memory_max)
    command = [args.program, *args.arguments]
    own = install(call, usage=args.json is not None)
    # Before the file is opened, which empties it.
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
    """Return the first of some options that was given, empty when none was."""
    given = (name for name, default in options.items() if getattr(args, name) != default)
    return next((_SPELLED.get(name, f"--{name.replace('_', '-')}") for name in given), "")


def _become(command: list[str]) -> NoReturn:
    """Become a program, or say as a shell does why not, and end with the status that goes with it."""
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
        report["error"] = f"what was done is not known: {error.strerror}"
    try:
        write(report)
    except OSError as error:
        complain(f"--json: {line_of(error)}")
        # What the program came to is still to be told, but not that all is well.
        return end_as(status) or 1
    return end_as(status)


def _usage() -> dict[str, int]:
    """Ask the service what its owners have done.

    Raises:
        OSError: supervisor or service are gone; EOPNOTSUPP for a server, whose services do not
            count.
    """
    from restrictedmem.service.client import Service

    with Service.connect(os.environ[SERVER_VARIABLE]) as service:
        found: dict[str, int] | None = service.status()["usage"]
    if found is None:
        raise failed("STATUS", EOPNOTSUPP, "a server's services do not count")
    return found
