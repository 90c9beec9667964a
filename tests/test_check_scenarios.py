"""Each scenario of the checker does what tests/scenarios.txt says.

The file has a paragraph for each scenario: its name, for which designs it is searched and what they
break, and then what is done, in words. ``python tests/test_check_scenarios.py`` writes the file
anew; read the difference before you commit it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.check import scenarios
from restrictedmem.check.guest_cpu import DONE, Access
from restrictedmem.check.scenario import SCENARIOS, Scenario
from restrictedmem.check.world import World
from restrictedmem.protocol.exits import MemoryFault

FILE: Final = Path(__file__).parent / "scenarios.txt"


def program(accesses: tuple[Access, ...]) -> str:
    return ", ".join(
        f"load {each.gfn:#x}" if each.value is None else f"store {each.value} at {each.gfn:#x}"
        for each in accesses
    )


class Recorder:
    """A world that writes down what a scenario does with it."""

    def __init__(self, lines: list[str], *, npages: int, kind: str, platform: object) -> None:
        self.lines = lines
        words = f"world: {npages} pages, {kind}"
        self.note(words + (f", {platform}" if platform else ""))
        self.frames = Switches(self)
        self.file = SimpleNamespace(get=lambda: self.note("get the file"))
        self._vcpus = 0

    def note(self, words: str) -> None:
        self.lines.append(words)

    def add_slot(self, base: int, npages: int, start: int = 0) -> str:
        name = self.make_slot(base, npages, start)
        self.note(f"register {name}")
        return name

    def make_slot(self, base: int, npages: int, start: int = 0) -> str:
        self.note(f"slot at {base:#x}: {npages} pages from {start} on")
        return f"the slot at {base:#x}"

    def touched(self, *accesses: Access) -> None:
        self.note(f"touched: {program(accesses)}")

    def add_vcpu(self, *accesses: Access) -> Any:
        name = f"vCPU {self._vcpus}"
        self._vcpus += 1
        self.note(f"{name}: {program(accesses)}")

        def run() -> object:
            self.note(f"run {name}")
            return DONE

        return SimpleNamespace(name=name, run=run, interrupt=partial(self.note, f"stop {name}"))

    def guest(self, *accesses: Access) -> Any:
        vcpu = self.add_vcpu(*accesses)
        self.actor(vcpu.name, vcpu.run)
        return vcpu

    def actor(self, name: str, *steps: Callable[[], object]) -> None:
        outer = self.lines
        self.lines = list[str]()
        for step in steps:
            step()
        outer.append(f"actor {name}: {'; '.join(self.lines)}")
        self.lines = outer

    def run(self, vcpu: Any) -> None:
        vcpu.run()

    def run_until_gone(self, vcpu: Any) -> None:
        self.note(f"run {vcpu.name} until its slot is gone")

    def expect_done(self, found: object) -> None:
        assert found is DONE

    def register(self, slot: str) -> None:
        self.note(f"register {slot}")

    def unregister(self, slot: str) -> None:
        self.note(f"unregister {slot}")

    def punch(self, start: int, end: int) -> None:
        self.note(f"punch {start} to {end}")
        if self.frames.refuses:
            raise OSError(12, "")

    def fallocate(self, start: int, end: int) -> None:
        self.note(f"allocate {start} to {end}")

    def convert(self, start: int, end: int, *, private: bool) -> None:
        self.note(f"convert {start:#x} to {end:#x}, {'private' if private else 'shared'}")

    def error(self, start: int, end: int) -> None:
        self.note(f"lose {start} to {end}")

    def close(self) -> None:
        self.note("close")


class Switches:
    """The frames of a recorded world: their switches are written down, too."""

    refuses: bool = False

    def __init__(self, world: Recorder) -> None:
        self.__dict__["world"] = world

    def __setattr__(self, name: str, value: object) -> None:
        self.__dict__[name] = value
        self.__dict__["world"].note(f"frames.{name} = {value}")

    def refill(self) -> None:
        self.__dict__["world"].note("refill")


def paragraph(scenario: Scenario) -> str:
    """Return a scenario in words."""
    lines: list[str] = []

    def make(*, npages: int = 1, kind: str = "memfd", platform: Any = None) -> World:
        words = platform and platform._name
        return cast("World", Recorder(lines, npages=npages, kind=kind, platform=words))

    scenario.build(make)
    flags = [name for name in ("quick", "leaves") if getattr(scenario, name)]
    breaks = [f"breaks {design}: {fault.rule.name}" for design, fault in scenario.findings.items()]
    return "\n  ".join(
        [
            f"{scenario.name}: {scenario.actors} actors; {' '.join(scenario.designs)}"
            + "".join(f"; {flag}" for flag in flags),
            *breaks,
            *lines,
        ]
    )


def written() -> dict[str, str]:
    """Return the paragraphs of the file by the names of the scenarios."""
    paragraphs = FILE.read_text(encoding="utf-8").strip().split("\n\n")
    return {text.partition(":")[0]: text for text in paragraphs}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_does_what_is_written(name: str) -> None:
    assert paragraph(SCENARIOS[name]) == written()[name]


def test_every_scenario_is_written() -> None:
    assert list(written()) == list(SCENARIOS)


@pytest.mark.parametrize(("body", "errno"), [("_until_memory", 28), ("_until_poison", EHWPOISON)])
def test_a_vmm_stops_at_the_fault_that_it_expects_and_at_no_other(body: str, errno: int) -> None:
    until = getattr(scenarios, body)
    done: list[object] = []
    world = SimpleNamespace(expect_done=done.append)
    for number in (errno, errno + 1):
        vcpu = SimpleNamespace(run=lambda number=number: MemoryFault(8, 0, 4096, number))
        if number == errno:
            until(world, vcpu)
        else:
            with pytest.raises(AssertionError):
                until(world, vcpu)
    until(world, SimpleNamespace(run=lambda: DONE))
    assert done == [DONE]


if __name__ == "__main__":
    FILE.write_text("\n\n".join(map(paragraph, SCENARIOS.values())) + "\n", encoding="utf-8")
