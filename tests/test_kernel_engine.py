"""The kernel engine by itself: page tables, the state it gives a guest, and what it asks of the kernel."""

import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, TypeVar, cast

import pytest

from outcomes import Errno, outcome
from restrictedmem import guests
from restrictedmem.abi import kvm, memory
from restrictedmem.abi.kvm import Cap, ExitReason
from restrictedmem.abi.kvm_x86 import kvm_sregs
from restrictedmem.consumer import Bound
from restrictedmem.devkvm import Kvm, VmFd
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm import engine_process
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine import VcpuEngine
from restrictedmem.kvm.engine_vcpu import EngineVcpus
from restrictedmem.kvm.half import Half
from restrictedmem.kvm.kernel import guest_system
from restrictedmem.kvm.kernel.guest_system import MAX_VCPUS, System
from restrictedmem.kvm.kernel.kernel_vcpu import KernelVcpu
from restrictedmem.kvm.kernel.kernel_vm import KernelVm
from restrictedmem.kvm.kernel.page_tables import USER, WRITABLE, PageTables
from restrictedmem.kvm.kernel.private import GuestMemfdHalf, PrivateFile
from restrictedmem.kvm.kernel.slots import ByAddress, ByAttribute, KernelSlots, runs
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.mm.notifier import Api
from restrictedmem.protocol import guest_abi
from restrictedmem.protocol.exits import Debug, Hypercall, MemoryFault, Shutdown, Unknown
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.protocol.vm_wire import Creation
from restrictedmem.service import SERVER_VARIABLE, client
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PageRange, gfn_t, pgoff_t
from restrictedmem.vmm import elf
from restrictedmem.vmm.vm import Vm as VmOfOwner
from restrictedmem.vmm.vmm import Vmm
from software_machine import shared_half
from users import ORDINARY, as_user

PAGE: Final = 4096
MIB: Final = 1 << 20
BASE: Final = guest_abi.PRIVATE_BASE
PAGES: Final = 1024
ENOENT, ENOMEM, EACCES, EFAULT, ENODEV, EINVAL, ENOSPC, EOPNOTSUPP = 2, 12, 13, 14, 19, 22, 28, 95
_T = TypeVar("_T")
CALL: Final = "b863000000b900001000ffd1"


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
    """Count the pages that this process maps (/proc/self/pagemap), which MADV_DONTNEED takes away."""
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


# In this process, on /dev/kvm.


class Files:
    """Stands for the service: every token is a file of its own."""

    def bind(self, token: bytes, window: PageRange, take: Callable[[Bound], _T]) -> _T:
        memfd = memory.memfd_create("file")
        os.ftruncate(memfd.fileno(), 1 << 62)
        sequence = OwnedFd(os.eventfd(0))
        return take(Bound(token[0], token[0], None, memfd, sequence, flags=0, order=0))

    def bind_again(self, binding: int, window: PageRange, take: Callable[[int], _T]) -> _T:
        raise AssertionError("of a file whose binding is told of all ranges there is one")

    def unbind(self, number: int) -> None:
        del number


@contextmanager
def make_vm(*, debug: bool = False) -> Generator[KernelVm]:
    with Kvm.open() as device:
        vm = KernelVm(Files(), EngineVcpus(), Attributes(Api.V10), device, debug=debug)
    with closing(vm):
        yield vm


@pytest.fixture
def vm() -> Iterator[KernelVm]:
    with make_vm() as made:
        yield made


@pytest.fixture
def debugged() -> Iterator[KernelVm]:
    with make_vm(debug=True) as made:
        yield made


def private_slot(vm: KernelVm, base: int = BASE, token: bytes = b"\1") -> Memslot:
    half = vm.bind(token, PageRange(pgoff_t(0), pgoff_t(PAGES)))
    slot = Memslot(0, gfn_t(base >> PAGE_SHIFT), PAGES, private=half, shared=None)
    slot.attributes[:] = bytes([1]) * PAGES
    vm.add_slot(slot)
    return slot


@pytest.mark.requires("kvm")
def test_private_memory_is_readable_for_a_debug_policy(debugged: KernelVm) -> None:
    slot = private_slot(debugged)
    debugged.launch_update(slot, BASE, b"secret".ljust(PAGE, b"\0"))
    half = slot.private
    assert isinstance(half, GuestMemfdHalf)
    assert half.mapping is not None
    assert debugged.read_private(slot, BASE, 6) == b"secret"
    assert debugged.read_private(slot, BASE + PAGE - 2, 4) == bytes(4)
    assert half.file.memfd.resident_pages(0, 0) == 1
    debugged.write_private(slot, BASE + 1, b"E")
    assert half.mapping[:6] == b"sEcret"


