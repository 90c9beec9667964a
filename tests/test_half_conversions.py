"""Conversions that fail half way, because an owner limits its engine's memory (prlimit)."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, Final, TypeVar, cast

import pytest

from outcomes import Errno, failing_at, in_child, outcome
from restrictedmem.abi import kvm
from restrictedmem.devkvm import VmFd
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine_vcpu import EngineVcpus
from restrictedmem.kvm.half import forbid_shrinking
from restrictedmem.kvm.kernel.guest_system import SIZE, System
from restrictedmem.kvm.kernel.page_tables import PRESENT, WRITABLE
from restrictedmem.kvm.kernel.private import GuestMemfdHalf, PrivateFile
from restrictedmem.kvm.kernel.slots import ByAddress, ByAttribute, Conversion, KernelSlots
from restrictedmem.kvm.memslot import READ, Memslot
from restrictedmem.kvm.mmu import Fault, Mmu
from restrictedmem.kvm.software.software_vm import SoftwareVm
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.kvm.whole import begun, whole
from restrictedmem.mm import page_attributes
from restrictedmem.mm.notifier import Api
from restrictedmem.platform.platform import NoPlatform
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PAGE_SIZE, PageRange, gfn_t, pgoff_t
from software_machine import shared_half

GPA: Final = 0x4000_0000
BASE: Final = gfn_t(GPA >> PAGE_SHIFT)
PAGES: Final = 1024
START, END = gfn_t(BASE + 500), gfn_t(BASE + 600)
ENOMEM, EINVAL = 12, 22
_T = TypeVar("_T")


def each_failure(make: Callable[[], _T], act: Callable[[_T], object]) -> Iterator[_T]:
    """Yield objects of ``make`` after ``act``: one for each call of ``act`` that finds no memory.

    The last object is one for which all calls find memory.
    """
    for number in count():
        made = make()
        failed = failing_at(number, partial(act, made))
        yield made
        if not failed:
            return


class KvmVm:
    """The kernel's VM as far as slots need it: its attributes, its memory, and its slots.

    It can lack memory for the slots.
    """

    def __init__(self) -> None:
        self.private: set[int] = set()
        self.slots: set[int] = set()
        self.error = 0

    def set_user_memory_region(self, slot: int, *_: object) -> None:
        if self.error:
            raise OSError(self.error, "KVM_SET_USER_MEMORY_REGION")
        self.slots.add(slot)

    set_user_memory_region2 = set_user_memory_region

    def delete_memory_region(self, slot: int) -> None:
        self.slots.remove(slot)

    def set_memory_attributes(self, address: int, size: int, attributes: int) -> None:
        if self.error:
            raise OSError(self.error, "KVM_SET_MEMORY_ATTRIBUTES")
        pages = range(address >> PAGE_SHIFT, address + size >> PAGE_SHIFT)
        (self.private.update if attributes else self.private.difference_update)(pages)


class NoFile:
    """A guest_memfd made without MMAP."""

    flags = 0


class Engine:
    """The part of the kernel's engine that converts, and one slot in it with a shared half."""

    def __init__(self, by: str) -> None:
        self.own, self.kvm = System(), KvmVm()
        vm = cast("VmFd", self.kvm)
        slots, tables = KernelSlots(vm, self.own), self.own.tables
        private = None
        if by == "attribute":
            file = PrivateFile(1, 1, cast("Any", NoFile()), MAX_FILE_BYTES, None)
            private = GuestMemfdHalf(
                file, PageRange(pgoff_t(0), pgoff_t(PAGES)), binding=1, unbind=lambda: None
            )
        self.conversion: Conversion = (
            ByAttribute(vm, slots, tables) if by == "attribute" else ByAddress(slots, tables)
        )
        self.slot = Memslot(0, BASE, PAGES, private=private, shared=shared_half(PAGES))
        self.conversion.add(self.slot)

    def convert(self, private: bool = True) -> None:
        self.conversion.convert(self.slot, START, END, private=private)

    def shown(self) -> list[bool]:
        """Return which pages lead to their shared half."""
        own, leads = self.own.tables, list[bool]()
        for gfn in range(BASE, BASE + PAGES):
            entry = own.entry(gfn << PAGE_SHIFT)
            leads.append(
                bool(entry & PRESENT)
                and (entry & (1 << 52) - 1) >> PAGE_SHIFT not in self.kvm.private
            )
        return leads


