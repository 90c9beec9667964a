"""``restrictedmem run``: a guest on restricted memory, its input from stdin, its output to stdout."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from errno import ENOMEM, ENOSPC
from typing import TYPE_CHECKING, Any, Final

from restrictedmem.cli import guest_arguments as guest_option
from restrictedmem.cli import hints, jsonfile, table, values
from restrictedmem.cli.errors import CommandError
from restrictedmem.failure import line_of
from restrictedmem.mm import design
from restrictedmem.platform import platform

if TYPE_CHECKING:
    from restrictedmem.service.client import Service
    from restrictedmem.vmm.elf import Image
    from restrictedmem.vmm.vmm import Ended, Vmm


#: Backings of huge pages that are set aside, and where it is said how many.
_POOLS: Final = {
    "hugetlb-2m": "sysctl vm.nr_hugepages",
    "hugetlb-1g": "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        help="run a guest in private memory",
        description="Create a restricted descriptor, give it to a VM as private memory, and run a guest on it. The guest's input is "
        "stdin, its output stdout, its exit status ours. What happened is said on stderr.",
        epilog="examples:\n"
        "  restrictedmem run sha256 </usr/bin/python3      digest a file inside private memory\n"
        "  restrictedmem run --memory 2M sha256 <big.iso   the input may be far larger than the memory\n"
        "  restrictedmem run --engine software convert     pages turned shared and private, on emulated vCPUs\n"
        "  restrictedmem run --platform snp --design folio+teardown convert\n"
        "                                                  what comes back of the host's direct map\n"
        "  restrictedmem run --prove                       every way to the guest's memory, tried\n"
        "  restrictedmem run --gdb 1234 ./my.elf           debug a guest of one's own\n"
        "  restrictedmem run --json run.json ./my.elf arg",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = values.memory_size
    parser.add_argument(
        "--memory",
        type=size,
        default="64M",
        metavar="SIZE",
        help="private memory of the guest (default 64M)",
    )
    parser.add_argument(
        "--memory-max",
        type=size,
        metavar="SIZE",
        help="what a descriptor may hold at most; beyond it, ENOSPC",
    )
    values.add_api(parser)
    parser.add_argument(
        "--engine",
        choices=("auto", "kernel", "software"),
        default="auto",
        help="what runs guest code: /dev/kvm with guest_memfd, Unicorn, or the first of them that works here (default auto; a --memory-max "
        "below --memory is for Unicorn alone, and --gdb is far faster there)",
    )
    _add_memory(parser)
    parser.add_argument(
        "--vcpus",
        type=values.count_of("vCPUs", values.MOST_VCPUS),
        metavar="N",
        help="vCPUs of the guest (default 1)",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write the events of the run as JSON lines (docs/use/trace.md); what cannot be written is said, with "
        "the guest's exit status, or 1 in place of 0",
    )
    parser.add_argument(
        "--gdb",
        type=values.port,
        metavar="PORT",
        help="wait for gdb on this port of 127.0.0.1, 0 for a free one; the VM's policy then allows its owner everything, "
        "and its measurement says so",
    )
    parser.add_argument(
        "--prove",
        nargs="?",
        choices=("as-owner", "as-root"),
        const="as-owner",
        metavar="as-root",
        help="instead of a guest of yours run one that holds a random pattern, try every way an owner has to get at it, without the "
        "capabilities that open any process (as-root: with them), and exit with 1 if one succeeds that docs/understand/threat-model.md does not list",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the closing table as JSON; with --prove, what was tried, and - is stdout then, in place of the table. What cannot be "
        "written is said as for --trace",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")
    parser.add_argument("guest", metavar="GUEST", nargs="?", help=guest_option.KINDS)
    parser.add_argument(
        "args", nargs=argparse.REMAINDER, metavar="ARGS", help="arguments of the guest"
    )
    parser.set_defaults(
        main=main, error=parser.error, options=frozenset(parser._option_string_actions)
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """Add what the thread argued about: who hears what of a punch, where pages lie, and what the host has to put right after it."""
    parser.add_argument(
        "--design",
        type=_design,
        metavar="NAME",
        help=f"what of a punch the VM hears, and when pages go: {', '.join(design.NAMES)} (docs/understand/designs.md; default: that of --api). With "
        f"{design.TEARDOWN} behind it, a VM that ends hears that everything goes, which no posting did",
    )
    parser.add_argument(
        "--backing",
        choices=("memfd", "thp", "hugetlb-2m", "hugetlb-1g"),
        help="what the pages are: of 4 KiB; of 2 MiB where shmem has them, which a punch splits; or huge pages that the machine has set "
        "aside, which nothing splits (default memfd; all others on the software engine)",
    )
    parser.add_argument(
        "--pin",
        action="store_true",
        help="keep each page at its physical address once the guest has it (docs/understand/pinning.md; software engine)",
    )
    parser.add_argument(
        "--platform",
        choices=platform.NAMES,
        help="model a SEV-SNP host under the guest, say at the end what is left of its direct map and RMP, and exit with 1 if a rule was "
        "violated: snp keeps private pages in the direct map, split where it must be; snp-unmapped takes them out (docs/understand/platform.md; "
        "software engine)",
    )


def _design(text: str) -> str:
    try:
        return str(design.make(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(error.strerror) from None


def main(args: argparse.Namespace) -> int:
    """Run the command and return the guest's exit status, or that of the proof."""
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
    """End the program for options that do not go together, or would do nothing."""
    if args.engine == "kernel" and (word := _software_alone(args)):
        args.error(
            f"{word} is for the software engine: the kernel's keeps private memory in a guest_memfd"
        )
    if args.prove is None and args.json == jsonfile.STDOUT:
        args.error("--json takes a file: stdout is the guest's")
    services = _first(args, "api", "design", "backing", "memory_max", "pin")
    if server and services:
        args.error(
            f"{services} is for a service of one's own, and RESTRICTEDMEM_SERVER names another"
        )
    guests = _first(args, "vcpus", "trace", "gdb", "platform")
    if args.prove is not None and guests:
        args.error(f"{guests} goes with a guest, not with --prove")


