"""userfaultfd(2), and its use to make faults on missing pages fail.

A process that has such a descriptor can block a fault.
"""

import ctypes
import os
from typing import Final

from restrictedmem.abi._ioctl import Dir, Ioctl
from restrictedmem.abi._struct import c_struct, u64
from restrictedmem.abi._syscall import syscall
from restrictedmem.fd import OwnedFd

SYS_userfaultfd: Final = {"x86_64": 323, "aarch64": 282}
UFFD_USER_MODE_ONLY: Final = 1

UFFD_API: Final = 0xAA
UFFD_FEATURE_SIGBUS: Final = 1 << 7
UFFDIO_REGISTER_MODE_MISSING: Final = 1


@c_struct(size=24)
class uffdio_api(ctypes.Structure):
    """The features that are asked of the descriptor."""

    api: u64
    features: u64
    ioctls: u64 = 0


@c_struct(size=32)
class uffdio_register(ctypes.Structure):
    """A range of addresses to watch."""

    start: u64
    len: u64
    mode: u64
    ioctls: u64 = 0


UFFDIO_API: Final = Ioctl("UFFDIO_API", 0xAA, 0x3F, Dir.READ | Dir.WRITE, uffdio_api)
UFFDIO_REGISTER: Final = Ioctl("UFFDIO_REGISTER", 0xAA, 0x00, Dir.READ | Dir.WRITE, uffdio_register)


def userfaultfd(flags: int) -> OwnedFd:
    """Make a userfaultfd, close-on-exec; the caller owns it.

    Raises:
        OSError: EPERM without CAP_SYS_PTRACE where vm.unprivileged_userfaultfd is 0, unless
            UFFD_USER_MODE_ONLY; ENOSYS.
    """
    return OwnedFd(
        syscall("userfaultfd", SYS_userfaultfd.get(os.uname().machine, -1), flags | os.O_CLOEXEC)
    )


def refuse_missing(address: int, length: int) -> OwnedFd:
    """Make faults on missing pages of a mapping fail, until the returned descriptor is closed.

    Such a fault is SIGBUS, or EFAULT in a system call, and allocates nothing (Linux 4.14). The
    caller owns the descriptor. No privilege is needed.

    Raises:
        OSError: EPERM, ENOSYS where userfaultfd(2) is forbidden or missing.
    """
    fd = userfaultfd(UFFD_USER_MODE_ONLY)
    try:
        UFFDIO_API(fd, uffdio_api(api=UFFD_API, features=UFFD_FEATURE_SIGBUS))
        UFFDIO_REGISTER(
            fd, uffdio_register(start=address, len=length, mode=UFFDIO_REGISTER_MODE_MISSING)
        )
    except BaseException:
        fd.close()
        raise
    return fd
