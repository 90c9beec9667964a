"""The command ``restrictedmem conformance``, and the reports that it writes and compares."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bad_cases import Case as BadCase
from bad_cases import check, found, inputs
from conformance_reports import a_report, evil, evil_result
from processes import Process, children, in_session
from restrictedmem.conformance import listing, table, tap
from restrictedmem.conformance.case import Case, Family, NotApplicable, Since
from restrictedmem.conformance.cases import CASES, SUBJECTS
from restrictedmem.conformance.columns import COLUMNS, column_of
from restrictedmem.conformance.facts import FACTS, OVERLAP_IN_FILE
from restrictedmem.conformance.outcome import Errno
from restrictedmem.conformance.result import Result, Verdict
from restrictedmem.conformance.suite_report import CaseNote, SuiteReport, differences, spans
from restrictedmem.conformance.suite_run import run
from users import as_user
from waiting import PATIENCE, wait_until

__all__ = ["found", "inputs"]

COMMAND = [sys.executable, "-m", "restrictedmem", "conformance"]
MEMFD = ["--target", "memfd", "--case", "read"]


def command(*words: str, start: str = 'exec "$@"') -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", start, "sh", *COMMAND, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


TABLE = """\
one ──────────┐
two/a ────────│─┐
two/b ────────│─│─┐
content
  read        . F F
slots
  bind-again  k - u

. pass   F FAIL   k known   - not applicable   u unsupported here

Not on this machine
  none: there is none

Unsupported here
  no guest runs: bind-again

FAIL read on two/a, two/b
  expected  EINVAL
  seen      EPERM
  source    read(2)
  calls
    fd = open() = 3
    read(fd, buf, 64) = -1 EPERM

known overlap-in-file
  A slot whose range of a guest_memfd is bound already was EINVAL, and is EEXIST
    now.
  Linux 6.8 to 7.1; changed 2026-06; virt/kvm/guest_memfd.c, kvm_gmem_bind
  bind-again on one

