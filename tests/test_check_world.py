"""What a world of the checker tells the explorer: its state, and the steps that only it has."""

from collections.abc import Callable
from errno import EFAULT
from typing import Final

import pytest

from checked_worlds import BASE, ENTRY, broken, map_pages, span, touches, world_of
from planting import noting, stub
from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.check import control, guest_cpu, invariants, objects, world
from restrictedmem.check.explorer import RuleBroken
from restrictedmem.check.frames import HUGE_PAGES, MEMORY
from restrictedmem.check.guest_cpu import DONE, GuestCpu, load, store
from restrictedmem.check.invariants import SlotHistory, acting
from restrictedmem.check.world import World
from restrictedmem.kvm.engine_vcpu import EngineVcpu
from restrictedmem.kvm.memslot import ALL, PRIVATE
from restrictedmem.kvm.mmu import Fault
from restrictedmem.mm.notifier import Notifier
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.platform.platform import NoPlatform
from restrictedmem.platform.snp import Snp
from restrictedmem.protocol import guest_abi
from restrictedmem.protocol.exits import Hypercall, MemoryFault, MmioRead
from restrictedmem.units import gfn_t

# Facts that the rules remember.


TOLD: Final = invariants.Told(span(1, 2), 3)
#: Facts that tell states apart: how each becomes another.
FACTS: Final[dict[str, Callable[[World, SlotHistory], object]]] = {
    "taken": lambda world, _: world.invariants.taken.__setitem__(2, 0),
    "entry": lambda _, view: view.slot.entries.__setitem__(0, ENTRY),
    "told": lambda _, view: view.told.append(TOLD),
    "closed": lambda _, view: view.closed.append(TOLD),
    "leaving": lambda _, view: setattr(view, "leaving", True),
    "live": lambda _, view: setattr(view, "live", False),
    "punching": lambda world, _: world.invariants._punching.append(span(1, 2)),
    "converting": lambda world, _: world.invariants._converting.append((1, 2)),
    "written": lambda world, _: world.invariants._written.add(1),
    "poisoned": lambda world, _: world.invariants.poisoned.update({2: 1}),
    "dying": lambda world, _: world.invariants.dying(),
}


@pytest.mark.parametrize("name", FACTS)
def test_the_state_has_each_fact(name: str) -> None:
    world, rules, view = world_of()
    view.led[:] = world.frames.numbers[1:5]
    before = rules.state()
    assert before == world_of()[1].state()
    FACTS[name](world, view)
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
    monkeypatch.setattr(invariants, "touch", touches(heard))
    monkeypatch.setattr(invariants, "saw", noting(heard, "saw"))
    for doing in (rules.converting(gfn_t(BASE), gfn_t(BASE + 1)), rules.losing(span(1, 2))):
        heard.clear()
        with doing:
            assert heard == []
        assert heard == [(MEMORY, "write"), ("saw", None)]


def test_a_guest_page_belongs_to_one_slot() -> None:
    world, rules, view = world_of(npages=9)
    other = world.add_slot(BASE + 4, 2, start=5)
    assert [rules.view_of(BASE + page) for page in (0, 3, 4, 5)] == [view, view, other, other]
    with pytest.raises(StopIteration):
        rules.view_of(BASE + 6)


# Accesses that are steps.


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the explorer hears of a world's models."""
    heard: list[tuple[object, ...]] = []
    for module in (world, guest_cpu):
        monkeypatch.setattr(module, "touch", touches(heard))
        monkeypatch.setattr(module, "saw", noting(heard, "saw"))
    monkeypatch.setattr(guest_cpu, "forget", noting(heard, "forget"))
    return heard


def test_the_check_looks_at_frames_slots_and_entries() -> None:
    names = control.Names()
    with objects.controlled():
        control.enter(control.Execution(names, lambda _: None))
        made = World("v10")
        view = made.make_slot(BASE, 1)
        entries = view.slot.entries
        assert isinstance(entries, objects.SharedBytes)
        models = {names.place(("model", name)) for name in (MEMORY, "slots")}
        assert names._watched == {*models, entries.slot}


def test_slots_are_looked_at_where_they_may_go(steps: list[tuple[object, ...]]) -> None:
    made, _, view = world_of()
    steps.clear()
    looked = [("slots", "read"), ("saw", (view.slot.number,))]
    made.vm.mmu.wait_settled(lambda: False)
    assert steps[:2] == looked
    steps.clear()
    assert made.vm.mmu._told() is not None
    assert steps[:2] == looked
    steps.clear()
    with made.reaching_engine():
        assert steps == looked
        assert not made._channel.acquire(blocking=False)
    made.unregister(view)
    assert ("slots", "write") in steps
    made.register(view)
    assert steps[-2:] == [("slots", "write"), ("saw", None)]


