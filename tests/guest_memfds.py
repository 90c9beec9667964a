"""guest_memfds of the real kernel, for each set of flags that it offers."""

import ctypes
import os
from collections.abc import Generator

import pytest

from restrictedmem.abi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, Cap
from restrictedmem.devkvm import GuestMemfd, Kvm, VmFd
from restrictedmem.units import PAGE_SIZE

P = PAGE_SIZE
SIZE = 4 * P
MMAP, INIT_SHARED = GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED

SIGBUS = "SIGBUS"


@pytest.fixture
def vm() -> Generator[VmFd]:
    with Kvm.open() as kvm, kvm.create_vm() as made:
        yield made


def offered(vm: VmFd, flags: int) -> int:
    """Return flags, or skip the test when the VM has no such guest_memfd."""
    if not vm.check_extension(Cap.GUEST_MEMFD):
        pytest.skip("KVM_CAP_GUEST_MEMFD is 0")
    if flags & ~vm.check_extension(Cap.GUEST_MEMFD_FLAGS):
        pytest.skip(f"KVM_CAP_GUEST_MEMFD_FLAGS has not {flags:#x}")
    return flags


@pytest.fixture
def shared(vm: VmFd) -> Generator[GuestMemfd]:
    with vm.create_guest_memfd(SIZE, offered(vm, MMAP | INIT_SHARED)) as made:
        yield made


def written_from(address: int) -> int:
    reader, writer = os.pipe()
    try:
        return os.write(writer, memoryview((ctypes.c_char * 8).from_address(address)))
    finally:
        os.close(reader)
        os.close(writer)
