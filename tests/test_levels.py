"""The level at which private memory is mapped: never larger than folio, alignment and attributes allow, and as large as they do."""

import hashlib
import json
import os
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryFile
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import hugetlb
from restrictedmem import guests
from restrictedmem.abi import memory
from restrictedmem.abi.memory import PUNCH
from restrictedmem.consumer import Bound
from restrictedmem.consumer.memfd_file import MemfdFile
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.lpage import Level
from restrictedmem.kvm.memslot import (
    ALL,
    CODE,
    LEVEL_SHIFT,
    PRIVATE,
    WRITE,
    MemfdHalf,
    Memslot,
)
from restrictedmem.kvm.mmu import Fault, Mmu
from restrictedmem.kvm.page_fault import FAULT_AROUND
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.design import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.protocol import exits
from restrictedmem.protocol.trace_events import Trace, pair
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import PAGE_SHIFT, PageRange, gfn_t, pgoff_t
from restrictedmem.vmm import elf
from restrictedmem.vmm.vm import Vcpu
from restrictedmem.vmm.vmm import Ended, Vmm

EFAULT, ENOSPC, EHWPOISON = 14, 28, 133
PMD, PUD = Level.PMD.pages, Level.PUD.pages
BASE: Final = 1 << 20
SMALL: Final = ALL | PRIVATE


@dataclass
class Folios:
    """Pages without memory (``Allocator``): a block that is allocated whole and had no page becomes a folio of ``order``, unless 0."""

    order: int
    pages: int
    room: int = 1 << 40
    meanwhile: Callable[[], None] = lambda: None
    #: By order, the folios there are, by their numbers.
    folios: dict[int, set[int]] = field(default_factory=lambda: {9: set[int](), 18: set[int]()})

    def __post_init__(self) -> None:
        self.present = bytearray(self.pages)

    def allocate(self, offset: int, length: int) -> None:
        start, end = offset >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT
        if end - start > self.room:
            raise OSError(ENOSPC, "no room")
        if self.order:
            size = 1 << self.order
            for number in range(-(-start // size), end // size):
                if not any(self.present[number * size : (number + 1) * size]):
                    self.folios[self.order].add(number)
        self.present[start:end] = b"\1" * (end - start)
        self.meanwhile()

    def order_of(self, pgoff: pgoff_t) -> int:
        return next((order for order in (18, 9) if pgoff >> order in self.folios[order]), 0)

    def release(self, offset: int, length: int) -> None:
        pass

    def punch(self, span: PageRange) -> None:
        """As shmem does it: a folio that loses a part is none any more."""
        for order, folios in self.folios.items():
            folios -= set(range(span.start >> order, (span.end - 1 >> order) + 1))
        self.present[span.start : span.end] = bytes(len(span))

    def close(self) -> None:
        pass


@dataclass
class Host:
    """A platform that takes note of what is about to be mapped, or refuses it (``Platform``)."""

    refuses: bool = False
    prepared: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])

    def prepare(self, ino: int, span: PageRange, gfn: gfn_t, order: int) -> None:
        assert (ino, (gfn - span.start) % (1 << order), span.start % (1 << order)) == (1, 0, 0)
        if self.refuses:
            raise OSError(EFAULT, "a rule forbids it")
        self.prepared.append((span.start, span.end, order))

    def invalidate(self, ino: int, span: PageRange, order: int | None) -> None:
        raise AssertionError("the MMU does not call it")

    def freed(self, ino: int, span: PageRange) -> None:
        raise AssertionError("the MMU does not call it")

    def report(self) -> dict[str, object]:
        return {}