def test_a_slot_leaves_the_guest_before_its_notifier_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    made, rules, view = world_of(design="v10+teardown")
    made.touched(load(BASE))
    cpu = GuestCpu(rules, made.vm.mmu, 0)
    cpu.tlb[BASE] = ENTRY, 1
    made._cpus.append(cpu)
    seen: list[tuple[object, ...]] = []
    unregister = RestrictedFile.unregister_notifier

    def watched(file: RestrictedFile, notifier: Notifier) -> None:
        seen.append((view.live, view.leaving, list(made.vm.mmu.slots), dict(cpu.tlb)))
        unregister(file, notifier)

    monkeypatch.setattr(RestrictedFile, "unregister_notifier", watched)
    references = made.file._references
    made.unregister(view)
    assert seen == [(False, True, [], {})]
    assert (view.leaving, made.file._references) == (False, references - 1)


def test_a_mapping_larger_than_its_folio_is_found() -> None:
    made, rules, _ = world_of(HUGE_PAGES, start=0, shown=HUGE_PAGES, kind="thp")
    host = world.Host(made, NoPlatform())
    host.prepare(1, span(0, HUGE_PAGES), gfn_t(BASE), 9)
    assert broken(rules) == ""
    made.frames.punch(0, 1 << 12)
    made.frames.allocate(0, 1 << 12)
    rules.take(span(0, 1))
    host.prepare(1, span(0, HUGE_PAGES), gfn_t(BASE), 9)
    words = f"pages {span(0, HUGE_PAGES)} are mapped with order 9, but their folio has order 0"
    assert broken(rules) == f"mapped larger than it is: {words}"


def test_a_notifier_tells_the_rules_and_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[object, ...]] = []
    made, _, view = world_of()
    half = view.slot.memfd_half.binding
    for name in ("invalidate_start", "invalidate_end", "error"):
        monkeypatch.setattr(made.vm, name, noting(heard, name))
    for name in ("start", "end"):
        monkeypatch.setattr(made.invariants, name, noting(heard, name))
    notifier = made._notifiers[half]
    first, end = span(1, 3).start, span(1, 3).end
    notifier.invalidate_start(first, end, 5)
    notifier.invalidate_end(first, end, 5)
    notifier.error(first, end)
    # A consumer closes its range before it answers, and opens it after it was told.
    assert heard == [
        ("invalidate_start", half, span(1, 3), 5),
        ("start", view, span(1, 3)),
        ("end", view, span(1, 3)),
        ("invalidate_end", half, span(1, 3), 5),
        ("error", half, span(1, 3)),
    ]
    made.touched(load(BASE))
    assert notifier.page_count(first, end) == 2


def test_the_end_of_a_sequence_is_known_before_faults_go_on() -> None:
    made, rules, view = world_of()
    view.leaving = True
    made.sequence.begin(span(2, 3).start, span(2, 3).end)
    rules.start(view, span(2, 3))
    assert view.closed
    made.sequence.end()
    assert (view.closed, made.sequence.busy()) == ([], False)


def test_the_consumers_mapping_allocates_and_shows_frames() -> None:
    made = World("v10")
    assert len(made.frames.numbers) == 1
    file = world.MappedFile(made)
    file.allocate(0, 1 << 12)
    assert bytes(made.invariants.taken) == bytes(made.frames.numbers) == b"\1"
    assert file.order_of(span(0, 1).start) == 0


def test_the_platform_hears_what_the_world_does() -> None:
    heard: list[tuple[object, ...]] = []

    inner = stub(
        prepare=noting(heard, "prepare"),
        invalidate=noting(heard, "invalidate"),
        freed=noting(heard, "freed"),
        report=lambda: {"pages": 3},
    )
    made, _, _ = world_of()
    host = world.Host(made, inner)
    host.prepare(1, span(1, 2), gfn_t(BASE), 0)
    host.invalidate(1, span(1, 3), 5)
    host.freed(1, span(2, 4))
    assert heard == [
        ("prepare", 1, span(1, 2), BASE, 0),
        ("invalidate", 1, span(1, 3), 5),
        ("freed", 1, span(2, 4)),
    ]
    assert host.report() == {"pages": 3}


def test_a_violation_of_the_platform_is_raised() -> None:
    made = World("v10", platform=Snp(unmap=False))
    made.check()
    made.platform._violations.append(stub(rule="a rule", start=0x11))  # type: ignore[union-attr]
    with pytest.raises(RuleBroken, match=r"^a rule of the platform: a rule, page 0x11$"):
        made.check()
    made.platform = NoPlatform()
    made.check()


