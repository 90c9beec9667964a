"""A wait on a condition really waits, for the state that it names, and ends when that holds.

These tests use no thread and no time.
"""

from collections.abc import Callable
from typing import Any, Final, final

import pytest

from planting import stub
from restrictedmem import sync
from restrictedmem.consumer import bound_file, consumer
from restrictedmem.kvm import mmu
from restrictedmem.service import consumers
from restrictedmem.units import pgoff_t
from restrictedmem.vmm.gdb import gates

PAGE: Final = pgoff_t(0)


@final
class Condition:
    """A condition at which everything comes to pass while it is waited for, and nothing before."""

    def __init__(self, come_to_pass: Callable[[], object]) -> None:
        self._come_to_pass = come_to_pass
        #: For how long it was waited each time.
        self.waits: list[float | None] = []
        self._held = 0

    def __enter__(self) -> None:
        self._held += 1

    def __exit__(self, *_: object) -> None:
        self._held -= 1

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        assert self._held, "waited without the lock"
        assert not predicate(), "waited for what is so"
        self._come_to_pass()
        self.waits.append(timeout)
        return predicate()


def test_a_fault_that_retries_waits_for_the_invalidation_to_end() -> None:
    busy, asked, installed = [True], list[int](), list[int]()

    def get_page(pgoff: int) -> int:
        asked.append(pgoff)
        assert len(asked) < 5, "it asks without a pause"
        return 0

    def retry(*_: object) -> bool:
        return any(busy)

    settled = Condition(busy.pop)
    file: Any = stub(
        snapshot=int,
        get_page=get_page,
        _check=str,
        retry=retry,
        _settled=settled,
        _sequence=stub(busy=lambda: any(busy)),
    )
    assert bound_file.BoundFile.fault(file, PAGE, sync.mutex(), installed.append) == 1
    assert (installed, asked) == ([0], [PAGE, PAGE])
    # The end may be told to nobody.
    assert settled.waits == [bound_file._LOOK_AGAIN]


def test_a_vcpu_waits_for_the_end_of_what_it_was_told_of() -> None:
    told = [True]
    settled = Condition(told.pop)
    vm: Any = stub(_sequences=[stub(busy=lambda: True)], _settled=settled, _told=lambda: any(told))
    mmu.Mmu.wait_settled(vm, lambda: False)
    assert settled.waits == [None]


def test_a_vcpu_ends_its_wait_for_something_else() -> None:
    asked = list[bool]()
    settled = Condition(lambda: asked.append(True))
    vm: Any = stub(_sequences=[stub(busy=lambda: True)], _settled=settled, _told=lambda: True)
    mmu.Mmu.wait_settled(vm, lambda: any(asked))
    assert settled.waits == [None]


@pytest.mark.parametrize("made", [True, False])
def test_a_message_waits_for_the_notifier_that_is_being_made(made: bool) -> None:
    def come_to_pass() -> None:
        if made:
            library._notifiers[3] = "notifier"
        else:
            library._binding = 0

    known = Condition(come_to_pass)
    library: Any = stub(_known=known, _notifiers={}, _binding=1)
    found = consumer.Consumer._find(library, 3)
    assert found == ("notifier" if made else consumer._DEAF)
    assert known.waits == [None]


def test_a_service_waits_for_its_last_consumer() -> None:
    of_numbers = {1: "one"}
    idle = Condition(of_numbers.clear)
    some: Any = stub(_idle=idle, _all=of_numbers)
    consumers.Consumers.wait_idle(some)
    assert idle.waits == [None]


def test_a_consumer_waits_a_little_for_those_that_are_about_to_end() -> None:
    file = stub(holder=1, notifier_count=2)

    def one_ends() -> None:
        file.notifier_count -= 1

    idle = Condition(one_ends)
    some: Any = stub(_idle=idle)
    consumers.Consumers._let_end(some, stub(number=2), file)
    assert file.notifier_count == 0
    assert idle.waits == [consumers._LINGER / consumers._LINGER_SLICES] * 2
    # They may not end.
    file.notifier_count, idle.waits[:] = 1 << 20, []
    consumers.Consumers._let_end(some, stub(number=2), file)
    assert len(idle.waits) == consumers._LINGER_SLICES


@pytest.mark.parametrize("over", [True, False])
@pytest.mark.parametrize("entering", [True, False])
def test_a_vcpu_waits_at_its_gate(entering: bool, over: bool) -> None:
    gate = stub(open=False, inside=False)

    def come_to_pass() -> None:
        all_gates._over, gate.open = over, not over

    changed = Condition(come_to_pass)
    all_gates: Any = stub(_changed=changed, _removed=False, _over=False)
    assert gates.Gates._wait(all_gates, gate, entering=entering) is (entering and not over)
    assert gate.inside is (entering and not over)
    assert changed.waits == [None]


def test_a_debugger_waits_until_no_vcpu_is_inside() -> None:
    interrupted = list[int]()
    inside = [stub(open=True, inside=n < 2, vcpu=stub()) for n in range(3)]
    for number, gate in enumerate(inside):
        gate.vcpu.interrupt = lambda number=number: interrupted.append(number)

    def leave() -> None:
        for gate in inside:
            gate.inside = False

    changed = Condition(leave)
    all_gates: Any = stub(_changed=changed, all=inside)
    gates.Gates.shut(all_gates)
    assert (interrupted, changed.waits) == ([0, 1], [None])
    assert [gate.open for gate in inside] == [False] * 3
