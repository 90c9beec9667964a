"""The checker's scenarios hold for the production code.

The checker finds every slip of the postings, and the mistakes that tests make.
"""

import threading
import time
from collections.abc import Callable

import pytest

from restrictedmem.check.explorer import Result, RuleBroken
from restrictedmem.check.scenario import Scenario
from restrictedmem.check.scenarios import SCENARIOS
from restrictedmem.check.slips import SLIPS
from restrictedmem.check.world import World
from restrictedmem.kvm.engine_vcpu import EngineVcpus
from restrictedmem.kvm.mmu import Mmu
from restrictedmem.kvm.software.software_vm import SoftwareVm
from restrictedmem.mm.designs import NAMES
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import PageRange, gfn_t, pgoff_t

LIMIT = 100.0
QUICK = [
    scenario for scenario in SCENARIOS.values() if scenario.quick and "v10" in scenario.designs
]
SOUND = [scenario for scenario in SCENARIOS.values() if "v10" in scenario.designs]
#: Known convictions of designs, one scenario each; ``restrictedmem check`` has all others.
FINDINGS = [("punch-fault", "batched"), ("punch-fault", "folio-poc"), ("error-fault", "v9")]


def violation(result: Result) -> str:
    return "" if result.counterexample is None else result.counterexample.violation


@pytest.mark.parametrize("scenario", QUICK, ids=lambda scenario: scenario.name)
def test_the_default_design_holds(scenario: Scenario) -> None:
    result = scenario.search("v10", limit_seconds=LIMIT)
    assert result.complete
    assert violation(result) == ""


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_convicted(name: str) -> None:
    slip = SLIPS[name]
    assert violation(slip.search(limit_seconds=LIMIT)).startswith(slip.rule.value)


@pytest.mark.parametrize(("name", "design"), FINDINGS)
def test_a_design_is_convicted_of_its_nature(name: str, design: str) -> None:
    finding = SCENARIOS[name].finding(design)
    assert finding is not None
    assert violation(SCENARIOS[name].search(design, limit_seconds=LIMIT)).startswith(
        finding.rule.value
    )


def test_what_is_asked_before_the_punch_makes_batched_callbacks_sound() -> None:
    assert SCENARIOS["convert-then-punch"].search("batched", limit_seconds=LIMIT).holds


# Production code, broken on purpose.


def _no_retry(self: InvalidationSequence, snapshot: int, start: pgoff_t, end: pgoff_t) -> bool:
    del self, snapshot, start, end
    return False


def _no_refusal(self: Pages, start: pgoff_t, end: pgoff_t) -> None:
    del self, start, end


def _forget_at_the_end(self: Pages, span: PageRange) -> None:
    self.forget(span)


def _no_drop(self: EngineVcpus, start: gfn_t, end: gfn_t) -> None:
    del self, start, end


def _no_zap(self: Mmu, slot: object, start: gfn_t, end: gfn_t) -> tuple[gfn_t, gfn_t]:
    del self, slot
    return start, end


BROKEN: dict[str, tuple[type, str, Callable[..., object]]] = {
    "no retry": (InvalidationSequence, "retry", _no_retry),
    "no refusal of get_page during an invalidation": (Pages, "_refuse_invalidated", _no_refusal),
    "pages forgotten when faults are let in again": (Pages, "invalidate_end", _forget_at_the_end),
    "translations stay in the TLB": (EngineVcpus, "drop", _no_drop),
    "entries are not zapped": (Mmu, "_zap", _no_zap),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_production_code_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[name])
    assert violation(SCENARIOS["punch-fault"].search("v10", limit_seconds=LIMIT)) != ""


def test_a_fault_that_was_waiting_goes_on_when_its_slot_is_deleted() -> None:
    world = World("v10")
    view = world.add_slot(0x10, 1)
    world.sequence.begin(pgoff_t(0), pgoff_t(1))
    asked: list[bool] = []

    def unless() -> bool:
        asked.append(True)
        return False

    waiting = threading.Thread(target=world.vm.mmu.wait_settled, args=[unless], daemon=True)
    waiting.start()
    deadline = time.monotonic() + 10
    while not asked:
        assert time.monotonic() < deadline, "nobody waited"
    SoftwareVm.remove_slot(world.vm, view.slot)
    world.sequence.end()
    waiting.join(10)
    assert not waiting.is_alive()


def test_what_an_owner_takes_waits_for_the_end_of_a_punch() -> None:
    world = World("v10")
    view = world.add_slot(0x10, 1)
    world.sequence.begin(pgoff_t(0), pgoff_t(1))
    taking = threading.Thread(
        target=SoftwareVm.inject_failure, args=[world.vm, view.slot, gfn_t(0x10)], daemon=True
    )
    taking.start()
    taking.join(0.1)
    assert taking.is_alive()
    world.sequence.end()
    taking.join(10)
    assert not taking.is_alive()
    assert view.slot.memfd_half.failed == {0}


# The scenarios themselves.


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda scenario: scenario.name)
def test_a_scenario_is_what_it_says(scenario: Scenario) -> None:
    assert set(scenario.designs) <= set(NAMES)
    assert set(scenario.findings) <= set(NAMES)
    for design in scenario.designs:
        assert len(scenario.program(design)().actors()) == scenario.actors


@pytest.mark.parametrize("scenario", SOUND, ids=lambda scenario: scenario.name)
def test_one_actor_after_the_other_breaks_no_rule(scenario: Scenario) -> None:
    program = scenario.program("v10")()
    for name, act in program.actors():
        # An actor that stops an ended run waits for the next run to end: that run goes first.
        if not name.startswith("VM") or "interrupt" not in scenario.name:
            act()
    program.check()


def test_a_violation_of_a_world_is_raised_once_it_is_looked_for() -> None:
    world = World("v10")
    view = world.add_slot(0x10, 1)
    world.invariants.end(view, PageRange(pgoff_t(0), pgoff_t(1)))
    with pytest.raises(RuleBroken, match="callbacks out of balance"):
        world.check()
