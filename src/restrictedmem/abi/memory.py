"""memfd, fallocate(2), madvise(2) and mlock2(2): numbers and calls that Python lacks."""

import ctypes
import mmap
import os
from enum import IntFlag
from errno import EINVAL
from typing import Final, final

from restrictedmem.abi._struct import c_struct, u64
from restrictedmem.abi._syscall import libc, raise_errno, syscall
from restrictedmem.fd import OwnedFd

SYS_memfd_secret: Final = 447
SYS_cachestat: Final = 451

MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
MADV_COLLAPSE: Final = 25
MADV_GUARD_INSTALL: Final = 102
MADV_GUARD_REMOVE: Final = 103
MLOCK_ONFAULT: Final = 1

#: The number of memfd_restricted in v9 and v10, in both tables of x86. Since Linux 6.5 it is
#: cachestat's.
SYS_memfd_restricted: Final = 451
#: A flag of memfd_restricted(2), proposed after v10; bit 0 was RMFD_TMPFILE.
RMFD_HUGEPAGE: Final = 2
MFD_CLOEXEC: Final = 1
MFD_ALLOW_SEALING: Final = 2
MFD_HUGETLB: Final = 4
MFD_NOEXEC_SEAL: Final = 8
MFD_HUGE_SHIFT: Final = 26

#: Orders of the large folios that one page table entry maps, and the size of the smaller one in
#: bytes.
PMD_ORDER: Final = 9
PUD_ORDER: Final = 18
PMD_SIZE: Final = mmap.PAGESIZE << PMD_ORDER

_HUGETLBFS_MAGIC: Final = 0x9584_58F6
_LAST_BYTE: Final = (1 << 63) - 1


class FallocMode(IntFlag):
    """``FALLOC_FL_*`` of <linux/falloc.h>."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    COLLAPSE_RANGE = 0x08
    ZERO_RANGE = 0x10
    INSERT_RANGE = 0x20
    UNSHARE_RANGE = 0x40


PUNCH: Final = int(FallocMode.PUNCH_HOLE | FallocMode.KEEP_SIZE)

_fallocate = libc.fallocate64
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int
libc.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
_mmap = libc.mmap64
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_mmap.restype = ctypes.c_void_p
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_RESERVED: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_OVER: Final = mmap.MAP_SHARED | _MAP_FIXED | _MAP_NORESERVE
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE


def memfd_restricted(flags: int = 0, number: int = SYS_memfd_restricted) -> OwnedFd:
    """Make the system call itself, which a supervisor may answer.

    A kernel since Linux 6.5 takes it for cachestat, with null pointers.

    Raises:
        OSError: the errno of the kernel or the supervisor; ENOSYS and EFAULT are usual where the
            call is not present.
    """
    return OwnedFd(syscall("memfd_restricted", number, flags, 0, 0, 0))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2) with a mode; offset and length in bytes.

    Raises:
        OSError: the kernel's errno.
    """
    if _fallocate(fd, mode, offset, length):
        raise_errno("fallocate")


def memfd_create(name: str, flags: int = 0) -> OwnedFd:
    """Create an empty memfd that is close-on-exec and can be sealed; the caller owns it.

    From Linux 6.3 on it can never be executed.

    Raises:
        OSError: EMFILE, ENFILE, ENOMEM; ENODEV for huge pages of a size that the kernel does not
            have.
    """
    try:
        return OwnedFd(os.memfd_create(name, flags | MFD_CLOEXEC | MFD_NOEXEC_SEAL))
    except OSError as error:
        # MFD_NOEXEC_SEAL came with Linux 6.3; it implies MFD_ALLOW_SEALING.
        if error.errno != EINVAL:
            raise
        return OwnedFd(os.memfd_create(name, flags | MFD_CLOEXEC | MFD_ALLOW_SEALING))


def memfd_secret(flags: int = 0) -> OwnedFd:
    """Create secret memory (memfd_secret(2)); the caller owns the descriptor.

    Raises:
        OSError: ENOSYS where the kernel was booted without it, EINVAL for unknown flags.
    """
    return OwnedFd(syscall("memfd_secret", SYS_memfd_secret, flags))


