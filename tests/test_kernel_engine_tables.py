"""The kernel engine's page tables, and what a conversion asks of the kernel."""

import os
import struct
from collections.abc import Callable
from typing import Any, Final, cast

import pytest

from outcomes import Errno, outcome
from planting import always, stub
from restrictedmem.abi import kvm, memory
from restrictedmem.consumer import Bound
from restrictedmem.devkvm import VmFd
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.half import Half
from restrictedmem.kvm.kernel import guest_system
from restrictedmem.kvm.kernel.guest_system import System
from restrictedmem.kvm.kernel.page_tables import USER, WRITABLE, PageTables
from restrictedmem.kvm.kernel.private import GuestMemfdHalf, PrivateFile, PrivateFiles
from restrictedmem.kvm.kernel.slots import ByAddress, ByAttribute, KernelSlots, runs
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.protocol import guest_abi
from restrictedmem.service.wire import BindingFlag
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PAGE_SIZE, PageRange, gfn_t, pgoff_t
from software_machine import shared_half

PAGE: Final = 4096

BASE: Final = guest_abi.PRIVATE_BASE
PAGES: Final = 1024
ENOMEM, EFAULT = 12, 14


# Page tables, walked here by hand.


def walk(own: System, linear: int) -> int:
    table = own.tables.root
    for shift in (39, 30, 21, 12):
        (entry,) = struct.unpack_from("=Q", own.memory, table + 8 * (linear >> shift & 511))
        if not entry & 1:
            return 0
        table = entry & ((1 << 52) - 1) & ~0xFFF
    return int(entry)


@pytest.mark.parametrize(
    "linear", [0x1000, 0x3FFF_F000, 0x7F_FFE0_0000, (1 << 44) - (3 << PAGE_SHIFT)]
)
def test_page_tables_lead_where_they_were_told(linear: int) -> None:
    own = System()
    own.tables.reserve(linear, 3)
    own.tables.map(linear, 0x12_3456_7000, 3, USER | WRITABLE)
    assert [walk(own, linear + PAGE * index) & ~0xFFF for index in range(3)] == [
        0x12_3456_7000 + PAGE * index for index in range(3)
    ]
    assert walk(own, linear) & 0xFFF == 0x67
    assert own.tables.entry(linear) == walk(own, linear)
    assert own.tables.entry(linear - PAGE) == walk(own, linear - PAGE) == 0
    own.tables.unmap(linear + PAGE, 1)
    assert [bool(walk(own, linear + PAGE * index)) for index in range(3)] == [True, False, True]


def test_an_entry_that_leads_to_a_table_stays() -> None:
    own = System()
    own.tables.map(BASE, 0, 1, USER)
    before = bytes(own.memory[own.tables.root : own.tables.root + 4 * PAGE])
    own.tables.unmap(BASE, 512)
    own.tables.map(BASE, 1 << 32, 1, USER)
    after = bytes(own.memory[own.tables.root : own.tables.root + 4 * PAGE])
    changed = [at for at in range(0, len(after), 8) if before[at : at + 8] != after[at : at + 8]]
    assert len(changed) <= 1


def test_page_tables_run_out() -> None:
    own = System()
    tables = PageTables(own.memory, guest_system.SIZE - 4 * PAGE, guest_system.SIZE)
    tables.reserve(0, 1)
    with pytest.raises(OSError) as caught:
        tables.reserve(1 << 30, 1)
    assert caught.value.errno == ENOMEM


@pytest.mark.parametrize(
    ("linear", "npages", "errno"),
    [(1 << 30, 3 * 512, ENOMEM), ((2 << 30) - PAGE, 2, ENOMEM), (1 << 30, 2 * 512, 0)],
)
def test_a_range_that_is_refused_takes_no_page_tables(linear: int, npages: int, errno: int) -> None:
    own = System()
    # The root, three for the first page, and three more.
    tables = PageTables(own.memory, guest_system.SIZE - 7 * PAGE, guest_system.SIZE)
    tables.reserve(0, 1)
    before = own.memory[:]
    assert outcome(lambda: tables.reserve(linear, npages)) == (Errno(errno) if errno else None)
    same = own.memory[:] == before
    assert same is bool(errno)
    if errno:
        tables.reserve(1 << 30, 2 * 512)


def test_a_guest_reaches_nothing_of_the_engine_but_two_pages() -> None:
    own = System()
    own.add_vcpu(0)
    for page in range(guest_system.SIZE >> PAGE_SHIFT):
        entry = walk(own, (1 << guest_abi.GPA_BITS) + (page << PAGE_SHIFT))
        assert not entry & USER
    hypercall, report = walk(own, guest_abi.HYPERCALL_PAGE), walk(own, guest_abi.REPORT_PAGE)
    assert hypercall & (USER | WRITABLE) == USER
    assert report & (USER | WRITABLE) == USER | WRITABLE
    assert report >> 63 == 1
    assert walk(own, guest_system.STAGING) == walk(own, guest_system.COPY) == 0


