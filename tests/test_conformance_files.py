"""The cases of descriptors: none fails on this machine, and none of the selftests' is left out.

A column whose memory this kernel does not have is skipped, with the reason that the suite gives.
"""

import re
from collections.abc import Iterator
from errno import EINVAL, ENODEV
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from restrictedmem.conformance.case import Case, Family, NotApplicable, Since
from restrictedmem.conformance.cases import CASES
from restrictedmem.conformance.columns import COLUMNS, Column, column_of
from restrictedmem.conformance.facts import ANON_NOEXEC, FACTS
from restrictedmem.conformance.outcome import Errno
from restrictedmem.conformance.result import Verdict
from restrictedmem.conformance.suite_run import run
from restrictedmem.conformance.worker import judged, results

TESTS = Path(__file__).parent
DIVERGENCES = TESTS.parent / "docs" / "reference" / "divergences.md"
FILES = [case for case in CASES if case.family is Family.FILE]

#: What a column needs of the machine. The other columns exist on every kernel, or on few.
_NEEDS = {
    "descriptor": ["fuse"],
    "descriptor-pinned": ["fuse"],
    "syscall": ["fuse", "seccomp"],
    "kernel": ["kvm"],
    "memfd": [],
}
#: Assertions of the kernel's selftests that a machine of one NUMA node can make.
_ASSERTED = {
    "GM-FLAG-": range(64),
    "GM-MULTI-": range(1, 4),
    "GM-SIZE-": range(1, 4096),
    "GM-RW-": range(1, 5),
    "GM-MMAP-": range(1, 6),
    "GM-OVER-": range(1, 5),
    "GM-COLL-": range(1, 7),
    "GM-PRIV-": range(1, 2),
    "GM-COW-": range(1, 2),
    "GM-NOMMAP-": range(1, 3),
    "GM-STAT-": range(1, 2),
    "GM-FALLOC-": range(1, 10),
    "GM-PUNCH-": range(1, 11),
    "SEC-": range(7),
}


def _columns() -> Iterator[Any]:
    for column in COLUMNS:
        # test_conformance_in_place.py has the column left out.
        if Family.FILE in column.families and column.name != "software/in-place":
            needs = _NEEDS.get(column.target, [])
            marks = [pytest.mark.requires(*needs)] if needs else []
            yield pytest.param(column, id=column.name, marks=marks)


@pytest.mark.parametrize("column", list(_columns()))
def test_no_case_fails(column: Column) -> None:
    found = list(run([column], FILES, 1))
    assert [result.case for result in found] == [case.id for case in FILES]
    failed = [result for result in found if result.verdict is Verdict.FAIL]
    assert not failed, "\n".join(
        f"{one.case}: expected {one.expected}, seen {one.seen} {one.why}\n  "
        + "\n  ".join(one.steps)
        for one in failed
    )
    if all(result.verdict is Verdict.UNSUPPORTED for result in found):
        assert column.target not in ("descriptor", "descriptor-pinned", "syscall", "memfd")
        pytest.skip(found[0].why)
    passed = [result for result in found if result.verdict is Verdict.PASS]
    assert len(passed) > len(FILES) // 2
    assert all(result.steps for result in passed)


def test_another_answer_fails() -> None:
    read = next(case for case in CASES if case.id == "read")
    wrong = Case(read.id, read.family, read.does, {"memfd": Errno(EINVAL)}, read.source)
    (result,) = results(column_of("memfd"), [wrong])
    assert (result.verdict, result.expected, result.seen) == (Verdict.FAIL, "EINVAL", "0")
    assert result.steps[1:] == ("read(fd, buf, 64) = 0",)


def test_an_earlier_answer_is_known_by_its_fact() -> None:
    expected = Since(Errno(EINVAL), Errno(ENODEV), ANON_NOEXEC)
    assert judged(expected, "EINVAL") == (Verdict.PASS, "EINVAL", "")
    assert judged(expected, "ENODEV") == (Verdict.KNOWN, "EINVAL", ANON_NOEXEC.id)
    assert judged(expected, "0") == (Verdict.FAIL, "EINVAL", "")


def test_ids_are_unique_and_can_be_typed() -> None:
    ids = [case.id for case in CASES]
    assert sorted(set(ids)) == sorted(ids)
    assert [id for id in ids if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id)] == []


def test_every_case_names_a_source() -> None:
    assert [case.id for case in FILES if not case.source] == []


def test_every_assertion_of_the_selftests_has_a_case() -> None:
    covered = {id for case in CASES for id in case.covers}
    wanted = {
        f"{prefix}{number:02}" if prefix == "GM-FLAG-" else f"{prefix}{number}"
        for prefix, numbers in _ASSERTED.items()
        for number in numbers
    }
    assert wanted - covered == set()


def test_every_fact_is_in_the_table_once() -> None:
    used = {
        answer.fact
        for case in CASES
        for answer in case.expected.values()
        if isinstance(answer, Since)
    }
    assert used <= set(FACTS)
    assert len({fact.id for fact in FACTS}) == len(FACTS)
    assert all(fact.says and fact.versions and fact.source and fact.date for fact in FACTS)


def _differs(case: Case) -> bool:
    """Say whether this project answers another thing than the proposal."""
    proposal = case.expects(("proposal",))
    ours = [case.expects((api, "descriptor", "proposal")) for api in ("v9", "v10")]
    return any(answer != proposal for answer in ours)


def test_a_divergence_is_one_and_has_a_key() -> None:
    for case in FILES:
        if case.divergence or not isinstance(case.expects(("proposal",)), NotApplicable):
            assert _differs(case) == bool(case.divergence), case.id


def _documented() -> dict[str, list[str]]:
    """Return key and cells of every row of the descriptor's table."""
    text = (
        DIVERGENCES.read_text(encoding="utf-8")
        .partition("\n## Descriptor\n")[2]
        .partition("\n## ")[0]
    )
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    keys = sorted(row[0] for row in cells)
    assert [key for key, group in groupby(keys) if len(list(group)) > 1] == []
    return {row[0].strip("`"): row for row in cells}


def test_every_divergence_is_documented_and_every_row_is_shown() -> None:
    documented = _documented()
    shown_by = "`test_conformance_files.py::test_no_case_fails`"
    in_table = {key for key, cells in documented.items() if cells[-1] == shown_by}
    assert {case.divergence for case in FILES if case.divergence} == in_table
    for key, cells in documented.items():
        file, _, function = cells[-1].strip("`").partition("::")
        assert f"def {function}(" in (TESTS / file).read_text(encoding="utf-8"), key
