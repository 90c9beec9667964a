"""A report: all results of a run, with what a reader needs to understand them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from string import digits
from typing import Any, Final, Self, cast

from restrictedmem.conformance.case import Case, NotApplicable, Since
from restrictedmem.conformance.cases import SUBJECTS
from restrictedmem.conformance.columns import Column
from restrictedmem.conformance.facts import FACTS, Fact
from restrictedmem.conformance.outcome import spell
from restrictedmem.conformance.result import Result, Verdict, load
from restrictedmem.version import __version__

#: The version of the format.
FORMAT: Final = 1
#: More bytes than a report has.
LARGEST: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class ColumnNote:
    """A column, for the reader of a report."""

    name: str
    says: str


@dataclass(frozen=True, slots=True)
class CaseNote:
    """A case, for the reader of a report."""

    id: str
    subject: str
    source: str
    covers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SuiteReport:
    """A run's results, in the order of columns within that of cases."""

    format: int
    #: The version of this project.
    version: str
    #: The release that the kernel names, which is a note: no answer depends on it.
    kernel: str
    #: Date and time of the run's end, in UTC (ISO 8601).
    date: str
    seconds: float
    columns: tuple[ColumnNote, ...]
    cases: tuple[CaseNote, ...]
    facts: tuple[Fact, ...]
    results: tuple[Result, ...]

    @classmethod
    def of(
        cls,
        columns: Sequence[Column],
        cases: Sequence[Case],
        results: Sequence[Result],
        *,
        kernel: str,
        date: str,
        seconds: float,
    ) -> Self:
        """Make the report of a run of cases on columns."""
        subjects = {case.id: subject for subject, those in SUBJECTS.items() for case in those}
        order = {case.id: number for number, case in enumerate(cases)}
        ranks = {column.name: number for number, column in enumerate(columns)}
        return cls(
            FORMAT,
            __version__,
            kernel,
            date,
            round(seconds, 3),
            tuple(ColumnNote(column.name, column.says) for column in columns),
            tuple(
                CaseNote(case.id, subjects.get(case.id, ""), case.source, case.covers)
                for case in cases
            ),
            FACTS,
            tuple(sorted(results, key=lambda each: (order[each.case], ranks[each.column]))),
        )

    def dump(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return {**asdict(self), "results": [result.dump() for result in self.results]}

    @classmethod
    def load(cls, text: bytes) -> Self:
        """Read what ``dump`` made.

        Raises:
            ValueError: for anything else; the text says what is wrong.
        """
        if len(text) > LARGEST:
            raise ValueError(f"it is longer than {LARGEST} bytes")
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("it is not JSON") from None
        if type(found) is not dict or cast("dict[str, object]", found).get("format") != FORMAT:
            raise ValueError(f"it is no report of format {FORMAT}")
        report = load(cls, cast("object", found))
        if len(report.names()) < len(report.results):
            raise ValueError("it has two results of a case on a column")
        return report

    def names(self) -> set[tuple[str, str]]:
        """Return case and column of each result."""
        return {(result.case, result.column) for result in self.results}

    def failures(self) -> list[Result]:
        """Return the results that nobody expected."""
        return [result for result in self.results if result.verdict is Verdict.FAIL]

    def of_column(self, name: str) -> list[Result]:
        """Return the results of a column."""
        return [result for result in self.results if result.column == name]

    def lacking(self) -> dict[str, str]:
        """Return the columns that the machine lacks as a whole, each with the reason."""
        found: dict[str, str] = {}
        for column in self.columns:
            mine = self.of_column(column.name)
            reasons = {result.why for result in mine}
            if len(reasons) == 1 and all(each.verdict is Verdict.UNSUPPORTED for each in mine):
                found[column.name] = reasons.pop()
        return found

    def present(self) -> list[str]:
        """Return the columns that answered."""
        absent = self.lacking()
        asked = {result.column for result in self.results}
        return [
            column.name
            for column in self.columns
            if column.name in asked and column.name not in absent
        ]

    def counts(self) -> dict[Verdict, int]:
        """Return how many results have each verdict."""
        return {
            verdict: sum(result.verdict is verdict for result in self.results)
            for verdict in Verdict
        }


def counted(number: int, noun: str) -> str:
    """Return a number of things as text."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def alone(cases: Iterable[Case | CaseNote]) -> int:
    """Return how many cases make no assertion of the kernel's selftests."""
    return sum(not case.covers for case in cases)


def spans(ids: Iterable[str]) -> Iterator[str]:
    """Yield ids of assertions; a run of numbers is one text, such as ``GM-RW-1..4``."""

    def series(numbered: tuple[int, str]) -> tuple[str, int]:
        at, id_ = numbered
        prefix = id_.rstrip(digits)
        return prefix, int(id_[len(prefix) :] or at) - at

    for (prefix, _), run in groupby(enumerate(ids), series):
        (_, first), *rest = run
        yield f"{first}..{rest[-1][1].removeprefix(prefix)}" if rest else first


def spell_expected(expected: object) -> str:
    """Return the answer that a case expects, as text for a person."""
    match expected:
        case NotApplicable(why):
            return f"not applicable: {why}"
        case Since(now, before, fact):
            return f"{spell(now)} (before: {spell(before)}, {fact.id})"
        case _:
            return spell(expected)


def differences(before: SuiteReport, after: SuiteReport) -> Iterator[tuple[str, str, str]]:
    """Yield column, case, and what changed between two reports, where both have a result.

    A column that one of the machines lacks is one difference, without a case.
    """
    lacking = before.lacking(), after.lacking()
    found = {(result.column, result.case): result for result in after.results}
    told = set[str]()
    for one in before.results:
        other = found.get((one.column, one.case))
        if other is None or one.column in told:
            continue
        if (one.column in lacking[0]) != (one.column in lacking[1]):
            told.add(one.column)
            texts = [
                f"unsupported ({each[one.column]})" if one.column in each else "present"
                for each in lacking
            ]
            yield one.column, "", " -> ".join(texts)
        elif (one.verdict, one.seen) != (other.verdict, other.seen):
            yield one.column, one.case, f"{answer(one)} -> {answer(other)}"


def answer(result: Result) -> str:
    """Return a result in a few words: what was seen, and the verdict."""
    verdict = result.verdict.value
    return f"{result.seen} ({verdict})" if result.seen else verdict
