"""The level at which private memory is mapped.

It is never larger than folio, alignment and attributes allow, and as large as they do.
"""

import hashlib
import json
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryFile
from typing import Final

import pytest

import hugetlb
from mapped_levels import BASE, PMD, PUD, made
from restrictedmem import guests
from restrictedmem.abi import memory
from restrictedmem.abi.memory import PUNCH
from restrictedmem.kvm import mmu
from restrictedmem.kvm.lpage import Level
from restrictedmem.kvm.memslot import ALL, CODE, LEVEL_SHIFT, PRIVATE, WRITE, Memslot
from restrictedmem.kvm.mmu import Fault
from restrictedmem.kvm.page_fault import FAULT_AROUND
from restrictedmem.mm.pages import Pages
from restrictedmem.protocol import exits
from restrictedmem.protocol.trace_events import Trace, pair
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import PageRange, gfn_t, pgoff_t
from restrictedmem.vmm import elf
from restrictedmem.vmm.vm import Vcpu
from restrictedmem.vmm.vmm import Ended, Vmm

EFAULT, ENOSPC, EHWPOISON = 14, 28, 133

SMALL: Final = ALL | PRIVATE


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


def test_the_trace_names_the_half_of_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace()
    writer, reader = pair()
    trace.start(writer)

    def convert_meanwhile(slot: Memslot, index: int) -> tuple[int, int]:
        slot.attributes[index] = 0
        return index, index + 1

    with made(trace=trace) as vm, open(reader.detach(), encoding="ascii") as events:
        vm.folios.order = 0
        monkeypatch.setattr(mmu, "around", convert_meanwhile)
        assert vm.mmu.fault(vm.slot, BASE + 20) is Fault.RETRY
        trace.end()
        (event, _) = [json.loads(line) for line in events]
    assert (event["private"], event["result"]) == (True, "retry")


# Guests.


MIB: Final = 1 << 20
HUGETLB: Final = pytest.mark.requires("hugetlb")


@contextmanager
def vmm_on(backing: str, size: int) -> Generator[Vmm, None, None]:
    """Make a VM with ``size`` bytes of private memory, of huge pages reserved for it if wanted."""
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
    """sha256 goes round its heap.

    The punched page was digested already, and is written again later.
    """
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
            # The first 2 MiB were taken page by page, for the launch. The rest of the punched folio
            # is single pages.
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
    """The first fetch maps the page as one block, and write-protects the page of code.

    So the block is split into mappings of all smaller levels.
    """
    with vmm_on("hugetlb-1g", 1 << 30) as vmm, open("/dev/null", "r+b", buffering=0) as null:
        vmm.load(elf.parse(guests.path("spin").read_bytes()), ["hash", "64"])
        assert vmm.run(null, null, null) == Ended(0)
        # Beside it, one block of the shared window.
        assert mapped(vmm) == (PMD + FAULT_AROUND, PUD // PMD - 1, 0)
        assert vmm.vm.statistics()["splits"] == 2