@pytest.mark.requires("kvm")
def test_private_memory_is_readable_for_nobody_without_it(vm: KernelVm) -> None:
    slot = private_slot(vm)
    vm.launch_update(slot, BASE, b"secret".ljust(PAGE, b"\0"))
    half = slot.private
    assert isinstance(half, GuestMemfdHalf)
    with pytest.raises(OSError) as caught:
        vm.read_private(slot, BASE, 6)
    assert caught.value.errno == EOPNOTSUPP
    if half.mapping is None:
        # With memory attributes there is none to be had.
        with pytest.raises(OSError) as caught:
            half.file.memfd.mmap(0, PAGE)
        assert caught.value.errno == ENODEV
        return
    reader, writer = os.pipe()
    with OwnedFd(reader), OwnedFd(writer):
        # As the kernel says to any access of this process.
        with pytest.raises(OSError) as caught:
            os.write(writer, memoryview(half.mapping)[:6])
        assert caught.value.errno == EFAULT


@pytest.mark.requires("kvm")
def test_steps_and_breakpoints(debugged: KernelVm) -> None:
    vm = debugged
    slot = private_slot(vm)
    code = bytes.fromhex("90ffc7ffc7" + CALL + "ebfe")
    vm.launch_update(slot, BASE, code.ljust(PAGE, b"\0"))
    vcpu = vm.create_vcpu(0)
    vcpu.set_regs(kvm.kvm_regs(rip=BASE, rsp=BASE + MIB))
    vcpu.set_guest_debug(step=True, breakpoints=frozenset())
    assert [vcpu.run() for _ in range(3)] == [Debug(1, BASE + at, 1 << 14) for at in (1, 3, 5)]
    regs = vcpu.get_regs()
    assert (regs.rip, regs.rdi, regs.rflags & 0x100) == (BASE + 5, 2, 0)
    regs.rdi = 40
    vcpu.change_regs(regs)
    vcpu.set_guest_debug(step=False, breakpoints=frozenset({BASE + 10}))
    assert vcpu.run() == Debug(3, BASE + 10)
    vcpu.set_guest_debug(step=False, breakpoints=frozenset())
    assert vcpu.run() == Hypercall(99, (40, 0, 0, 0))
    assert vcpu.get_sregs().cs.selector == 0x23


@pytest.mark.requires("kvm")
def test_a_step_over_a_hypercall_comes_after_it(debugged: KernelVm) -> None:
    vm = debugged
    slot = private_slot(vm)
    vm.launch_update(slot, BASE, bytes.fromhex("b900001000ffd1" + CALL).ljust(PAGE, b"\0"))
    vcpu = vm.create_vcpu(0)
    vcpu.set_regs(kvm.kvm_regs(rip=BASE, rsp=BASE + MIB))
    vcpu.set_guest_debug(step=True, breakpoints=frozenset())
    assert vcpu.run() == Debug(1, BASE + 5, 1 << 14)
    assert vcpu.run() == Debug(1, guest_abi.HYPERCALL_PAGE, 1 << 14)
    assert vcpu.run() == Hypercall(0, (0, 0, 0, 0))
    vcpu.complete(5)
    assert vcpu.get_regs().rax == 5
    assert vcpu.run() == Debug(1, guest_abi.HYPERCALL_PAGE + 2, 1 << 14)
    # Turned off between an instruction and its #DB.
    assert vcpu.run() == Debug(1, BASE + 7, 1 << 14)
    vcpu.set_guest_debug(step=False, breakpoints=frozenset())
    assert isinstance(vcpu.run(), Hypercall)


# Flags.

#: pushf; pop rsi; hypercall
PUSHF: Final = "9c5e" + CALL


def start(vm: KernelVm, code: str) -> VcpuEngine:
    """Put a guest at the start of code in private memory."""
    slot = private_slot(vm)
    vm.launch_update(slot, BASE, bytes.fromhex(code).ljust(PAGE, b"\xf4"))
    vcpu = vm.create_vcpu(0)
    vcpu.set_regs(kvm.kvm_regs(rip=BASE, rsp=BASE + MIB))
    return vcpu


@pytest.mark.requires("kvm")
def test_a_guest_starts_with_the_flags_of_a_process(debugged: KernelVm) -> None:
    vcpu = start(debugged, PUSHF)
    flags = 0x3202 if needs_iopl(debugged) else 0x202
    assert vcpu.get_regs().rflags == flags
    assert vcpu.run() == Hypercall(99, (0, flags, 0, 0))
    assert vcpu.get_regs().rflags == flags


