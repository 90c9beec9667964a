"""A guest_memfd of the real kernel, operation by operation and errno by errno.

The tests try each operation for each set of flags that the kernel offers. The kernel's own selftest
(guest_memfd_test.c) makes the same assertions; these tests are named after them. The selftest
accepts any error in some places; there these tests have the errno of Linux 6.18.
"""

import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Generator
from errno import (
    EACCES,
    EFAULT,
    EINVAL,
    EIO,
    ENODEV,
    ENOMEM,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
    ESPIPE,
    EXDEV,
)

import pytest

import descriptor_handle as handle
import descriptor_operations as op
from descriptor_operations import PRIVATE, SHARED, R, W, X
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
from restrictedmem.abi.kvm import Cap
from restrictedmem.abi.memory import (
    MADV_COLLAPSE,
    MADV_POPULATE_WRITE,
    PUNCH,
    FallocMode,
    fallocate,
)
from restrictedmem.devkvm import GuestMemfd, VmFd

__all__ = ["shared", "vm"]

pytestmark = pytest.mark.requires("kvm")

FLAGS = (0, MMAP, INIT_SHARED, MMAP | INIT_SHARED)
MADV_COLD, MADV_WIPEONFORK = 20, 18


@pytest.fixture(params=FLAGS, ids=lambda flags: f"flags{flags}")
def memfd(request: pytest.FixtureRequest, vm: VmFd) -> Generator[GuestMemfd]:
    with vm.create_guest_memfd(SIZE, offered(vm, request.param)) as made:
        yield made


# KVM_CREATE_GUEST_MEMFD.


def create(vm: VmFd, size: int, flags: int) -> object:
    return outcome(lambda: vm.create_guest_memfd(size, flags).close())


def test_each_flag_is_taken_or_einval(vm: VmFd) -> None:
    known = vm.check_extension(Cap.GUEST_MEMFD_FLAGS)
    for bit in range(64):
        assert create(vm, P, 1 << bit) == (None if known >> bit & 1 else Errno(EINVAL)), bit


@pytest.mark.parametrize("flags", FLAGS)
def test_a_size_is_a_whole_number_of_pages(vm: VmFd, flags: int) -> None:
    offered(vm, flags)
    for size in (*range(P), P + 1, 1 << 63, (1 << 64) - P):
        assert create(vm, size, flags) == Errno(EINVAL), size
    with vm.create_guest_memfd(1 << 62, flags) as sparse:
        assert sparse.size == 1 << 62


def test_two_files_are_two_files(vm: VmFd) -> None:
    offered(vm, 0)
    with vm.create_guest_memfd(P) as first, vm.create_guest_memfd(2 * P) as second:
        assert (first.size, second.size, first.size) == (P, 2 * P, P)
        assert first.fstat().st_ino != second.fstat().st_ino


# The file operations.


def advise(advice: int) -> op.Operation:
    return mapped(lambda address, _: checked(libc.madvise(address, SIZE, advice)))


def write_at(offset: int) -> op.Operation:
    def body(address: int, _: int) -> str:
        def touch() -> int:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            ctypes.c_ubyte.from_address(address + offset).value = 1
            return ctypes.c_ubyte.from_address(address + offset).value

        return in_child(touch)

    return mapped(body, 16 * P)


def read_own_memory(address: int, _: int) -> int:
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        return len(os.pread(fd, 1, address))
    finally:
        os.close(fd)


def ftruncate(size: int) -> op.Operation:
    return lambda thing: os.ftruncate(thing.fd, size)


def by_flags(*, unmapped: object, private: object, shared: object) -> dict[int, object]:
    """Return outcomes that depend on MMAP, and on INIT_SHARED with it."""
    return {0: unmapped, INIT_SHARED: unmapped, MMAP: private, MMAP | INIT_SHARED: shared}


def with_mmap(result: object) -> dict[int, object]:
    return by_flags(unmapped=Errno(ENODEV), private=result, shared=result)