def _first(args: argparse.Namespace, *names: str) -> str:
    """Return the first of some options that was given, empty when none was."""
    # Not by comparison: port 0 is one.
    given = (
        name
        for name in names
        if getattr(args, name) is not None and getattr(args, name) is not False
    )
    return next((f"--{name.replace('_', '-')}" for name in given), "")


def _software_alone(args: argparse.Namespace) -> str:
    """Return the option that only the software engine has, if one was given."""
    return (
        ""
        if args.backing == "memfd" and not args.platform and not args.pin
        else _first(args, "platform", "pin", "backing")
    )


def _run(
    args: argparse.Namespace, service: "Service", write: Callable[[object], None] | None
) -> int:
    image = guest_option.read(args.guest)
    guest_option.warn(args.guest, args.args, args.options)
    ended: Ended | None = None
    platform: dict[str, Any] = {}
    try:
        with ExitStack() as stack:
            vmm, measurement = _launched(args, service, image, stack)
            ended = _to_its_end(vmm, quiet=args.quiet)
            found = {**vmm.statistics(), "measurement": measurement}
            # After the statistics, for the VM that they are of is gone then.
            platform = vmm.destroy() if args.platform else {}
            if not args.quiet:
                table.show({**found, "platform": platform})
            if write is not None:
                write(table.as_data({**found, "platform": platform}, ended))
    except OSError as error:
        if ended is None or ended.fatal is not None:
            raise
        # What the guest came to is still to be told, but not that all is well.
        raise CommandError(line_of(error), status=ended.status or 1) from None
    if platform.get("violated_pages"):
        # Before what stopped the guest, which may have come of it.
        story = "\n  ".join(table.story(platform))
        raise CommandError(
            f"rules of the platform were violated for {platform['violated_pages']} pages; the first:\n  {story}"
        )
    if ended.fatal is not None:
        raise _stopped(args, ended.fatal)
    return ended.status


def _stopped(args: argparse.Namespace, fatal: object) -> CommandError:
    """Return what is said of a guest that stopped for good: a memory fault brings an errno alone, and what it comes of depends."""
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
    """Return a guest that is ready to run, and its measurement; what belongs to it ends with ``stack``."""
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
        with guest_option.naming(args.guest):
            vmm.load(image, args.args)
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        raise CommandError(f"loading {args.guest}: {error.strerror}", _space(args)) from None
    measurement = vmm.launch_finish().hex()
    if args.gdb is not None:
        from restrictedmem.vmm.gdb import stub

        stack.enter_context(stub.serve(vmm, args.gdb, str(guest_option.find(args.guest))))
    return vmm, measurement


def _space(args: argparse.Namespace) -> str:
    """Return what there is to be done for want of space."""
    if args.backing in _POOLS:
        return f"the machine has no huge page left: set more aside, {_POOLS[args.backing]} (docs/understand/folios.md)"
    return "raise --memory-max" if args.memory_max is not None else ""


def _tell_lost(path: str, count: int) -> None:
    print(
        f"{path}: {count} events are missing, which found the socket full (docs/use/trace.md)",
        file=sys.stderr,
    )


def _engine(args: argparse.Namespace) -> str:
    # A guest_memfd has no limit but its size, and the kernel engine steps through all code while
    # there is a breakpoint.
    bounded = args.memory_max is not None and args.memory_max < args.memory
    return (
        "software"
        if args.engine == "auto" and (bounded or args.gdb is not None or _software_alone(args))
        else str(args.engine)
    )


def _to_its_end(vmm: "Vmm", *, quiet: bool) -> "Ended":
    with table.progress(vmm, show=not quiet) as tick:
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
