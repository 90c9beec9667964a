"""KVM_SET_USER_MEMORY_REGION of this project's engines, beside the cases that the kernel has too.

Those are in restrictedmem.conformance.cases: ``binding`` and ``slots``.
"""

import os
from dataclasses import dataclass, replace
from typing import Final

import pytest

from restrictedmem.abi import kvm, memory
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
SECOND: Final = Region(slot=1, gpa=GPA + 2 * MIB, offset=2 * MIB)


def ours(vm: Vm, window: int, region: Region) -> int:
    request = kvm.kvm_userspace_memory_region_ext(
        slot=region.slot,
        flags=region.flags,
        guest_phys_addr=region.gpa,
        memory_size=region.size,
        userspace_addr=region.offset,
    )
    return errno_of(vm._channel.call, vm_wire.SET_USER_MEMORY_REGION, bytes(request), [window])


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
