"""A run of the conformance suite goes on, whatever a case or its process does.

The cases here are those of ``conformance_worker``, which misbehave.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from conformance_worker import CASES, COLUMNS, body
from processes import in_session, runs
from restrictedmem.conformance.case import Case, Family
from restrictedmem.conformance.columns import Column
from restrictedmem.conformance.result import Result, Verdict
from restrictedmem.conformance.suite_run import Body, run
from waiting import PATIENCE, wait_until

ONE, TWO, MISSING, HANGING = COLUMNS


def chosen(*names: str) -> list[Case]:
    return [case for case in CASES if case.id in names]


def executes(*command: str) -> Body:
    return lambda _column, _cases: lambda: os.execvp(command[0], command)


def outcome(*names: str, columns: Sequence[Column] = (ONE,), jobs: int = 2) -> list[Result]:
    return list(run(columns, chosen(*names), jobs, body=body, deadline=PATIENCE))


def test_each_verdict_and_the_steps() -> None:
    found = outcome("answers", "fails", "refuses", "senseless", columns=(ONE, TWO))
    assert sorted((each.column, each.case, each.verdict, each.seen) for each in found) == sorted(
        (column.name, case, verdict, seen)
        for column in (ONE, TWO)
        for case, verdict, seen in (
            ("answers", Verdict.PASS, "0"),
            ("fails", Verdict.FAIL, "1"),
            ("refuses", Verdict.PASS, "EINVAL"),
            ("senseless", Verdict.NOT_APPLICABLE, ""),
        )
    )
    (refused,) = {each.steps for each in found if each.case == "refuses"}
    assert refused == ("open() = 3", "read(fd) = -1 EINVAL")


@pytest.mark.parametrize(
    ("case", "why", "steps"),
    [
        ("killed", "the process of the case ended: SIGKILL", ("open() = 3", "raise(9)")),
        ("aborts", "the process of the case ended: SIGABRT", ("open() = 3",)),
        ("ends", "the process of the case ended: exit status 3; last words", ("open() = 3",)),
        ("mistaken", "LookupError: no such thing", ("open() = 3",)),
    ],
)
def test_a_case_that_ends_its_process_ends_no_other(
    case: str, why: str, steps: tuple[str, ...]
) -> None:
    before, dead, after = outcome("answers", case, "last")
    assert (dead.verdict, dead.why, dead.steps) == (Verdict.FAIL, why, steps)
    assert (before.verdict, after.verdict) == (Verdict.PASS, Verdict.PASS)
    assert (before.case, dead.case, after.case) == ("answers", case, "last")


def test_a_case_that_prints_says_nothing_for_the_worker() -> None:
    assert [each.verdict for each in outcome("prints", "last")] == [Verdict.PASS] * 2


def test_a_silent_case_is_ended_before_the_next_one_runs() -> None:
    results = run([ONE], chosen("answers", "silent", "last"), 1, body=body, deadline=1.5)
    assert next(results).verdict is Verdict.PASS
    silent = next(results)
    assert (silent.verdict, silent.why) == (Verdict.FAIL, "no answer within 1.5 s")
    (opened, waits) = silent.steps
    assert opened == "open() = 3"
    assert next(results).verdict is Verdict.PASS
    assert not runs(int(waits.removeprefix("waits ")))
    assert list(results) == []


def test_a_column_that_never_opens_is_given_up() -> None:
    found = list(run([HANGING], chosen("answers", "fails", "last"), 1, body=body, deadline=0.2))
    assert [each.why for each in found] == [
        "no answer within 0.2 s",
        "no answer within 0.2 s",
        "not tried: 2 processes in turn gave no answer",
    ]
    assert {each.verdict for each in found} == {Verdict.FAIL}


def test_a_column_that_the_machine_lacks() -> None:
    found = outcome("answers", "last", columns=(MISSING,))
    assert {(each.verdict, each.why) for each in found} == {(Verdict.UNSUPPORTED, "there is none")}
    assert [each.case for each in found] == ["answers", "last"]


def test_a_case_that_the_worker_does_not_know() -> None:
    stranger = Case("stranger", Family.FILE, lambda _: 0, {}, source="a test")
    known = chosen("last")
    found = list(run([ONE], [*known, stranger], 1, body=body, deadline=PATIENCE))
    assert [(each.case, each.verdict, each.why) for each in found] == [
        ("last", Verdict.PASS, ""),
        ("stranger", Verdict.FAIL, "this version of the suite has no such case"),
    ]


@pytest.mark.parametrize(
    "said",
    [
        "nonsense",
        "[[[",
        "[" * 100_000,
        "{}",
        '{"case": "last"}',
        '[1, "a", "b"]',
        '["0", "a"]',
        '[-1000000, "a"]',
        "[true, 1]",
        '{"case": "last", "column": "good/two", "verdict": "pass", "expected": "", "seen": "",'
        ' "why": "", "steps": [], "seconds": 0}',
        '{"case": "answers", "column": "good/one", "verdict": "passed", "expected": "",'
        ' "seen": "", "why": "", "steps": [], "seconds": 0}',
        '{"case": "answers", "column": "good/one", "verdict": "pass", "expected": "",'
        ' "seen": "", "why": "", "steps": 1, "seconds": 0}',
        '{"case": "answers", "column": "good/one", "verdict": "pass", "expected": "",'
        ' "seen": "", "why": "", "steps": [], "seconds": 1e999}',
    ],
)
def test_garbage_on_the_pipe(said: str) -> None:
    found = list(
        run([ONE], chosen("answers"), 1, body=executes("printf", "%s\n", said), deadline=9)
    )
    (only,) = found
    assert (only.case, only.column, only.verdict) == ("answers", "good/one", Verdict.FAIL)
    assert only.why.startswith(
        ("the process of the case wrote no result", "the process of the case ended: exit status 0")
    )


def test_a_line_without_an_end() -> None:
    (only,) = run([ONE], chosen("answers"), 1, body=executes("cat", "/dev/zero"), deadline=60)
    assert only.why.startswith("the process of the case wrote no result, but '\\x00")


def test_a_process_that_closes_its_output_and_stays() -> None:
    stays = executes("sh", "-c", "exec >&- 2>&-; kill -STOP $$")
    (only,) = run([ONE], chosen("answers"), 1, body=stays, deadline=60)
    assert only.why == "the process of the case closed its output"


def test_a_program_that_is_not_there() -> None:
    (only,) = run([ONE], chosen("answers"), 1, body=executes("/nonesuch"), deadline=60)
    assert only.why == (
        "the process of the case ended: exit status 2;"
        " FileNotFoundError: [Errno 2] No such file or directory"
    )


def test_what_a_case_has_started_ends_with_the_run() -> None:
    left, _ = outcome("leaves", "last")
    assert left.verdict is Verdict.PASS
    assert not runs(int(left.steps[-1].removeprefix("left ")))


def test_a_run_that_is_closed_ends_its_processes() -> None:
    with closing(run([ONE, TWO], chosen("leaves", "silent"), 2, body=body)) as results:
        (left,) = [next(results)]
        pid = int(left.steps[-1].removeprefix("left "))
        session = os.getsid(pid)
        assert runs(pid)
    assert not runs(pid)
    assert in_session(session) == []


def test_signals_and_limits_are_those_of_a_fresh_process() -> None:
    script = (
        "import signal, runpy, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT});"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    program = str(Path(__file__).with_name("conformance_worker.py"))
    with TemporaryFile() as steps:
        done = subprocess.run(
            [sys.executable, "-c", script, program, ONE.name, "state"],
            stdin=steps,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    assert '"verdict": "pass"' in done.stdout.splitlines()[-1], done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_a_run_is_the_end_of_its_workers(number: signal.Signals) -> None:
    """A Ctrl-C ends the wait for a case at once, with everything that the worker has started."""
    program = str(Path(__file__).with_name("conformance_worker.py"))
    with subprocess.Popen(
        [sys.executable, program, "run", "leaves", "silent"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        left = next(int(line.split()[1]) for line in process.stdout if line.startswith("left "))
        worker = os.getsid(left)
        process.send_signal(number)
        process.wait(PATIENCE)
    if number == signal.SIGINT:
        assert in_session(worker) == []
    else:
        # Nobody is there to end what is no service and no worker.
        wait_until(lambda: not runs(worker), "the end of the worker")
        os.kill(left, signal.SIGKILL)
