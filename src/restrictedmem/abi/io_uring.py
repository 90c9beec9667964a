"""<linux/io_uring.h>: a ring that pins pages as registered buffers, without I/O."""

import ctypes
import struct
from typing import Final

from restrictedmem.abi._struct import c_struct, u32, u64
from restrictedmem.abi._syscall import syscall
from restrictedmem.fd import OwnedFd

SYS_io_uring_setup: Final = 425
SYS_io_uring_register: Final = 427
IORING_REGISTER_BUFFERS2: Final = 15
IORING_REGISTER_BUFFERS_UPDATE: Final = 16
IORING_RSRC_REGISTER_SPARSE: Final = 1
#: The most buffers of a ring; not in a header (io_uring/rsrc.c).
IORING_MAX_REG_BUFFERS: Final = 1 << 14
_PARAMS_BYTES: Final = 120
#: ``struct iovec``: address and length.
_IOVEC: Final = struct.Struct("@PN")


@c_struct(size=32)
class io_uring_rsrc_register(ctypes.Structure):
    """The number of buffers of a new table."""

    nr: u32
    flags: u32 = 0
    resv2: u64 = 0
    data: u64 = 0
    tags: u64 = 0


@c_struct(size=32)
class io_uring_rsrc_update2(ctypes.Structure):
    """The buffers to replace, and their new places (``data``: an array of ``iovec``)."""

    offset: u32
    resv: u32 = 0
    data: u64
    tags: u64 = 0
    nr: u32
    resv2: u32 = 0


def io_uring_setup(entries: int) -> OwnedFd:
    """Make a plain ring (io_uring_setup(2)); the caller owns it.

    Raises:
        OSError: EPERM where kernel.io_uring_disabled or a filter forbids it; ENOSYS; ENOMEM.
    """
    # A zero struct io_uring_params asks for nothing special. The kernel's answer in it is only
    # needed to map the ring.
    params = ctypes.create_string_buffer(_PARAMS_BYTES)
    return OwnedFd(syscall("io_uring_setup", SYS_io_uring_setup, entries, ctypes.addressof(params)))


def register_sparse_buffers(ring: OwnedFd, count: int) -> None:
    """Give a ring a table of empty buffers (IORING_REGISTER_BUFFERS2, Linux 5.19).

    Raises:
        OSError: EINVAL for more than ``IORING_MAX_REG_BUFFERS``, and on older kernels; ENOMEM.
    """
    table = io_uring_rsrc_register(nr=count, flags=IORING_RSRC_REGISTER_SPARSE)
    _register(ring, IORING_REGISTER_BUFFERS2, table)


def update_buffer(ring: OwnedFd, index: int, address: int, length: int) -> None:
    """Set one buffer of a ring to a range of this process's memory, at most 1 GiB.

    Address and length 0 make the buffer empty. The pages of the range are faulted in, and stay
    pinned (FOLL_LONGTERM) until the buffer is replaced or the ring closed.

    Raises:
        OSError: ENOMEM over RLIMIT_MEMLOCK, which counts all rings of a user, unless CAP_IPC_LOCK;
            EFAULT; EINVAL.
    """
    iovec = ctypes.create_string_buffer(_IOVEC.pack(address, length), _IOVEC.size)
    _register(
        ring,
        IORING_REGISTER_BUFFERS_UPDATE,
        io_uring_rsrc_update2(offset=index, data=ctypes.addressof(iovec), nr=1),
    )


def _register(ring: OwnedFd, opcode: int, argument: ctypes.Structure) -> None:
    syscall(
        "io_uring_register",
        SYS_io_uring_register,
        ring.fileno(),
        opcode,
        ctypes.addressof(argument),
        ctypes.sizeof(argument),
    )
