"""``restrictedmem doctor``: a report on what this machine offers and lacks."""

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from restrictedmem.text import plain

if TYPE_CHECKING:
    from restrictedmem.machine.examination import Conclusion, Examination
    from restrictedmem.machine.finding import Finding

_MARKS = {
    "yes": ("yes", "32"),
    "no": ("no", "31"),
    "partly": ("partly", "33"),
    "unknown": ("?", "2"),
}
_INDENT = "  "
_MARK_WIDTH = 8
_WIDEST = 120
_NARROWEST = 60


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine offers and how to get what is missing",
        description="Try each thing that restrictedmem needs, and run a guest on each engine."
        " Print what works, what does not work without it, and how to get what is missing. Nothing"
        " is left behind. Exit status 0 if a guest ran in restricted memory here, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="print findings and conclusion as JSON")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    from restrictedmem.machine.examination import examine

    examination = examine()
    if args.json:
        json.dump(as_data(examination), sys.stdout, indent=2)
        print()
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        width = max(
            _NARROWEST,
            min(_WIDEST, shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDEST),
        )
        print("\n".join(as_lines(examination, width, colour=colour)))
    return 0 if examination.conclusion.usable else 1


def as_data(examination: "Examination") -> dict[str, Any]:
    """Return an examination as a dictionary for JSON."""
    findings = [
        {"group": group.name.lower(), **_data(finding)}
        for group, findings in examination.groups.items()
        for finding in findings
    ]
    conclusion = {name: _data(part) for name, part in examination.conclusion.parts().items()}
    return {
        "findings": findings,
        "conclusion": {"usable": examination.conclusion.usable, **conclusion},
    }


def _data(finding: "Finding") -> dict[str, str]:
    return {**asdict(finding), "state": finding.state.value}


def as_lines(examination: "Examination", width: int, *, colour: bool) -> Iterator[str]:
    """Yield an examination as lines of text.

    They have at most ``width`` columns, except where a word is longer.
    """
    names = [finding.name for findings in examination.groups.values() for finding in findings]
    column = len(_INDENT) + _MARK_WIDTH + max(map(len, names)) + 2
    for group, findings in examination.groups.items():
        yield _styled(group.value, "1", colour=colour)
        for finding in findings:
            yield from _finding_lines(finding, column, width, colour=colour)
        yield ""
    yield _styled("This machine has what it takes for", "1", colour=colour)
    for part in examination.conclusion.parts().values():
        yield from _finding_lines(part, column, width, colour=colour)
    yield ""
    yield from textwrap.wrap(_verdict(examination.conclusion), width, break_on_hyphens=False)


def _finding_lines(finding: "Finding", column: int, width: int, *, colour: bool) -> Iterator[str]:
    mark, style = _MARKS[finding.state.value]
    head = (
        _INDENT
        + _styled(mark.ljust(_MARK_WIDTH), style, colour=colour)
        + finding.name.ljust(column - len(_INDENT) - _MARK_WIDTH)
    )
    blank = " " * column
    # The detail may have words of other programs, such as fusermount3.
    detail = plain(" ".join(finding.detail.split()))
    wrapped = textwrap.wrap(
        detail, width - column, break_long_words=False, break_on_hyphens=False
    ) or [""]
    yield head + wrapped[0]
    yield from (blank + line for line in wrapped[1:])
    for text in filter(None, (finding.consequence, finding.remedy)):
        yield from textwrap.wrap(
            f"→ {text}",
            width,
            initial_indent=blank,
            subsequent_indent=f"{blank}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def _verdict(conclusion: "Conclusion") -> str:
    engines = (conclusion.software_engine, conclusion.kernel_engine)
    if conclusion.usable:
        on = " and on ".join(f"the {part.name}" for part in engines if part.state.value == "yes")
        return f"A guest ran in restricted memory here, on {on}: restrictedmem run sha256 </bin/sh"
    missing = [part.name for part in (conclusion.descriptor,) if part.state.value != "yes"] or [
        part.name for part in engines
    ]
    return (
        "No guest can run in restricted memory here:"
        f" {' and '.join(f'the {name}' for name in missing)} will not work."
    )


def _styled(text: str, style: str, *, colour: bool) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if colour else text
