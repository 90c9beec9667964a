"""statx(2), for the attributes of a file that the kernel knows without its file system."""

import ctypes
import os
import struct
from typing import Final

from restrictedmem.abi._syscall import libc, raise_errno

SYS_statx: Final = {"x86_64": 332, "aarch64": 291}

#: Device and inode number; no two files have the same at the same time.
Identity = tuple[int, int]

AT_STATX_DONT_SYNC: Final = 0x4000
_AT_EMPTY_PATH: Final = 0x1000

#: ``struct statx``.
_Statx = ctypes.c_char * 256
#: ``stx_dev_major`` and ``stx_dev_minor``.
_DEVICE: Final = struct.Struct("=136x2I")
#: ``stx_ino``, and the device.
_IDENTITY: Final = struct.Struct("=32xQ96x2I")
_AT_FDCWD: Final = -100
_number: Final = ctypes.c_long(SYS_statx.get(os.uname().machine, -1))
_flags, _nothing = ctypes.c_long(AT_STATX_DONT_SYNC), ctypes.c_long(0)
_open_flags: Final = ctypes.c_long(AT_STATX_DONT_SYNC | _AT_EMPTY_PATH)


def device(path: str, directory: int = _AT_FDCWD) -> int:
    """Return the device number (``st_dev``) of the file at a path.

    A relative path begins at ``directory``. A FUSE server is not asked: the kernel keeps the device
    number itself, and with AT_STATX_DONT_SYNC fuse_update_get_attr never sends GETATTR.

    Raises:
        OSError: as statx(2).
    """
    found = _Statx()
    if libc.syscall(_number, ctypes.c_long(directory), path.encode(), _flags, _nothing, found) < 0:
        raise_errno("statx")
    return os.makedev(*_DEVICE.unpack_from(found))


def identity(fd: int) -> Identity:
    """Return the identity of an open file of any kind, without asking its file system.

    ``device`` says why this works.

    Raises:
        OSError: EBADF.
    """
    found = _Statx()
    if libc.syscall(_number, ctypes.c_long(fd), b"", _open_flags, _nothing, found) < 0:
        raise_errno("statx")
    ino, major, minor = _IDENTITY.unpack_from(found)
    return os.makedev(major, minor), ino
