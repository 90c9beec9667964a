"""The conformance suite's cases of VMs, on this machine's columns, and the machines below them."""

import re
from collections.abc import Callable, Generator
from errno import EFAULT, ENOSPC, ETIMEDOUT
from pathlib import Path
from typing import Final

import pytest

from restrictedmem.conformance import guest, machines
from restrictedmem.conformance.case import Case, Family, UnsupportedError
from restrictedmem.conformance.cases import CASES
from restrictedmem.conformance.columns import COLUMNS, Column, column_of, having
from restrictedmem.conformance.machines import DATA, Machine, spell_exit, uniform
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.conformance.result import Verdict
from restrictedmem.conformance.steps import Steps
from restrictedmem.conformance.suite_run import run
from restrictedmem.protocol import exits

REFERENCE: Final = Path(__file__).parent.parent / "docs" / "reference"
PAGE: Final = 4096
#: A case that any column of VMs can run; a test changes nothing but its needs.
ANY: Final = Case("any", Family.VM, lambda _: None, {}, "none")

VM_CASES: Final = [case for case in CASES if case.family is Family.VM]


def needed(column: Column) -> tuple[str, ...]:
    return {"kernel-engine": ("fuse", "kvm"), "software": ("fuse",)}.get(column.target, ("kvm",))


COLUMNS_OF_VMS: Final = [
    pytest.param(column, marks=pytest.mark.requires(*needed(column)), id=column.name)
    for column in COLUMNS
    # test_conformance_in_place.py has the column left out.
    if Family.VM in column.families and column.name != "software/in-place"
]

#: How many cases pass at least on a column that the machine has.
_FEWEST = 60


# The cases.


@pytest.mark.parametrize("column", COLUMNS_OF_VMS)
def test_no_case_fails(column: Column) -> None:
    results = list(run([column], VM_CASES, 1))
    assert [result.case for result in results] == [case.id for case in VM_CASES]
    for result in results:
        assert result.verdict is not Verdict.FAIL, result
        assert result.why or result.verdict is Verdict.PASS, result
    if all(result.verdict is Verdict.UNSUPPORTED for result in results):
        assert column.target not in ("software", "kernel-engine")
        pytest.skip(results[0].why)
    assert sum(result.verdict is Verdict.PASS for result in results) > _FEWEST


def test_ids_are_unique_and_can_be_typed() -> None:
    ids = [case.id for case in CASES]
    assert sorted(set(ids)) == sorted(ids)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", each) for each in ids)


def test_each_assertion_of_the_selftests_has_a_case() -> None:
    wanted = {
        # set_memory_region_test.c, but for one slot of each number (MAX-2) and an exception whose
        # handler's address is in no slot (VEC).
        *("SMR-ZERO-1", "SMR-FLAGS", "SMR-FLAGS-G1", "SMR-FLAGS-G2", "SMR-MAX-1", "SMR-MAX-3"),
        *(f"SMR-ADD-{number}" for number in (1, 2, 3, 4, 5, "6..4100", "last")),
        *(f"SMR-OVL-{number}" for number in range(1, 8)),
        *("SMR-MOVE", "SMR-DEL"),
        # private_mem_conversions_test.c and private_mem_kvm_exits_test.c
        *("PMC-0", "PMC-PUNCH", "PMC-END-1", "PMC-END-2"),
        *(f"PMC-r-{number}" for number in range(1, 11)),
        *(f"PME-{number}" for number in range(1, 5)),
        # pre_fault_memory_test.c and guest_memfd_test.c
        *("PFM-inv", "PFM-1", "PFM-2", "PFM-3", "PFM-4"),
        *(f"GM-GUEST-{number}" for number in range(1, 8)),
        # guest_memfd_conversions_test.c of the series on conversion in place
        *(f"IPC-{number}" for number in (1, 2, 4, 5, 7, 8)),
        *(
            f"IPC-{test}.{page}"
            for test, pages in ((3, 4), (6, 8), (9, 4))
            for page in range(pages)
        ),
    }
    covered = {name for case in VM_CASES for name in case.covers}
    assert covered == wanted


# Differences.

ENGINES: Final = [
    column_of(f"{name}/{api}") for name in ("software", "kernel-engine") for api in ("v9", "v10")
]


