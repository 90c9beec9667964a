"""What the actors of a checker's world do to production's objects."""

from collections.abc import Callable
from typing import Any, Final

import pytest

from checked_worlds import BASE, span, world_of
from planting import noting
from restrictedmem.abi.memory import PUNCH
from restrictedmem.check.explorer import RuleBroken
from restrictedmem.check.frames import HUGE
from restrictedmem.check.guest_cpu import DONE, store
from restrictedmem.check.invariants import Rule, acting
from restrictedmem.check.world import World
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.protocol.exits import Exit, Interrupted, MmioRead, Shutdown
from restrictedmem.units import PAGE_SIZE

#: An action, and the call that it makes: the class, the method and the arguments.
ACTIONS: Final[dict[str, tuple[Callable[[World], None], type, str, tuple[object, ...]]]] = {
    "punch": (
        lambda world: world.punch(2, 5),
        RestrictedFile,
        "fallocate",
        (PUNCH, 2 * PAGE_SIZE, 3 * PAGE_SIZE),
    ),
    "allocate": (
        lambda world: world.fallocate(2, 5),
        RestrictedFile,
        "fallocate",
        (0, 2 * PAGE_SIZE, 3 * PAGE_SIZE),
    ),
    "share": (
        lambda world: world.convert(BASE + 1, BASE + 3, private=False),
        VmMemory,
        "set_attributes",
        (Api.V10, (BASE + 1) * PAGE_SIZE, 2 * PAGE_SIZE, 0, 0),
    ),
    "unshare": (
        lambda world: world.convert(BASE + 1, BASE + 3, private=True),
        VmMemory,
        "set_attributes",
        (Api.V10, (BASE + 1) * PAGE_SIZE, 2 * PAGE_SIZE, 8, 0),
    ),
    "lose": (lambda world: world.error(2, 5), RestrictedFile, "error_page", (2, 5)),
    "close": (World.close, RestrictedFile, "put", ()),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_is_one_call_of_production(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, kind, method, arguments = ACTIONS[name]
    heard: list[tuple[object, ...]] = []
    world, _, _ = world_of()
    monkeypatch.setattr(kind, method, noting(heard))
    act(world)
    ((_, *found),) = heard
    assert tuple(found) == arguments


#: What the rules know while an action is under way.
KNOWN: Final[dict[str, Callable[[World], object]]] = {
    "punch": lambda world: world.invariants._punching == [span(2, 5)],
    "allocate": lambda world: world.invariants._punching == [span(2, 5)],
    "share": lambda world: world.invariants._converting == [(BASE + 1, BASE + 3)],
    "lose": lambda world: world.invariants.views[0].asked == [span(2, 5)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_rules_know_of_an_action_under_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, kind, method, _ = ACTIONS[name]
    world, rules, _ = world_of()
    seen: list[object] = []

    def look(*_: Any) -> None:
        seen.append(KNOWN[name](world))

    monkeypatch.setattr(kind, method, look)
    act(world)
    assert seen == [True]
    assert (rules._punching, rules._converting) == ([], [])


@pytest.mark.parametrize("design", ["v10", "bindings"])
def test_a_slot_that_is_added_is_registered_and_keeps_the_file(design: str) -> None:
    world = World(design, npages=6)
    references = world.file._references
    view = world.make_slot(BASE, 3, start=2)
    assert len(world.file.registrations()) == len(list(world.vm.mmu.slots)) == 0
    world.register(view)
    (registration,) = world.file.registrations()
    whole = (2, 5) if design == "bindings" else (registration.start, registration.end)
    assert registration.notifier is world._notifiers[view.slot.memfd_half.binding]
    assert (registration.start, registration.end) == whole
    assert world.file._references == references + 1
    assert list(world.vm.mmu.slots) == list(world.memory.slots) == [view.slot]
    assert world.vm._halves == {view.slot.memfd_half.binding: view.slot.memfd_half}
    world.unregister(view)
    assert list(world.vm.mmu.slots) == list(world.memory.slots) == []
    assert (world.file.registrations(), world.file._references) == ((), references)


@pytest.mark.parametrize(("kind", "order"), [("memfd", 0), ("thp", HUGE), ("hugetlb", HUGE)])
def test_a_slot_shows_a_part_of_the_file(kind: str, order: int) -> None:
    world = World("v10", npages=512, kind=kind)
    first, second = world.make_slot(BASE, 3, start=2), world.make_slot(BASE + 3, 1, private=False)
    half = first.slot.memfd_half
    assert (half.window, half.told, half.failed) == (span(2, 5), 0, set())
    assert (half.order, half.may_have_folios) == (order, order > 0)
    assert [view.slot.memfd_half.binding for view in (first, second)] == [1, 2]
    assert (first.slot.base_gfn, first.slot.end_gfn) == (BASE, BASE + 3)
    assert bytes(first.slot.attributes) == b"\1" * 3
    assert bytes(second.slot.attributes) == b"\0"
    assert (first.window, len(first.led)) == (span(2, 5), 3)
    assert first.slot.shared is not None
    assert first.slot.shared.offset == 2 * PAGE_SIZE


def test_a_vcpu_runs_until_its_guest_is_done() -> None:
    world, _, _ = world_of()
    vcpu = world.guest(store(BASE, 5))
    ((name, act),) = world.actors()
    assert name == "vCPU 0"
    exits: list[Exit] = [Interrupted(), Interrupted(), DONE, Shutdown(13), Shutdown(13)]
    exits += [MmioRead(BASE, 8), DONE]
    vcpu.run = lambda: exits.pop(0)  # type: ignore[method-assign]
    act()
    assert len(exits) == 4
    for run in (World.run, World.run_until_gone):
        with pytest.raises(AssertionError, match="before it was done"):
            run(world, vcpu)
    world.run_until_gone(vcpu)
    world.run_until_gone(vcpu)
    assert exits == []
    acting.set(-1)


@pytest.mark.parametrize("ask", [World.check, World.finish])
def test_a_broken_rule_is_raised(ask: Callable[[World], None]) -> None:
    world, rules, _ = world_of()
    ask(world)
    rules.violate(Rule.LEVEL, "here")
    with pytest.raises(RuleBroken, match="here"):
        ask(world)
