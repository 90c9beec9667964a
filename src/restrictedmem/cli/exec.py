"""``restrictedmem exec``: a program nobody changed, with memfd_restricted(2) present."""

import argparse

from restrictedmem.abi.memory import SYS_memfd_restricted
from restrictedmem.units import parse_size


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "exec",
        help="run a program with the system call present",
        description="Run a program and all its descendants with memfd_restricted(2) present: syscall(451, 0) returns a restricted "
        "descriptor, lowest free number and not close-on-exec. The program takes this process's place, so its terminal, signals and exit "
        "status are its own; 126 and 127 as a shell. A nested exec uses the outer supervisor. What the program cannot do: gain privileges "
        "by exec (sudo, ping), or have a seccomp listener of its own (EBUSY).",
        epilog="examples:\n"
        "  restrictedmem exec -- ./vmm --memory 64M\n"
        "  restrictedmem exec -- python3 -c 'import ctypes; print(ctypes.CDLL(None).syscall(451, 0))'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--api", choices=("v9", "v10"), default="v10", help="which posting of the series to follow (default v10)")
    parser.add_argument("--memory-max", type=parse_size, metavar="SIZE", help="what a descriptor may hold at most")
    parser.add_argument(
        "--syscall-number",
        type=int,
        default=SYS_memfd_restricted,
        metavar="N",
        help="number of the call (default %(default)s, as in both postings)",
    )
    parser.add_argument(
        "--no-cachestat",
        dest="cachestat",
        action="store_false",
        help="judge flags strictly; without this, a call of the number with other flags goes to the kernel if it can only be cachestat(2), "
        "whose number it is since Linux 6.5",
    )
    parser.add_argument("program", metavar="PROG", help="found as a shell finds it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Become the program."""
    from restrictedmem.syscall.launch import Call, error_status, install, replace

    install(Call(args.syscall_number, args.cachestat, args.api, args.memory_max))
    try:
        replace([args.program, *args.arguments])
    except OSError as error:
        return error_status(error, args.program)