def test_the_platform_hears_of_taken_pages_that_are_holes(steps: list[tuple[object, ...]]) -> None:
    heard: list[tuple[object, ...]] = []
    made, _, view = world_of()
    half = view.slot.memfd_half
    # The fault of a page takes its neighbours.
    made.touched(load(BASE))
    made.frames.punch(2 << 12, 3 << 12)
    made.vm._find_freed(half, span(1, 5))
    assert half.pages.count(span(1, 5)) == 4
    made.platform = stub(freed=noting(heard))
    steps.clear()
    made.vm._find_freed(half, span(1, 3))
    assert (heard, steps) == ([(1, span(2, 3))], [(MEMORY, "read")])
    assert [half.pages.count(span(page, page + 1)) for page in (1, 2, 3)] == [1, 0, 1]


def test_a_touched_world_has_no_vcpu_left() -> None:
    made, _, _ = world_of()
    kept = made.add_vcpu(load(BASE))
    made.touched(store(BASE + 1, 5))
    assert (made.vcpus.all, len(made._cpus), len(made._vcpus)) == ((kept,), 1, 1)
    assert made.frames.content == {2: 5}


def test_actors_do_their_steps_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made, done = World("v10"), list[object]()
    monkeypatch.setattr(world, "forget", done.append)
    for name in ("one", "two"):
        made.actor(name, *[lambda: done.append(acting.get())] * 2)
    for name, act in made.actors():
        done.append(name)
        act()
    assert done == [
        *("one", ("step", 0, 0), 0, ("step", 0, 1), 0),
        *("two", ("step", 1, 0), 1, ("step", 1, 1), 1),
    ]
    acting.set(-1)


# The guest.


def guest_of(*program: guest_cpu.Access) -> tuple[World, GuestCpu]:
    made, rules, _ = world_of()
    cpu = GuestCpu(rules, made.vm.mmu, 3)
    cpu.program = list(program)
    return made, cpu


def test_a_guest_loads_and_stores_through_its_tlb(steps: list[tuple[object, ...]]) -> None:
    made, cpu = guest_of(load(BASE), store(BASE, 5), store(BASE + 1, 6))
    steps.clear()
    assert cpu.run() is DONE
    mine = [step for step in steps if step[0] in ("vCPU 3", MEMORY, "saw")]
    assert mine == [("vCPU 3", "write"), ("saw", False), (MEMORY, "read"), ("saw", None)] * 3
    assert made.frames.content == {1: 5, 2: 6}
    assert {gfn: number for gfn, (_, number) in cpu.tlb.items()} == {BASE: 1, BASE + 1: 1}
    assert cpu.run() is DONE
    assert made.frames.content == {1: 5, 2: 6}


def test_a_guest_that_is_done_has_ended_well() -> None:
    assert Hypercall(guest_abi.EXIT, (0, 0, 0, 0)) == DONE


def test_a_kick_ends_a_run_once(steps: list[tuple[object, ...]]) -> None:
    made, cpu = guest_of(store(BASE, 5))
    woken: list[bool] = []
    made.vm.mmu.wake = lambda: woken.append(cpu.kicked)  # type: ignore[method-assign]
    steps.clear()
    cpu.kick()
    assert (steps, woken) == ([("vCPU 3", "write"), ("saw", None)], [True])
    assert cpu._was_kicked()
    assert steps[2:] == [("vCPU 3", "read"), ("saw", True)]
    assert cpu.run() is None
    assert made.frames.content == {}
    assert cpu.run() is DONE
    assert not cpu._was_kicked()


def test_a_guest_settles_unless_it_is_kicked(steps: list[tuple[object, ...]]) -> None:
    made, cpu = guest_of()
    asked: list[Callable[[], bool]] = []

    def wait_settled(unless: Callable[[], bool]) -> None:
        asked.append(unless)

    made.vm.mmu.wait_settled = wait_settled  # type: ignore[method-assign]
    cpu.settle()
    assert asked == [cpu._was_kicked]
    assert steps[-1] == ("forget", ("settle", "vCPU 3", acting.get()))