@dataclass
class Vm:
    """One private slot, no guest: ``tlb`` is what a vCPU has cached that touches pages, a byte each, and drops what it is told to."""

    file: RestrictedFile
    folios: Folios
    host: Host
    mmu: Mmu
    slot: Memslot

    def __post_init__(self) -> None:
        self.base = self.slot.base_gfn
        self.tlb = bytearray(len(self.slot.entries))

    @property
    def half(self) -> MemfdHalf:
        return self.slot.memfd_half

    def touch(self, index: int) -> Fault:
        """Access a page as a vCPU does, which caches all of a large translation."""
        fault = (
            Fault.MAPPED
            if self.slot.entries[index]
            else self.mmu.fault(self.slot, self.base + index)
        )
        if fault is Fault.MAPPED:
            first, last = self.slot.leaf(index)
            self.tlb[first:last] = b"\1" * (last - first)
        return fault

    def fetch(self, index: int) -> None:
        self.touch(index)
        self.mmu.protect_code(self.slot, self.base + index)

    def drop(self, start: int, end: int) -> None:
        self.tlb[start - self.base : end - self.base] = bytes(end - start)

    def convert(self, first: int, last: int, *, private: bool) -> None:
        start, end = gfn_t(self.base + first), gfn_t(self.base + last)
        self.drop(*self.mmu.set_attributes(self.slot, start, end, private=private))
        self.slot.lpage.update(start, end)

    def lose(self, index: int) -> None:
        pgoff = self.slot.pgoff_of(self.base + index)
        self.drop(*self.mmu.lose(self.half, PageRange(pgoff, pgoff_t(pgoff + 1))))

    def punch(self, first: int, last: int) -> None:
        span = self.slot.span_of(first, last)
        self.file.fallocate(PUNCH, span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        del order
        self.mmu.begin(self.half)
        self.drop(*self.mmu.invalidate_start(self.half, PageRange(start, end)))
        self.folios.punch(PageRange(start, end))

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        del order
        self.mmu.invalidate_end(self.half, PageRange(start, end))

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("losses are told to the MMU here")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0

    def level(self, index: int) -> Level | None:
        entry = self.slot.entries[index]
        return Level((entry >> LEVEL_SHIFT) + 1) if entry else None

    def mapped(self) -> tuple[int, int, int]:
        """Return how many translations there are of 4 KiB, 2 MiB and 1 GiB."""
        return self.mmu.mapped(Level.PAGE), self.mmu.mapped(Level.PMD), self.mmu.mapped(Level.PUD)


@contextmanager
def made(
    pages: int = 2 * PMD,
    *,
    order: int = 9,
    first: int = 0,
    shift: int = 0,
    offered: int | None = None,
    trace: Trace | None = None,
) -> Generator[Vm, None, None]:
    """Make a VM whose slot begins ``first`` pages behind an aligned one, and at page ``first + shift`` of the file.

    Pages come as folios of ``order``, or, when something else is ``offered``, as those.
    """
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    fd, sequence = (
        OwnedFd(os.dup(fd)) for fd in (file.backing.fileno(), file.sequence().fd.fileno())
    )
    window = PageRange(pgoff_t(first + shift), pgoff_t(first + shift + pages))
    bound = Bound(1, 1, None, fd, sequence, flags=0, order=order)
    half = MemfdHalf(MemfdFile(bound), 1, window, unbind=lambda: None)
    folios = Folios(order if offered is None else offered, window.end)
    half.pages.close()
    half.pages = Pages(folios, window)
    slot = Memslot(0, gfn_t(BASE + first), pages, private=half, shared=None)
    slot.attributes[:] = b"\1" * pages
    host = Host()
    mmu = Mmu(Attributes(Api.V10), trace, host)
    mmu.add_slot(slot)
    vm = Vm(file, folios, host, mmu, slot)
    file.register_notifier(vm)
    try:
        yield vm
    finally:
        file.unregister_notifier(vm)
        slot.close()
        file.put()


# One step at a time.


def test_a_fault_maps_a_whole_folio_and_tells_the_platform_so() -> None:
    with made() as vm:
        assert vm.touch(700) is Fault.MAPPED
        assert vm.slot.entries == bytes(PMD) + bytes([SMALL | 1 << LEVEL_SHIFT]) * PMD
        assert (vm.host.prepared, vm.mapped()) == ([(PMD, 2 * PMD, 9)], (0, 1, 0))
        assert (vm.half.pages.taken, vm.mmu.counters.faults_private) == (PMD, 1)


def test_a_folio_of_1_gib_is_mapped_as_one_where_the_slot_has_all_of_it() -> None:
    with made(PUD + PMD, order=18) as vm:
        vm.touch(5)
        assert (vm.mapped(), vm.level(PUD - 1)) == ((0, 0, 1), Level.PUD)
        vm.folios.folios[18].add(1)
        vm.touch(PUD + 5)
        assert (vm.mapped(), vm.host.prepared) == ((0, 1, 1), [(0, PUD, 18), (PUD, PUD + PMD, 9)])


@pytest.mark.parametrize(
    ("first", "pages", "shift"),
    [(0, PMD - 1, 0), (1, PMD, 0), (0, 2 * PMD, 1), (PMD - 1, PMD, 0)],
    ids=["short", "begins late", "not congruent", "one page of the first block"],
)
def test_blocks_that_the_slot_does_not_show_whole_are_mapped_small(
    first: int, pages: int, shift: int
) -> None:
    with made(pages, first=first, shift=shift) as vm:
        for order in (9, 18):
            vm.folios.folios[order] = {0, 1, 2}
        vm.touch(300)
        assert vm.mapped() == (FAULT_AROUND, 0, 0)


def test_pages_that_are_no_folio_are_mapped_small() -> None:
    with made(offered=0) as vm:
        vm.touch(20)
        assert vm.mapped() == (FAULT_AROUND, 0, 0)
        assert vm.host.prepared == [(16, 32, 0)]


def test_what_came_page_by_page_is_no_folio() -> None:
    with made(offered=0) as vm:
        vm.touch(0)
        vm.folios.order = 9
        vm.touch(100)
        assert vm.mapped() == (2 * FAULT_AROUND, 0, 0)


def test_what_was_mapped_small_is_mapped_as_one_once_it_is_a_folio() -> None:
    with made(offered=0) as vm:
        vm.touch(0)
        vm.folios.folios[9].add(0)
        vm.half.pages.forget(PageRange(pgoff_t(5), pgoff_t(6)))
        vm.touch(200)
        assert vm.mapped() == (0, 1, 0)


def test_a_block_that_becomes_a_folio_behind_a_remembered_order_is_mapped_small_once_more() -> None:
    with made() as vm:
        vm.fetch(PMD)
        vm.punch(0, 730)
        # Order 0 is remembered of the block.
        assert vm.mmu.prefault(gfn_t(BASE + 763), gfn_t(BASE + 764)) == 1
        vm.folios.folios[9].add(1)
        vm.touch(PMD)
        assert (vm.level(PMD), vm.level(800)) == (Level.PAGE, Level.PAGE)
        # Pages were taken anew, so the order is asked for again.
        vm.touch(PMD + FAULT_AROUND)
        assert (vm.level(PMD), vm.level(800)) == (Level.PMD, Level.PMD)


def test_where_a_block_cannot_be_had_less_is_mapped() -> None:
    with made() as vm:
        vm.folios.room = FAULT_AROUND
        assert vm.touch(20) is Fault.MAPPED
        assert vm.mapped() == (FAULT_AROUND, 0, 0)
        vm.folios.room = 1
        vm.touch(100)
        assert vm.mapped() == (FAULT_AROUND + 1, 0, 0)
        vm.folios.room = 0
        with pytest.raises(OSError, match="no room") as caught:
            vm.touch(200)
        assert caught.value.errno == ENOSPC


def test_a_punch_of_a_part_takes_the_whole_translation() -> None:
    """KVM's TDP MMU zaps the entry that overlaps; its vCPUs lose all that it translated."""
    with made() as vm:
        vm.touch(0)
        vm.touch(PMD)
        vm.punch(PMD + 7, PMD + 8)
        assert vm.mapped() == (0, 1, 0)
        assert vm.tlb == b"\1" * PMD + bytes(PMD)
        assert (vm.mmu.counters.zapped, vm.mmu.counters.freed, vm.mmu.counters.splits) == (
            PMD,
            1,
            1,
        )
        vm.touch(PMD + 7)
        assert vm.mapped() == (FAULT_AROUND, 1, 0)
        vm.punch(PMD, 2 * PMD)
        assert vm.mmu.counters.splits == 1
        vm.touch(PMD + 7)
        assert vm.mapped() == (0, 2, 0)


def test_a_punch_across_two_translations_takes_both() -> None:
    with made() as vm:
        vm.touch(0)
        vm.touch(PMD)
        vm.punch(PMD - 1, PMD + 1)
        assert (vm.mapped(), vm.mmu.counters.splits, any(vm.tlb)) == ((0, 0, 0), 2, False)


def test_a_conversion_of_a_part_zaps_the_whole_and_a_mixed_block_is_mapped_small() -> None:
    with made() as vm:
        vm.touch(0)
        vm.convert(3, 4, private=False)
        assert (vm.mapped(), any(vm.tlb), vm.mmu.counters.splits) == ((0, 0, 0), False, 1)
        vm.touch(100)
        assert vm.level(100) is Level.PAGE
        vm.convert(3, 4, private=True)
        vm.touch(200)
        assert (vm.mapped(), vm.level(100)) == ((0, 1, 0), Level.PMD)


def test_attributes_that_lpage_was_not_told_of_yet_count() -> None:
    """The VM writes attributes first; a fault that comes between does not map the block as one."""
    with made() as vm:
        vm.mmu.set_attributes(vm.slot, gfn_t(BASE + 3), gfn_t(BASE + 4), private=False)
        assert vm.slot.lpage.max_level(BASE) is Level.PMD
        vm.touch(100)
        assert vm.mapped() == (FAULT_AROUND, 0, 0)


def test_code_is_protected_alone_in_a_block() -> None:
    with made() as vm:
        vm.touch(0)
        assert vm.mmu.protect_code(vm.slot, BASE + 9) == (SMALL & ~WRITE | CODE, True)
        assert (vm.mapped(), vm.mmu.counters.splits, vm.slot.entries[8], vm.level(8)) == (
            (PMD, 0, 0),
            1,
            SMALL,
            Level.PAGE,
        )
        # A neighbour's fault does not give the page its right back.
        vm.mmu._zap(vm.slot, gfn_t(BASE + 100), gfn_t(BASE + 101))
        vm.touch(100)
        assert vm.mapped() == (PMD, 0, 0)
        assert vm.slot.entries[9] == SMALL & ~WRITE | CODE


def test_code_in_1_gib_splits_down_to_its_page() -> None:
    with made(PUD, order=18) as vm:
        vm.touch(0)
        vm.fetch(PMD + 1)
        assert (vm.mapped(), vm.mmu.counters.splits) == ((PMD, PUD // PMD - 1, 0), 2)
        vm.punch(0, 1)
        assert (vm.mapped(), vm.level(PMD)) == ((PMD, PUD // PMD - 2, 0), Level.PAGE)


def test_a_page_that_is_lost_while_its_slot_is_made_is_whole_after_a_punch() -> None:
    with made() as vm:
        vm.mmu.remove_slot(vm.slot)
        vm.lose(5)
        assert vm.half.failed == {5}
        vm.punch(0, PMD)
        vm.mmu.add_slot(vm.slot)
        vm.touch(5)
        assert vm.half.failed == set()


def test_a_lost_page_is_lost_alone() -> None:
    with made() as vm:
        vm.touch(0)
        vm.lose(5)
        assert (vm.mapped(), any(vm.tlb)) == ((0, 0, 0), False)
        with pytest.raises(OSError, match="lost") as caught:
            vm.touch(5)
        assert caught.value.errno == EHWPOISON
        vm.touch(100)
        assert (vm.mapped(), vm.level(100)) == ((FAULT_AROUND, 0, 0), Level.PAGE)
        vm.punch(0, PMD)
        vm.touch(5)
        assert vm.mapped() == (0, 1, 0)


def test_what_the_platform_refuses_is_not_mapped_at_all() -> None:
    with made() as vm:
        vm.host.refuses = True
        for offered in (9, 0):
            vm.folios.order = offered
            with pytest.raises(OSError, match="a rule forbids it") as caught:
                vm.touch(PMD + 3 if offered else 3)
            assert (caught.value.errno, any(vm.slot.entries), vm.mapped()) == (
                EFAULT,
                False,
                (0, 0, 0),
            )


@pytest.mark.parametrize("beside", [0, PMD - 1])
def test_an_invalidation_anywhere_in_the_block_makes_the_fault_come_again(
    beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made() as vm:
        get_page = Pages.get_page

        def interrupted(pages: Pages, pgoff: pgoff_t) -> int:
            order = get_page(pages, pgoff)
            vm.punch(beside, beside + 1)
            return order

        monkeypatch.setattr(Pages, "get_page", interrupted)
        assert vm.touch(100) is Fault.RETRY
        monkeypatch.undo()
        assert (vm.mapped(), vm.mmu.counters.retries) == ((0, 0, 0), 1)
        # The folio is none any more.
        vm.touch(100)
        assert vm.mapped() == (FAULT_AROUND, 0, 0)


@pytest.mark.parametrize("beside", [0, PMD - 1])
def test_no_block_is_mapped_while_a_part_of_it_is_being_invalidated(beside: int) -> None:
    with made() as vm:
        vm.half.pages.get_pages(PageRange(pgoff_t(0), pgoff_t(PMD)))
        sequence = vm.file.sequence()
        sequence.begin(pgoff_t(beside), pgoff_t(beside + 1))
        assert (vm.touch(100), vm.mapped()) == (Fault.RETRY, (0, 0, 0))
        sequence.end()
        sequence.begin(pgoff_t(PMD), pgoff_t(PMD + 1))
        assert (vm.touch(100), vm.mapped()) == (Fault.MAPPED, (0, 1, 0))
        sequence.end()


def test_a_conversion_meanwhile_makes_the_fault_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with made() as vm:
        get_pages = Pages.get_pages
        converted = gfn_t(BASE + PMD - 1)

        def interrupted(pages: Pages, span: PageRange) -> None:
            get_pages(pages, span)
            vm.mmu.set_attributes(vm.slot, converted, gfn_t(converted + 1), private=False)

        vm.half.pages.get_pages(PageRange(pgoff_t(0), pgoff_t(PMD)))
        monkeypatch.setattr(Pages, "get_pages", interrupted)
        assert vm.touch(100) is Fault.RETRY
        monkeypatch.undo()
        vm.touch(100)
        assert vm.mapped() == (FAULT_AROUND, 0, 0)


def test_prefault_goes_on_behind_the_whole_block() -> None:
    with made(3 * PMD) as vm:
        start, end = gfn_t(BASE + 5), gfn_t(BASE + 3 * PMD)
        assert vm.mmu.prefault(start, end) == PMD - 5
        assert vm.mmu.prefault(start, gfn_t(start + 1)) == 1
        assert vm.mapped() == (0, 1, 0)
        vm.folios.order = 0
        assert vm.mmu.prefault(gfn_t(BASE + PMD), end) == PMD
        assert vm.mapped() == (PMD, 1, 0)
        vm.lose(2 * PMD + 7)
        assert vm.mmu.prefault(gfn_t(BASE + 2 * PMD), end) == 1
        with pytest.raises(OSError, match="lost") as caught:
            vm.mmu.prefault(gfn_t(BASE + 2 * PMD + 7), end)
        assert caught.value.errno == EHWPOISON


def test_the_trace_says_the_level() -> None:
    trace = Trace()
    writer, reader = pair()
    trace.start(writer)
    with made(trace=trace) as vm, open(reader.detach(), encoding="ascii") as events:
        vm.touch(700)
        vm.folios.order = 0
        vm.touch(20)
        vm.host.refuses = True
        with pytest.raises(OSError, match="forbids"):
            vm.touch(100)
        trace.end()
        *found, _ = [json.loads(line) for line in events]
    assert [
        (event["gfn"] - BASE, event["npages"], event["level"], event["result"]) for event in found
    ] == [
        (PMD, PMD, 2, "mapped"),
        (16, 16, 1, "mapped"),
        (96, 0, 0, "error"),
    ]


# All of it, against a look at every page.

#: Entries as "is there one", a byte each.
_ANY: Final = bytes([0] + [1] * 255)


def naive_level(vm: Vm, index: int, order: int) -> Level:
    """Return the largest level at which a private page may be mapped that lies in a folio of ``order``."""
    slot, half = vm.slot, vm.half
    for level in (Level.PUD, Level.PMD):
        first = (slot.base_gfn + index) // level.pages * level.pages - slot.base_gfn
        last = first + level.pages
        inside = first >= 0 and last <= len(slot.entries)
        if order < level.order or not inside or (half.window.start - slot.base_gfn) % level.pages:
            continue
        lost = any(first <= pgoff - half.window.start < last for pgoff in half.failed)
        code = any(entry & CODE for entry in slot.entries[first:last])
        if all(slot.attributes[first:last]) and not lost and not code:
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


# Guests.

MIB: Final = 1 << 20
HUGETLB: Final = pytest.mark.requires("hugetlb")


@contextmanager
def vmm_on(backing: str, size: int) -> Generator[Vmm, None, None]:
    """Make a VM with so many bytes of private memory, out of huge pages set aside for it where it is to have such."""
    with ExitStack() as stack:
        if backing in hugetlb.SIZES:
            page = hugetlb.SIZES[backing]
            stack.enter_context(hugetlb.reserved(page, -(-size // page)))
        service = stack.enter_context(Service.start(Options(backing=backing)))
        yield stack.enter_context(Vmm(size, service))


def mapped(vmm: Vmm) -> tuple[int, int, int]:
    found = vmm.vm.statistics()
    return found["mapped_4k"], found["mapped_2m"], found["mapped_1g"]


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(
    "backing",
    [
        "memfd",
        pytest.param("thp", marks=pytest.mark.requires("orders")),
        pytest.param("hugetlb-2m", marks=HUGETLB),
    ],
)
def test_a_punch_under_a_guest_that_goes_on_computing(backing: str) -> None:
    """sha256 goes round its heap: the page was digested when it is punched, and is written again later."""
    data = bytes(range(251)) * (24 * MIB // 251)
    found: list[tuple[int, int, int]] = []
    with (
        vmm_on(backing, 16 * MIB) as vmm,
        TemporaryFile() as source,
        TemporaryFile() as out,
        open("/dev/null", "wb") as err,
    ):
        vmm.load(elf.parse(guests.path("sha256").read_bytes()))

        def enter(vcpu: Vcpu, value: int) -> exits.Exit:
            if not found and vmm.bytes_in >= 8 * MIB:
                found.append(mapped(vmm))
                memory.fallocate(vmm.restricted_fd, PUNCH, 4 * MIB + 7 * 4096, 4096)
                found.append(mapped(vmm))
            return vcpu.run(value)

        vmm.enter = enter
        source.write(data)
        source.seek(0)
        assert vmm.run(source, out, err) == Ended(0)
        out.seek(0)
        assert out.read() == hashlib.sha256(data).hexdigest().encode() + b"  -\n"
        (small, large, _), after, at_the_end = *found, mapped(vmm)
        splits = vmm.vm.statistics()["splits"]
    match backing:
        case "thp":
            # The first 2 MiB were taken page by page, for the launch; what is left of the punched
            # folio is pages.
            assert (large, after, at_the_end[1]) == (4, (small, large - 1, 0), 16 // 2 - 2)
            assert at_the_end[0] - after[0] == PMD
        case "hugetlb-2m":
            # Part of a huge page is zeroed and not freed, so all of it is mapped as one again; the
            # first has code, and is not.
            assert (large, after, at_the_end[1]) == (4, (small, large - 1, 0), 16 // 2 - 1)
        case _:
            assert (large, after, at_the_end[1]) == (0, (small - 1, 0, 0), 0)
    assert splits == {"memfd": 0, "thp": 1, "hugetlb-2m": 2}[backing]


@pytest.mark.requires("fuse", "hugetlb")
def test_a_guest_on_a_huge_page_of_1_gib() -> None:
    """Mapped as one at the first fetch, which has its page's code protected: so it ends as all smaller levels."""
    with vmm_on("hugetlb-1g", 1 << 30) as vmm, open("/dev/null", "r+b", buffering=0) as null:
        vmm.load(elf.parse(guests.path("spin").read_bytes()), ["hash", "64"])
        assert vmm.run(null, null, null) == Ended(0)
        # Beside it, one block of the shared window.
        assert mapped(vmm) == (PMD + FAULT_AROUND, PUD // PMD - 1, 0)
        assert vmm.vm.statistics()["splits"] == 2
