"""``restrictedmem conformance``: what this kernel, and this project, do with private memory."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from restrictedmem.cli import jsonfile, values
from restrictedmem.cli.errors import CommandError
from restrictedmem.failure import line_of, named
from restrictedmem.paths import NewFile
from restrictedmem.text import Line, duration, plain

if TYPE_CHECKING:
    from restrictedmem.conformance.case import Case
    from restrictedmem.conformance.columns import Column
    from restrictedmem.conformance.result import Result
    from restrictedmem.conformance.suite_report import SuiteReport

_T = TypeVar("_T")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "conformance",
        help="run every case on every kind of private memory, and compare two runs",
        description="Ask each kind of private memory that this machine has the same questions, and"
        " compare each answer\nwith what the kernel's selftests, the man pages and the postings"
        " say. A case is one question.\nA column is one kind of memory, such as guest_memfd with"
        " one set of flags, or this project's\ndescriptor as v10. A target is the first part of"
        " a column's name.\n\n"
        "The table has a line for each case and a mark for each column: . pass, F FAIL, k known (an"
        "\nanswer of earlier kernels), - not applicable, u unsupported here. Below it stand each"
        " failure with\nthe calls that show it, and what this machine lacks.\n\n"
        "Exit status 0 if nothing unexpected was seen, else 1. docs/use/conformance.md explains the"
        " rest.",
        epilog="examples:\n"
        "  restrictedmem conformance                       run everything, and print the table\n"
        "  restrictedmem conformance --target kernel       ask the guest_memfd of this kernel alone"
        "\n  restrictedmem conformance --target memfd --case 'read*' --case pread\n"
        "                                                  run some cases on one column\n"
        "  restrictedmem conformance --list                list the cases with their sources\n"
        "  restrictedmem conformance --json old.json --html old.html\n"
        "                                                  keep results for programs and for people"
        "\n  restrictedmem conformance --kernel bzImage       ask another kernel, under emulation\n"
        "  restrictedmem conformance --diff old.json new.json\n"
        "                                                  say what changed between two kernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="run only this target or column; may be given several times",
    )
    parser.add_argument(
        "--case",
        action="append",
        metavar="PATTERN",
        help="run only cases whose id matches this shell pattern; may be given several times",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="list columns and cases, with the answers expected and their sources, and run nothing",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write all results to FILE; - prints them, and no table"
    )
    parser.add_argument(
        "--tap",
        action="store_true",
        help="print each result when it comes, as the Test Anything Protocol (TAP 14), and no"
        " table",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write a page to FILE that a browser shows without a network"
    )
    parser.add_argument(
        "--jobs",
        type=values.count_of("jobs"),
        metavar="N",
        help="number of columns at the same time (default: one for each CPU)",
    )
    parser.add_argument(
        "--diff",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="run nothing; print each answer that differs between two files of --json. Exit status"
        " 1 if any differs, else 0, as diff(1)",
    )
    parser.add_argument(
        "--kernel",
        type=Path,
        metavar="IMAGE",
        help="run under this kernel (a bzImage or vmlinuz), which QEMU emulates; scripts/kernel-lab"
        " builds one. The Debian packages qemu-system-x86 and busybox-static are needed",
    )
    parser.add_argument(
        "--modules",
        type=Path,
        metavar="DIR",
        help="with --kernel: the kernel's directory in /lib/modules, for kernels of distributions",
    )
    parser.set_defaults(main=main, error=parser.error)


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    if args.diff is not None:
        return _diff(*args.diff)
    columns, cases = _columns(args), _cases(args)
    if not any(case.family in column.families for case in cases for column in columns):
        args.error("none of these cases is for any of these targets: see --list")
    if args.list:
        from restrictedmem.conformance import listing

        print("\n".join(listing.lines(columns, cases)))
        return 0
    return _run(args, columns, cases)


def _check(args: argparse.Namespace) -> None:
    """End the program if two options do not go together."""
    run = {
        "--json": args.json is not None,
        "--tap": args.tap,
        "--html": args.html is not None,
        "--jobs": args.jobs is not None,
        "--kernel": args.kernel is not None,
    }
    choice = {"--target": args.target is not None, "--case": args.case is not None}
    instead = {"--diff": {**run, **choice, "--list": args.list}, "--list": run}
    for option, others in instead.items():
        given = next((name for name, value in others.items() if value), None)
        if given is not None and getattr(args, option.removeprefix("--")):
            args.error(f"{given} does not go with {option}")
    if args.tap and args.json == jsonfile.STDOUT:
        args.error("--json - does not go with --tap: both print to stdout")
    if args.modules is not None and args.kernel is None:
        args.error("--modules is for --kernel")
    if args.html == jsonfile.STDOUT:
        args.error("--html takes a file")


def _columns(args: argparse.Namespace) -> "list[Column]":
    from restrictedmem.conformance.columns import COLUMNS

    return _chosen(
        args,
        "--target",
        COLUMNS,
        args.target,
        lambda column, name: name in (column.name, column.target),
    )


def _cases(args: argparse.Namespace) -> "list[Case]":
    from restrictedmem.conformance.cases import CASES

    return _chosen(
        args, "--case", CASES, args.case, lambda case, pattern: fnmatchcase(case.id, pattern)
    )


def _chosen(
    args: argparse.Namespace,
    option: str,
    every: Sequence[_T],
    wanted: list[str] | None,
    fits: Callable[[_T, str], bool],
) -> list[_T]:
    """Return what an option chooses, which is everything if it was not given."""
    if wanted is None:
        return list(every)
    for each in wanted:
        if not any(fits(one, each) for one in every):
            args.error(f"argument {option}: nothing is called {plain(each)!r}: see --list")
    return [one for one in every if any(fits(one, each) for each in wanted)]


def _run(args: argparse.Namespace, columns: "list[Column]", cases: "list[Case]") -> int:
    from restrictedmem.conformance.suite_run import run
    from restrictedmem.emulated.emulated_machine import EmulationError, Kernel

    if args.kernel is None:
        return _report(args, columns, cases, run, lambda: os.uname().release)
    from restrictedmem.conformance.emulated_run import EmulatedRun

    try:
        emulated = EmulatedRun(Kernel(args.kernel, args.modules))
        return _report(args, columns, cases, emulated.run, lambda: emulated.release)
    except EmulationError as error:
        raise CommandError(str(error), error.hint) from error


def _report(
    args: argparse.Namespace,
    columns: "list[Column]",
    cases: "list[Case]",
    run: "Callable[[list[Column], list[Case], int], Generator[Result]]",
    release: Callable[[], str],
) -> int:
    """Run cases on columns, and report the results."""
    from restrictedmem.conformance import page, table
    from restrictedmem.conformance.suite_report import SuiteReport

    jobs = args.jobs or len(os.sched_getaffinity(0))
    count = sum(case.family in column.families for case in cases for column in columns)
    began = time.monotonic()
    with ExitStack() as stack:
        # A file that cannot be written is an error before anything runs.
        write = None if args.json is None else stack.enter_context(jsonfile.opened(args.json))
        html = None if args.html is None else stack.enter_context(NewFile(args.html))
        results = stack.enter_context(closing(run(columns, cases, jobs)))
        found = list(_as_tap(results, count) if args.tap else _with_progress(results, count))
        report = SuiteReport.of(
            columns,
            cases,
            found,
            kernel=release(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=time.monotonic() - began,
        )
        if not args.tap and args.json != jsonfile.STDOUT:
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            print("\n".join(table.lines(report, colour=colour)))
        if write is not None:
            write(report.dump())
        if html is not None:
            html.write(page.of(report).encode())
            html.close()
    return 1 if report.failures() else 0


def _with_progress(results: "Iterable[Result]", count: int) -> "Iterator[Result]":
    """Pass results on, and show progress on a terminal meanwhile."""
    line, began = Line(sys.stderr), time.monotonic()

    def text(number: int, result: "Result") -> str:
        passed = duration(time.monotonic() - began)
        return f"{number} of {count} results, {passed}: {result.case} on {result.column}"

    try:
        for number, result in enumerate(results, 1):
            line.update(partial(text, number, result))
            yield result
    finally:
        line.clear()


def _as_tap(results: "Iterable[Result]", count: int) -> "Iterator[Result]":
    """Pass results on, and print each when it comes."""
    from restrictedmem.conformance import tap

    print(tap.head(count), flush=True)
    try:
        for number, result in enumerate(results, 1):
            print("\n".join(tap.lines(number, result)), flush=True)
            yield result
    except BaseException:
        print(tap.ABORTED, flush=True)
        raise


def _diff(before: str, after: str) -> int:
    from restrictedmem.conformance.suite_report import counted, differences

    one, other = _read(before), _read(after)
    if not one.names() & other.names():
        raise CommandError(f"{before} and {after} have no case and column in common", status=2)
    alone = {before: one.names() - other.names(), after: other.names() - one.names()}
    for file, names in alone.items():
        if names:
            count = counted(len(names), "result")
            print(f"not compared, in {plain(file)} alone: {count}", file=sys.stderr)
    found = list(differences(one, other))
    for column, case, change in found:
        print(plain(f"{column} {case}: {change}" if case else f"{column}: {change}"))
    return 1 if found else 0


def _read(name: str) -> "SuiteReport":
    from restrictedmem.conformance.suite_report import LARGEST, SuiteReport

    try:
        with open(name, "rb") as file:
            return SuiteReport.load(file.read(LARGEST + 1))
    except OSError as error:
        raise CommandError(line_of(named("open", error, name)), status=2) from None
    except ValueError as error:
        raise CommandError(f"{name} is no report of --json: {error}", status=2) from None