def test_a_guest_without_a_translation_faults() -> None:
    made, cpu = guest_of(load(BASE + 2))
    error: list[OSError] = [OSError(EHWPOISON, "lost"), OSError("no errno")]
    fault = made.vm.mmu.fault

    def failing(*_: object) -> Fault:
        raise error.pop(0)

    made.vm.mmu.fault = failing  # type: ignore[assignment, method-assign]
    at = (BASE + 2) << 12
    assert cpu.run() == MemoryFault(8, at, 4096, EHWPOISON)
    assert cpu.run() == MemoryFault(8, at, 4096, EFAULT)
    made.vm.mmu.fault = lambda *_: Fault.NO_HALF  # type: ignore[method-assign]
    assert cpu.run() == MemoryFault(8, at, 4096, EFAULT)
    # The entry is gone again: the fault is tried again.
    made.vm.mmu.fault = lambda *_: Fault.MAPPED  # type: ignore[method-assign]
    assert cpu.run() is None
    made.vm.mmu.fault = fault  # type: ignore[method-assign]
    assert cpu.run() is DONE


def test_a_guest_finds_a_slot_deleted() -> None:
    made, cpu = guest_of(load(BASE + 1))
    (slot,) = made.vm.mmu.slots
    made.vm.remove_slot(slot)
    assert cpu.run() == MmioRead((BASE + 1) << 12, 8)


def test_a_shared_page_has_no_frame_of_the_file() -> None:
    made, cpu = guest_of(store(BASE, 5))
    (slot,) = made.vm.mmu.slots
    slot.attributes[:] = bytes(4)
    slot.entries[:] = bytes([ALL]) * 4
    made.invariants.view_of(BASE).led[0] = 1
    assert cpu.run() is DONE
    assert (cpu.tlb, made.frames.content) == ({BASE: (ALL, 0)}, {})


def test_a_store_needs_an_entry_that_may_be_written() -> None:
    made, cpu = guest_of()
    made.frames.punch(1 << 12, 1 << 12)
    made.frames.allocate(1 << 12, 1 << 12)
    made.invariants.take(span(1, 2))
    cpu.tlb[BASE] = 1 | PRIVATE, 2
    assert cpu._access(load(BASE)) is DONE
    assert cpu.tlb[BASE] == (1 | PRIVATE, 2)
    assert cpu._access(store(BASE, 5)) is DONE
    assert cpu.tlb[BASE][0] & 2
    assert made.frames.content == {1: 5}


def test_dropped_translations_are_those_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    made, cpu = guest_of()
    heard: list[tuple[object, ...]] = []
    monkeypatch.setattr(made.invariants, "dropped", noting(heard))
    cpu.tlb = {BASE + page: (ENTRY, 1) for page in range(4)}
    cpu.drop(gfn_t(BASE + 1), gfn_t(BASE + 3))
    assert (list(cpu.tlb), heard) == ([BASE, BASE + 3], [(BASE + 1, BASE + 3)])
    cpu.flush()
    assert cpu.tlb == {}


def test_the_state_of_a_guest_ends_with_its_program() -> None:
    made, cpu = guest_of(load(BASE + 1), load(BASE + 2))
    states = [cpu.state()]
    cpu.tlb[BASE + 1] = ENTRY, 1
    states.append(cpu.state())
    made.frames.punch(2 << 12, 1 << 12)
    states.append(cpu.state())
    cpu.kicked = True
    states.append(cpu.state())
    cpu._next = 1
    states.append(cpu.state())
    assert len(set(states)) == 5
    assert states[1:3] == [
        (0, ((BASE + 1, ENTRY, b"\1"),), False),
        (0, ((BASE + 1, ENTRY, b"\2"),), False),
    ]
    cpu._next = 2
    assert cpu.state() is None


def test_the_state_of_a_vcpu_has_who_waits_for_its_exit(
    steps: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, _ = world_of()
    made.add_vcpu(load(BASE))
    (vcpu,) = made._vcpus
    states = [vcpu.state()]
    steps.clear()
    assert vcpu.request_drop(gfn_t(BASE), gfn_t(BASE + 1)) is None
    states.append(vcpu.state())
    vcpu._in_guest = True
    acting.set(4)
    stay = vcpu.request_drop(gfn_t(BASE), gfn_t(BASE + 1))
    assert steps == [("saw", False), ("saw", True)]
    assert (stay, vcpu._asked) == (0, {4})
    states.append(vcpu.state())
    sent: list[tuple[object, ...]] = []
    with monkeypatch.context() as patch:
        patch.setattr(EngineVcpu, "send_out", noting(sent))
        vcpu.send_out(0)
    assert (vcpu._asked, sent) == (set(), [(vcpu, 0)])
    vcpu._asked.add(4)
    vcpu._enter()
    assert (vcpu._asked, vcpu._stale, vcpu._in_guest) == (set(), [], True)
    vcpu._leave()
    for name in ("_running", "_interrupted"):
        setattr(vcpu, name, True)
        states.append(vcpu.state())
    vcpu._holds = 1
    states.append(vcpu.state())
    assert len(set(states)) == 6
    acting.set(-1)
