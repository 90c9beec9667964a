"""Information that a pidfd gives about another process (<linux/pidfd.h>).

The process need not be a child of this one.
"""

import ctypes
from typing import Final

from restrictedmem.abi._ioctl import Dir, HasFileno, Ioctl
from restrictedmem.abi._struct import c_struct, s32, u32, u64

PIDFD_INFO_EXIT: Final = 1 << 3


@c_struct(size=64)
class pidfd_info(ctypes.Structure):
    """``struct pidfd_info`` of Linux 6.15; earlier kernels have no ``exit_code``."""

    mask: u64 = 0
    cgroupid: u64 = 0
    pid: u32 = 0
    tgid: u32 = 0
    ppid: u32 = 0
    ruid: u32 = 0
    rgid: u32 = 0
    euid: u32 = 0
    egid: u32 = 0
    suid: u32 = 0
    sgid: u32 = 0
    fsuid: u32 = 0
    fsgid: u32 = 0
    exit_code: s32 = 0


PIDFD_GET_INFO: Final = Ioctl("PIDFD_GET_INFO", 0xFF, 11, Dir.READ | Dir.WRITE, pidfd_info)


def wait_status(pidfd: HasFileno) -> int | None:
    """Return the wait status of a process that has ended and was reaped (Linux 6.15).

    Before that, return None.

    Raises:
        OSError: ENOTTY, EINVAL on older kernels; ESRCH there and where the pidfd was made too late.
    """
    found = pidfd_info(mask=PIDFD_INFO_EXIT)
    PIDFD_GET_INFO(pidfd, found)
    return found.exit_code if found.mask & PIDFD_INFO_EXIT else None
