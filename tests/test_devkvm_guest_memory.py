"""The content of a guest_memfd of the real kernel, for host and guest."""

import ctypes
import mmap
import os
from collections.abc import Generator
from errno import EBADF, EFAULT, EINVAL

import pytest

import descriptor_operations as op
from devkvm_machine import COMPARE_AND_FILL, DATA, DONE, Machine, machine
from guest_memfds import (
    INIT_SHARED,
    MMAP,
    SIGBUS,
    SIZE,
    P,
    libc,
    mapped,
    offered,
    shared,
    vm,
    written_from,
)
from outcomes import Errno, checked, in_child, outcome
from restrictedmem.abi.kvm import Cap, ExitReason
from restrictedmem.abi.memory import MADV_COLLAPSE
from restrictedmem.devkvm import GuestMemfd, VmFd, address_of

__all__ = ["shared", "vm"]

pytestmark = pytest.mark.requires("kvm")


@pytest.fixture
def guest() -> Generator[Machine]:
    with machine() as made:
        offered(made.vm, MMAP | INIT_SHARED)
        yield made


# The content of a shared guest_memfd.


def test_a_punched_page_is_zero_and_its_neighbours_stay(shared: GuestMemfd) -> None:
    with shared.mmap(0, SIZE) as view:
        view[:] = b"\xaa" * SIZE
        assert set(view[:]) == {0xAA}
        shared.punch_hole(0, P)
        assert set(view[:P]) == {0}
        assert set(view[P:]) == {0xAA}
        view[:P] = b"\xaa" * P
        assert set(view[:]) == {0xAA}


def test_a_mapping_longer_than_the_file_faults_at_its_end(shared: GuestMemfd) -> None:
    thing = op.Thing(shared.fileno(), lambda _: -1)
    with shared.mmap(0, SIZE) as view:
        view[:] = bytes(SIZE)
        write = ctypes.memset

        def fill(address: int, _: int) -> str:
            return in_child(lambda: write(address, 0xAA, 16 * P) and 0)

        assert mapped(fill, 16 * P)(thing) == SIGBUS
        assert set(view[:]) == {0xAA}


def test_forgotten_ptes_lose_nothing_and_removed_pages_do(shared: GuestMemfd) -> None:
    with shared.mmap(0, SIZE) as view:
        view[:] = b"\x5a" * SIZE
        view.madvise(mmap.MADV_DONTNEED)
        assert view[0] == 0x5A
        view.madvise(mmap.MADV_REMOVE)
        assert view[0] == 0


def test_huge_pages_are_never_made(vm: VmFd) -> None:
    size = 2 << 20
    with (
        vm.create_guest_memfd(size, offered(vm, MMAP | INIT_SHARED)) as memfd,
        memfd.mmap(0, size) as view,
    ):
        for offset in range(0, size, P):
            assert view[offset] == 0
        view.madvise(mmap.MADV_HUGEPAGE)
        with pytest.raises(OSError) as raised:
            view.madvise(MADV_COLLAPSE)
        assert raised.value.errno == EINVAL
        view.madvise(mmap.MADV_DONTNEED)
        assert view[0] == 0


def test_mincore_and_cachestat_differ(shared: GuestMemfd) -> None:
    shared.allocate(0, 2 * P)
    residency = (ctypes.c_ubyte * 4)()
    with shared.mmap(0, SIZE) as view:
        assert view[P] == 0
        checked(libc.mincore(address_of(view), SIZE, residency))
        # Allocated but never cleared is not up to date, and so not in core.
        assert [value & 1 for value in residency] == [0, 1, 0, 0]


# With a guest.


