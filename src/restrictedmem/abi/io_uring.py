"""<linux/io_uring.h>: making a ring, no more; whoever has one can pin pages of a file."""

import ctypes
from typing import Final

from restrictedmem.abi._syscall import libc, raise_errno
from restrictedmem.fd import OwnedFd

SYS_io_uring_setup: Final = 425
_PARAMS_BYTES: Final = 120


def io_uring_setup(entries: int) -> OwnedFd:
    """Make a plain ring (io_uring_setup(2)); the caller owns it.

    Raises:
        OSError: EPERM where kernel.io_uring_disabled or a filter forbids it; ENOSYS; ENOMEM.
    """
    # A struct io_uring_params that is all zero asks for nothing special; what the kernel writes into it serves to map the ring.
    params = ctypes.create_string_buffer(_PARAMS_BYTES)
    fd: int = libc.syscall(ctypes.c_long(SYS_io_uring_setup), ctypes.c_long(entries), params)
    if fd < 0:
        raise_errno("io_uring_setup")
    return OwnedFd(fd)
