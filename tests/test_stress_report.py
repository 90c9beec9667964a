"""A random run as a command: what it prints, and its exit status."""

import json
from collections.abc import Callable
from typing import Any, Final

import pytest

from fake_vm import PLAN
from planting import always, stub
from restrictedmem.service.options import Options
from restrictedmem.stress import run
from restrictedmem.stress.finding import Finding
from restrictedmem.stress.plan import Plan
from restrictedmem.stress.run import Total


class Acts:
    """A run that comes out as a test wants."""

    def __init__(self, options: Options, scenario: str | None, seed: int) -> None:
        self.options, self.scenario, self.seed = options, scenario, seed
        self.plan: Plan | None = None
        self.elapsed = 2.00049
        self.total = Total(
            vms=3,
            killed=1,
            reused=2,
            operations=40,
            punches=30,
            pages_punched=90,
            slowest_punch=0.01234,
            guest_steps=5000,
            faults=3001,
            counted_seconds=2,
            by_engine={"software": 2, "kernel": 1},
        )
        self.left = ""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def until(self, deadline: float, line: Callable[[Callable[[], str]], None]) -> None:
        line(lambda: f"until {deadline:g}")

    def look_for_remains(self) -> None:
        if self.left:
            raise Finding(self.left)


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def prepare(**parts: object) -> None:
        def make(*of: Any) -> Acts:
            made = Acts(*of)
            for name, value in parts.items():
                setattr(made.total if name == "operations" else made, name, value)
            return made

        monkeypatch.setattr(run, "Run", make)
        monkeypatch.setattr(run, "time", stub(monotonic=lambda: 100))

    return prepare


HOLDS: Final = """\
seed         7, 2 s, design v10, scenario all
VMs          3 (2 software, 1 kernel), 1 killed, 2 on the descriptor of an earlier VM
operations   40, 30 of them punches of 90 pages; slowest 12.3 ms
guest        5000 steps, 1,500 private faults a second (software engine)
holds        no stale read, nothing lost, no hang, callbacks in balance, nothing left behind
"""


def test_a_run_that_holds_is_told_in_five_lines(
    acts: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    acts()
    assert run.main(2.5, seed=7) == 0
    assert capsys.readouterr().out == HOLDS


def test_a_finding_is_told_with_the_way_to_repeat_it(
    acts: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    acts(left="2 processes", plan=PLAN)
    assert run.main(60, "v9", "error-fault", seed=7) == 1
    first, *_, failed, again, vm = capsys.readouterr().out.splitlines()
    assert first == "seed         7, 2 s, design v9, scenario error-fault"
    assert failed == "FAILED       2 processes"
    words = "restrictedmem check --random 60 --seed 7 --design v9 --scenario error-fault"
    assert (again, vm) == (f"again        {words}", f"the VM       {PLAN}")


def test_a_run_without_operations_has_tested_nothing(
    acts: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    acts(operations=0)
    assert run.main(60, seed=7) == 1
    *_, failed, again = capsys.readouterr().out.splitlines()
    assert failed.startswith("FAILED       no operation was done in this time")
    assert again == "again        restrictedmem check --random 60 --seed 7"


@pytest.mark.parametrize("left", ["", "2 processes"])
def test_a_run_is_told_as_data(
    left: str, acts: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    acts(left=left)
    assert run.main(2.5, "v9", seed=7, as_json=True) == bool(left)
    assert json.loads(capsys.readouterr().out) == {
        "seed": 7,
        "design": "v9",
        "scenario": None,
        "seconds": 2.0,
        "vms": 3,
        "killed": 1,
        "reused": 2,
        "operations": 40,
        "punches": 30,
        "pages_punched": 90,
        "slowest_punch": 0.01234,
        "guest_steps": 5000,
        "faults": 3001,
        "counted_seconds": 2,
        "by_engine": {"software": 2, "kernel": 1},
        "faults_a_second": 1500.5,
        "failure": left or None,
        "again": "restrictedmem check --random 2.5 --seed 7 --design v9",
    }


def test_a_seed_is_chosen_when_none_is_given(
    acts: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    acts()
    chosen = always(stub(randrange=(-1).__add__))
    monkeypatch.setattr(run, "random", stub(SystemRandom=chosen))
    run.main(2.5, as_json=True)
    assert json.loads(capsys.readouterr().out)["seed"] == 0xFFFF_FFFF


def test_the_line_on_a_terminal_is_cleared(
    acts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def line(file: object, *, interval: float) -> Any:
        assert interval == 1

        def update(text: Callable[[], str]) -> None:
            shown.append(text())

        return stub(update=update, clear=lambda: shown.append("clear"))

    acts()
    monkeypatch.setattr(run, "Line", line)
    run.main(2.5)
    assert shown == ["until 102.5", "clear"]


def test_without_faults_there_is_no_rate() -> None:
    assert Total().faults_a_second == 0
    assert all(not getattr(Total(), name) for name in Total.__slots__)