OPERATIONS: dict[str, tuple[op.Operation, object]] = {
    "read": (lambda thing: os.read(thing.fd, 64), Errno(EINVAL)),
    "read nothing": (lambda thing: os.read(thing.fd, 0), Errno(EINVAL)),
    "readv": (lambda thing: os.readv(thing.fd, [bytearray(8)]), Errno(EINVAL)),
    "write": (lambda thing: os.write(thing.fd, bytes(64)), Errno(EINVAL)),
    "writev": (lambda thing: os.writev(thing.fd, [b"content"]), Errno(EINVAL)),
    "pread": (lambda thing: os.pread(thing.fd, 64, 0), Errno(ESPIPE)),
    "pwrite": (lambda thing: os.pwrite(thing.fd, bytes(64), 0), Errno(ESPIPE)),
    **{
        f"lseek {whence}": (op.lseek(whence), Errno(ESPIPE))
        for whence in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, os.SEEK_DATA)
    },
    "splice out": (op.splice_out(None), Errno(EINVAL)),
    "splice in": (op.splice_in(None), Errno(EINVAL)),
    "sendfile from": (op.sendfile_from(None), Errno(EINVAL)),
    "sendfile into": (op.sendfile_into, Errno(EINVAL)),
    "copy_file_range": (op.copy_out, Errno(EXDEV)),
    **{f"ftruncate {size}": (ftruncate(size), Errno(EINVAL)) for size in (0, SIZE, 2 * SIZE)},
    "fchmod": (op.chmod, Errno(EINVAL)),
    "fchown": (op.chown, Errno(EINVAL)),
    "futimens": (op.utimens, Errno(EINVAL)),
    "fsync": (lambda thing: os.fsync(thing.fd), Errno(EINVAL)),
    "fdatasync": (lambda thing: os.fdatasync(thing.fd), Errno(EINVAL)),
    "posix_fadvise": (lambda thing: os.posix_fadvise(thing.fd, 0, P, os.POSIX_FADV_DONTNEED), None),
    "seals": (handle.seals, Errno(EINVAL)),
    "add seals": (handle.add_seals, Errno(EINVAL)),
    "reopen": (handle.reopen(os.O_RDONLY), Errno(ENXIO)),
    "dup": (lambda thing: handle.duplicate(thing)[0], True),
    "mmap shared": (op.map_(SHARED, R | W), with_mmap(0)),
    "mmap private": (op.map_(PRIVATE, R | W), with_mmap(Errno(EINVAL))),
    "mmap executable": (op.map_(SHARED, R | X), Errno(EPERM)),
    "mmap huge": (op.map_(SHARED | op.MAP_HUGETLB, R), Errno(EINVAL)),
    "mmap past the end": (op.map_(SHARED, R, offset=2 * SIZE), with_mmap(0)),
    "touch": (write_at(0), by_flags(unmapped=Errno(ENODEV), private=SIGBUS, shared="1")),
    "touch past the end": (write_at(SIZE), with_mmap(SIGBUS)),
    "mlock": (
        mapped(lambda address, _: checked(libc.mlock(address, SIZE))),
        by_flags(unmapped=Errno(ENODEV), private=Errno(ENOMEM), shared=0),
    ),
    "MADV_POPULATE_WRITE": (
        advise(MADV_POPULATE_WRITE),
        by_flags(unmapped=Errno(ENODEV), private=Errno(EFAULT), shared=0),
    ),
    **{
        f"madvise {advice}": (advise(advice), with_mmap(0))
        for advice in (
            mmap.MADV_DONTNEED,
            mmap.MADV_REMOVE,
            mmap.MADV_HUGEPAGE,
            mmap.MADV_DONTFORK,
            mmap.MADV_DONTDUMP,
            MADV_COLD,
        )
    },
    **{
        f"madvise {advice}": (advise(advice), with_mmap(Errno(EINVAL)))
        for advice in (mmap.MADV_FREE, MADV_WIPEONFORK, MADV_COLLAPSE)
    },
    "mprotect executable": (
        mapped(lambda address, _: checked(libc.mprotect(address, P, R | X))),
        with_mmap(Errno(EACCES)),
    ),
    "msync": (
        mapped(lambda address, _: checked(libc.msync(address, P, 4))),
        with_mmap(Errno(EINVAL)),
    ),
    "/proc/self/mem": (
        mapped(read_own_memory),
        by_flags(unmapped=Errno(ENODEV), private=Errno(EIO), shared=1),
    ),
    "write(2) from it": (
        mapped(written_from),
        by_flags(unmapped=Errno(ENODEV), private=Errno(EFAULT), shared=8),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(memfd: GuestMemfd, vm: VmFd, name: str) -> None:
    operation, expected = OPERATIONS[name]
    thing = op.Thing(
        memfd.fileno(), lambda flags: vm.create_guest_memfd(SIZE, memfd.flags | flags).detach()
    )
    found = outcome(lambda: operation(thing))
    assert found == (expected[memfd.flags] if isinstance(expected, dict) else expected)


def test_what_fstat_says(memfd: GuestMemfd) -> None:
    memfd.allocate(0, P)
    found = memfd.fstat()
    assert (found.st_mode, found.st_size, found.st_blksize, found.st_blocks, found.st_nlink) == (
        0o100600,
        SIZE,
        P,
        0,
        1,
    )
    assert memfd.size == SIZE
    # It has an inode of its own since 7.3.
    assert os.readlink(f"/proc/self/fd/{memfd.fileno()}") in (
        "anon_inode:[kvm-gmem]",
        "/[kvm-gmem] (deleted)",
    )


def test_a_mapping_past_the_end_is_refused_before_the_kernel_is_asked(shared: GuestMemfd) -> None:
    with pytest.raises(ValueError, match="mmap"):
        shared.mmap(0, SIZE + P)


# fallocate.


KEEP = FallocMode.KEEP_SIZE


@pytest.mark.parametrize(
    "mode",
    [
        0,
        FallocMode.PUNCH_HOLE,
        FallocMode.ZERO_RANGE | KEEP,
        FallocMode.COLLAPSE_RANGE,
        FallocMode.INSERT_RANGE,
        FallocMode.UNSHARE_RANGE | KEEP,
    ],
)
def test_other_modes_are_not_supported(memfd: GuestMemfd, mode: int) -> None:
    assert outcome(lambda: fallocate(memfd.fileno(), mode, 0, P)) == Errno(EOPNOTSUPP)


@pytest.mark.parametrize(
    ("mode", "offset", "length", "expected"),
    [
        (KEEP, 0, SIZE, None),
        (PUNCH, P - 1, P, Errno(EINVAL)),
        (KEEP, SIZE, P, Errno(EINVAL)),
        (KEEP, SIZE + P, P, Errno(EINVAL)),
        (KEEP, SIZE - P, 2 * P, Errno(EINVAL)),
        (PUNCH, SIZE, P, None),
        (PUNCH, SIZE + P, P, None),
        (PUNCH, SIZE - P, 2 * P, None),
        (PUNCH, 1 << 40, P, None),
        (PUNCH, P, P - 1, Errno(EINVAL)),
        (PUNCH, P, P, None),
        (KEEP, P, P, None),
        (KEEP, 0, 0, Errno(EINVAL)),
        (KEEP, -P, P, Errno(EINVAL)),
        (KEEP, 1, P, Errno(EINVAL)),
        *(
            (PUNCH, offset, length, Errno(EINVAL))
            for offset in (0, P)
            for length in (1, P - 1, P + 1)
        ),
        *((PUNCH, 1, length, Errno(EINVAL)) for length in (1, P - 1, P, P + 1)),
    ],
)
def test_ranges(memfd: GuestMemfd, mode: int, offset: int, length: int, expected: object) -> None:
    call = memfd.punch_hole if mode == PUNCH else memfd.allocate
    assert outcome(lambda: call(offset, length)) == expected


def test_pages_are_counted_whoever_may_see_them(memfd: GuestMemfd) -> None:
    def resident() -> int:
        try:
            return memfd.resident_pages(0, SIZE)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            pytest.skip("cachestat came with Linux 6.5")

    assert resident() == 0
    memfd.allocate(0, 3 * P)
    assert resident() == 3
    memfd.punch_hole(P, P)
    assert resident() == 2
    assert memfd.resident_pages(P, P) == 0