2 cases (1 in no selftest) on 3 columns in 1:01, Linux 6.18: 1 pass, 2 FAIL, 1
known, 1 not applicable, 3 unsupported here
"""


def test_the_table() -> None:
    lines = list(table.lines(a_report(), colour=False))
    assert "\n".join(lines) + "\n" == TABLE
    coloured = "\n".join(table.lines(a_report(), colour=True))
    assert "\x1b[1;31mF\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) + "\n" == TABLE


def test_a_table_that_is_longer_than_a_screen_names_its_columns_again() -> None:
    short = a_report()
    notes = tuple(CaseNote(f"case-{number}", "content", "", ()) for number in range(50))
    results = tuple(Result(note.id, "one", Verdict.PASS, "0", "0") for note in notes)
    lines = list(table.lines(replace(short, cases=notes, results=results), colour=False))
    assert lines[0] == "one ───────┐"
    assert lines[52] == "one ───────┘"


def test_text_of_others_is_no_command_for_a_terminal() -> None:
    (whole, part) = table.lines(evil(a_report()), colour=False), tap.lines(1, evil_result())
    for line in (*whole, *part):
        assert line.isprintable() or not line


def test_tap() -> None:
    report = a_report()
    assert tap.head(2) == "TAP version 14\n1..2"
    assert [
        list(tap.lines(number, each)) for number, each in enumerate(report.results[2:5], 1)
    ] == [
        [
            "not ok 1 - two/b: read",
            "  ---",
            '  verdict: "fail"',
            '  expected: "EINVAL"',
            '  seen: "EPERM"',
            '  why: ""',
            '  steps: ["fd = open() = 3", "read(fd, buf, 64) = -1 EPERM"]',
            "  ...",
        ],
        ["ok 2 - none: read # SKIP unsupported: there is none"],
        [
            "ok 3 - one: bind-again",
            "  ---",
            '  verdict: "known"',
            '  expected: "EEXIST"',
            '  seen: "EINVAL"',
            '  why: "overlap-in-file"',
            '  steps: ["fd = open() = 3", "read(fd, buf, 64) = -1 EPERM"]',
            "  ...",
        ],
    ]
    odd = Result("a # TODO \\", "one", Verdict.PASS)
    assert list(tap.lines(1, odd)) == ["ok 1 - one: a \\# TODO \\\\"]


def test_a_list_says_what_is_expected_of_whom() -> None:
    columns = [column_of(name) for name in ("kernel/flags=0", "kernel/flags=3", "memfd")]
    case = Case(
        "example",
        Family.FILE,
        lambda _: 0,
        {
            "gmem-shared": Errno(1),
            "gmem": Since(Errno(17), Errno(22), OVERLAP_IN_FILE),
            "memfd": NotApplicable("no sense"),
        },
        source="a test",
        covers=("GM-1",),
    )
    answers = listing.answers(columns, case)
    assert answers == {
        "EEXIST (before: EINVAL, overlap-in-file)": ["kernel/flags=0"],
        "EPERM": ["kernel/flags=3"],
        "not applicable: no sense": ["memfd"],
    }
    shown = "\n".join(listing.lines(COLUMNS, CASES))
    for name in (*(each.id for each in CASES), *(each.name for each in COLUMNS)):
        assert f"\n  {name}  " in shown
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert "[GM-SIZE-1..4095]" in shown
    untested = sum(not each.covers for each in CASES)
    assert f"{len(CASES)} cases ({untested} in no selftest of the kernel)." in shown


def test_a_run_of_assertions_is_one_text() -> None:
    ids = ("GM-00", "GM-01", "GM-02", "GM-04", "SEC-5", "END", "PFM-inv", "A-6..9", "A-last")
    assert list(spans(ids)) == ["GM-00..02", *ids[3:]]
    assert not list(spans(()))


def test_every_case_has_a_subject_and_an_id_of_its_own() -> None:
    assert sum(map(len, SUBJECTS.values())) == len(CASES) == len({case.id for case in CASES})


def test_a_report_comes_back_as_it_was() -> None:
    report = a_report()
    assert SuiteReport.load(json.dumps(report.dump()).encode()) == report


def test_a_report_of_a_run() -> None:
    columns, cases = [column_of("memfd"), column_of("posting")], CASES[:2]
    results = list(run(columns, cases, 2))
    report = SuiteReport.of(columns, cases, results[::-1], kernel="x", date="y", seconds=1.23456)
    assert [(each.case, each.column) for each in report.results] == [
        (case.id, column.name) for case in cases for column in columns
    ]
    assert report.facts == FACTS
    first = CASES[0]
    assert report.cases[0] == CaseNote(first.id, "creation", first.source, first.covers)


def changed(**fields: object) -> dict[str, Any]:
    return {**a_report().dump(), **fields}


def with_result(**fields: object) -> dict[str, Any]:
    return changed(results=[{**a_report().results[0].dump(), **fields}])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"[" * 200_000, "it is not JSON"),
        (b"9" * 5000, "it is not JSON"),
        (b"3", "it is no report of format 1"),
        (b"[]", "it is no report of format 1"),
        (b'{"format": 2}', "it is no report of format 1"),
        (b'{"format": 1}', "the whole has another form"),
        (b" " * ((16 << 20) + 1), "it is longer than 16777216 bytes"),
        (changed(more=1), "the whole has another form"),
        (changed(kernel=6), "kernel has another form"),
        (changed(format=True), "format has another form"),
        (changed(columns={}), "columns has another form"),
        (changed(columns=["one"]), "columns[0] has another form"),
        (changed(cases=[{"id": "read"}]), "cases[0] has another form"),
        (changed(seconds=float("nan")), "seconds has another form"),
        (changed(seconds=10**400), "seconds has another form"),
        (with_result(verdict="passed"), "results[0].verdict has another form"),
        (with_result(verdict=[]), "results[0].verdict has another form"),
        (with_result(steps=["", 1]), "results[0].steps[1] has another form"),
        (with_result(seconds="1"), "results[0].seconds has another form"),
        (with_result(case=None), "results[0].case has another form"),
        (
            changed(results=[a_report().results[0].dump()] * 2),
            "it has two results of a case on a column",
        ),
    ],
)
def test_a_file_that_is_no_report(
    text: bytes | dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from restrictedmem.cli.main import main

    path = tmp_path / "A.json"
    path.write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())
    assert main(["conformance", "--diff", str(path), str(path)]) == 2
    assert capsys.readouterr() == ("", f"error: {path} is no report of --json: {words}\n")


def test_differences() -> None:
    before = a_report()
    other = Result("bind-again", "one", Verdict.PASS, "EEXIST", "EEXIST", seconds=3)
    results = [
        other if (each.case, each.column) == ("bind-again", "one") else each
        for each in before.results
        if each.column != "two/b"
    ]
    after = replace(before, results=tuple(replace(each, seconds=1) for each in results))
    assert list(differences(before, before)) == []
    assert list(differences(before, after)) == [
        ("one", "bind-again", "EINVAL (known) -> EEXIST (pass)")
    ]
    come = [
        replace(each, verdict=Verdict.PASS, seen="0") if each.column == "none" else each
        for each in results
    ]
    assert list(differences(after, replace(after, results=tuple(come)))) == [
        ("none", "", "unsupported (there is none) -> present")
    ]


def test_diff_as_a_command(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one.json", "two.json", "three.json"))
    report = a_report()
    failed = replace(report.results[0], verdict=Verdict.FAIL, seen="EPERM")
    one.write_text(json.dumps(report.dump()))
    two.write_text(json.dumps(replace(report, results=(failed,)).dump()))
    three.write_text(json.dumps(replace(report, results=()).dump()))
    same = command("--diff", str(one), str(one))
    assert (same.returncode, same.stdout, same.stderr) == (0, "", "")
    done = command("--diff", str(one), str(two))
    assert (done.returncode, done.stdout) == (1, "one read: EINVAL (pass) -> EPERM (fail)\n")
    assert done.stderr == f"not compared, in {one} alone: 7 results\n"
    nothing = command("--diff", str(one), str(three))
    words = f"error: {one} and {three} have no case and column in common\n"
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (2, "", words)


def test_a_run_as_a_command(tmp_path: Path) -> None:
    page, file = tmp_path / "page.html", tmp_path / "found.json"
    done = command(*MEMFD, "--json", str(file), "--html", str(page))
    assert (done.returncode, done.stderr) == (0, "")
    report = SuiteReport.load(file.read_bytes())
    assert done.stdout == "\n".join(table.lines(report, colour=False)) + "\n"
    (only,) = report.results
    assert (only.column, only.case, only.verdict) == ("memfd", "read", Verdict.PASS)
    assert only.steps[-1] == "read(fd, buf, 64) = 0"
    assert report.kernel == os.uname().release
    assert "<!doctype html>" in page.read_text()


def test_a_terminal_that_has_no_lines_to_draw_with() -> None:
    done = command(*MEMFD, start='PYTHONIOENCODING=ascii exec "$@"')
    assert done.stdout.startswith("memfd ---+\ncontent\n  read   .\n")


def test_json_on_stdout_is_alone_there() -> None:
    done = command(*MEMFD, "--json", "-")
    assert (done.returncode, done.stderr) == (0, "")
    assert SuiteReport.load(done.stdout.encode()).results[0].case == "read"


def test_tap_on_stdout_is_alone_there() -> None:
    done = command(*MEMFD, "--case", "pread", "--tap")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "TAP version 14\n1..2\nok 1 - memfd: read\nok 2 - memfd: pread\n"


USAGE = [
    BadCase(f"conformance {words}", 2, line)
    for words, line in {
        "--target nonesuch": "argument --target: nothing is called 'nonesuch': see --list",
        "--target memfd --target kernel/": "argument --target: nothing is called 'kernel/': see .*",
        "--case *nonesuch": r"argument --case: nothing is called '\*nonesuch': see --list",
        "--jobs 0": "argument --jobs: 0 is not a number of jobs, 1 to 1048576",
        "--tap --json -": "--json - does not go with --tap: both print to stdout",
        "--html -": "--html takes a file",
        "--list --tap": "--tap does not go with --list",
        "--list --json IN/new": "--json does not go with --list",
        "--diff a b --case read": "--case does not go with --diff",
        "--diff a b --list": "--list does not go with --diff",
        "--diff a": "argument --diff: expected 2 arguments",
        "--diff IN/nonesuch IN/nonesuch": ".*/nonesuch: open: No such file or directory",
        "--diff IN/ IN/": ".*/: open: Is a directory",
        "--diff IN/text IN/text": ".*/text is no report of --json: it is not JSON",
    }.items()
] + [
    BadCase("conformance --json IN/no/file", 1, ".*/no/file: open: No such file or directory"),
    BadCase("conformance --html IN/no/file", 1, ".*/no/file: open: No such file or directory"),
]


@pytest.mark.parametrize("case", USAGE, ids=str)
def test_wrong_command_lines(
    case: BadCase, found: Callable[[BadCase], subprocess.CompletedProcess[str]], inputs: Path
) -> None:
    check(case, found(case), inputs)


@pytest.mark.parametrize(
    "start",
    [
        'exec "$@" <&-',
        'trap "" CHLD; exec "$@"',
        'trap "" INT TERM PIPE; exec "$@"',
        'ulimit -n 24; exec "$@"',
        'ulimit -c unlimited; exec "$@"',
        'cd /; umask 777; exec "$@"',
        'exec env -u PATH -u HOME LC_ALL=C "$@"',
    ],
)
def test_a_run_in_an_odd_process(start: str) -> None:
    done = command(*MEMFD, start=start)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"Linux [^ ]+: 1 pass, 0 FAIL$", " ".join(done.stdout.split()))


def test_too_few_descriptors_are_one_line() -> None:
    done = command(*MEMFD, start='ulimit -n 5; exec "$@"')
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("error: .*: Too many open files.*\n(hint: .*\n)?", done.stderr)


@pytest.mark.requires("root")
def test_too_few_processes_are_one_line() -> None:
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NPROC, (2, 2));"
    words = [sys.executable, "-c", f"{limit} os.execv(sys.argv[1], sys.argv[1:])", *COMMAND, *MEMFD]

    def run_it() -> tuple[int, str, str]:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout, done.stderr

    # Other processes of the user would count, too.
    status, out, err = as_user(run_it, 1_000_000 + os.getpid())
    assert (status, out) == (1, "")
    assert re.fullmatch("error: fork: Resource temporarily unavailable.*\n(hint: .*\n)?", err)


def test_a_worker_imports_nothing_that_a_variable_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('planted')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = list(run([column_of("memfd")], CASES[:2], 1))
    assert [each.verdict for each in found] == [Verdict.PASS] * 2


def test_progress_on_a_terminal() -> None:
    parent, terminal = os.openpty()
    with os.fdopen(parent, "rb", buffering=0) as seen:
        done = subprocess.run(
            [*COMMAND, *MEMFD], stdout=subprocess.PIPE, stderr=terminal, check=True, timeout=60
        )
        os.set_blocking(seen.fileno(), False)
        said = seen.read(4096) or b""
        os.close(terminal)
    assert b"1 of 1 results, 0:00: read on memfd" in said
    assert said.endswith(b"\r\x1b[K")
    assert b"\x1b" not in done.stdout


@pytest.mark.requires("fuse")
def test_ctrl_c_ends_the_command_with_its_services() -> None:
    with subprocess.Popen(
        [*COMMAND, "--target", "descriptor", "--jobs", "2"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        workers: list[int] = []

        def services() -> list[Process]:
            workers[:] = [child.pid for child in children(process.pid)]
            found = [each for worker in workers for each in in_session(worker)]
            return [each for each in found if each.name == "rmem-service"]

        wait_until(services, "a service")
        for worker in workers:
            # It must not come to the end of its cases before the signal.
            os.kill(worker, signal.SIGSTOP)
        assert services()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, "", "")
    assert [in_session(worker) for worker in workers] == [[] for _ in workers]
