"""``restrictedmem trace``: what ``run --trace`` wrote, for other programs."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from restrictedmem.cli.errors import CommandError
from restrictedmem.failure import named
from restrictedmem.paths import NewFile

#: More than any event has.
_LONGEST_LINE = 1 << 16
_CUT_OFF = "what there is was converted; the run was killed or is under way, its disk was full, or its pipe was (docs/use/trace.md)"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "trace",
        help="convert a trace of a run",
        description="Convert what run --trace wrote (docs/use/trace.md says what is in it).",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    to_perfetto = actions.add_parser(
        "to-perfetto",
        help="to Perfetto's format",
        description="Convert a trace to Perfetto's format. Open the result on https://ui.perfetto.dev: a track for each vCPU and each "
        "other thread of owner and engine, and a counter of private pages.",
    )
    to_perfetto.add_argument("source", metavar="IN", type=Path, help="the trace, one event a line")
    to_perfetto.add_argument(
        "target", metavar="OUT", type=Path, help="where to write, such as run.perfetto-trace"
    )
    to_perfetto.set_defaults(main=main)


def _lines(file: TextIO) -> Iterator[str]:
    """Yield lines; one that is longer than any event's comes in parts, which are none."""
    while line := file.readline(_LONGEST_LINE):
        yield line if line.endswith("\n") or len(line) < _LONGEST_LINE else f"{line}\n"


def main(args: argparse.Namespace) -> int:
    """Run the command; a trace that is not all is converted too, and is an error."""
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
        raise CommandError(f"{source}: missing of the trace: {trace.missing}", _CUT_OFF)
    print(f"{len(trace.events)} events", file=sys.stderr)
    return 0