def test_the_guest_sees_what_the_host_wrote_and_the_other_way_round(guest: Machine) -> None:
    with guest.vm.create_guest_memfd(P, MMAP | INIT_SHARED) as memfd:
        guest.vm.set_user_memory_region2(1, DATA, P, 0, memfd)
        with memfd.mmap(0, P) as view:
            view[:] = b"\xaa" * P
        guest.start(COMPARE_AND_FILL, rsi=P, rax=0xAA, rdx=0xFF)
        assert guest.port() == DONE
        with memfd.mmap(0, P) as view:
            assert set(view[:]) == {0xFF}


def test_private_memory_is_the_guests_alone(guest: Machine) -> None:
    with guest.vm.create_guest_memfd(SIZE, MMAP) as memfd:
        guest.vm.set_user_memory_region2(1, DATA, SIZE, 0, memfd)
        guest.store(0x1234_5678_9ABC_DEF0, DATA + P)
        assert guest.load(DATA + P) == 0x1234_5678_9ABC_DEF0
        assert memfd.resident_pages(0, SIZE) == 1
        with memfd.mmap(0, SIZE) as view:
            assert in_child(lambda: view[P]) == SIGBUS
            assert outcome(lambda: written_from(address_of(view) + P, 0)) == Errno(EFAULT)
        memfd.punch_hole(P, P)
        assert memfd.resident_pages(0, SIZE) == 0
        assert guest.load(DATA + P) == 0


def test_closing_the_last_descriptor_is_a_memory_fault(guest: Machine) -> None:
    memfd = guest.vm.create_guest_memfd(SIZE, MMAP)
    guest.vm.set_user_memory_region2(1, DATA, SIZE, 0, memfd)
    guest.store(7)
    memfd.close()
    guest.start(bytes.fromhex("488b07 e610"), rdi=DATA + P + 8)
    assert guest.vcpu.run() == ExitReason.MEMORY_FAULT
    fault = guest.vcpu.kvm_run.exit.memory_fault
    assert (fault.flags, fault.gpa, fault.size, guest.vcpu.run_errno) == (0, DATA + P, P, EFAULT)
    # The slot is still there, and nothing but a slot can be put in its place.
    guest.vm.delete_memory_region(1)
    guest.start(bytes.fromhex("488b07 e610"))
    assert guest.vcpu.run() == ExitReason.MMIO


def test_without_mmap_the_guest_gets_the_other_half(guest: Machine) -> None:
    if guest.vm.check_extension(Cap.MEMORY_ATTRIBUTES):
        pytest.skip("with memory attributes the kernel serves both halves")
    half = mmap.mmap(-1, SIZE)
    with guest.vm.create_guest_memfd(SIZE) as memfd:
        guest.vm.set_user_memory_region2(1, DATA, SIZE, address_of(half), memfd)
        guest.store(0x42)
        assert half[0] == 0x42
        assert memfd.resident_pages(0, SIZE) == 0
        guest.vm.delete_memory_region(1)
        guest.vm.set_user_memory_region2(1, DATA, SIZE, 0, memfd)
        guest.start(bytes.fromhex("488b07 e610"))
        assert outcome(guest.vcpu.run) == Errno(EFAULT)
        assert guest.vcpu.kvm_run.exit_reason != ExitReason.MEMORY_FAULT


def test_the_file_outlives_the_vm(guest: Machine) -> None:
    with guest.vm.create_guest_memfd(SIZE, MMAP | INIT_SHARED) as memfd:
        guest.vm.set_user_memory_region2(1, DATA, SIZE, 0, memfd)
        guest.store(5)
        guest.vcpu.close()
        guest.vm.close()
        with memfd.mmap(0, SIZE) as view:
            assert view[0] == 5
            memfd.punch_hole(0, SIZE)
            assert view[0] == 0
        memfd.allocate(0, SIZE)
        assert memfd.resident_pages(0, SIZE) == 4


def test_a_closed_handle_is_closed(shared: GuestMemfd) -> None:
    number = shared.fileno()
    shared.close()
    assert outcome(lambda: os.fstat(number)) == Errno(EBADF)
    with pytest.raises(ValueError, match="closed"):
        shared.allocate(0, P)
