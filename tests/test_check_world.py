"""What a world of the checker tells the explorer: its state, and the steps that only it has."""

from collections.abc import Callable

import pytest

from checked_worlds import BASE, ENTRY, map_pages, span, world_of
from restrictedmem.check import invariants
from restrictedmem.check.frames import MEMORY
from restrictedmem.check.invariants import SlotHistory
from restrictedmem.check.world import World
from restrictedmem.kvm.memslot import ALL
from restrictedmem.units import gfn_t

# Facts that the rules remember.


@pytest.mark.parametrize(
    "change",
    [
        lambda world, view: world.invariants.taken.__setitem__(2, 0),
        lambda world, view: view.slot.entries.__setitem__(0, ENTRY),
        lambda world, view: view.told.append(invariants.Told(span(1, 2), 3)),
        lambda world, view: view.closed.append(invariants.Told(span(1, 2), 3)),
        lambda world, view: setattr(view, "leaving", True),
        lambda world, view: setattr(view, "live", False),
        lambda world, view: world.invariants._punching.append(span(1, 2)),
        lambda world, view: world.invariants._converting.append((1, 2)),
        lambda world, view: world.invariants._written.add(1),
        lambda world, view: world.invariants.poisoned.update({2: 1}),
        lambda world, view: world.invariants.dying(),
    ],
)
def test_the_state_has_each_fact(change: Callable[[World, SlotHistory], None]) -> None:
    world, rules, view = world_of()
    view.led[:] = world.frames.numbers[1:5]
    before = rules.state()
    assert before == world_of()[1].state()
    change(world, view)
    assert rules.state() != before


def test_the_state_says_whether_entries_lead_to_their_frames() -> None:
    world, rules, view = world_of()
    view.led[:] = world.frames.numbers[1:5]
    assert rules._led(view) == b""
    view.slot.entries[0:1] = bytes([ALL])
    assert rules._led(view) == b""
    map_pages(view, 1, 3)
    assert rules._led(view) == bytes([0, 1, 1, 0])
    world.frames.punch(3 << 12, 1 << 12)
    assert rules._led(view) == bytes([0, 1, 2, 0])


def test_a_rule_that_remembers_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[object, ...]] = []
    _, rules, _ = world_of()
    monkeypatch.setattr(invariants, "touch", lambda name, *, write: heard.append((name, write)))
    monkeypatch.setattr(invariants, "saw", lambda value: heard.append(("saw", value)))
    for doing in (rules.converting(gfn_t(BASE), gfn_t(BASE + 1)), rules.losing(span(1, 2))):
        heard.clear()
        with doing:
            assert heard == []
        assert heard == [(MEMORY, True), ("saw", None)]


def test_a_guest_page_belongs_to_one_slot() -> None:
    world, rules, view = world_of(npages=9)
    other = world.add_slot(BASE + 4, 2, start=5)
    assert [rules.view_of(BASE + page) for page in (0, 3, 4, 5)] == [view, view, other, other]
    with pytest.raises(StopIteration):
        rules.view_of(BASE + 6)
