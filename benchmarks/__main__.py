"""``scripts/bench [--json] [--quick] [NAME…]``: measure, and say which aims are met."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks import (
    conversion,
    descriptor,
    devkvm,
    get_page,
    guest,
    in_place,
    levels,
    memory,
    notifier,
    punched,
    seal,
    slots,
    startup,
    syscall,
    vcpus,
)
from benchmarks.common import HEAD, BenchError, Figure, Lab, machine

BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {
    **conversion.BENCHES,
    **get_page.BENCHES,
    **descriptor.BENCHES,
    **guest.BENCHES,
    **in_place.BENCHES,
    **levels.BENCHES,
    **devkvm.BENCHES,
    **memory.BENCHES,
    **notifier.BENCHES,
    **punched.BENCHES,
    **seal.BENCHES,
    **slots.BENCHES,
    **startup.BENCHES,
    **syscall.BENCHES,
    **vcpus.BENCHES,
}


def main() -> int:
    """Run the named benchmarks, or all.

    Returns 1 when an aim was missed, and 2 when a benchmark cannot run.
    """
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure every figure beside its floor, the least the same work could cost, "
        "in turns.",
    )
    parser.add_argument("--json", action="store_true", help="write JSON instead of a table")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="measure little of everything: shows that the benchmarks run, not how fast",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="benchmarks to run (default all): " + ", ".join(BENCHES),
    )
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BENCHES]
    if unknown:
        parser.error(f"no benchmark {unknown[0]}; choose from {', '.join(BENCHES)}")
    figures: list[dict[str, object]] = []
    if not args.json:
        print(
            "; ".join(f"{name} {value}" for name, value in machine().items()),
            HEAD,
            sep="\n",
            flush=True,
        )
    with tempfile.TemporaryDirectory(prefix="restrictedmem-bench-") as directory:
        lab = Lab(Path(directory), args.quick)
        for name in args.names or BENCHES:
            try:
                for figure in BENCHES[name](lab):
                    figures.append({"name": name, **figure.as_data()})
                    if not args.json:
                        print(figure.as_row(), flush=True)
            except BenchError as error:
                print(f"error: {name}: {error}\nhint: {error.hint}", file=sys.stderr)
                return 2
    if args.json:
        print(json.dumps({"machine": machine(), "figures": figures}, indent=1))
    return any(figure["met"] is False for figure in figures)


if __name__ == "__main__":
    sys.exit(main())
