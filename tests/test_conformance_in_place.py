"""The cases on the guest_memfd of this project: none fails, and each difference has a row."""

import re
from typing import Final

import pytest

from restrictedmem.conformance.case import Case, NotApplicable, Since
from restrictedmem.conformance.cases import CASES, SUBJECTS
from restrictedmem.conformance.columns import column_of
from restrictedmem.conformance.result import Verdict
from restrictedmem.conformance.suite_run import run
from test_conformance_vm import keys_of

IN_PLACE: Final = column_of("software/in-place")
#: The cases of conversion in place, and those of descriptors and of VMs. They run in two tests,
#: since a test has two minutes on a busy machine.
OWN: Final = frozenset({"conversion in place"})
OTHERS: Final = frozenset(SUBJECTS) - OWN
HEADING: Final = "The guest_memfd of this project"


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("subjects", [OWN, OTHERS], ids=["own", "others"])
def test_no_case_fails(subjects: frozenset[str]) -> None:
    cases = [case for subject in subjects for case in SUBJECTS[subject]]
    results = list(run([IN_PLACE], cases, 1))
    assert [result.case for result in results] == [case.id for case in cases]
    for result in results:
        assert result.verdict is not Verdict.FAIL, result
        assert result.why or result.verdict is Verdict.PASS, result
    passed = sum(result.verdict is Verdict.PASS for result in results)
    assert passed > len(cases) * 4 / 5
    assert subjects is OTHERS or passed == len(cases)


def differs(case: Case) -> bool:
    """Say whether the file answers another thing than a guest_memfd of today's kernel."""
    ours, kernel = (
        answer.now if isinstance(answer, Since) else answer
        for answer in map(case.expects, (IN_PLACE.answers, IN_PLACE.answers[1:]))
    )
    return ours != kernel and not isinstance(ours, NotApplicable)


def test_each_difference_has_a_row_and_each_row_a_case() -> None:
    rows = keys_of("divergences.md", HEADING)
    assert rows
    shown = {key: re.findall(r"`([\w-]+)`", cells[-1]) for key, cells in rows.items()}
    assert all(shown.values()), shown
    assert {id_ for ids in shown.values() for id_ in ids} == {
        case.id for case in CASES if differs(case)
    }