# Conversions, against a recording of what is asked of the kernel.


class Recorder:
    """Stands for ``devkvm.Vm``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def record(*arguments: Any) -> None:
            self.calls.append((name, arguments))

        return record

    def take(self, name: str) -> list[tuple[Any, ...]]:
        found = [arguments for called, arguments in self.calls if called == name]
        self.calls = [call for call in self.calls if call[0] != name]
        return found


class NoFile:
    """Stands for a guest_memfd made without MMAP."""

    flags = 0


def slot_of_both(own: System, private: bool = True, shared: bool = True) -> Memslot:
    window = PageRange(pgoff_t(16), pgoff_t(16 + PAGES))
    half = GuestMemfdHalf(
        PrivateFile(1, 1, cast("Any", NoFile()), MAX_FILE_BYTES, None),
        window,
        binding=1,
        unbind=lambda: None,
    )
    return Memslot(
        0,
        gfn_t(BASE >> PAGE_SHIFT),
        PAGES,
        private=half if private else None,
        shared=shared_half(PAGES) if shared else None,
    )


def test_with_memory_attributes_a_slot_is_one_and_the_kernel_converts() -> None:
    own, vm = System(), Recorder()
    by = ByAttribute(cast("VmFd", vm), KernelSlots(cast("VmFd", vm), own), own.tables)
    slot = slot_of_both(own)
    slot.attributes[8:16] = bytes([1]) * 8
    assert vm.take("set_user_memory_region") == [(0, 0, guest_system.SIZE, own.address)]
    by.add(slot)
    assert slot.shared is not None
    assert isinstance(slot.private, GuestMemfdHalf)
    gpa = 1 << 32
    assert vm.take("set_user_memory_region2") == [
        (1, gpa, PAGES * PAGE, slot.shared.address, slot.private.file.memfd, 16 * PAGE)
    ]
    private = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
    assert vm.take("set_memory_attributes") == [
        (gpa, 8 * PAGE, 0),
        (gpa + 8 * PAGE, 8 * PAGE, private),
        (gpa + 16 * PAGE, (PAGES - 16) * PAGE, 0),
    ]
    assert walk(own, BASE) & ~0xFFF == gpa
    assert walk(own, BASE + 9 * PAGE) & ~0xFFF == gpa + 9 * PAGE
    by.convert(slot, gfn_t((BASE >> PAGE_SHIFT) + 1), gfn_t((BASE >> PAGE_SHIFT) + 3), private=True)
    assert vm.take("set_memory_attributes") == [(gpa + PAGE, 2 * PAGE, private)]
    assert by.find(gpa + 5) == BASE + 5
    by.remove(slot)
    assert vm.take("delete_memory_region") == [(1,)]
    assert vm.take("set_memory_attributes") == [(gpa, PAGES * PAGE, 0)]
    assert walk(own, BASE) == 0
    assert by.find(gpa) is None
    slot.close()


def test_with_memory_attributes_a_half_that_is_missing_has_no_entry() -> None:
    own, vm = System(), Recorder()
    by = ByAttribute(cast("VmFd", vm), KernelSlots(cast("VmFd", vm), own), own.tables)
    slot = slot_of_both(own, shared=False)
    slot.attributes[1] = 1
    by.add(slot)
    assert [bool(walk(own, BASE + PAGE * index)) for index in range(3)] == [False, True, False]
    (arguments,) = vm.take("set_user_memory_region2")
    assert arguments[3] == 0


def within_reach(half: Half, page: int) -> bool:
    """Say whether the kernel may read a page of a half for this process, as KVM would."""
    reader, writer = os.pipe()
    with OwnedFd(reader), OwnedFd(writer):
        found = outcome(
            lambda: os.write(writer, half.mapping.memory[page * PAGE : page * PAGE + 1])
        )
        assert found in (1, Errno(EFAULT))
        return found == 1


@pytest.mark.requires("guard")
def test_with_memory_attributes_the_shared_half_of_private_pages_is_out_of_reach() -> None:
    own, vm = System(), Recorder()
    by = ByAttribute(cast("VmFd", vm), KernelSlots(cast("VmFd", vm), own), own.tables)
    slot = slot_of_both(own)
    assert slot.shared is not None
    slot.shared.mapping.memory[9 * PAGE] = 0x55
    slot.attributes[8:16] = bytes([1]) * 8
    by.add(slot)
    assert [within_reach(slot.shared, page) for page in (7, 8, 15, 16)] == [
        True,
        False,
        False,
        True,
    ]
    first = gfn_t(BASE >> PAGE_SHIFT)
    by.convert(slot, gfn_t(first + 7), gfn_t(first + 8), private=True)
    by.convert(slot, gfn_t(first + 9), gfn_t(first + 10), private=False)
    assert [within_reach(slot.shared, page) for page in (6, 7, 8, 9, 10)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert slot.shared.mapping.memory[9 * PAGE] == 0x55

    def refuse(*_: object) -> None:
        raise OSError(ENOMEM, "no memory for attributes")

    vars(vm)["set_memory_attributes"] = refuse
    with pytest.raises(OSError, match="no memory for attributes"):
        by.convert(slot, gfn_t(first + 8), gfn_t(first + 18), private=True)
    assert [within_reach(slot.shared, page) for page in (8, 9, 10, 16, 17)] == [
        False,
        True,
        False,
        True,
        True,
    ]
    del vars(vm)["set_memory_attributes"]
    by.remove(slot)
    assert all(within_reach(slot.shared, page) for page in range(20))
    slot.close()


def test_before_guards_a_shared_half_stays_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    own, vm = System(), Recorder()
    by = ByAttribute(cast("VmFd", vm), KernelSlots(cast("VmFd", vm), own), own.tables)
    slot = slot_of_both(own)
    slot.attributes[:] = bytes([1]) * PAGES
    assert slot.shared is not None
    monkeypatch.setattr(memory, "MADV_GUARD_INSTALL", 1000)
    by.add(slot)
    assert within_reach(slot.shared, 0)
    slot.close()


def test_without_them_each_half_is_a_slot_and_only_pages_that_convert_are_zapped() -> None:
    own, vm = System(), Recorder()
    by = ByAddress(KernelSlots(cast("VmFd", vm), own), own.tables)
    slot = slot_of_both(own, private=False)
    by.add(slot)
    assert len(vm.take("set_user_memory_region")) == 2
    assert slot.shared is not None
    slot.shared.mapping.memory[:] = b"x" * PAGES * PAGE
    resident = resident_pages(slot.shared)
    by.convert(slot, gfn_t((BASE >> PAGE_SHIFT) + 1), gfn_t((BASE >> PAGE_SHIFT) + 3), private=True)
    assert [bool(walk(own, BASE + PAGE * index)) for index in range(4)] == [
        True,
        False,
        False,
        True,
    ]
    # Gone from this process, and so from KVM, though not from the file.
    assert resident - resident_pages(slot.shared) == 2
    assert slot.shared.mapping.memory[PAGE] == ord("x")
    slot.close()


def resident_pages(half: Half) -> int:
    """Count the pages that this process maps (/proc/self/pagemap). MADV_DONTNEED unmaps them."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(half.address >> PAGE_SHIFT << 3)
        return sum(
            entry >> 63
            for (entry,) in struct.iter_unpack("=Q", pagemap.read(8 * (half.size >> PAGE_SHIFT)))
        )


