"""KVM_SET_USER_MEMORY_REGION: what can be made, moved and deleted.

Each request is put to the real kernel too, where the kernel knows it.
"""

import mmap
import os
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from restrictedmem.abi import kvm, memory
from restrictedmem.devkvm import Kvm
from restrictedmem.devkvm import VmFd as KernelVm
from restrictedmem.devkvm.vm_fd import address_of
from restrictedmem.kvm.vm_memory import MAX_ALL_PAGES
from restrictedmem.protocol import vm_wire
from restrictedmem.vmm.vm import Vm
from vm_slots import GPA, errno_of, fd, service, vm, window

__all__ = ["fd", "service", "vm", "window"]

pytestmark = pytest.mark.requires("fuse")

PAGE: Final = 4096
MIB: Final = 1 << 20

EEXIST, EINVAL, ENOMEM = 17, 22, 12


@dataclass(frozen=True)
class Region:
    """One request for a slot without a private half; ``offset`` is its place in 4 MiB of memory."""

    slot: int = 0
    gpa: int = GPA
    size: int = MIB
    offset: int = 0
    flags: int = 0


FIRST: Final = Region()
READONLY: Final = replace(FIRST, flags=kvm.KVM_MEM_READONLY)
SECOND: Final = Region(slot=1, gpa=GPA + 2 * MIB, offset=2 * MIB)
GONE: Final = replace(FIRST, size=0)

SEQUENCES: Final = {
    "the same again": [FIRST, FIRST],
    "move up": [FIRST, replace(FIRST, gpa=GPA + MIB), replace(FIRST, gpa=GPA)],
    "move onto a part of itself": [
        FIRST,
        replace(FIRST, gpa=GPA + PAGE),
        replace(FIRST, gpa=GPA - PAGE),
    ],
    "move onto another": [
        FIRST,
        SECOND,
        replace(FIRST, gpa=GPA + 2 * MIB - PAGE),
        replace(FIRST, gpa=GPA + MIB),
    ],
    "move and resize": [FIRST, replace(FIRST, gpa=GPA + MIB, size=2 * MIB)],
    "resize": [FIRST, replace(FIRST, size=MIB - PAGE), replace(FIRST, size=MIB + PAGE)],
    "other memory": [FIRST, replace(FIRST, offset=PAGE)],
    "other memory, moved": [FIRST, replace(FIRST, offset=PAGE, gpa=GPA + MIB)],
    "make read-only": [FIRST, READONLY],
    "make writable": [READONLY, FIRST],
    "move, and make read-only": [FIRST, replace(READONLY, gpa=GPA + MIB)],
    "move a read-only one": [READONLY, replace(READONLY, gpa=GPA + MIB)],
    "delete, and again": [FIRST, GONE, GONE],
    "delete what never was": [GONE],
    "delete with another address": [FIRST, replace(GONE, gpa=0x123000, offset=PAGE)],
    "delete with an unaligned address": [FIRST, replace(GONE, gpa=1), FIRST],
    "delete with flags": [FIRST, replace(GONE, flags=kvm.KVM_MEM_READONLY), FIRST],
    "delete, and make anew": [FIRST, GONE, replace(FIRST, gpa=GPA + MIB, size=2 * MIB)],
    "overlap": [FIRST, replace(SECOND, gpa=GPA + MIB - PAGE), replace(SECOND, gpa=GPA + MIB)],
    "inside another": [FIRST, replace(SECOND, gpa=GPA + PAGE, size=PAGE)],
    "unaligned": [
        replace(FIRST, gpa=GPA + 1),
        replace(FIRST, size=MIB + 1),
        replace(FIRST, offset=1),
    ],
    "wraps": [
        replace(FIRST, gpa=(1 << 64) - MIB),
        replace(FIRST, gpa=(1 << 64) - PAGE),
        replace(FIRST, gpa=1 << 60),
    ],
    "number": [
        replace(FIRST, slot=32763),
        replace(SECOND, slot=32764),
        replace(SECOND, slot=0xFFFF),
    ],
    "too large": [replace(FIRST, gpa=0, size=(1 << 31) * PAGE)],
    "flags": [replace(FIRST, flags=1 << 3), replace(FIRST, flags=1 << 31)],
}


def ours(vm: Vm, window: int, region: Region) -> int:
    request = kvm.kvm_userspace_memory_region_ext(
        slot=region.slot,
        flags=region.flags,
        guest_phys_addr=region.gpa,
        memory_size=region.size,
        userspace_addr=region.offset,
    )
    return errno_of(vm._channel.call, vm_wire.SET_USER_MEMORY_REGION, bytes(request), [window])


