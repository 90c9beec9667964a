"""``restrictedmem run``: a guest on restricted memory, between stdin and stdout."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from errno import ENOMEM, ENOSPC
from typing import TYPE_CHECKING, Any, Final

from restrictedmem.cli import guest_arguments, hints, jsonfile, run_table, values
from restrictedmem.cli.errors import CommandError
from restrictedmem.failure import line_of
from restrictedmem.mm import designs
from restrictedmem.mm.design import TEARDOWN
from restrictedmem.platform import platform

if TYPE_CHECKING:
    from restrictedmem.service.client import Service
    from restrictedmem.vmm.elf import Image
    from restrictedmem.vmm.vmm import Ended, Vmm


#: Backings of reserved huge pages, and where their number is set.
_POOLS: Final = {
    "hugetlb-2m": "sysctl vm.nr_hugepages",
    "hugetlb-1g": "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        help="run a guest in private memory",
        description="Create a restricted descriptor, give it to a VM as private memory, and run a"
        " guest on it.\nThe guest reads stdin and writes stdout; the command exits with the guest's"
        " status.\nProgress and a closing table go to stderr.",
        epilog="examples:\n"
        "  restrictedmem run sha256 </usr/bin/python3      digest a file inside private memory\n"
        "  restrictedmem run --memory 2M sha256 <big.iso   digest more than fits into the memory\n"
        "  restrictedmem run --engine software convert     convert pages, on emulated vCPUs\n"
        "  restrictedmem run --platform snp --design folio+teardown convert\n"
        "                                                  see how much of the host's direct map\n"
        "                                                  is put together again\n"
        "  restrictedmem run --prove                       try every known way to guest memory\n"
        "  restrictedmem run --gdb 1234 ./my.elf           debug a guest of your own\n"
        "  restrictedmem run --json run.json ./my.elf arg  write the closing table as JSON",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = values.memory_size
    parser.add_argument(
        "--memory",
        type=size,
        default="64M",
        metavar="SIZE",
        help="size of the guest's private memory (default 64M)",
    )
    parser.add_argument(
        "--memory-max",
        type=size,
        metavar="SIZE",
        help="limit on the memory of a descriptor; beyond it, ENOSPC",
    )
    values.add_api(parser)
    parser.add_argument(
        "--engine",
        choices=("auto", "kernel", "software"),
        default="auto",
        help="engine that runs the guest: kernel uses /dev/kvm with guest_memfd; software uses"
        " Unicorn, an emulator; auto takes the first of them that works here (default auto). A"
        " --memory-max below --memory needs the software engine, and --gdb is far faster there, so"
        " auto takes it for them",
    )
    _add_memory(parser)
    parser.add_argument(
        "--vcpus",
        type=values.count_of("vCPUs", values.MOST_VCPUS),
        metavar="N",
        help="number of vCPUs (default 1)",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write the events of the run to FILE as JSON lines (docs/use/trace.md). If FILE cannot"
        " be written, print an error, and exit with the guest's status, or 1 if that is 0",
    )
    parser.add_argument(
        "--gdb",
        type=values.port,
        metavar="PORT",
        help="wait for gdb on this port of 127.0.0.1, 0 for a free one. The VM's policy then opens"
        " the guest to its owner, and the measurement includes this policy",
    )
    parser.add_argument(
        "--prove",
        nargs="?",
        choices=("as-owner", "as-root"),
        const="as-owner",
        metavar="as-root",
        help="instead of GUEST, run a guest that holds a random pattern, and try every known way"
        " for its owner to read it. Exit with 1 if a way succeeds that"
        " docs/understand/threat-model.md does not list. The attempts are made without the"
        " capabilities that open any process; with as-root, they have these capabilities",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the closing table to FILE as JSON. With --prove, write the attempts; then -"
        " means stdout, in place of the table. If FILE cannot be written, the same happens as for"
        " --trace",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress and no table")
    parser.add_argument("guest", metavar="GUEST", nargs="?", help=guest_arguments.KINDS)
    parser.add_argument(
        "args", nargs=argparse.REMAINDER, metavar="ARGS", help="arguments of the guest"
    )
    parser.set_defaults(
        main=main, error=parser.error, options=frozenset(parser._option_string_actions)
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """Add the options for the design of notifications, the backing and the modelled host."""
    parser.add_argument(
        "--design",
        type=_design,
        metavar="NAME",
        help="design of the notifications: what the VM hears of a punch, and when pages are freed:"
        f" {', '.join(designs.NAMES)} (docs/understand/designs.md; default: that of --api). With"
        f" {TEARDOWN} behind it, a VM that ends is told that all its pages go, which no"
        " posting did",
    )
    parser.add_argument(
        "--backing",
        choices=("memfd", "thp", "hugetlb-2m", "hugetlb-1g"),
        help="pages behind the descriptor: memfd has pages of 4 KiB; thp has pages of 2 MiB where"
        " shmem has them, and a punch splits them; hugetlb-2m and hugetlb-1g are reserved huge"
        " pages, which nothing splits (default memfd; all others need the software engine)",
    )
    parser.add_argument(
        "--pin",
        action="store_true",
        help="keep each page at its physical address once the guest has it"
        " (docs/understand/pinning.md; software engine)",
    )
    parser.add_argument(
        "--platform",
        choices=platform.NAMES,
        help="model a SEV-SNP host under the guest, and show at the end what is left of its direct"
        " map and RMP. Exit with 1 if a rule of the platform was violated. snp keeps private pages"
        " in the direct map, which it splits where it must; snp-unmapped takes them out"
        " (docs/understand/platform.md; software engine)",
    )


def _design(text: str) -> str:
    try:
        return str(designs.make(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(error.strerror) from None


def main(args: argparse.Namespace) -> int:
    """Run the command and return the guest's exit status, or the status of ``--prove``."""
    from restrictedmem.service import SERVER_VARIABLE
    from restrictedmem.service.client import Service
    from restrictedmem.service.options import Options

    if (args.guest is None) == (args.prove is None):
        args.error(
            "name a guest, or --prove"
            if args.guest is None
            else "--prove runs a guest of its own: leave out the guest, or --prove"
        )
    server = os.environ.get(SERVER_VARIABLE)
    _check(args, server)
    options = Options(
        api=args.api or values.DEFAULT_API,
        design=args.design,
        memory_max=args.memory_max,
        backing=args.backing or "memfd",
        pin=args.pin,
    )
    with ExitStack() as stack:
        write = None if args.json is None else stack.enter_context(jsonfile.opened(args.json))
        service = stack.enter_context(Service.connect(server) if server else Service.start(options))
        return (_run if args.prove is None else _prove)(args, service, write)


