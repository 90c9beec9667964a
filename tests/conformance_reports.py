"""Reports of the conformance suite that tests show."""

from dataclasses import replace
from typing import Final

from restrictedmem.conformance.facts import OVERLAP_IN_FILE
from restrictedmem.conformance.result import Result, Verdict
from restrictedmem.conformance.suite_report import CaseNote, ColumnNote, SuiteReport

#: Text that a terminal or a browser would obey.
EVIL: Final = "<b>\"'\x1b[2J&\u202e\ud800</script><img src=x onerror=alert(1)>"


def a_report() -> SuiteReport:
    """Return a report with each verdict, a column that is lacking, and two that fail alike."""
    steps = ("fd = open() = 3", "read(fd, buf, 64) = -1 EPERM")
    results = (
        Result("read", "one", Verdict.PASS, "EINVAL", "EINVAL", steps=steps),
        Result("read", "two/a", Verdict.FAIL, "EINVAL", "EPERM", steps=steps),
        Result("read", "two/b", Verdict.FAIL, "EINVAL", "EPERM", steps=steps),
        Result("read", "none", Verdict.UNSUPPORTED, why="there is none"),
        Result("bind-again", "one", Verdict.KNOWN, "EEXIST", "EINVAL", OVERLAP_IN_FILE.id, steps),
        Result("bind-again", "two/a", Verdict.NOT_APPLICABLE, why="it has no slots"),
        Result("bind-again", "two/b", Verdict.UNSUPPORTED, why="no guest runs"),
        Result("bind-again", "none", Verdict.UNSUPPORTED, why="there is none"),
    )
    return SuiteReport(
        1,
        "0.1.0",
        "6.18",
        "2026-11-30T08:00:00+00:00",
        61.5,
        tuple(ColumnNote(name, f"what {name} is") for name in ("one", "two/a", "two/b", "none")),
        (
            CaseNote("read", "content", "read(2)", ("GM-RW-1",)),
            CaseNote("bind-again", "slots", "a selftest", ()),
        ),
        (OVERLAP_IN_FILE,),
        results,
    )


def evil(report: SuiteReport) -> SuiteReport:
    """Return a report with hostile text in each field."""
    return SuiteReport(
        1,
        EVIL,
        EVIL,
        EVIL,
        1.0,
        tuple(ColumnNote(f"{each.name}{EVIL}", EVIL) for each in report.columns),
        tuple(CaseNote(f"{each.id}{EVIL}", EVIL, EVIL, (EVIL,)) for each in report.cases),
        tuple(replace(each, says=EVIL, versions=EVIL, source=EVIL) for each in report.facts),
        tuple(
            replace(
                each,
                case=f"{each.case}{EVIL}",
                column=f"{each.column}{EVIL}",
                expected=EVIL,
                seen=EVIL,
                why=each.why if each.verdict is Verdict.KNOWN else EVIL,
                steps=(EVIL,),
            )
            for each in report.results
        ),
    )


def evil_result() -> Result:
    return Result(f"read {EVIL}\n", "one", Verdict.FAIL, EVIL, EVIL, EVIL, (EVIL,))


def many_columns() -> SuiteReport:
    """Return a report with sixteen columns and long texts."""
    names = [f"kernel-sw-protected/flags={number}" for number in range(16)]
    name = "a-case-with-a-name-that-is-rather-long"
    step = f"ioctl(vm, KVM_CREATE_GUEST_MEMFD, {{{'x' * 200}}}) = 0"
    return replace(
        a_report(),
        columns=tuple(ColumnNote(name, "one of many " * 20) for name in names),
        cases=(CaseNote(name, "content", "guest_memfd_test.c " * 9, ()),),
        results=tuple(
            Result(name, column, Verdict.FAIL, "EINVAL " * 40, "0", steps=(step,))
            for column in names
        ),
    )
