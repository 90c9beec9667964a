"""``restrictedmem trace``: conversion of what ``run --trace`` wrote."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from restrictedmem.cli.errors import CommandError
from restrictedmem.failure import named
from restrictedmem.paths import NewFile

#: More characters than any event has.
_LONGEST_LINE = 1 << 16
_CUT_OFF = (
    "the rest was converted; the run was killed or is under way, or its disk or pipe was full"
    " (docs/use/trace.md)"
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "trace",
        help="convert a trace of a run",
        description="Convert a file that run --trace wrote (docs/use/trace.md describes it).",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    to_perfetto = actions.add_parser(
        "to-perfetto",
        help="convert to Perfetto's format",
        description="Convert a trace to Perfetto's format. Open the result on"
        " https://ui.perfetto.dev: it has a track for each vCPU and for each other thread of owner"
        " and engine, and a counter of private pages.",
    )
    to_perfetto.add_argument(
        "source", metavar="IN", type=Path, help="the trace, one event per line"
    )
    to_perfetto.add_argument(
        "target", metavar="OUT", type=Path, help="file to write, such as run.perfetto-trace"
    )
    to_perfetto.set_defaults(main=main)


def _lines(file: TextIO) -> Iterator[str]:
    """Yield lines; yield one that is longer than any event in parts, which are not events."""
    while line := file.readline(_LONGEST_LINE):
        yield line if line.endswith("\n") or len(line) < _LONGEST_LINE else f"{line}\n"


def main(args: argparse.Namespace) -> int:
    """Run the command; convert an incomplete trace too, and then report an error."""
    from restrictedmem.vmm import perfetto

    source = str(args.source)
    try:
        with args.source.open(encoding="utf-8", errors="replace") as lines:
            trace = perfetto.read(_lines(lines))
    except OSError as error:
        raise named("read", error, source) from None
    with NewFile(str(args.target)) as target:
        target.write(perfetto.convert(trace.events))
    if trace.missing:
        raise CommandError(f"{source}: the trace is incomplete; missing: {trace.missing}", _CUT_OFF)
    print(f"{len(trace.events)} events", file=sys.stderr)
    return 0
