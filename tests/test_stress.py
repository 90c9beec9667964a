"""The random mode of ``check``.

It runs, convicts broken code, and leaves nothing behind, however it ends.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from errno import EINVAL
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from processes import descendants, wait_gone
from restrictedmem.abi import memory
from restrictedmem.check.scenarios import SCENARIOS
from restrictedmem.service import exec_service
from restrictedmem.service.client import Service
from restrictedmem.stress import run
from restrictedmem.stress.ground import Ground
from restrictedmem.stress.owner import Owner
from restrictedmem.stress.plan import MIXES, NAMES, OPERATIONS, Plan, plan_of
from restrictedmem.stress.progress import Progress
from restrictedmem.stress.puncher import Puncher
from restrictedmem.units import PAGE_SIZE
from waiting import wait_until

ROOT = Path(__file__).parent.parent
SECONDS = 2.5


def on_engine(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Let every VM run on one engine, and end after two seconds. The counts then must be right."""
    plan = plan_of

    def fixed(seed: int, number: int, **options: Any) -> Plan:
        options["engines"] = {engine: options["engines"][engine]}
        return replace(plan(seed, number, **options), seconds=2.0, killed=False)

    monkeypatch.setattr(run, "plan_of", fixed)


def run_stress(capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[int, dict[str, Any]]:
    status = run.main(SECONDS, as_json=True, **options)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, found


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(
    "design",
    ["v10", "v9+teardown", pytest.param("folio", marks=pytest.mark.requires("orders")), "lazy"],
)
def test_a_sound_design_holds(design: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run_stress(capsys, design=design, seed=5)
    assert (status, found["failure"], found["seed"], found["design"]) == (0, None, 5, design)
    assert found["vms"] >= 1
    assert found["punches"] > 0
    assert found["guest_steps"] > 0


@pytest.mark.requires("fuse")
def test_a_scenario_is_a_mix_of_operations(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run_stress(capsys, scenario="interrupt-fault", seed=6)
    assert (status, found["failure"]) == (0, None)
    assert found["operations"] > 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.requires("fuse")
def test_a_terminal_is_told_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run.main(0.1, scenario="interrupt-fault", seed=6, as_json=True)
    assert re.search(r"\d s  seed 6  VM 1: \w+, [1248] vCPUs, \d+ pages; \d", terminal.getvalue())


def test_scenarios_and_operations_exist() -> None:
    assert MIXES.keys() <= SCENARIOS.keys()
    assert {name for mix in MIXES.values() for name in mix} == OPERATIONS.keys()


def test_what_does_not_exist_is_refused() -> None:
    for design, scenario in ((None, "nonsense"), ("nonsense", None)):
        with pytest.raises(OSError, match="nonsense") as caught:
            run.main(SECONDS, design, scenario)
        assert caught.value.errno == EINVAL


def test_the_same_seed_makes_the_same_plans() -> None:
    def plans(seed: int) -> list[Plan]:
        engines = {"software": ("punch", "convert"), "kernel": ("punch",)}
        found: list[Plan] = []
        for number in range(9):
            found.append(
                plan_of(seed, number, before=found[-1] if found else None, engines=engines, left=60)
            )
        return found

    first = plans(1)
    assert first == plans(1) != plans(2)
    assert {(plan.engine, plan.operations) for plan in first} == {
        ("software", ("punch", "convert")),
        ("kernel", ("punch",)),
    }
    assert all(
        not plan.platform and not plan.converting for plan in first if plan.engine == "kernel"
    )
    assert all(
        (plan.pages, plan.vcpus) == (before.pages, before.vcpus)
        for before, plan in pairwise(first)
        if plan.reused
    )


# The guest, with an owner that breaks its word.


@contextmanager
def owner_of_a_guest(converting: int = 0) -> Generator[tuple[Owner, Ground, Puncher]]:
    plan = Plan(
        "words",
        "software",
        "",
        2,
        32,
        reused=False,
        converting=converting,
        operations=(),
        seconds=0,
        killed=False,
    )
    with Service.start() as service, ExitStack() as stack:
        ground = Ground(service, plan)
        stack.callback(ground.close)
        progress = Progress(NAMES)
        stack.callback(progress.close)
        puncher = Puncher(ground, ground.board.lane(0), progress, "words")
        owner = Owner(service, ground, plan, puncher, stack)
        owner.start()
        wait_until(
            lambda: min(ground.board.steps(0), ground.board.steps(1)) > 2000,
            "the guest to touch all its pages",
            20,
        )
        yield owner, ground, puncher
        ground.board.stop()
        owner.join()


@pytest.mark.requires("fuse")
def test_the_guest_finds_nothing_where_nothing_is_wrong() -> None:
    with owner_of_a_guest(converting=20) as (owner, ground, puncher):
        puncher.take(range(ground.pages))
        steps = ground.board.steps(0)
        wait_until(
            lambda: ground.board.steps(0) > steps + 2000 or owner.failure, "the guest to go on", 20
        )
    assert (owner.failure, owner.said) == ("", "")


@pytest.mark.requires("fuse")
def test_the_guest_finds_what_was_said_to_be_gone() -> None:
    with owner_of_a_guest() as (owner, _, puncher):

        def found() -> str:
            # Said again and again: what the guest stamps between the two words of a punch counts as
            # later than it.
            with puncher.lane.taking(range(7, 8)):
                pass
            return owner.failure

        wait_until(found, "the guest to find page 7", 20)
    assert re.fullmatch(
        r"the guest ended with 1: stale: page 7 holds 0x8[0-9a-f]{8}, expected 0x8[0-9a-f]{8}",
        owner.failure,
    )


@pytest.mark.requires("fuse")
def test_the_guest_finds_what_is_gone_without_a_word() -> None:
    with owner_of_a_guest() as (owner, ground, _):

        def found() -> str:
            # Again and again: one that comes between the guest's look at the page and its next
            # stamp takes nothing that the guest knows of.
            memory.fallocate(ground.fd, memory.PUNCH, ground.offset + 7 * PAGE_SIZE, PAGE_SIZE)
            return owner.failure

        wait_until(found, "the guest to find page 7", 20)
    assert owner.failure == "the guest ended with 1: lost: page 7 holds 0x0, expected 0x800000000"


# Broken code is convicted.


def breaking(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Make the service's processes and engines run our code first. Their children have it too."""
    start = exec_service._START  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(
        exec_service, "_START", f"import sys; sys.path.insert(0, sys.argv[1])\n{source}\n{start}"
    )


DEAF = """
from restrictedmem.service.consumer_process import Binding
begin, finish, told = Binding.invalidate_start, Binding.invalidate_end, [0]
unheard = set()
def start(self, *what):
    told[0] += 1
    if told[0] % 3 == 0:
        unheard.add(what)
    else:
        begin(self, *what)
def end(self, *what):
    if what in unheard:
        unheard.discard(what)
    else:
        finish(self, *what)
Binding.invalidate_start, Binding.invalidate_end = start, end
"""
NO_END = """
from restrictedmem.service.consumer_process import Binding
Binding.invalidate_end = lambda self, start, end, order: None
"""
BUSY = """
from restrictedmem.mm.sequence import InvalidationSequence
end, ends = InvalidationSequence.end, [0]
def lose_one(self):
    ends[0] += 1
    if ends[0] != 40:
        end(self)
InvalidationSequence.end = lose_one
"""


@pytest.mark.requires("fuse", "kvm")
def test_callbacks_that_do_not_come_are_stale_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking(monkeypatch, DEAF)
    on_engine(monkeypatch, "kernel")
    status, found = run_stress(capsys, scenario="punch-fault", seed=7)
    assert status == 1
    assert re.search(
        r"the guest ended with 1: stale: page \d+ holds 0x[0-9a-f]+, expected 0x[0-9a-f]+",
        found["failure"],
    )
    assert found["again"] == "restrictedmem check --random 2.5 --seed 7 --scenario punch-fault"


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(
    ("source", "words"),
    [
        (DEAF, r"punched, and the engine gave up"),
        (NO_END, r"hang: waited|without their end"),
        (BUSY, r"hang: waited"),
    ],
    ids=["deaf", "no end", "busy"],
)
def test_books_that_do_not_balance_are_found(
    source: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking(monkeypatch, source)
    for module in ("party", "finding", "owner", "run"):
        monkeypatch.setattr(f"restrictedmem.stress.{module}.PATIENCE", 3.0)
    on_engine(monkeypatch, "software")
    status, found = run_stress(capsys, scenario="punch-fault", seed=8)
    assert status == 1
    assert re.search(words, found["failure"])


# The end.


@pytest.mark.requires("fuse")
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    # Its descendants stay below it (a subreaper), and so does a service whose first parent ends.
    # The tests' parent may ignore SIGINT.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from restrictedmem.abi.process import PR_SET_CHILD_SUBREAPER, prctl; "
        "prctl(PR_SET_CHILD_SUBREAPER, 1)\n"
        "from restrictedmem.stress import run; run.main(60, seed=9)"
    )
    out = tmp_path / "out"
    with out.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: any(found.name == "rmem-kvm" for found in descendants([child.pid])),
            "an engine to run a guest",
            20,
        )
        started = descendants([child.pid])
        os.killpg(child.pid, signal.SIGINT)
        assert child.wait(20) == -signal.SIGINT
    finally:
        child.kill()
        child.wait()
    wait_gone(started, 20)
