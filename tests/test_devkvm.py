"""The handles of /dev/kvm.

Every method calls what its name says, says what failed, and gives back what the kernel gave.
"""

import gc
import os
import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EBADF, EEXIST, EINVAL, ENOTTY
from functools import partial

import pytest

from devkvm_machine import DATA, OUTS, Machine, guest, kvm, machine
from outcomes import Errno, in_child, outcome
from restrictedmem.abi.kvm import KVM_X86_DEFAULT_VM, Cap, ExitReason, kvm_regs
from restrictedmem.abi.kvm_x86 import (
    KVM_MP_STATE_RUNNABLE,
    kvm_fpu,
    kvm_sregs,
    kvm_vcpu_events,
    kvm_xcrs,
    kvm_xsave,
)
from restrictedmem.devkvm import GuestMemfd, Kvm, VcpuFd, VmFd
from restrictedmem.fd import OwnedFd
from restrictedmem.units import PAGE_SIZE

__all__ = ["guest", "kvm"]

pytestmark = pytest.mark.requires("kvm")


IA32_TSC = 0x10


# Handles.


HANDLES: dict[type[OwnedFd], Callable[[int], OwnedFd]] = {
    Kvm: Kvm,
    VmFd: lambda number: VmFd(number, 2 * PAGE_SIZE),
    VcpuFd: lambda number: VcpuFd(number, 2 * PAGE_SIZE),
    GuestMemfd: lambda number: GuestMemfd(number, 0),
}


@contextmanager
def bad(kind: type[OwnedFd]) -> Generator[OwnedFd]:
    """Build a handle on a number that is no descriptor."""
    number = os.dup(0)
    os.close(number)
    handle = HANDLES[kind](number)
    yield handle
    handle.detach()


#: Arguments of the methods that have any; none of them is looked at when the descriptor is bad.
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "check_extension": (Cap.USER_MEMORY,),
    "enable_cap": (Cap.EXIT_HYPERCALL, 0),
    "create_guest_memfd": (PAGE_SIZE,),
    "set_user_memory_region": (0, 0, PAGE_SIZE, 0),
    "set_user_memory_region2": (0, 0, PAGE_SIZE, 0, -1),
    "delete_memory_region": (0,),
    "set_memory_attributes": (0, PAGE_SIZE, 0),
    "set_nr_mmu_pages": (64,),
    "set_tss_addr": (0xFFFB_D000,),
    "set_signal_mask": ((),),
    "set_regs": (kvm_regs(),),
    "set_sregs": (kvm_sregs(),),
    "set_fpu": (kvm_fpu(),),
    "set_xsave": (kvm_xsave(),),
    "set_xcrs": (kvm_xcrs(),),
    "set_vcpu_events": (kvm_vcpu_events(),),
    "get_msrs": ((IA32_TSC,),),
    "set_msrs": ({IA32_TSC: 0},),
    "set_cpuid2": ((),),
    "set_mp_state": (KVM_MP_STATE_RUNNABLE,),
    "set_guest_debug": (0,),
    "translate": (0,),
    "pre_fault_memory": (0, PAGE_SIZE),
    "allocate": (0, PAGE_SIZE),
    "punch_hole": (0, PAGE_SIZE),
    "resident_pages": (0, PAGE_SIZE),
    "mmap": (0, PAGE_SIZE),
}
#: Methods of every owned descriptor, methods that make no call on it, and the one that makes the
#: descriptor.
WITHOUT_A_CALL = {"close", "closed", "detach", "fileno", "kick", "flags", "run_errno", "open"}


METHODS = [
    (kind, name)
    for kind in HANDLES
    for name in dir(kind)
    if not name.startswith("_") and name not in WITHOUT_A_CALL
]


@pytest.mark.parametrize(
    ("kind", "name"), METHODS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_every_method_of_a_bad_descriptor_is_ebadf(kind: type[OwnedFd], name: str) -> None:
    with bad(kind) as handle, pytest.raises(OSError) as raised:
        getattr(handle, name)(*ARGUMENTS.get(name, ()))
    assert raised.value.errno == EBADF


def test_the_methods_of_bad_descriptors_are_many() -> None:
    # They come from the classes themselves; an empty list would pass.
    assert len(METHODS) > 45


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Kvm, "get_api_version"), (VmFd, "create_vcpu"), (VcpuFd, "get_regs"), (VcpuFd, "set_msrs")],
)
def test_errors_name_their_ioctl(kind: type[OwnedFd], name: str) -> None:
    with (
        bad(kind) as handle,
        pytest.raises(OSError, match=rf"^\[Errno 9\] KVM_{name.upper()}: Bad file descriptor$"),
    ):
        getattr(handle, name)(*ARGUMENTS.get(name, ()))


