"""The process that runs cases of one column.

It reads ids of cases from stdin, one a line, and writes lines of JSON to stdout. A list of number
and text is a line of the steps of the case that runs. An object is the case's result. A case that
ends the process ends no other.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from restrictedmem.abi.process import PR_SET_PDEATHSIG, prctl
from restrictedmem.conformance.case import Case, NotApplicable, Since, UnsupportedError
from restrictedmem.conformance.cases import CASES
from restrictedmem.conformance.columns import COLUMNS, Column, Ground
from restrictedmem.conformance.outcome import outcome, spell
from restrictedmem.conformance.result import Result, Verdict
from restrictedmem.conformance.steps import Steps


def results(
    column: Column, cases: Iterable[Case], new_steps: Callable[[], Steps] = Steps
) -> Iterator[Result]:
    """Run cases of a column in this process, and yield their results."""
    try:
        with column.open() as ground:
            for case in cases:
                yield result_of(case, column, ground, new_steps())
    except UnsupportedError as missing:
        for case in cases:
            yield Result(case.id, column.name, Verdict.UNSUPPORTED, why=str(missing))


def result_of(case: Case, column: Column, ground: Ground, steps: Steps | None = None) -> Result:
    """Run one case."""
    expected = case.expects(column.answers)
    if isinstance(expected, NotApplicable):
        return Result(case.id, column.name, Verdict.NOT_APPLICABLE, why=expected.why)
    steps, started = steps or Steps(), time.monotonic()
    seen = wrong = ""
    try:
        with ground.subject(case, steps) as subject:
            seen = spell(outcome(lambda: case.does(subject)))
    except UnsupportedError as missing:
        return Result(case.id, column.name, Verdict.UNSUPPORTED, why=str(missing))
    except Exception as error:  # noqa: BLE001  a result for every case
        # A mistake in a case must not take the steps with it that show where the case was.
        wrong = f"{type(error).__name__}: {error}"
    verdict, wanted, why = judged(expected, seen)
    if wrong:
        verdict, why = Verdict.FAIL, wrong
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
    """Run the cases that stdin names, on the column that the command line names."""
    serve(sys.argv[1], COLUMNS, CASES)


def serve(name: str, columns: Iterable[Column], cases: Iterable[Case]) -> None:
    """Run the cases of a table that stdin names, on a column of a table."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    column = {column.name: column for column in columns}[name]
    known = {case.id: case for case in cases}
    asked = sys.stdin.read().split()
    # Nothing that a case or its children print may look like a result.
    said = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def say(found: object) -> None:
        print(json.dumps(found), file=said, flush=True)

    def tell(number: int, line: str) -> None:
        say((number, line))

    mine = [known[each] for each in asked if each in known]
    for result in results(column, mine, lambda: Steps(tell)):
        say(result.dump())
    for each in asked:
        if each not in known:
            why = "this version of the suite has no such case"
            say(Result(each, column.name, Verdict.FAIL, why=why).dump())