@pytest.fixture(params=["address", "attribute"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = Engine(request.param)
    yield made
    made.slot.close()


def told_private(engine: Engine) -> list[bool]:
    return [bool(private) for private in engine.slot.attributes]


@pytest.mark.parametrize("by", ["address", "attribute"])
def test_no_page_is_told_to_be_private_that_leads_to_the_shared_half(by: str) -> None:
    converted: list[int] = []
    for engine in each_failure(partial(Engine, by), Engine.convert):
        pages = zip(told_private(engine), engine.shown(), strict=True)
        assert not any(private and shown for private, shown in pages), len(converted)
        converted.append(sum(told_private(engine)))
        engine.slot.close()
    assert len(converted) > 5
    assert converted[-1] == END - START


def test_pages_of_a_read_only_slot_can_be_written_to_while_content_is_put_in() -> None:
    engine = Engine("attribute")
    engine.conversion.remove(engine.slot)
    engine.slot.rights = READ
    engine.conversion.add(engine.slot)
    engine.convert()

    def writable() -> list[int]:
        return [
            gfn
            for gfn in range(BASE, BASE + PAGES)
            if engine.own.tables.entry(gfn << PAGE_SHIFT) & WRITABLE
        ]

    assert writable() == []
    with engine.conversion.open_for_copy(engine.slot, START, END):
        assert writable() == list(range(START, END))
        engine.kvm.private.clear()
    assert writable() == []
    # A change of the attribute and back zaps the kernel's translations of the entries.
    assert engine.kvm.private == {
        (engine.own.tables.entry(gfn << PAGE_SHIFT) & (1 << 52) - 1) >> PAGE_SHIFT
        for gfn in range(START, END)
    }
    engine.slot.close()


def test_what_the_kernel_has_no_memory_for_changes_nothing() -> None:
    engine = Engine("attribute")
    engine.kvm.error = ENOMEM
    before = engine.shown()
    with pytest.raises(OSError) as caught:
        engine.convert()
    assert caught.value.errno == ENOMEM
    assert (told_private(engine), engine.shown()) == ([False] * PAGES, before)
    engine.slot.close()


def test_an_errno_in_the_middle_is_not_one_of_a_call_that_changed_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(EINVAL, "madvise")

    # After the tables are written, or while they are.
    if isinstance(engine.conversion, ByAddress):
        monkeypatch.setattr(type(engine.conversion), "_zap", staticmethod(fail))
    else:
        monkeypatch.setattr(engine.own.tables, "write", fail)
    with pytest.raises(RuntimeError):
        engine.convert()
    assert told_private(engine) == [False] * PAGES


@pytest.mark.parametrize("by", ["address", "attribute"])
def test_a_slot_that_finds_no_memory_leaves_no_entries(by: str) -> None:
    def make() -> Engine:
        made = Engine(by)
        made.conversion.remove(made.slot)
        return made

    shown: list[bool] = []
    for engine in each_failure(make, lambda engine: engine.conversion.add(engine.slot)):
        shown.append(any(engine.shown()))
        engine.slot.close()
    assert len(shown) > 5
    assert shown == [False] * (len(shown) - 1) + [True]


def test_a_slot_that_the_kernel_refuses_takes_no_page_tables(engine: Engine) -> None:
    engine.conversion.remove(engine.slot)
    before = engine.own.memory[:]
    engine.kvm.error = EINVAL
    engine.slot.base_gfn, engine.slot.end_gfn = gfn_t(BASE * 16), gfn_t(BASE * 16 + PAGES)
    assert outcome(lambda: engine.conversion.add(engine.slot)) == Errno(EINVAL)
    same = engine.own.memory[:] == before
    assert same


def test_a_slot_that_finds_no_page_tables_is_none_of_the_kernels(engine: Engine) -> None:
    engine.conversion.remove(engine.slot)
    before, slots = engine.own.memory[:], set(engine.kvm.slots)
    engine.slot.end_gfn = gfn_t(BASE + (SIZE // PAGE_SIZE << 9))
    assert outcome(lambda: engine.conversion.add(engine.slot)) == Errno(ENOMEM)
    assert engine.kvm.slots == slots
    same = engine.own.memory[:] == before
    assert same


# The software engine, under the VM's own list of attributes.


class Window:
    """A VM of the software engine with one slot, of shared memory that the guest has mapped."""

    def __init__(self) -> None:
        self.attributes = Attributes(Api.V10)
        self.engine = SoftwareVm(
            cast("Any", None), EngineVcpus(), self.attributes, Trace(), NoPlatform()
        )
        self.memory = VmMemory(
            self.engine, cast("Any", None), Api.V10, self.attributes, forbid_shrinking
        )
        with OwnedFd(os.memfd_create("window", os.MFD_ALLOW_SEALING)) as fd:
            os.ftruncate(fd.fileno(), PAGES * PAGE_SIZE)
            region = kvm.kvm_userspace_memory_region_ext(
                slot=0,
                flags=0,
                userspace_addr=0,
                guest_phys_addr=GPA,
                memory_size=PAGES * PAGE_SIZE,
            )
            self.memory.set_region(region, b"", fd)
        (self.slot,) = self.memory.slots
        for gfn in range(BASE, BASE + PAGES):
            self.engine.mmu.fault(self.slot, gfn)

    def convert(self) -> None:
        size = (END - START) << PAGE_SHIFT
        assert (
            self.memory.set_attributes(
                Api.V10, START << PAGE_SHIFT, size, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE, 0
            )
            == size
        )

    def state(self) -> tuple[bytes, bytes, list[bool]]:
        listed = [self.attributes.is_private(gfn) for gfn in range(BASE, BASE + PAGES)]
        return bytes(self.slot.attributes), bytes(self.slot.entries), listed


def test_the_softwares_entries_go_before_pages_are_told_to_be_private() -> None:
    converted: list[int] = []
    for window in each_failure(Window, Window.convert):
        attributes, entries, listed = window.state()
        pages = zip(attributes, entries, listed, strict=True)
        assert not any(
            (private or claimed) and (entry or not private) for private, entry, claimed in pages
        ), len(converted)
        converted.append(sum(attributes))
        window.slot.close()
    assert len(converted) > 20
    assert converted[-1] == END - START


def change_slot(
    window: Window, number: int, gpa: int, size: int, failing: int
) -> tuple[bool, tuple[set[int], ...]]:
    """Say whether memory was missing, and which slots VM and engine know, by number and by page."""
    with OwnedFd(os.memfd_create("other", os.MFD_ALLOW_SEALING)) as fd:
        os.ftruncate(fd.fileno(), PAGE_SIZE)
        region = kvm.kvm_userspace_memory_region_ext(
            slot=number, flags=0, userspace_addr=0, guest_phys_addr=gpa, memory_size=size
        )
        failed = failing_at(failing, partial(window.memory.set_region, region, b"", fd))
    lists = (window.memory.slots, window.engine.mmu.slots)
    by_number = [{slot.number for slot in slots} for slots in lists]
    by_page = [{slot.number for slot in slots.overlapping(0, 1 << 52)} for slots in lists]
    return failed, (*by_number, *by_page)


@pytest.mark.parametrize(
    ("number", "gpa", "size", "after"),
    [(1, 0x8000_0000, PAGE_SIZE, {0, 1}), (0, GPA, 0, set[int]())],
)
def test_a_slot_is_known_everywhere_or_nowhere_whatever_fails(
    number: int, gpa: int, size: int, after: set[int]
) -> None:
    """A slot known to the engine but not to the VM's own list would be in no measurement.

    Nothing would hold it.
    """
    window = Window()
    done, outcomes = repr((False, (after,) * 4)), list[str]()
    while done not in outcomes:
        outcomes.append(in_child(partial(change_slot, window, number, gpa, size, len(outcomes))))
    # "": the engine ended.
    assert set(outcomes) <= {"", done, repr((True, ({0},) * 4)), repr((True, (after,) * 4))}
    assert "" in outcomes
    window.slot.close()


def test_a_list_that_is_full_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    window = Window()
    before = window.state()
    monkeypatch.setattr(page_attributes, "_MAX_CHANGES", 1)
    with pytest.raises(OSError) as caught:
        window.convert()
    assert caught.value.errno == ENOMEM
    assert window.state() == before
    window.slot.close()


def test_a_vcpu_that_cannot_be_sent_out_is_no_errno_of_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(EINVAL, "kick")

    window = Window()
    monkeypatch.setattr(EngineVcpus, "drop", fail)
    with pytest.raises(RuntimeError):
        window.convert()
    window.slot.close()


def test_what_is_done_by_half_ends_the_engine() -> None:
    def refuse() -> None:
        with whole():
            raise OSError(EINVAL, "a range")

    def find_no_memory() -> None:
        with whole():
            raise MemoryError

    def fail_half_way() -> None:
        with whole(), begun():
            raise OSError(EINVAL, "madvise")

    assert in_child(refuse) == repr(Errno(EINVAL))
    assert in_child(find_no_memory) == ""
    assert in_child(fail_half_way) == ""


def test_a_slot_over_private_pages_has_mixed_blocks() -> None:
    window = Window()
    window.convert()
    assert window.memory.statistics()["mixed_2m"] == 2
    slot = window.slot
    window.memory._replace(slot, None)
    assert window.memory.statistics()["mixed_2m"] == 0
    again = Memslot(0, BASE, PAGES, private=None, shared=slot.shared)
    window.memory._replace(None, again)
    assert window.memory.statistics()["mixed_2m"] == 2
    again.close()


def test_a_conversion_meanwhile_makes_a_shared_fault_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    window = Window()
    mmu, install = window.engine.mmu, Mmu._map_shared

    def overtaken(self: Mmu, slot: Memslot, first: int, last: int) -> Fault:
        self.set_attributes(slot, START, END, private=True)
        return install(self, slot, first, last)

    mmu._zap(window.slot, START, END)
    monkeypatch.setattr(Mmu, "_map_shared", overtaken)
    assert (mmu.fault(window.slot, START), mmu.counters.retries) == (Fault.RETRY, 1)
    window.slot.close()


@pytest.mark.parametrize(
    ("api", "attribute", "told"),
    [(Api.V9, 0, Errno(ENOMEM)), (Api.V10, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE, PAGE_SIZE)],
)
def test_of_two_slots_of_which_the_second_fails(api: Api, attribute: int, told: object) -> None:
    """v10 returns how much was done, v9 the error. In both, the first slot's pages have changed."""

    def set_attributes(slot: Memslot, *_: object, **__: object) -> None:
        if slot is second:
            raise OSError(ENOMEM, "the second")

    engine, attributes, half = (
        SimpleNamespace(set_attributes=set_attributes),
        Attributes(api),
        cast("Any", SimpleNamespace(window=range(1), locked=0, unlocked_because="")),
    )
    memory = VmMemory(cast("Any", engine), cast("Any", None), api, attributes, forbid_shrinking)
    first, second = (
        Memslot(number, gfn_t(BASE + number), 1, private=half, shared=None) for number in range(2)
    )
    for slot in (first, second):
        memory.slots.add(slot)
    assert outcome(partial(memory.set_attributes, api, GPA, 2 * PAGE_SIZE, attribute, 0)) == told
    assert [attributes.is_private(BASE + number) for number in range(2)] == [
        bool(attribute),
        not attribute,
    ]
