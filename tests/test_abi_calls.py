"""The calls and codecs of ``abi``, on what they cannot do."""

import ctypes
import mmap
import os
from errno import EBADF, EINVAL, ENOSYS, EOPNOTSUPP

import pytest

from outcomes import Errno, outcome
from restrictedmem.abi import fuse, kvm, memory
from restrictedmem.abi._struct import c_struct, codec, u16, u32, u64
from restrictedmem.fd import OwnedFd
from restrictedmem.units import PAGE_SIZE


def test_a_struct_of_another_size_is_refused() -> None:
    with pytest.raises(TypeError, match="8 bytes, the kernel's has 4"):

        @c_struct(size=4)
        class wrong(ctypes.Structure):  # pyright: ignore[reportUnusedClass]
            a: u32
            b: u32


def test_codecs_agree_with_ctypes() -> None:
    values = (1, 2, 3 << 40, 4, 5, 6, 7, 8, 9)
    packed = fuse.IN_HEADER.pack(*values)
    names = [field[0] for field in fuse.fuse_in_header._fields_]
    assert bytes(fuse.fuse_in_header(**dict(zip(names, values, strict=True)))) == packed
    assert codec(fuse.fuse_attr).size == ctypes.sizeof(fuse.fuse_attr)


def test_codecs_refuse_what_struct_cannot_express() -> None:
    @c_struct(size=8)
    class holed(ctypes.Structure):
        small: u16
        large: u32

    @c_struct(size=16)
    class nested(ctypes.Structure):
        inner: holed
        last: u64

    with pytest.raises(TypeError, match="padding"):
        codec(holed)
    with pytest.raises(TypeError, match="not plain integers"):
        codec(nested)


def test_calls_on_a_closed_descriptor_are_ebadf() -> None:
    closed = os.dup(0)
    os.close(closed)
    assert outcome(lambda: memory.fallocate(closed, 0, 0, PAGE_SIZE)) == Errno(EBADF)
    assert outcome(lambda: memory.resident_pages(closed, 0, PAGE_SIZE)) in (
        Errno(EBADF),
        Errno(ENOSYS),
    )
    assert outcome(lambda: kvm.KVM_GET_API_VERSION(closed)) == Errno(EBADF)
    asked = kvm.kvm_create_guest_memfd(size=PAGE_SIZE, flags=0)
    assert outcome(lambda: kvm.KVM_CREATE_GUEST_MEMFD(closed, asked)) == Errno(EBADF)
    with mmap.mmap(-1, PAGE_SIZE) as mapped:
        address = ctypes.addressof(first := ctypes.c_char.from_buffer(mapped))
        assert outcome(lambda: memory.map_over(address, PAGE_SIZE, closed)) == Errno(EBADF)
        del first


@pytest.mark.requires("kvm")
def test_an_ioctl_without_an_argument_passes_zero() -> None:
    """KVM refuses every other."""
    with open("/dev/kvm", "rb") as device:
        assert kvm.KVM_GET_API_VERSION(device) == 12
        assert outcome(lambda: kvm.KVM_GET_API_VERSION(device, 1)) == Errno(EINVAL)


def test_errors_name_the_call() -> None:
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(OSError, match=r"^\[Errno 9\] KVM_GET_API_VERSION: Bad file descriptor$"):
        kvm.KVM_GET_API_VERSION(closed)
    with pytest.raises(OSError, match=r"^\[Errno 9\] fallocate: Bad file descriptor$"):
        memory.fallocate(closed, 0, 0, 1)


def test_memfd_secret_refuses_flags() -> None:
    assert outcome(lambda: memory.memfd_secret(1 << 20)) in (Errno(EINVAL), Errno(ENOSYS))


@pytest.mark.requires("cachestat")
def test_cachestat_counts_preallocated_pages_and_no_holes() -> None:
    with memory.memfd_create("counted") as fd:
        os.ftruncate(fd.fileno(), 16 * PAGE_SIZE)
        memory.fallocate(fd.fileno(), 0, 4 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert memory.resident_pages(fd.fileno(), 0, 16 * PAGE_SIZE) == 2
        assert memory.resident_pages(fd.fileno(), 5 * PAGE_SIZE, PAGE_SIZE) == 1
        assert memory.resident_pages(fd.fileno(), 0, 4 * PAGE_SIZE) == 0
    ours, theirs = (OwnedFd(number) for number in os.pipe())
    with ours, theirs:
        # A pipe has no page cache: EOPNOTSUPP since 6.17, nothing to count before.
        assert outcome(lambda: memory.resident_pages(ours.fileno(), 0, PAGE_SIZE)) in (
            0,
            Errno(EOPNOTSUPP),
            Errno(EBADF),
        )


def test_memfds_are_close_on_exec_and_sealed_against_execution() -> None:
    with memory.memfd_create("made") as fd:
        assert not os.get_inheritable(fd.fileno())
        assert os.fstat(fd.fileno()).st_mode & 0o111 in (0, 0o111), "sealed since Linux 6.3"
