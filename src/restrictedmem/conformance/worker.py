"""The process that runs cases of one column.

``python -m restrictedmem.conformance.worker COLUMN`` reads ids of cases from stdin, one a line, and
writes each result to stdout as a line of JSON. A case that ends the process ends no other.
"""

import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator

from restrictedmem.conformance.case import Case, NotApplicable, Since, UnsupportedError
from restrictedmem.conformance.cases import CASES
from restrictedmem.conformance.columns import Column, Ground, column_of
from restrictedmem.conformance.outcome import outcome, spell
from restrictedmem.conformance.result import Result, Verdict
from restrictedmem.conformance.steps import Steps


def results(column: Column, cases: Iterable[Case]) -> Iterator[Result]:
    """Run cases of a column in this process, and yield their results."""
    try:
        with column.open() as ground:
            for case in cases:
                yield result_of(case, column, ground)
    except UnsupportedError as missing:
        for case in cases:
            yield Result(case.id, column.name, Verdict.UNSUPPORTED, why=str(missing))


def result_of(case: Case, column: Column, ground: Ground) -> Result:
    """Run one case."""
    expected = case.expects(column.answers)
    if isinstance(expected, NotApplicable):
        return Result(case.id, column.name, Verdict.NOT_APPLICABLE, why=expected.why)
    steps, started = Steps(), time.monotonic()
    try:
        with ground.subject(case, steps) as subject:
            seen = spell(outcome(lambda: case.does(subject)))
    except UnsupportedError as missing:
        return Result(case.id, column.name, Verdict.UNSUPPORTED, why=str(missing))
    verdict, wanted, why = judged(expected, seen)
    took = time.monotonic() - started
    return Result(case.id, column.name, verdict, wanted, seen, why, tuple(steps.lines), took)


def judged(expected: object, seen: str) -> tuple[Verdict, str, str]:
    """Return the verdict on an answer, the expected answer, and the fact that explains it."""
    if isinstance(expected, Since):
        if seen == spell(expected.before) != spell(expected.now):
            return Verdict.KNOWN, spell(expected.now), expected.fact.id
        expected = expected.now
    wanted = spell(expected)
    return (Verdict.PASS if seen == wanted else Verdict.FAIL), wanted, ""


def main() -> None:
    """Run the cases that stdin names."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    column = column_of(sys.argv[1])
    known = {case.id: case for case in CASES}
    asked = [known[line.rstrip("\n")] for line in sys.stdin]
    for result in results(column, asked):
        print(json.dumps(result.dump()), flush=True)


if __name__ == "__main__":
    main()