def test_runs_of_attributes() -> None:
    own = System()
    slot = slot_of_both(own)
    slot.attributes[2:5] = bytes([1]) * 3
    base = slot.base_gfn
    found = [
        (start - base, end - base, private)
        for start, end, private in runs(slot, gfn_t(base + 1), gfn_t(base + 8))
    ]
    assert found == [(1, 2, False), (2, 5, True), (5, 8, False)]
    slot.close()


def test_pages_are_counted_where_a_binding_hears_of_them() -> None:
    """The binding is told of pages 16 to 31 of the file."""
    counted: list[tuple[int, int]] = []

    def resident_pages(offset: int, length: int) -> int:
        counted.append((offset, length))
        return 5

    gmem = stub(flags=0, resident_pages=resident_pages)

    def bind(_: bytes, window: PageRange, take: Callable[[Bound], object]) -> Bound:
        del window, take
        memfd, sequence = memory.memfd_create("file"), memory.memfd_create("sequence")
        os.ftruncate(memfd.fileno(), 64 * PAGE_SIZE)
        return Bound(7, 1, None, memfd, sequence, flags=BindingFlag.RANGE, order=0)

    files = PrivateFiles(stub(create_guest_memfd=always(gmem)), stub(bind=bind), 0)
    files.bind(b"", PageRange(pgoff_t(16), pgoff_t(32)))
    spans = [(0, 17), (20, 22), (31, 40), (0, 16), (32, 40)]
    found = [files.resident(7, PageRange(pgoff_t(first), pgoff_t(last))) for first, last in spans]
    assert found == [5, 5, 5, 0, 0]
    assert counted == [
        (16 * PAGE_SIZE, PAGE_SIZE),
        (20 * PAGE_SIZE, 2 * PAGE_SIZE),
        (31 * PAGE_SIZE, PAGE_SIZE),
    ]
    assert files.resident(8, PageRange(pgoff_t(16), pgoff_t(17))) == 0
