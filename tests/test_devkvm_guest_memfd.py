"""The library's handle on a guest_memfd of the real kernel.

What the kernel answers to each operation is in the cases of ``restrictedmem conformance``.
"""

import mmap
import os
from collections.abc import Generator
from errno import EBADF, EINVAL

import pytest

from outcomes import Errno, outcome
from restrictedmem.abi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, Cap
from restrictedmem.devkvm import GuestMemfd, Kvm, VmFd
from restrictedmem.units import PAGE_SIZE

pytestmark = pytest.mark.requires("kvm")

P = PAGE_SIZE
SIZE = 4 * P
MMAP, INIT_SHARED = GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED
FLAGS = (0, MMAP, INIT_SHARED, MMAP | INIT_SHARED)


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


@pytest.fixture(params=FLAGS, ids=lambda flags: f"flags{flags}")
def memfd(request: pytest.FixtureRequest, vm: VmFd) -> Generator[GuestMemfd]:
    with vm.create_guest_memfd(SIZE, offered(vm, request.param)) as made:
        yield made


def test_size_and_flags_are_those_of_its_creation(memfd: GuestMemfd, vm: VmFd) -> None:
    assert (memfd.size, memfd.fstat().st_size) == (SIZE, SIZE)
    with vm.create_guest_memfd(2 * P, memfd.flags) as other:
        assert (other.size, other.flags) == (2 * P, memfd.flags)
    assert outcome(lambda: vm.create_guest_memfd(P + 1, memfd.flags)) == Errno(EINVAL)


def test_one_without_flags_has_none(vm: VmFd) -> None:
    offered(vm, 0)
    with vm.create_guest_memfd(P) as made:
        assert made.flags == 0
        with pytest.raises(OSError, match="No such device"):
            mmap.mmap(made.fileno(), P)


def test_a_mapping_past_the_end_is_refused_before_the_kernel_is_asked(shared: GuestMemfd) -> None:
    with pytest.raises(ValueError, match="mmap"):
        shared.mmap(0, SIZE + P)


@pytest.mark.requires("cachestat")
def test_pages_are_counted_whoever_may_see_them(memfd: GuestMemfd) -> None:
    assert memfd.resident_pages(0, SIZE) == 0
    memfd.allocate(0, 3 * P)
    assert memfd.resident_pages(0, SIZE) == 3
    memfd.punch_hole(P, P)
    assert memfd.resident_pages(0, SIZE) == 2
    assert memfd.resident_pages(P, P) == 0
    assert outcome(lambda: memfd.allocate(SIZE, P)) == Errno(EINVAL)
    assert outcome(lambda: memfd.punch_hole(P, 1)) == Errno(EINVAL)


def test_a_closed_handle_is_closed(shared: GuestMemfd) -> None:
    number = shared.fileno()
    shared.close()
    assert outcome(lambda: os.fstat(number)) == Errno(EBADF)
    with pytest.raises(ValueError, match="closed"):
        shared.allocate(0, P)