def _check(args: argparse.Namespace, server: str | None) -> None:
    """End the program if options conflict, or if one would have no effect."""
    if args.engine == "kernel" and (word := _software_alone(args)):
        args.error(
            f"{word} is for the software engine: the kernel engine keeps private memory in a"
            " guest_memfd"
        )
    if args.prove is None and args.json == jsonfile.STDOUT:
        args.error("--json takes a file: stdout is the guest's")
    services = _first(args, "api", "design", "backing", "memory_max", "pin")
    if server and services:
        args.error(
            f"{services} is for a service that this command starts, and RESTRICTEDMEM_SERVER names"
            " another"
        )
    guests = _first(args, "vcpus", "trace", "gdb", "platform")
    if args.prove is not None and guests:
        args.error(f"{guests} goes with a guest, not with --prove")


def _first(args: argparse.Namespace, *names: str) -> str:
    """Return the first of some options that was given, or an empty string."""
    # 0 counts as given: it is a port.
    given = (
        name
        for name in names
        if getattr(args, name) is not None and getattr(args, name) is not False
    )
    return next((f"--{name.replace('_', '-')}" for name in given), "")


def _software_alone(args: argparse.Namespace) -> str:
    """Return the first given option that only the software engine has, or an empty string."""
    return (
        ""
        if args.backing == "memfd" and not args.platform and not args.pin
        else _first(args, "platform", "pin", "backing")
    )


