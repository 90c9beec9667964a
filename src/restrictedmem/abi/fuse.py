"""The part of FUSE that a restricted file needs (<linux/fuse.h>, protocol 7.31 and later)."""

import ctypes
import fcntl
import os
import struct
from enum import IntEnum, IntFlag
from typing import Final

from restrictedmem.abi._ioctl import Dir, request_number
from restrictedmem.abi._struct import c_struct, codec, s32, s64, u16, u32, u64
from restrictedmem.fd import OwnedFd

KERNEL_VERSION: Final = 7
#: The protocol version of this server; 7.38 has FOPEN_NOFLUSH (since 7.35) and total_extlen.
KERNEL_MINOR_VERSION: Final = 38
#: The oldest minor version whose kernel knows FOPEN_NOFLUSH (Linux 5.16).
OLDEST_MINOR_VERSION: Final = 35
ROOT_ID: Final = 1
#: A read of /dev/fuse with a smaller buffer is EINVAL.
MIN_READ_BUFFER: Final = 8192


class Opcode(IntEnum):
    """``enum fuse_opcode``."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    UNLINK = 10
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    BATCH_FORGET = 42
    FALLOCATE = 43
    LSEEK = 46
    COPY_FILE_RANGE = 47


class InitFlag(IntFlag):
    """Features that INIT negotiates."""

    ATOMIC_O_TRUNC = 1 << 3
    PARALLEL_DIROPS = 1 << 18
    INIT_EXT = 1 << 30


class OpenFlag(IntFlag):
    """``FOPEN_*`` in the replies to OPEN and CREATE."""

    DIRECT_IO = 1 << 0
    NONSEEKABLE = 1 << 2
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6


#: ``fuse_read_in.read_flags``: a read(2) with O_DIRECT. The page cache's own reads lack it.
FUSE_READ_LOCKOWNER: Final = 1 << 1
#: ``fuse_write_in.write_flags``: a page of the page cache is written back.
FUSE_WRITE_CACHE: Final = 1 << 0
#: The ``error`` of a message with ``unique`` 0: drop pages from the page cache.
FUSE_NOTIFY_INVAL_INODE: Final = 2


class AttrValid(IntFlag):
    """``FATTR_*``: which fields of a SETATTR are valid."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10


@c_struct(size=40)
class fuse_in_header(ctypes.Structure):
    """The head of every request."""

    len: u32
    opcode: u32
    unique: u64
    nodeid: u64
    uid: u32
    gid: u32
    pid: u32
    total_extlen: u16 = 0
    padding: u16 = 0


@c_struct(size=16)
class fuse_out_header(ctypes.Structure):
    """The head of every reply; ``error`` is 0 or a negative errno."""

    len: u32
    error: s32
    unique: u64


@c_struct(size=64)
class fuse_init_in(ctypes.Structure):
    """The kernel's offer in INIT."""

    major: u32
    minor: u32
    max_readahead: u32
    flags: u32
    flags2: u32 = 0
    unused0: u32 = 0
    unused1: u64 = 0
    unused2: u64 = 0
    unused3: u64 = 0
    unused4: u64 = 0
    unused5: u64 = 0


@c_struct(size=64)
class fuse_init_out(ctypes.Structure):
    """The server's answer to INIT: the features that it uses."""

    major: u32
    minor: u32
    max_readahead: u32
    flags: u32
    max_background: u16
    congestion_threshold: u16
    max_write: u32
    time_gran: u32
    max_pages: u16 = 0
    map_alignment: u16 = 0
    flags2: u32 = 0
    max_stack_depth: u32 = 0
    unused0: u32 = 0
    unused1: u64 = 0
    unused2: u64 = 0


@c_struct(size=88)
class fuse_attr(ctypes.Structure):
    """A file's attributes; ``blocks`` counts 512-byte units."""

    ino: u64
    size: u64
    blocks: u64
    atime: u64
    mtime: u64
    ctime: u64
    atimensec: u32
    mtimensec: u32
    ctimensec: u32
    mode: u32
    nlink: u32
    uid: u32
    gid: u32
    rdev: u32
    blksize: u32
    flags: u32


@c_struct(size=40)
class fuse_entry_out(ctypes.Structure):
    """The head of a reply to LOOKUP and CREATE; the attributes follow."""

    nodeid: u64
    generation: u64
    entry_valid: u64
    attr_valid: u64
    entry_valid_nsec: u32
    attr_valid_nsec: u32


@c_struct(size=16)
class fuse_attr_out(ctypes.Structure):
    """The head of a reply to GETATTR and SETATTR; the attributes follow."""

    attr_valid: u64
    attr_valid_nsec: u32
    dummy: u32


