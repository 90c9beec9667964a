"""The kernel engine in the test's process, on /dev/kvm.

The tests try the state that it gives a guest, and what differs from kernel to kernel.
"""

import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, TypeVar, cast

import pytest

from restrictedmem.abi import kvm, memory
from restrictedmem.abi.kvm import Cap, ExitReason
from restrictedmem.abi.kvm_x86 import kvm_sregs
from restrictedmem.consumer import Bound
from restrictedmem.devkvm import Kvm
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine import VcpuEngine
from restrictedmem.kvm.engine_vcpu import EngineVcpus
from restrictedmem.kvm.kernel.guest_system import MAX_VCPUS, System
from restrictedmem.kvm.kernel.kernel_vcpu import KernelVcpu
from restrictedmem.kvm.kernel.kernel_vm import KernelVm
from restrictedmem.kvm.kernel.private import GuestMemfdHalf
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.mm.notifier import Api
from restrictedmem.protocol import guest_abi
from restrictedmem.protocol.exits import Debug, Hypercall, MemoryFault, Shutdown, Unknown
from restrictedmem.units import PAGE_SHIFT, PageRange, gfn_t, pgoff_t
from software_machine import shared_half

PAGE: Final = 4096
MIB: Final = 1 << 20
BASE: Final = guest_abi.PRIVATE_BASE
PAGES: Final = 1024
EFAULT, ENODEV, EINVAL, EOPNOTSUPP = 14, 19, 22, 95
_T = TypeVar("_T")
CALL: Final = "b863000000b900001000ffd1"


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
        # The kernel answers so to any access of this process.
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
