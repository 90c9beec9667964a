"""``restrictedmem run``: a guest on restricted memory, its input from stdin, its output to stdout."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from errno import ENOEXEC, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restrictedmem import guests
from restrictedmem.cli.errors import CommandError
from restrictedmem.units import PAGE_MASK, format_size, parse_size

if TYPE_CHECKING:
    from restrictedmem.kvm.vmm import Ended, Vmm

_PROGRESS_INTERVAL = 0.1


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
        "  restrictedmem run --json ./my.elf arg 2>run.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", type=_size, default="64M", metavar="SIZE", help="private memory of the guest (default 64M)")
    parser.add_argument("--memory-max", type=_size, metavar="SIZE", help="what a descriptor may hold at most; beyond it, ENOSPC")
    parser.add_argument("--api", choices=("v9", "v10"), default="v10", help="which posting of the series to follow (default v10)")
    parser.add_argument("--json", action="store_true", help="write the closing table as JSON, to stderr too")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")
    parser.add_argument("guest", metavar="GUEST", help="one of: " + ", ".join(guests.names()) + "; or a path to an ELF")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="arguments of the guest")
    parser.set_defaults(main=main)


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not size or size & PAGE_MASK:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of pages")
    return size


def main(args: argparse.Namespace) -> int:
    """Run the command and return the guest's exit status."""
    from restrictedmem.kvm import elf
    from restrictedmem.kvm.vmm import Vmm
    from restrictedmem.service.client import SERVER_VARIABLE, Service
    from restrictedmem.service.start import Options

    path = _find(args.guest)
    try:
        image = elf.parse(path.read_bytes())
    except OSError as error:
        hint = "docs/guests.md says how to build one" if error.errno == ENOEXEC else ""
        raise CommandError(f"{path}: {error.strerror}", hint) from None
    server = os.environ.get(SERVER_VARIABLE)
    service = Service.connect(server) if server else Service.start(Options(api=args.api, memory_max=args.memory_max))
    with service, Vmm(args.memory, service) as vmm:
        try:
            vmm.load(image, args.args)
        except OSError as error:
            if error.errno != ENOSPC:
                raise
            raise CommandError(f"loading {path.name}: {error.strerror}", "raise --memory-max") from None
        with _progress(vmm, show=sys.stderr.isatty() and not args.quiet) as tick:
            ended = vmm.run(sys.stdin.buffer, sys.stdout.buffer, sys.stderr.buffer, tick)
        if not args.quiet:
            _show(vmm, ended, as_json=args.json)
    if ended.fatal is not None:
        raise CommandError(f"the guest stopped: {ended.fatal}")
    return ended.status


def _find(name: str) -> Path:
    if "/" in name:
        return Path(name)
    try:
        return guests.path(name)
    except OSError:
        known = ", ".join(guests.names())
        raise CommandError(f"no guest named {name}", f"there are {known}; a file needs a slash: ./{name}") from None


@contextmanager
def _progress(vmm: "Vmm", *, show: bool) -> Generator[Callable[[], None] | None, None, None]:
    """Show phase, bytes and rate on a terminal while the guest runs; yields what the VMM calls after each exit, or None."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    phase, done = TextColumn("{task.description}"), DownloadColumn(binary_units=True)
    columns = (SpinnerColumn(), phase, done, TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("guest runs", total=_input_size())
        shown = time.monotonic()

        def tick() -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= _PROGRESS_INTERVAL:
                shown = now
                progress.update(task, completed=vmm.bytes_in, refresh=True)

        yield tick


def _input_size() -> int | None:
    found = os.fstat(sys.stdin.fileno())
    return found.st_size if found.st_size and os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR) == 0 else None


def _show(vmm: "Vmm", ended: "Ended", *, as_json: bool) -> None:
    found = vmm.statistics()
    if as_json:
        print(json.dumps({**found, "status": ended.status, "fatal": ended.fatal and str(ended.fatal)}), file=sys.stderr)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for row in _rows(found):
        table.add_row(*row)
    Console(stderr=True, highlight=False, soft_wrap=True).print(table)


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    seconds = found["time_total_ns"] / 1e9
    rate = f", {format_size(round(found['bytes_in'] / seconds))}/s" if found["bytes_in"] and seconds else ""
    yield "mount", found["way"]
    yield "input, output", f"{format_size(found['bytes_in'])} in, {format_size(found['bytes_out'])} out{rate}"
    yield "pages taken", f"{found['pages_taken']} ({format_size(found['pages_taken'] * 4096)} of {format_size(found['private_bytes'])})"
    yield "faults", f"{found['faults_private']} private, {found['faults_shared']} shared, {found['fault_retries']} retried"
    yield "invalidations", f"{found['invalidations']}: {found['entries_zapped']} entries zapped, {found['pages_freed']} pages freed"
    yield "exits", ", ".join(f"{count} {name}" for name, count in sorted(found["exits"].items())) or "none"
    yield "locked", _locked(found)
    yield "memory charged to", found["cgroup"]
    yield "time", f"{found['time_in_guest_ns'] / 1e9:.3f} s in the guest, {found['time_outside_ns'] / 1e9:.3f} s outside"


def _locked(found: dict[str, Any]) -> str:
    if found["locked_bytes"]:
        return f"yes, {format_size(found['locked_bytes'])}"
    swap = "swap exists, so pages may be written to it" if found["swap"] else "no swap exists, so nothing is written out"
    return f"no ({found['unlocked_because']}: the limit is {format_size(found['memlock_limit'])}); {swap}"