@c_struct(size=16)
class fuse_open_out(ctypes.Structure):
    """The reply to OPEN, and the end of a reply to CREATE."""

    fh: u64
    open_flags: u32
    backing_id: s32


@c_struct(size=16)
class fuse_create_in(ctypes.Structure):
    """open(2) with O_CREAT; the name follows."""

    flags: u32
    mode: u32
    umask: u32
    open_flags: u32


@c_struct(size=88)
class fuse_setattr_in(ctypes.Structure):
    """New attributes; ``valid`` says which fields count."""

    valid: u32
    padding: u32
    fh: u64
    size: u64
    lock_owner: u64
    atime: u64
    mtime: u64
    ctime: u64
    atimensec: u32
    mtimensec: u32
    ctimensec: u32
    mode: u32
    unused4: u32
    uid: u32
    gid: u32
    unused5: u32


@c_struct(size=32)
class fuse_fallocate_in(ctypes.Structure):
    """fallocate(2); offset and length in bytes."""

    fh: u64
    offset: u64
    length: u64
    mode: u32
    padding: u32


@c_struct(size=40)
class fuse_read_in(ctypes.Structure):
    """A read of ``size`` bytes."""

    fh: u64
    offset: u64
    size: u32
    read_flags: u32
    lock_owner: u64
    flags: u32
    padding: u32


@c_struct(size=40)
class fuse_write_in(ctypes.Structure):
    """A write of ``size`` bytes, which follow."""

    fh: u64
    offset: u64
    size: u32
    write_flags: u32
    lock_owner: u64
    flags: u32
    padding: u32


@c_struct(size=8)
class fuse_write_out(ctypes.Structure):
    """How many bytes were written."""

    size: u32
    padding: u32


@c_struct(size=24)
class fuse_notify_inval_inode_out(ctypes.Structure):
    """A range of a file's page cache, in bytes."""

    ino: u64
    off: s64
    len: s64


@c_struct(size=32)
class fuse_ioctl_in(ctypes.Structure):
    """ioctl(2); the bytes of the argument follow, as many as the request number says."""

    fh: u64
    flags: u32
    cmd: u32
    arg: u64
    in_size: u32
    out_size: u32


@c_struct(size=16)
class fuse_ioctl_out(ctypes.Structure):
    """The result of an ioctl."""

    result: s32
    flags: u32
    in_iovs: u32
    out_iovs: u32


@c_struct(size=8)
class fuse_batch_forget_in(ctypes.Structure):
    """The head of a BATCH_FORGET; ``count`` pairs follow."""

    count: u32
    dummy: u32


@c_struct(size=16)
class fuse_forget_one(ctypes.Structure):
    """One node of a BATCH_FORGET."""

    nodeid: u64
    nlookup: u64


@c_struct(size=80)
class fuse_statfs_out(ctypes.Structure):
    """``struct fuse_kstatfs``."""

    blocks: u64 = 0
    bfree: u64 = 0
    bavail: u64 = 0
    files: u64 = 0
    ffree: u64 = 0
    bsize: u32 = 0
    namelen: u32 = 0
    frsize: u32 = 0
    padding: u32 = 0
    spare0: u64 = 0
    spare1: u64 = 0
    spare2: u64 = 0


IN_HEADER = codec(fuse_in_header)
OUT_HEADER = codec(fuse_out_header)
ATTR = codec(fuse_attr)
ENTRY_OUT = codec(fuse_entry_out)
ATTR_OUT = codec(fuse_attr_out)
OPEN_OUT = codec(fuse_open_out)
READ_IN = codec(fuse_read_in)
WRITE_IN = codec(fuse_write_in)
WRITE_OUT = codec(fuse_write_out)
NOTIFY_INVAL_INODE_OUT = codec(fuse_notify_inval_inode_out)
FALLOCATE_IN = codec(fuse_fallocate_in)
IOCTL_OUT = codec(fuse_ioctl_out)
FORGET_ONE = codec(fuse_forget_one)

_CLONE: Final = request_number(229, 0, Dir.READ, 4)


def clone(device: OwnedFd) -> OwnedFd:
    """Return another /dev/fuse for the same mount (FUSE_DEV_IOC_CLONE), which the caller owns.

    Each has the requests that were read from it. When the last descriptor of one is closed, the
    kernel fails the requests that were read from it and have no answer.

    Raises:
        OSError: EACCES for /dev/fuse; EMFILE, ENFILE.
    """
    made = OwnedFd(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    try:
        fcntl.ioctl(made.fileno(), _CLONE, struct.pack("=I", device.fileno()))
    except BaseException:
        made.close()
        raise
    return made