@pytest.mark.requires("kvm")
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_slot_behaves_as_the_kernels(vm: Vm, window: int, name: str) -> None:
    content = mmap.mmap(-1, 4 * MIB)
    with Kvm.open() as system, system.create_vm() as real:

        def theirs(real: KernelVm, region: Region) -> int:
            address = address_of(content) + region.offset
            return errno_of(
                real.set_user_memory_region,
                region.slot,
                region.gpa,
                region.size,
                address,
                region.flags,
            )

        found = [(ours(vm, window, region), theirs(real, region)) for region in SEQUENCES[name]]
    assert [mine for mine, _ in found] == [their for _, their in found]


def test_dirty_logging_is_refused(vm: Vm, window: int) -> None:
    assert ours(vm, window, replace(FIRST, flags=kvm.KVM_MEM_LOG_DIRTY_PAGES)) == EINVAL
    assert ours(vm, window, FIRST) == 0
    assert ours(vm, window, replace(FIRST, flags=kvm.KVM_MEM_LOG_DIRTY_PAGES)) == EINVAL


def test_the_engines_own_pages_are_taken(vm: Vm, window: int) -> None:
    for gpa in (0x10_0000, 0x10_1000):
        assert ours(vm, window, replace(FIRST, gpa=gpa, size=PAGE)) == EEXIST
    assert ours(vm, window, FIRST) == 0
    assert ours(vm, window, replace(FIRST, gpa=0x10_1000)) == EEXIST
    # It is where it was.
    assert ours(vm, window, replace(SECOND, gpa=GPA + PAGE)) == EEXIST


def test_the_slots_of_a_vm_have_so_many_pages_together(vm: Vm) -> None:
    """Each page takes bytes of the engine; the kernel, whose pages do too, has no such limit."""
    half = replace(FIRST, gpa=1 << 40, size=MAX_ALL_PAGES // 2 * PAGE)
    other = replace(half, slot=1, gpa=2 << 40)
    small = replace(SECOND, slot=2, size=PAGE)
    with memory.memfd_create("large") as fd:
        os.ftruncate(fd.fileno(), half.size)
        asked = [
            half,
            other,
            small,
            replace(half, gpa=3 << 40),
            replace(other, size=0),
            small,
            replace(other, size=half.size),
        ]
        assert [ours(vm, fd.fileno(), region) for region in asked] == [
            0,
            0,
            ENOMEM,
            0,
            0,
            0,
            ENOMEM,
        ]


def test_a_slot_without_memory_moves_and_is_not_given_any(vm: Vm, window: int) -> None:
    assert errno_of(vm.set_user_memory_region, slot=0, guest_phys_addr=GPA, memory_size=MIB) == 0
    assert (
        errno_of(vm.set_user_memory_region, slot=0, guest_phys_addr=GPA + MIB, memory_size=MIB) == 0
    )
    assert (
        errno_of(
            vm.set_user_memory_region,
            slot=0,
            guest_phys_addr=GPA,
            memory_size=MIB,
            shared_fd=window,
        )
        == EINVAL
    )


def test_a_private_slot_can_only_be_deleted(vm: Vm, fd: int, window: int) -> None:
    private: dict[str, Any] = {
        "slot": 0,
        "guest_phys_addr": GPA,
        "memory_size": MIB,
        "restricted_fd": fd,
        "shared_fd": window,
    }
    vm.set_user_memory_region(**private)
    changes: list[dict[str, Any]] = [
        {},
        {"guest_phys_addr": GPA + MIB},
        {"readonly": True},
        {"restricted_fd": None},
        {"restricted_offset": MIB},
    ]
    for change in changes:
        assert errno_of(vm.set_user_memory_region, **{**private, **change}) == EINVAL, change
    # A shared slot does not become private either.
    assert ours(vm, window, SECOND) == 0
    assert (
        errno_of(
            vm.set_user_memory_region,
            slot=1,
            guest_phys_addr=SECOND.gpa,
            memory_size=MIB,
            restricted_fd=fd,
        )
        == EINVAL
    )
    # Slots are deleted with the flag set or without, whatever the descriptor is.
    vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=0)
    vm.set_user_memory_region(**private)
    vm.set_user_memory_region(slot=0, guest_phys_addr=0, memory_size=0, restricted_fd=-1)
