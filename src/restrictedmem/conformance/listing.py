"""The cases and the columns as text, without a run."""

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from restrictedmem.conformance.case import Case
from restrictedmem.conformance.cases import SUBJECTS
from restrictedmem.conformance.columns import Column
from restrictedmem.conformance.suite_report import alone, counted, spans, spell_expected

_WIDTH: Final = 80


def lines(columns: Sequence[Column], cases: Sequence[Case]) -> Iterator[str]:
    """Yield the lines of a list: what each column is, and what each case expects of it."""
    yield "Columns"
    width = max(len(column.name) for column in columns) + 2
    for column in columns:
        yield from _wrapped(f"  {column.name.ljust(width)}", column.says)
    for subject, those in SUBJECTS.items():
        mine = [case for case in cases if case in those]
        if mine:
            yield ""
            yield f"Cases: {subject}"
        for case in mine:
            ids = f" [{' '.join(spans(case.covers))}]" if case.covers else ""
            yield from _wrapped(f"  {case.id}  ", f"{case.source}{ids}")
            for answer, names in answers(columns, case).items():
                yield from _wrapped("      ", f"{answer}: {' '.join(names)}")
    yield ""
    yield from _wrapped(
        "",
        f"{counted(len(cases), 'case')} ({alone(cases)} in no selftest of the kernel). In brackets"
        " stand the assertions of selftests that a case makes.",
    )


def answers(columns: Sequence[Column], case: Case) -> dict[str, list[str]]:
    """Return each answer with the columns of which it is expected.

    The name of a target stands for all its columns where they answer alike.
    """
    expected = {
        column: spell_expected(case.expects(column.answers))
        for column in columns
        if case.family in column.families
    }
    found: dict[str, list[str]] = defaultdict(list)
    for column, answer in expected.items():
        kin = {other for each, other in expected.items() if each.target == column.target}
        name = column.target if len(kin) == 1 else column.name
        if name not in found[answer]:
            found[answer].append(name)
    return found


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
