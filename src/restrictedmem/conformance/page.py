"""A report as one page of HTML, which needs no network and is complete without JavaScript."""

import html
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Final, final

from restrictedmem.conformance.result import Result, Verdict
from restrictedmem.conformance.suite_report import CaseNote, SuiteReport, counted, spans
from restrictedmem.text import duration, plain

#: The class of each verdict in page.css and page.js, its mark, and its words.
_SHOWN: Final = {
    Verdict.PASS: ("pass", "✓", "pass"),
    Verdict.FAIL: ("fail", "✕", "FAIL"),
    Verdict.KNOWN: ("known", "k", "known"),
    Verdict.NOT_APPLICABLE: ("na", "–", "not applicable"),  # noqa: RUF001  a dash
    Verdict.UNSUPPORTED: ("unsupported", "u", "unsupported here"),
}
#: Results that stand first in a case.
_FIRST: Final = (Verdict.FAIL, Verdict.KNOWN)


def of(report: SuiteReport) -> str:
    """Return the page of a report, of which every text is escaped."""
    return _Page(report).text()


def _text(value: object) -> str:
    return html.escape(plain(value))


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source of a policy (CSP) that allows this text, and no other."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


@final
class _Page:
    """The parts of a page, each a list of lines."""

    def __init__(self, report: SuiteReport) -> None:
        self._report = report
        self._lacking = report.lacking()
        self._names = report.present()
        self._of_case: dict[str, dict[str, Result]] = defaultdict(dict)
        for result in report.results:
            if result.column not in self._lacking:
                self._of_case[result.case][result.column] = result

    def text(self) -> str:
        """Return the whole page."""
        style = f"{_asset('page.css')}:root {{ --n: {max(1, len(self._names))}; }}\n"
        script = _asset("page.js")
        # Even a text that was not escaped could run no script and load nothing.
        policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
        title = f"Conformance of private memory, Linux {_text(self._report.kernel)}"
        parts = (self._head(), self._matrix(), self._facts(), self._columns())
        return "\n".join(
            [
                "<!doctype html>",
                '<html lang="en">',
                '<meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{title}</title>",
                f"<style>{style}</style>",
                "<main>",
                *(line for part in parts for line in part),
                "</main>",
                f"<script>{script}</script>",
                "</html>",
                "",
            ]
        )

    def _head(self) -> Iterator[str]:
        report = self._report
        when = report.date[:16].replace("T", " ")
        yield "<h1>Conformance of private memory</h1>"
        yield (
            f'<p class="soft">Linux {_text(report.kernel)}, {_text(when)} UTC, restrictedmem'
            f" {_text(report.version)}: {counted(len(report.cases), 'case')} on"
            f" {counted(len(self._names), 'column')} in {duration(report.seconds)}</p>"
        )
        yield '<ul class="counts">'
        for verdict, number in report.counts().items():
            kind, _, words = _SHOWN[verdict]
            zero = "" if number else " zero"
            yield f'<li class="{kind}{zero}"><b>{number}</b><span>{words}</span></li>'
        yield "</ul>"

    def _matrix(self) -> Iterator[str]:
        yield "<h2>Cases</h2>"
        yield "<p>Each row opens to the calls that were made and what they answered.</p>"
        yield from self._filter()
        heads = "".join(f"<span>{_text(name)}</span>" for name in self._names)
        legend = "".join(
            f'<span><i class="{kind}">{mark}</i>{words}</span>'
            for kind, mark, words in _SHOWN.values()
        )
        yield f'<p class="legend">{legend}</p>'
        yield '<div class="matrix">'
        yield f'<div class="row head"><span></span>{heads}</div>'
        shown = [case for case in self._report.cases if case.id in self._of_case]
        for subject, cases in groupby(shown, lambda case: case.subject):
            yield f'<section class="part"><h3 class="subject">{_text(subject)}</h3>'
            for case in cases:
                yield from self._case(case)
            yield "</section>"
        yield "</div>"

    def _filter(self) -> Iterator[str]:
        """Yield the filter, which the script shows."""
        verdicts = "".join(
            f'<option value="{kind}">{words}</option>' for kind, _, words in _SHOWN.values()
        )
        columns = "".join(f"<option>{_text(name)}</option>" for name in self._names)
        yield "<form hidden>"
        yield '<input name="text" type="search" placeholder="Case or source" aria-label="Text">'
        yield (
            '<select name="verdict" aria-label="Verdict"><option value="">every verdict</option>'
            f"{verdicts}</select>"
        )
        yield (
            '<select name="column" aria-label="Column"><option value="">every column</option>'
            f"{columns}</select>"
        )
        yield "<output></output></form>"

    def _case(self, case: CaseNote) -> Iterator[str]:
        found = self._of_case[case.id]
        is_open = " open" if any(each.verdict is Verdict.FAIL for each in found.values()) else ""
        marks = "".join(self._mark(found.get(name), name) for name in self._names)
        source = _text(" ".join((case.source, *spans(case.covers))))
        yield f'<details class="case" id="case-{_text(case.id)}"{is_open}>'
        yield f'<summary class="row"><span class="id">{_text(case.id)}</span>'
        yield f'<span class="source">{source}</span>{marks}</summary>'
        yield '<div class="body">'
        alike: dict[object, list[Result]] = defaultdict(list)
        for each in found.values():
            alike[each.verdict, each.expected, each.seen, each.why, each.steps].append(each)
        for those in sorted(alike.values(), key=lambda those: those[0].verdict not in _FIRST):
            yield from self._group(those)
        yield "</div></details>"

    def _mark(self, result: Result | None, name: str) -> str:
        if result is None:
            return '<i class="mark"></i>'
        kind, mark, words = _SHOWN[result.verdict]
        return f'<i class="mark {kind}" title="{_text(name)}: {words}">{mark}</i>'

    def _group(self, those: list[Result]) -> Iterator[str]:
        """Yield what columns did that did the same."""
        first = those[0]
        kind, _, words = _SHOWN[first.verdict]
        numbers = " ".join(str(self._names.index(each.column)) for each in those)
        names = ", ".join(f'<span class="name">{_text(each.column)}</span>' for each in those)
        yield f'<div class="group {kind}" data-columns="{numbers}">'
        yield f'<p><span class="badge">{words}</span> {names}</p>'
        terms = {"expected": first.expected, "seen": first.seen, "why": first.why}
        given = [(term, value) for term, value in terms.items() if value]
        if given:
            yield "<dl>"
            yield from (f"<dt>{term}<dd>{_text(value)}" for term, value in given)
            yield "</dl>"
        if first.steps:
            steps = "\n".join(_text(step) for step in first.steps)
            yield f"<pre>{steps}</pre>"
        yield "</div>"

    def _facts(self) -> Iterator[str]:
        seen = {each.why for each in self._report.results if each.verdict is Verdict.KNOWN}
        facts = [fact for fact in self._report.facts if fact.id in seen]
        if not facts:
            return
        yield "<h2>Known facts</h2>"
        yield "<p>This kernel answers as earlier kernels did. The versions are a note.</p>"
        yield '<dl class="facts">'
        for fact in facts:
            yield f"<dt><code>{_text(fact.id)}</code>"
            yield (
                f'<dd>{_text(fact.says)} <span class="soft">Linux {_text(fact.versions)}; changed'
                f" {_text(fact.date)}; {_text(fact.source)}</span>"
            )
        yield "</dl>"

    def _columns(self) -> Iterator[str]:
        yield "<h2>Columns</h2>"
        yield '<table class="columns">'
        for column in self._report.columns:
            why = self._lacking.get(column.name)
            state = "" if why is None else f'<td class="soft">not on this machine: {_text(why)}'
            if why is None:
                state = f"<td>{_text(column.says)}"
            yield f'<tr><th><span class="name">{_text(column.name)}</span>{state}'
        yield "</table>"
