"""``restrictedmem trace``: what ``run --trace`` wrote, for other programs."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from restrictedmem import paths

#: More than any event has.
_LONGEST_LINE = 1 << 16


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "trace",
        help="convert a trace of a run",
        description="Convert what run --trace wrote (docs/trace.md says what is in it).",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    to_perfetto = actions.add_parser(
        "to-perfetto",
        help="to Perfetto's format",
        description="Convert a trace to Perfetto's format. Open the result on https://ui.perfetto.dev: a track for each vCPU and each "
        "other thread of owner and engine, and a counter of private pages.",
    )
    to_perfetto.add_argument("source", metavar="IN", type=Path, help="the trace, one event a line")
    to_perfetto.add_argument("target", metavar="OUT", type=Path, help="where to write, such as run.perfetto-trace")
    to_perfetto.set_defaults(main=main)


def _lines(file: TextIO) -> Iterator[str]:
    """Yield lines; one that is longer than any event's comes in parts, which are none."""
    while line := file.readline(_LONGEST_LINE):
        yield line if line.endswith("\n") or len(line) < _LONGEST_LINE else f"{line}\n"


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    from restrictedmem.kvm import perfetto

    with args.source.open(encoding="utf-8", errors="replace") as lines:
        try:
            events = perfetto.read(_lines(lines))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(args.source)) from None
    converted = perfetto.convert(events)
    with open(paths.create(str(args.target)).detach(), "wb") as target:
        target.write(converted)
    print(f"{len(events)} events", file=sys.stderr)
    return 0
