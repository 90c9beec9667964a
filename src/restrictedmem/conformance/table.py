"""A report as text: a table of cases by columns, then what a reader has to know about it."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final

from restrictedmem.conformance.result import Result, Verdict
from restrictedmem.conformance.suite_report import SuiteReport, alone, counted
from restrictedmem.text import duration, plain

MARKS: Final = {
    Verdict.PASS: ".",
    Verdict.FAIL: "F",
    Verdict.KNOWN: "k",
    Verdict.NOT_APPLICABLE: "-",
    Verdict.UNSUPPORTED: "u",
}
#: The words of the legend and of the counts.
WORDS: Final = {
    Verdict.PASS: "pass",
    Verdict.FAIL: "FAIL",
    Verdict.KNOWN: "known",
    Verdict.NOT_APPLICABLE: "not applicable",
    Verdict.UNSUPPORTED: "unsupported here",
}
_COLOURS: Final = {Verdict.FAIL: "1;31", Verdict.KNOWN: "33"}
_BOLD, _DIM = "1", "2"
_WIDTH: Final = 80
#: Lines of a table that one can see at once; below a longer one stand the columns again.
_SCREEN: Final = 40
#: How many cases a line names; the number of all others follows.
_NAMED: Final = 4


def lines(report: SuiteReport, *, colour: bool) -> Iterator[str]:
    """Yield the lines of a report; with ``colour``, for a terminal."""
    paint = _Paint(colour)
    lacking = report.lacking()
    names = report.present()
    if names:
        yield from _table(report, names, paint)
        yield ""
    if lacking:
        yield paint("Not on this machine", _BOLD)
        for why, those in _by_reason(lacking.items()).items():
            yield from _entry(f"{', '.join(those)}: {why}")
        yield ""
    for part in (_unsupported(report, lacking), _failures(report, paint), _known(report, paint)):
        found = list(part)
        yield from found
    yield from textwrap.wrap(_total(report), _WIDTH)


class _Paint:
    """Text with a style of a terminal, or without."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._colour and style else text


def _table(report: SuiteReport, names: list[str], paint: _Paint) -> Iterator[str]:
    found = {(result.case, result.column): result for result in report.results}
    shown = [case for case in report.cases if any((case.id, column) in found for column in names)]
    width = max(len(text) for text in (*names, *(case.id for case in shown))) + 4
    yield from _names(names, width, paint, "┐")
    count = 0
    for subject, cases in groupby(shown, lambda case: case.subject):
        yield paint(plain(subject), _BOLD)
        for case in cases:
            marks = [_mark(found.get((case.id, name)), paint) for name in names]
            yield f"  {plain(case.id).ljust(width - 2)}{' '.join(marks)}".rstrip()
            count += 1
    if count > _SCREEN:
        yield from reversed(list(_names(names, width, paint, "┘")))
    yield ""
    used = {result.verdict for result in report.results if result.column in names}
    legend = [f"{MARKS[each]} {WORDS[each]}" for each in Verdict if each in used]
    yield paint("   ".join(legend), _DIM)


def _names(names: list[str], width: int, paint: _Paint, corner: str) -> Iterator[str]:
    """Yield a line for each name, which leads to the name's column of marks."""
    for number, name in enumerate(names):
        line = "─" * (width - len(plain(name)) - 1) + "│─" * number + corner
        yield f"{plain(name)} {paint(line, _DIM)}"


def _mark(result: Result | None, paint: _Paint) -> str:
    if result is None:
        return " "
    return paint(MARKS[result.verdict], _COLOURS.get(result.verdict, ""))


def _unsupported(report: SuiteReport, lacking: dict[str, str]) -> Iterator[str]:
    """Yield the reasons why single cases could not run."""
    missing = [
        result
        for result in report.results
        if result.verdict is Verdict.UNSUPPORTED and result.column not in lacking
    ]
    if missing:
        yield "Unsupported here"
        for why, those in _by_reason((result.case, result.why) for result in missing).items():
            yield from _entry(f"{why}: {_some(those)}")
        yield ""


def _failures(report: SuiteReport, paint: _Paint) -> Iterator[str]:
    """Yield each failure in full; columns that failed in the same way stand together."""
    sources = {case.id: case for case in report.cases}
    alike: dict[object, list[Result]] = defaultdict(list)
    for each in report.failures():
        alike[each.case, each.expected, each.seen, each.why, each.steps].append(each)
    for those in alike.values():
        first = those[0]
        columns = ", ".join(plain(each.column) for each in those)
        yield f"{paint('FAIL', _COLOURS[Verdict.FAIL])} {plain(first.case)} on {columns}"
        if first.why:
            yield from _entry(f"why       {first.why}", 12)
        if first.expected:
            yield from _entry(f"expected  {first.expected}", 12)
        if first.seen:
            yield from _entry(f"seen      {first.seen}", 12)
        if first.case in sources:
            yield from _entry(f"source    {sources[first.case].source}", 12)
        if first.steps:
            yield "  calls"
            yield from (f"    {plain(step)}" for step in first.steps)
        yield ""


def _known(report: SuiteReport, paint: _Paint) -> Iterator[str]:
    """Yield the facts that explain results."""
    for fact in report.facts:
        those = [
            result
            for result in report.results
            if result.verdict is Verdict.KNOWN and result.why == fact.id
        ]
        if those:
            yield f"{paint('known', _COLOURS[Verdict.KNOWN])} {plain(fact.id)}"
            yield from _entry(fact.says)
            yield from _entry(f"Linux {fact.versions}; changed {fact.date}; {fact.source}")
            for case, results in groupby(those, lambda result: result.case):
                yield from _entry(f"{case} on {', '.join(each.column for each in results)}")
            yield ""


def _by_reason(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the names that have each reason."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, why in found:
        if name not in names[why]:
            names[why].append(name)
    return names


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _entry(text: str, hanging: int = 4) -> list[str]:
    return textwrap.wrap(
        plain(text),
        _WIDTH,
        initial_indent="  ",
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _total(report: SuiteReport) -> str:
    counts = report.counts()
    columns = len(report.present())
    shares = ", ".join(
        f"{number} {WORDS[verdict]}"
        for verdict, number in counts.items()
        if number or verdict is Verdict.FAIL
    )
    return (
        f"{counted(len(report.cases), 'case')} ({alone(report.cases)} in no"
        f" selftest) on {counted(columns, 'column')} in"
        f" {duration(report.seconds)}, Linux {plain(report.kernel)}: {shares}"
    )
