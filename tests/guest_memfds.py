"""guest_memfds of the real kernel, for each set of flags that it offers, and mappings of them."""

import ctypes
import os
from collections.abc import Callable, Generator

import pytest

import descriptor_operations as op
from descriptor_operations import SHARED, R, W
from outcomes import checked
from restrictedmem.abi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, Cap
from restrictedmem.devkvm import GuestMemfd, Kvm, VmFd
from restrictedmem.units import PAGE_SIZE

P = PAGE_SIZE
SIZE = 4 * P
MMAP, INIT_SHARED = GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED

SIGBUS = "SIGBUS"

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap64.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
libc.mmap64.restype = ctypes.c_void_p
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


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


def mapped(then: Callable[[int, int], object], length: int = SIZE) -> op.Operation:
    """Map ``length`` bytes and do something with (address, descriptor)."""

    def operation(thing: op.Thing) -> object:
        address = libc.mmap64(None, length, R | W, SHARED, thing.fd, 0)
        if address == ctypes.c_void_p(-1).value:
            checked(-1)
        try:
            return then(address, thing.fd)
        finally:
            checked(libc.munmap(address, length))

    return operation


def written_from(address: int, _: int) -> int:
    reader, writer = os.pipe()
    try:
        return os.write(writer, memoryview((ctypes.c_char * 8).from_address(address)))
    finally:
        os.close(reader)
        os.close(writer)