def _run(
    args: argparse.Namespace, service: "Service", write: Callable[[object], None] | None
) -> int:
    image = guest_arguments.read(args.guest)
    guest_arguments.warn(args.guest, args.args, args.options)
    ended: Ended | None = None
    platform: dict[str, Any] = {}
    try:
        with ExitStack() as stack:
            vmm, measurement = _launched(args, service, image, stack)
            ended = _to_its_end(vmm, quiet=args.quiet)
            found = {**vmm.statistics(), "measurement": measurement}
            # After the statistics, because the VM is gone then.
            platform = vmm.destroy() if args.platform else {}
            if not args.quiet:
                run_table.show({**found, "platform": platform})
            if write is not None:
                write(run_table.as_data({**found, "platform": platform}, ended))
    except OSError as error:
        if ended is None or ended.fatal is not None:
            raise
        # The exit status still tells how the guest ended, but must not be 0 now.
        raise CommandError(line_of(error), status=ended.status or 1) from None
    if platform.get("violated_pages"):
        # Reported before the exit that stopped the guest, because the violation may have caused it.
        story = "\n  ".join(run_table.story(platform))
        raise CommandError(
            f"rules of the platform were violated for {platform['violated_pages']} pages;"
            f" the first:\n  {story}"
        )
    if ended.fatal is not None:
        raise _stopped(args, ended.fatal)
    return ended.status


def _stopped(args: argparse.Namespace, fatal: object) -> CommandError:
    """Return the error for a guest that stopped for good.

    A memory fault has only an errno, whose cause depends on the options.
    """
    from restrictedmem.protocol import exits

    why, hint = "", ""
    if isinstance(fatal, exits.MemoryFault) and fatal.errno == ENOSPC:
        hint = _space(args)
    elif isinstance(fatal, exits.MemoryFault) and fatal.errno == ENOMEM and args.pin:
        why, hint = ": cannot pin: RLIMIT_MEMLOCK", hints.PINNED
    return CommandError(f"the guest stopped: {fatal}{why}", hint)


def _launched(
    args: argparse.Namespace, service: "Service", image: "Image", stack: ExitStack
) -> tuple["Vmm", str]:
    """Return a guest that is ready to run, and its measurement; ``stack`` closes it."""
    from restrictedmem.vmm.vmm import Vmm

    vmm = stack.enter_context(
        Vmm(
            args.memory,
            service,
            vcpus=args.vcpus or 1,
            engine=_engine(args),
            debug=args.gdb is not None,
            platform=args.platform or "",
        )
    )
    if args.trace is not None:
        from restrictedmem.vmm import recording

        stack.enter_context(
            recording.record(vmm, args.trace, lambda count: _tell_lost(args.trace, count))
        )
    try:
        with guest_arguments.naming(args.guest):
            vmm.load(image, args.args)
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        raise CommandError(f"loading {args.guest}: {error.strerror}", _space(args)) from None
    measurement = vmm.launch_finish().hex()
    if args.gdb is not None:
        from restrictedmem.vmm.gdb import stub

        stack.enter_context(stub.serve(vmm, args.gdb, str(guest_arguments.find(args.guest))))
    return vmm, measurement


def _space(args: argparse.Namespace) -> str:
    """Return the hint for a lack of space."""
    if args.backing in _POOLS:
        return (
            "the machine has no huge page left: reserve more,"
            f" {_POOLS[args.backing]} (docs/understand/folios.md)"
        )
    return "raise --memory-max" if args.memory_max is not None else ""


def _tell_lost(path: str, count: int) -> None:
    print(
        f"{path}: {count} events are missing, because the socket was full (docs/use/trace.md)",
        file=sys.stderr,
    )


def _engine(args: argparse.Namespace) -> str:
    # A guest_memfd has no limit below its size. While there is a breakpoint, the kernel engine
    # single-steps all code.
    bounded = args.memory_max is not None and args.memory_max < args.memory
    return (
        "software"
        if args.engine == "auto" and (bounded or args.gdb is not None or _software_alone(args))
        else str(args.engine)
    )


def _to_its_end(vmm: "Vmm", *, quiet: bool) -> "Ended":
    with run_table.progress(vmm, show=not quiet) as tick:
        return vmm.run(sys.stdin.buffer, sys.stdout.buffer, sys.stderr.buffer, tick)


def _prove(
    args: argparse.Namespace, service: "Service", write: Callable[[object], None] | None
) -> int:
    from restrictedmem.audit.prove import prove_main, show

    found = prove_main(
        service,
        memory=args.memory,
        engine=_engine(args),
        as_root=args.prove == "as-root",
        quiet=args.quiet,
    )
    if args.json != jsonfile.STDOUT:
        show(found.attempts)
    if write is not None:
        write(found.as_data())
    return 0 if found.proved else 1
