"""The process that runs cases of one column.

It writes the result of each case to stdout, a line of JSON. stdin is a file in which it keeps the
steps of the case that runs. So a case that ends the process ends no other, and leaves its steps.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import final

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


@final
class _Kept:
    """The steps of the case that runs, in a file that outlives this process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        #: Where in the file each line begins.
        self._starts = [0]

    def tell(self, number: int, line: str) -> None:
        """Write a line, which is new or has become longer."""
        start, data = self._starts[number], f"{line}\n".encode()
        os.pwrite(self._fd, data, start)
        self._starts[number + 1 :] = [start + len(data)]

    def clear(self) -> None:
        """Forget all lines, for the next case."""
        os.ftruncate(self._fd, 0)
        self._starts = [0]


def main() -> None:
    """Run cases on a column, all of which the command line names."""
    serve(sys.argv[1], sys.argv[2:], COLUMNS, CASES)


def serve(
    name: str, asked: Sequence[str], columns: Iterable[Column], cases: Iterable[Case]
) -> None:
    """Run cases of a table on a column of a table, as ``main``."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    column = {column.name: column for column in columns}[name]
    known = {case.id: case for case in cases}
    # Nothing that a case or its children print may look like a result.
    said = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    kept = _Kept(0)

    def say(result: Result) -> None:
        print(json.dumps(result.dump()), file=said, flush=True)
        kept.clear()

    mine = [known[each] for each in asked if each in known]
    for result in results(column, mine, lambda: Steps(kept.tell)):
        say(result)
    for each in asked:
        if each not in known:
            why = "this version of the suite has no such case"
            say(Result(each, column.name, Verdict.FAIL, why=why))
