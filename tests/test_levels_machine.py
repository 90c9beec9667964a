"""The level at which private memory is mapped, after any operations.

A state machine compares it with a look at every page.
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mapped_levels import PMD, PUD, Vm, made
from restrictedmem.kvm.lpage import Level
from restrictedmem.kvm.memslot import CODE, LEVEL_SHIFT
from restrictedmem.kvm.mmu import Fault
from restrictedmem.mm.pages import Pages
from restrictedmem.units import gfn_t, pgoff_t

EFAULT, EHWPOISON = 14, 133

#: Entries as "is there one" and as "is it of code", a byte each.
_ANY: Final = bytes([0] + [1] * 255)
_OF_CODE: Final = bytes(bool(entry & CODE) for entry in range(256))


def naive_level(vm: Vm, index: int, order: int) -> Level:
    """Return the largest level at which a private page in a folio of ``order`` may be mapped."""
    slot, half = vm.slot, vm.half
    for level in (Level.PUD, Level.PMD):
        first = (slot.base_gfn + index) // level.pages * level.pages - slot.base_gfn
        last = first + level.pages
        inside = first >= 0 and last <= len(slot.entries)
        if order < level.order or not inside or (half.window.start - slot.base_gfn) % level.pages:
            continue
        lost = any(first <= pgoff - half.window.start < last for pgoff in half.failed)
        code = 1 in slot.entries[first:last].translate(_OF_CODE)
        if 0 not in slot.attributes[first:last] and not lost and not code:
            return level
    return Level.PAGE


@contextmanager
def orders_told() -> Generator[list[int]]:
    """Collect what get_page answers."""
    get_page, told = Pages.get_page, list[int]()

    def collecting(pages: Pages, pgoff: pgoff_t) -> int:
        told.append(get_page(pages, pgoff))
        return told[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pages, "get_page", collecting)
        yield told


class Levels(RuleBasedStateMachine):
    """Faults, zaps, conversions, punches, losses and code on a slot whose folios come and go."""

    @initialize(
        pages=st.sampled_from([PMD, 2 * PMD, 3 * PMD + 5, PUD]),
        first=st.sampled_from([0, 0, PMD - 3, 7]),
        shift=st.sampled_from([0, 0, 0, 1, PMD]),
        offered=st.sampled_from([9, 9, 18, 0]),
    )
    def make(self, pages: int, first: int, shift: int, offered: int) -> None:
        self.context = made(pages, order=offered or 9, first=first, shift=shift, offered=offered)
        self.vm = self.context.__enter__()
        self.pages = pages

    def teardown(self) -> None:
        if hasattr(self, "vm"):
            self.context.__exit__(None, None, None)

    def page(self, data: st.DataObject) -> int:
        """Pick a page, often one beside an edge of a block."""
        slot = self.vm.slot
        edges = range(-slot.base_gfn % PMD, self.pages, PMD)
        near = [edge + by for edge in edges for by in (-1, 0, 1) if 0 <= edge + by < self.pages]
        return data.draw(
            st.one_of(st.sampled_from(near or [0]), st.integers(0, self.pages - 1)), "page"
        )

    def range(self, data: st.DataObject) -> tuple[int, int]:
        one, other = self.page(data), self.page(data)
        # One page most of the time, else all between two.
        return (
            (one, one + 1)
            if data.draw(st.booleans(), "one page")
            else (min(one, other), max(one, other) + 1)
        )

    def error_at(self, index: int) -> int:
        if not self.vm.slot.attributes[index]:
            return EFAULT
        return (
            EHWPOISON if self.vm.slot.pgoff_of(self.vm.base + index) in self.vm.half.failed else 0
        )

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.do_touch(self.page(data))

    def do_touch(self, index: int) -> None:
        vm = self.vm
        missing = not vm.slot.entries[index]
        if self.error_at(index) == EHWPOISON:
            with pytest.raises(OSError, match="lost") as caught:
                vm.touch(index)
            assert caught.value.errno == EHWPOISON
            return
        with orders_told() as told:
            fault = vm.touch(index)
        assert fault is (Fault.MAPPED if vm.slot.attributes[index] else Fault.NO_HALF)
        if fault is Fault.MAPPED and missing:
            # Pages may not know yet that a block became a folio; the fault itself may make them ask
            # the next time.
            order = told[0] if told else vm.folios.order_of(vm.slot.pgoff_of(vm.base + index))
            assert vm.level(index) is naive_level(vm, index, order)

    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        index = self.page(data)
        self.do_touch(index)
        self.vm.mmu.protect_code(self.vm.slot, self.vm.slot.base_gfn + index)

    @rule(data=st.data())
    def prefault(self, data: st.DataObject) -> None:
        first, last = self.range(data)
        prefault = partial(
            self.vm.mmu.prefault, gfn_t(self.vm.base + first), gfn_t(self.vm.base + last)
        )
        error = self.error_at(first)
        if error:
            with pytest.raises(OSError, match=r"lost|no such half") as caught:
                prefault()
            assert caught.value.errno == error
            return
        done = prefault()
        assert 0 < done <= last - first
        assert all(self.vm.slot.entries[first : first + done])

    @rule(data=st.data(), private=st.booleans())
    def convert(self, data: st.DataObject, *, private: bool) -> None:
        self.vm.convert(*self.range(data), private=private)

    @rule(data=st.data())
    def punch(self, data: st.DataObject) -> None:
        self.vm.punch(*self.range(data))

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.vm.lose(self.page(data))

    @rule(data=st.data())
    def collapse(self, data: st.DataObject) -> None:
        """Make a block a folio that has pages or not, as khugepaged may."""
        self.vm.folios.folios[9].add(
            self.vm.slot.pgoff_of(self.vm.slot.base_gfn + self.page(data)) >> 9
        )

    @rule(order=st.sampled_from([0, 9]))
    def fragment(self, order: int) -> None:
        self.vm.folios.order = order

    @invariant()
    def nothing_is_mapped_larger_than_it_may_be(self) -> None:
        if not hasattr(self, "vm"):
            return
        vm, slot = self.vm, self.vm.slot
        counted = dict.fromkeys(Level, 0)
        index = 0
        while index < self.pages:
            last = min(slot.block(index, Level.PMD)[1], self.pages)
            if max(slot.entries[index:last]) >> LEVEL_SHIFT:
                level = vm.level(index)
                assert level is not None
                assert slot.leaf(index)[0] == index
                last = index + level.pages
                assert len(set(slot.entries[index:last])) == 1
                assert level <= naive_level(
                    vm, index, vm.folios.order_of(slot.pgoff_of(slot.base_gfn + index))
                )
                counted[level] += 1
            else:
                counted[Level.PAGE] += last - index - slot.entries.count(0, index, last)
            index = last
        assert vm.mapped() == tuple(counted.values())

    @invariant()
    def what_is_mapped_is_private_and_not_lost_and_what_is_not_is_in_no_tlb(self) -> None:
        if not hasattr(self, "vm"):
            return
        slot, half = self.vm.slot, self.vm.half
        entries, private, tlb = (
            int.from_bytes(part.translate(_ANY), "little")
            for part in (slot.entries, slot.attributes, self.vm.tlb)
        )
        assert not entries & ~private
        assert not tlb & ~entries
        assert not any(slot.entries[pgoff - half.window.start] for pgoff in half.failed)


TestLevels = pytest.mark.no_cover(Levels.TestCase)
Levels.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