def test_an_ioctl_on_another_kind_of_descriptor_is_enotty_or_einval(kvm: Kvm) -> None:
    vcpu = VcpuFd(kvm.fileno(), PAGE_SIZE)
    try:
        assert outcome(vcpu.get_regs) in (Errno(ENOTTY), Errno(EINVAL))
    finally:
        vcpu.detach()


def test_every_descriptor_is_close_on_exec(guest: Machine) -> None:
    with guest.vm.create_guest_memfd(PAGE_SIZE) as memfd:
        for handle in (guest.kvm, guest.vm, guest.vcpu, memfd):
            assert not os.get_inheritable(handle.fileno()), handle


def test_handles_show_their_kind(guest: Machine) -> None:
    assert repr(guest.vm) == f"VmFd({guest.vm.fileno()})"


def test_a_closed_vcpu_gives_its_mapping_back() -> None:
    # VMs of other tests are cycles, which may still hold descriptors.
    gc.collect()
    with machine() as guest:
        guest.start(OUTS)
        assert guest.vcpu.run() == ExitReason.IO
        assert mappings() == 1
    assert mappings() == 0


def mappings() -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("kvm-vcpu" in line for line in maps)


def test_another_process_gets_eio(guest: Machine) -> None:
    assert in_child(guest.vm.create_vcpu) == "EIO"
    assert in_child(guest.vcpu.get_regs) == "EIO"


# /dev/kvm.


def test_the_device(kvm: Kvm) -> None:
    assert kvm.get_api_version() == 12
    assert kvm.get_vcpu_mmap_size() >= 2 * PAGE_SIZE
    assert kvm.check_extension(Cap.USER_MEMORY) == 1
    assert kvm.check_extension(9999) == 0


def test_supported_cpuid_begins_with_the_highest_function(kvm: Kvm) -> None:
    entries = kvm.get_supported_cpuid()
    (first,) = (entry for entry in entries if entry.function == 0)
    assert first.eax >= max(entry.function for entry in entries if entry.function < 0x4000_0000)
    assert struct.pack("=III", first.ebx, first.edx, first.ecx).isascii()


def test_vm_kinds_are_those_of_the_capability(kvm: Kvm) -> None:
    offered = kvm.check_extension(Cap.VM_TYPES) | 1 << KVM_X86_DEFAULT_VM
    for kind in range(8):
        if offered >> kind & 1:
            kvm.create_vm(kind).close()
        else:
            assert outcome(partial(kvm.create_vm, kind)) == Errno(EINVAL), kind


# VMs.


def test_vm_refusals(guest: Machine) -> None:
    vm = guest.vm
    assert outcome(lambda: vm.create_vcpu(0).close()) == Errno(EEXIST)
    assert outcome(lambda: vm.create_vcpu(vm.check_extension(Cap.MAX_VCPU_ID)).close()) == Errno(
        EINVAL
    )
    assert outcome(lambda: vm.enable_cap(Cap.USER_MEMORY)) == Errno(EINVAL)
    assert outcome(lambda: vm.set_nr_mmu_pages(63)) == Errno(EINVAL)
    assert outcome(lambda: vm.set_tss_addr(0xFFFF_F000)) == Errno(EINVAL)


def test_what_a_vm_takes(guest: Machine) -> None:
    guest.vm.set_nr_mmu_pages(64)
    guest.vm.set_tss_addr(0xFFFB_D000)
    mask = guest.vm.check_extension(Cap.EXIT_HYPERCALL)
    guest.vm.enable_cap(Cap.EXIT_HYPERCALL, mask)
    assert outcome(lambda: guest.vm.enable_cap(Cap.EXIT_HYPERCALL, ~mask & 0xFFFF)) == Errno(EINVAL)


def test_memory_attributes_take_the_capability(guest: Machine) -> None:
    # The device speaks for any VM: whether the kernel has the call at all.
    offered = guest.kvm.check_extension(Cap.MEMORY_ATTRIBUTES)
    expected = Errno(EINVAL) if offered else Errno(ENOTTY)
    assert outcome(lambda: guest.vm.set_memory_attributes(DATA, PAGE_SIZE, 1 << 5)) == expected