def keys_of(page: str, heading: str) -> dict[str, list[str]]:
    """Return the rows below a heading by their key."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    part = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in part.splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("`"): row for row in cells}


def differs(case: Case, other: Callable[[Column], tuple[str, ...]]) -> bool:
    """Say whether an engine's answer is not that of other names, which have one."""
    return any(case.expects(column.answers) != case.expects(other(column)) for column in ENGINES)


def test_a_case_that_differs_from_the_postings_names_its_row() -> None:
    documented = (
        keys_of("divergences.md", "A VM").keys() | keys_of("engines.md", "Differences").keys()
    )
    for case in VM_CASES:
        if differs(case, lambda column: column.answers[2:]):
            assert case.divergence in documented, case.id
        else:
            # No posting has KVM_PRE_FAULT_MEMORY.
            assert case.divergence in ("", "prefault"), case.id


def test_each_row_about_vms_names_a_case_that_shows_it() -> None:
    known = {case.id: case for case in VM_CASES}
    rows = keys_of("divergences.md", "A VM")
    assert rows
    for key, cells in rows.items():
        shown = re.findall(r"`([\w-]+)`", cells[-1])
        assert shown, key
        for id_ in shown:
            case = known[id_]
            assert case.divergence == key or differs(case, lambda _: ("gmem-unmapped", "gmem"))
    for case in VM_CASES:
        if case.divergence in rows:
            assert f"`{case.id}`" in rows[case.divergence][-1], case.id


# Machines.


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.requires(*needed(column_of(name))))
        for name in ("kernel/flags=3", "software/v10", "kernel-engine/v10")
    ]
)
def machine(request: pytest.FixtureRequest) -> Generator[Machine]:
    try:
        with column_of(request.param).open() as ground, ground.subject(ANY, Steps()) as made:
            yield made
    except UnsupportedError as missing:
        pytest.skip(str(missing))


def test_a_guest_finds_what_its_owner_wrote_and_the_other_way_round(machine: Machine) -> None:
    machine.set_region(size=4 * PAGE, shared=0)
    machine.host_fill(0, PAGE, 0xAB)
    assert machine.sees(DATA, PAGE) == "0xab"
    assert machine.load(DATA) == 0xABAB_ABAB_ABAB_ABAB
    assert machine.fill(DATA + PAGE, 2 * PAGE, 0xCD) == 0
    assert bytes(machine.memory[PAGE : 4 * PAGE]) == b"\xcd" * 2 * PAGE + bytes(PAGE)
    assert machine.fill(DATA + 2 * PAGE, PAGE, 0xAB) == 0
    assert machine.sees(DATA, PAGE, 2, 2 * PAGE) == "0xab"
    assert machine.sees(DATA + PAGE, PAGE, 2, 2 * PAGE) == "mixed"
    assert machine.sees(DATA, PAGE, 3, PAGE) == "mixed"
    assert machine.store(1, DATA + PAGE - 8) == 0
    # A word that differs at either end, or that alone is of two bytes.
    for first, size in ((DATA, PAGE), (DATA + PAGE - 8, PAGE), (DATA + PAGE - 8, 8)):
        assert machine.sees(first, size) == "mixed"
    assert machine.host_sees(0, PAGE) == "mixed"
    assert machine.steps.lines[1] == "memset(memory + 0x0, 0xab, 0x1000)"
    assert machine.steps.lines[2] == f"guest: bytes of {DATA:#x}, 0x1000 = 0xab"


def test_a_guest_that_stopped_in_a_step_goes_on_with_the_next(machine: Machine) -> None:
    machine.set_region(size=PAGE, shared=0)
    machine.store(7)
    for _ in range(3):
        assert isinstance(machine.load(DATA + PAGE), str)
        assert machine.load(DATA) == 7
        assert isinstance(machine.touch(DATA, 2 * PAGE), str)
        assert isinstance(machine.store(1, DATA + PAGE), str)
        assert machine.load(DATA) == 7


def test_a_guest_that_dies_says_so(machine: Machine) -> None:
    machine.set_region(size=PAGE, shared=0)
    assert machine.store(1) == 0
    assert machine.trap() == "SHUTDOWN"
    assert machine.steps.lines[-1] == "guest: ud2 = SHUTDOWN"


