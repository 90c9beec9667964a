"""``restrictedmem conformance``: what this kernel, and this project, do with private memory."""

import argparse
import os


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("conformance", help="run every case on every kind of memory")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    from restrictedmem.conformance.cases import CASES
    from restrictedmem.conformance.columns import COLUMNS
    from restrictedmem.conformance.result import Verdict
    from restrictedmem.conformance.run import run

    failed = False
    for result in run(COLUMNS, CASES, args.jobs):
        failed |= result.verdict is Verdict.FAIL
        print(result.case, result.column, result.verdict.value, result.seen, result.why)
    return 1 if failed else 0