def needs_iopl(vm: KernelVm) -> bool:
    """Say whether this machine's processors refuse ports by the TSS (QEMU's TCG)."""
    vm.create_vcpu(0)
    vcpu = vm.create_vcpu(1)
    assert isinstance(vcpu, KernelVcpu)
    return vcpu.needs_iopl()


@pytest.mark.requires("kvm")
@pytest.mark.parametrize("code", ["fa", "fb"], ids=["cli", "sti"])
def test_a_guest_does_not_touch_the_interrupt_flag(vm: KernelVm, code: str) -> None:
    exit_ = start(vm, code + PUSHF).run()
    if needs_iopl(vm):
        assert exit_ == Hypercall(99, (0, 0x3002 if code == "fa" else 0x3202, 0, 0))
    else:
        assert exit_ in (Shutdown(6), Shutdown(13))


@pytest.mark.requires("kvm")
def test_popf_changes_no_privilege(vm: KernelVm) -> None:
    exit_ = start(vm, "6a029d" + PUSHF).run()  # push 2; popf
    assert exit_ == Hypercall(99, (0, 0x3002 if needs_iopl(vm) else 0x202, 0, 0))


@pytest.mark.requires("kvm")
def test_a_processor_that_refuses_ports_by_the_tss_gets_iopl_3(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def add_vcpu(own: System, number: int) -> None:
        """Refuse every port: a bit each, behind the TSS."""
        as_ever(own, number)
        tss = own.sregs(kvm_sregs(), number).tr.base - (1 << guest_abi.GPA_BITS)
        own.memory[tss + 0x68 : tss + 0x68 + (1 << 13)] = b"\xff" * (1 << 13)

    as_ever = System.add_vcpu
    monkeypatch.setattr(System, "add_vcpu", add_vcpu)
    with make_vm(debug=True) as vm:
        vcpu = vm.create_vcpu(0)
        vcpu.set_regs(kvm.kvm_regs(rip=BASE))
        assert vcpu.get_regs().rflags == 0x3202


@pytest.mark.requires("kvm")
@pytest.mark.parametrize(
    "code",
    ["0f01e6", "0f00ce", "0f00c6", "0f010424", "0f014c24f0"],
    ids=["smsw", "str", "sldt", "sgdt", "sidt"],
)
def test_a_guest_learns_nothing_of_the_engine_s_tables(vm: KernelVm, code: str) -> None:
    with Kvm.open() as device:
        umip = any(
            (leaf.function, leaf.index, leaf.ecx >> 2 & 1) == (7, 0, 1)
            for leaf in device.get_supported_cpuid()
        )
    if not umip:
        pytest.skip("this processor has no UMIP")
    assert start(vm, code + CALL).run() in (Shutdown(6), Shutdown(13))


#: Instructions in private code, and what may come of it: an exit, or the value in rsi if the guest
#: goes on.
BY_KERNEL: Final[dict[str, tuple[str, set[object]]]] = {
    "pushf": ("9c5e", {0x202, 0x3202}),
    "cli": ("fa9c5e", {Shutdown(6), Shutdown(13), 0x3002}),
    "cpuid": ("0fa2", {Shutdown(6), Unknown(ExitReason.INTERNAL_ERROR), 0}),
    "vmcall": ("0f01c1", {0, Shutdown(6)}),
    "vmmcall": ("0f01d9", {0, Unknown(ExitReason.INTERNAL_ERROR)}),
    # push 0x40202; popf; mov rdx, [rsp + 1]
    "ac": ("68020204009d488b542401", {Shutdown(17), 0}),
    "sgdt": ("0f014424f0", {Shutdown(6), Shutdown(13)}),
    "xgetbv": ("31c90f01d0", {Shutdown(6), 0}),
    "cs": ("8cce", {0x33, 0x23}),
}


@pytest.mark.requires("kvm", "guard")
@pytest.mark.parametrize("key", BY_KERNEL)
def test_what_differs_from_kernel_to_kernel(vm: KernelVm, key: str) -> None:
    code, expected = BY_KERNEL[key]
    found = start(vm, code + CALL).run()
    assert (found.arguments[1] if isinstance(found, Hypercall) else found) in expected


def test_every_difference_of_kernels_has_its_row() -> None:
    table = (
        (Path(__file__).parent.parent / "docs" / "reference" / "engines.md")
        .read_text(encoding="utf-8")
        .split("## From kernel to kernel")[1]
    )
    assert re.findall(r"^\| `([a-z]+)` \|", table.split("\n## ")[0], re.MULTILINE) == list(
        BY_KERNEL
    )


@pytest.mark.requires("kvm", "guard")
def test_what_an_owner_puts_into_the_other_half_is_not_executed(vm: KernelVm) -> None:
    """Where KVM emulates an instruction it might read there."""
    shared = shared_half(PAGES)
    shared.mapping.memory[:7] = bytes.fromhex("48c7c72a000000")  # mov rdi, 42
    private = vm.bind(b"\1", PageRange(pgoff_t(0), pgoff_t(PAGES)))
    slot = Memslot(0, gfn_t(BASE >> PAGE_SHIFT), PAGES, private=private, shared=shared)
    slot.attributes[:] = bytes([1]) * PAGES
    vm.add_slot(slot)
    vm.launch_update(
        slot, BASE, bytes.fromhex("6e" + "90" * 6 + CALL).ljust(PAGE, b"\xf4")
    )  # outsb
    vcpu = vm.create_vcpu(0)
    vcpu.set_regs(kvm.kvm_regs(rip=BASE, rsi=BASE))
    assert vcpu.run() == Shutdown(6)
    shared.close()


@pytest.mark.requires("kvm")
def test_a_page_that_cannot_be_had_is_a_memory_fault(vm: KernelVm) -> None:
    slot = private_slot(vm)
    vm.launch_update(
        slot, BASE, bytes.fromhex("bb000010408a03f4").ljust(PAGE, b"\0")
    )  # mov ebx, BASE + 1 MiB; mov al, [rbx]
    vcpu = vm.create_vcpu(0)
    vcpu.set_regs(kvm.kvm_regs(rip=BASE))
    half = slot.private
    assert isinstance(half, GuestMemfdHalf)
    # The last descriptor gone, nothing is bound any more: guest_memfd's own way to refuse.
    if half.mapping is not None:
        half.mapping.close()
    half.file.memfd.close()
    assert vcpu.run() == MemoryFault(8, BASE, PAGE, EFAULT)


@pytest.mark.requires("kvm")
def test_registers_and_memory_of_a_vm_stay_in_its_process(vm: KernelVm) -> None:
    slot = private_slot(vm)
    assert vm.statistics() == {"pages_taken": 0, "pages_freed": 0, "invalidations": 0}
    vm.launch_update(slot, BASE, b"x" * 2 * PAGE)
    assert vm.statistics()["pages_taken"] == 2
    vm.invalidate_start(1, PageRange(pgoff_t(0), pgoff_t(1)), None)
    vm.invalidate_start(9, PageRange(pgoff_t(0), pgoff_t(1)), None)
    assert vm.statistics() == {"pages_taken": 2, "pages_freed": 1, "invalidations": 1}


@pytest.mark.requires("kvm")
def test_a_window_past_the_end_of_the_file(vm: KernelVm) -> None:
    with pytest.raises(OSError) as caught:
        vm.bind(b"\1", PageRange(pgoff_t(1 << 50), pgoff_t((1 << 50) + 1)))
    assert caught.value.errno == EINVAL


@pytest.mark.requires("kvm")
def test_kicks_are_not_lost(vm: KernelVm) -> None:
    slot = private_slot(vm)
    vm.launch_update(slot, BASE, bytes.fromhex("ebfe").ljust(PAGE, b"\0"))
    engine = vm.create_vcpu(0)
    engine.set_regs(kvm.kvm_regs(rip=BASE))
    # One that comes before the first run has nobody to reach, and does no harm.
    engine.kick()
    engine.get_regs()
    for _ in range(200):
        engine.kick()
        assert engine.run() is None


def test_vcpus_are_as_many_as_kernel_and_engine_have() -> None:
    for known, told in ((4, 4), (MAX_VCPUS, MAX_VCPUS), (1000, MAX_VCPUS)):
        engine = SimpleNamespace(_vm=SimpleNamespace(check_extension={Cap.NR_VCPUS: known}.get))
        assert KernelVm.check_extension(cast("Any", engine), Cap.NR_VCPUS) == told


# Which engine.


class Nobody:
    """Stands for a service that is not asked."""


def test_without_the_device_auto_is_software_and_the_name_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> Kvm:
        raise OSError(ENOENT, "open: No such file or directory: '/dev/kvm'")

    monkeypatch.setattr(Kvm, "open", missing)
    binder = cast("engine_process.EngineBinder", Nobody())
    assert (
        engine_process.make_engine(
            Creation("auto"), binder, EngineVcpus(), Attributes(Api.V10), Trace()
        ).name
        == "software"
    )
    with pytest.raises(OSError, match="/dev/kvm") as caught:
        engine_process.make_engine(
            Creation("kernel"), binder, EngineVcpus(), Attributes(Api.V10), Trace()
        )
    assert caught.value.errno == ENOENT


@pytest.mark.requires("kvm")
def test_with_the_device_auto_is_the_kernel() -> None:
    binder = cast("engine_process.EngineBinder", Nobody())
    made = engine_process.make_engine(
        Creation("auto"), binder, EngineVcpus(), Attributes(Api.V10), Trace()
    )
    assert isinstance(made, KernelVm)
    made.close()
    assert made.name == "kernel"
    assert (
        engine_process.make_engine(
            Creation("software"), binder, EngineVcpus(), Attributes(Api.V10), Trace()
        ).name
        == "software"
    )


# With a service.


@pytest.mark.requires("fuse", "kvm")
def test_what_a_slot_has_left_counts_for_the_limit() -> None:
    with (
        Service.start(Options(memory_max=4 * PAGE)) as limited,
        VmOfOwner(limited, engine="kernel") as vm,
    ):
        fd = limited.memfd_restricted()
        os.ftruncate(fd, 16 * PAGE)

        def show(slot: int, first: int, count: int) -> object:
            at, size = BASE + slot * MIB, count * PAGE
            make = partial(
                vm.set_user_memory_region, slot=slot, guest_phys_addr=at, memory_size=size
            )
            return outcome(lambda: make(restricted_fd=fd, restricted_offset=first * PAGE))

        assert show(0, 0, 4) is None
        vm.set_memory_attributes(BASE, 4 * PAGE, private=True)
        vm.launch_update(BASE, bytes(4 * PAGE))
        vm.set_user_memory_region(slot=0, guest_phys_addr=0, memory_size=0)
        assert show(1, 4, 1) == Errno(ENOSPC), "four pages are left"
        assert show(1, 0, 2) is None, "two of them are shown again"
        assert show(2, 4, 1) == Errno(ENOSPC)
        memory.fallocate(fd, memory.PUNCH, 2 * PAGE, 2 * PAGE)
        assert show(2, 4, 2) is None
        assert show(3, 1, 1) == Errno(ENOSPC), "a page shown twice counts twice"
        os.close(fd)


@pytest.mark.requires("fuse", "kvm")
def test_a_trace_counts_pages_while_files_come_and_go() -> None:
    with ExitStack() as held:
        service = held.enter_context(Service.start())
        vm = held.enter_context(VmOfOwner(service, engine="kernel"))
        fds = [service.memfd_restricted() for _ in range(8)]
        for fd in fds:
            held.callback(os.close, fd)
            os.ftruncate(fd, PAGE)
        vm.set_user_memory_region(
            slot=0, guest_phys_addr=BASE, memory_size=PAGE, restricted_fd=fds[0]
        )
        # Nobody reads it: what is lost has been counted as well.
        held.enter_context(vm.start_trace())
        punch, done = partial(memory.fallocate, fds[0], memory.PUNCH, 0, PAGE), threading.Event()
        puncher = threading.Thread(target=lambda: [punch() for _ in iter(done.is_set, True)])
        puncher.start()
        try:
            for _ in range(40):
                for number, fd in enumerate(fds[1:], 1):
                    vm.set_user_memory_region(
                        slot=number,
                        guest_phys_addr=BASE + number * MIB,
                        memory_size=PAGE,
                        restricted_fd=fd,
                    )
                for number in range(1, 8):
                    vm.set_user_memory_region(slot=number, guest_phys_addr=0, memory_size=0)
        finally:
            done.set()
            puncher.join()


@pytest.fixture
def place() -> Iterator[str]:
    """Name a directory that every user can enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield directory


@pytest.mark.requires("fuse", "kvm", "root")
def test_an_owner_that_may_not_open_the_device_gets_the_kernel_by_serve(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{place}/socket"
    monkeypatch.setattr(client, "_default", None)
    monkeypatch.setenv(SERVER_VARIABLE, path)
    server = subprocess.Popen(
        [sys.executable, "-m", "restrictedmem", "serve", "--socket", path, "--user", "nobody"],
        stderr=subprocess.PIPE,
        text=True,
    )

    def body() -> str:
        with pytest.raises(OSError) as caught:
            Kvm.open()
        assert caught.value.errno == EACCES
        with Vmm(MIB, engine="auto") as vmm:
            vmm.load(elf.parse(guests.path("spin").read_bytes()), ["exit", "7"])
            assert isinstance(vmm.vcpus[0].run(), Hypercall)
            return str(vmm.statistics()["engine"])

    try:
        assert server.stderr is not None
        assert server.stderr.readline() == f"listening on {path}\n"
        assert as_user(body, ORDINARY - 1, fuse=False) == "kernel"
    finally:
        server.terminate()
        server.communicate(timeout=20)
