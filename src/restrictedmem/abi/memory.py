"""memfd, fallocate(2), madvise(2) and mlock2(2): numbers and calls the standard library lacks."""

import ctypes
import mmap
import os
from enum import IntFlag
from errno import EINVAL
from typing import Final

from restrictedmem.abi._struct import c_struct, u64
from restrictedmem.abi._syscall import libc, raise_errno, syscall
from restrictedmem.fd import OwnedFd

SYS_memfd_secret: Final = 447
SYS_cachestat: Final = 451

MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
MADV_COLLAPSE: Final = 25
MLOCK_ONFAULT: Final = 1

MFD_CLOEXEC: Final = 1
MFD_NOEXEC_SEAL: Final = 8


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
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_mmap.restype = ctypes.c_void_p
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode; offset and length in bytes.

    Raises:
        OSError: the kernel's errno.
    """
    if _fallocate(fd, mode, offset, length):
        raise_errno("fallocate")


def memfd_create(name: str) -> OwnedFd:
    """Create an empty memfd that is close-on-exec and can never be executed (the caller owns it).

    Raises:
        OSError: EMFILE, ENFILE, ENOMEM.
    """
    try:
        return OwnedFd(os.memfd_create(name, MFD_CLOEXEC | MFD_NOEXEC_SEAL))
    except OSError as error:
        # MFD_NOEXEC_SEAL came with Linux 6.3.
        if error.errno != EINVAL:
            raise
        return OwnedFd(os.memfd_create(name, MFD_CLOEXEC))


def memfd_secret(flags: int = 0) -> OwnedFd:
    """memfd_secret(2); the caller owns the descriptor.

    Raises:
        OSError: ENOSYS where the kernel was booted without it, EINVAL for unknown flags.
    """
    return OwnedFd(syscall("memfd_secret", SYS_memfd_secret, flags))


def mlock_onfault(address: int, length: int) -> None:
    """Lock a mapping's pages as they come, all of the range or none of it (mlock2(2), MLOCK_ONFAULT); bytes.

    Raises:
        OSError: ENOMEM over RLIMIT_MEMLOCK, EPERM when the limit is 0.
    """
    if libc.mlock2(address, length, MLOCK_ONFAULT):
        raise_errno("mlock2")


def map_over(address: int, length: int, fd: int) -> None:
    """Map the first ``length`` bytes of a file, shared, over what this process has mapped at ``address`` (MAP_FIXED).

    Raises:
        OSError: as mmap(2).
    """
    if _mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == _MAP_FAILED:
        raise_errno("mmap")


@c_struct(size=16)
class cachestat_range(ctypes.Structure):
    """A range of a file in bytes."""

    off: u64
    len: u64


@c_struct(size=40)
class cachestat(ctypes.Structure):
    """Page counts of a range."""

    nr_cache: u64 = 0
    nr_dirty: u64 = 0
    nr_writeback: u64 = 0
    nr_evicted: u64 = 0
    nr_recently_evicted: u64 = 0


def resident_pages(fd: int, offset: int, length: int) -> int:
    """Count the allocated pages of a byte range, those only preallocated included (cachestat(2), Linux 6.5).

    Raises:
        OSError: ENOSYS on older kernels.
    """
    span, found = cachestat_range(off=offset, len=length), cachestat()
    if libc.syscall(ctypes.c_long(SYS_cachestat), ctypes.c_long(fd), ctypes.byref(span), ctypes.byref(found), ctypes.c_long(0)):
        raise_errno("cachestat")
    return found.nr_cache