def mlock_onfault(address: int, length: int) -> None:
    """Lock pages of a mapping as they are faulted in (mlock2(2), MLOCK_ONFAULT); bytes.

    The call locks the whole range or nothing.

    Raises:
        OSError: ENOMEM over RLIMIT_MEMLOCK, EPERM when the limit is 0.
    """
    if libc.mlock2(address, length, MLOCK_ONFAULT):
        raise_errno("mlock2")


def map_over(address: int, length: int, fd: int, offset: int = 0) -> None:
    """Map a file shared over memory that this process has mapped at ``address`` (MAP_FIXED).

    ``length`` and ``offset`` are in bytes. No huge pages are reserved; each is taken at the first
    touch.

    Raises:
        OSError: as mmap(2).
    """
    if _mmap(address, length, _READ_WRITE, _OVER, fd, offset) == _MAP_FAILED:
        raise_errno("mmap")


@final
class Mapping:
    """Bytes of a file, mapped shared so that huge pages of the file can be mapped whole.

    Address and file offset are equally aligned. The huge pages around the range are mapped whole,
    too; nobody may touch the bytes outside the range.
    """

    __slots__ = ("_area", "_offset", "address", "memory")

    def __init__(self, fd: int, offset: int, length: int, alignment: int = PMD_SIZE) -> None:
        """Map ``length`` bytes of ``fd`` from byte ``offset`` on.

        The descriptor stays the caller's. ``alignment`` is a power of 2.

        Raises:
            OSError: as mmap(2).
        """
        start, size = offset, length
        if alignment > mmap.PAGESIZE:
            start = offset & -alignment
            size = (
                min((offset + length + alignment - 1) & -alignment, _LAST_BYTE & -mmap.PAGESIZE)
                - start
            )
        # The address must be known before the file is mapped, because a mapping with pages cannot
        # be moved to an aligned address.
        self._area = mmap.mmap(-1, size + alignment - mmap.PAGESIZE, _RESERVED, _READ_WRITE)
        try:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._area))
            padding = -address & alignment - 1
            map_over(address + padding, size, fd, start)
        except BaseException:
            self._area.close()
            raise
        self._offset = padding + offset - start
        #: The address of byte ``offset`` of the file.
        self.address = address + self._offset
        #: The range, for reading and writing.
        self.memory = memoryview(self._area)[self._offset : self._offset + length]

    def madvise(self, option: int, start: int, length: int) -> None:
        """Call madvise(2) for ``length`` bytes from byte ``start`` of the range on.

        Raises:
            OSError: the kernel's errno.
        """
        self._area.madvise(option, self._offset + start, length)

    def close(self) -> None:
        """Unmap everything; the address must not be used any more."""
        self.memory.release()
        self._area.close()


@c_struct(size=16)
class cachestat_range(ctypes.Structure):
    """A range of a file in bytes."""

    off: u64
    len: u64


@c_struct(size=40)
class cachestat(ctypes.Structure):
    """The page counts of a range."""

    nr_cache: u64 = 0
    nr_dirty: u64 = 0
    nr_writeback: u64 = 0
    nr_evicted: u64 = 0
    nr_recently_evicted: u64 = 0


def resident_pages(fd: int, offset: int, length: int) -> int:
    """Count the allocated pages of a byte range (cachestat(2), Linux 6.5).

    Pages that are only preallocated or swapped out count too.

    Raises:
        OSError: ENOSYS on older kernels; EOPNOTSUPP for hugetlbfs.
    """
    span, found = cachestat_range(off=offset, len=length), cachestat()
    if libc.syscall(
        ctypes.c_long(SYS_cachestat),
        ctypes.c_long(fd),
        ctypes.byref(span),
        ctypes.byref(found),
        ctypes.c_long(0),
    ):
        raise_errno("cachestat")
    return found.nr_cache + found.nr_evicted


def is_hugetlbfs(fd: int) -> bool:
    """Say whether a file is on hugetlbfs, which takes and drops whole pages (fstatfs(2))."""
    # struct statfs: f_type is its first word.
    found = (ctypes.c_long * 32)()
    if libc.fstatfs(fd, found):
        raise_errno("fstatfs")
    return found[0] == _HUGETLBFS_MAGIC


def mincore(address: int, length: int) -> bytes:
    """Say for each page of a mapping whether its file has it in memory: 1 or 0 (mincore(2)).

    This works for hugetlbfs too.

    Raises:
        OSError: ENOMEM where nothing is mapped.
    """
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), pages):
        raise_errno("mincore")
    return bytes(page & 1 for page in pages)