def test_a_guest_that_waits_in_a_thread(machine: Machine) -> None:
    machine.set_region(size=PAGE, shared=0)
    with machine.waiting(0) as end:
        machine.memory[0] = 5
        assert end() == 5
    assert machine.load() == 5


def test_a_guest_that_does_not_exit_is_given_up(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "_DEADLINE", 0.2)
    machine.set_region(size=PAGE, shared=0)
    with machine.waiting(0) as end:
        assert outcome(end) == Errno(ETIMEDOUT)
        machine.memory[0] = 1
        monkeypatch.undo()
        assert end() == 1


def test_a_case_that_needs_more_is_unsupported(machine: Machine) -> None:
    class Poor:
        def lacks(self, need: str) -> str:
            return "" if need == "had" else f"no {need}"

    assert having((), machine) is machine
    assert having(("had",), Poor()) is not None  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"^no other$"):
        having(("had", "other"), Poor())  # type: ignore[arg-type]


def test_exits_are_spelled() -> None:
    assert spell_exit(exits.PortOut(guest.DONE, 1, 0)) == ""
    assert spell_exit(exits.PortOut(0x11, 1, 5)) == "PortOut(port=17, size=1, data=5)"
    fault = exits.MemoryFault(8, DATA, PAGE, EFAULT)
    assert spell_exit(fault) == "MEMORY_FAULT flags=0x8 gpa=0x100000000 size=0x1000"
    full = exits.MemoryFault(0, DATA, PAGE, ENOSPC)
    assert spell_exit(full) == "MEMORY_FAULT flags=0x0 gpa=0x100000000 size=0x1000 ENOSPC"
    assert spell_exit(exits.MmioRead(DATA, 8)) == "MMIO read 8 at 0x100000000"
    assert spell_exit(exits.MmioWrite(DATA, 2, 0xBEEF)) == "MMIO write 2 at 0x100000000: 0xbeef"
    call = exits.Hypercall(12, (DATA, 2, 16, 0))
    assert spell_exit(call) == "HYPERCALL MAP_GPA_RANGE 0x100000000 2 0x10"
    assert spell_exit(exits.Shutdown(6)) == "SHUTDOWN"
    assert spell_exit(exits.Unknown(77)) == "exit 77"


def test_the_code_of_two_steps_lies_in_two_places() -> None:
    first, second = guest.page(b"\xf4", 0), guest.page(b"\xf4", 1)
    assert len(first) == len(second)
    assert first[: guest.START] == second[: guest.START] == bytes((0xE6, guest.DONE))
    one, two = first.index(b"\xf4\xe9"), second.index(b"\xf4\xe9")
    assert one == guest.START
    # What the other step used is full of NOPs.
    assert set(second[one:two]) == set(first[two : two + 1]) == {0x90}
    for page, at in ((first, one + 1), (second, two + 1)):
        assert at + 5 + int.from_bytes(page[at + 1 : at + 5], "little", signed=True) == 0
    end = len(first) - 5
    assert first[end] == 0xE9
    assert len(first) + int.from_bytes(first[end + 1 :], "little", signed=True) == guest.START


def test_many_calls_are_one_line() -> None:
    told: list[str] = []
    steps = Steps(lambda _, text: told.append(text))
    steps.note("before")
    with steps.summed("many calls"):
        for _ in range(3):
            steps.note("one")
            assert steps.call("two", lambda: 2) == 2
            assert steps.in_child(lambda: steps.call("three", lambda: 3)) == "3"
        with steps.summed("many more"):
            steps.note("four")
        steps.note("five")
    assert steps.call("six", lambda: 6) == 6
    assert steps.lines == ["before", "many calls", "six = 6"]
    # Nobody hears of the calls that one line stands for, because that would take longer than they.
    assert set(told) == {"before", "many calls", "six", "six = 6"}


def test_bytes_that_are_the_same() -> None:
    assert [uniform(content) for content in (b"\0\0", b"\7", b"\7\0", b"\0\7")] == [
        "0x0",
        "0x7",
        "mixed",
        "mixed",
    ]
