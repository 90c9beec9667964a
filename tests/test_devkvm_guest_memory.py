"""The content of a guest_memfd of the real kernel, for host and guest."""

import mmap
import os
from collections.abc import Generator
from errno import EBADF, EFAULT

import pytest

from devkvm_machine import COMPARE_AND_FILL, DATA, DONE, Machine, machine
from guest_memfds import (
    INIT_SHARED,
    MMAP,
    SIGBUS,
    SIZE,
    P,
    offered,
    shared,
    vm,
    written_from,
)
from outcomes import Errno, in_child, outcome
from restrictedmem.abi.kvm import Cap, ExitReason
from restrictedmem.devkvm import GuestMemfd, address_of

__all__ = ["shared", "vm"]

pytestmark = pytest.mark.requires("kvm")


@pytest.fixture
def guest() -> Generator[Machine]:
    with machine() as made:
        offered(made.vm, MMAP | INIT_SHARED)
        yield made


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
            assert outcome(lambda: written_from(address_of(view) + P)) == Errno(EFAULT)
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
