"""Cases of a descriptor's content: read, write, and the calls between files."""

import os
from collections.abc import Callable
from errno import EFAULT, EINVAL, EIO, EOPNOTSUPP, ESPIPE, EXDEV
from typing import Final

from restrictedmem.conformance import handles
from restrictedmem.conformance.case import Case, Since
from restrictedmem.conformance.cases.rows import (
    GMEM_TEST,
    POSTING,
    by_fuse,
    everywhere,
    file,
    refused,
)
from restrictedmem.conformance.facts import ANON_FILE, FUSE_SPLICE_EMPTY, FUSE_SPLICE_ERROR
from restrictedmem.conformance.files import File
from restrictedmem.conformance.outcome import Errno
from restrictedmem.units import PAGE_SIZE

_RW: Final = f"{GMEM_TEST} test_file_read_write; {POSTING}"
_VFS: Final = f"{POSTING}; read(2), write(2)"
_SEEK: Final = f"{POSTING}: no FMODE_LSEEK; lseek(2)"
_SPLICE: Final = f"{POSTING}: no splice operation; splice(2), sendfile(2)"
_COPY: Final = f"{POSTING}; copy_file_range(2)"


def _sized(does: Callable[[File], object]) -> Callable[[File], object]:
    """Return an operation that sets the size to a page first."""

    def operation(file: File) -> object:
        file.resize()
        return does(file)

    return operation


_EMPTY: Final = refused(EINVAL, descriptor=Since(0, Errno(EINVAL), FUSE_SPLICE_EMPTY), memfd=0)
_FULL: Final = refused(
    EINVAL, descriptor=Since(Errno(EIO), Errno(EINVAL), FUSE_SPLICE_ERROR), memfd=PAGE_SIZE
)

CASES: Final[tuple[Case, ...]] = (
    file("read", lambda f: f.read(64), refused(EINVAL, memfd=0), _RW, ("GM-RW-1", "SEC-3")),
    file("read-sized", _sized(lambda f: f.read(64)), refused(EINVAL, memfd=64), _VFS),
    file(
        "read-nothing",
        lambda f: f.read(0),
        refused(EINVAL, memfd=0, **by_fuse(0)),
        _VFS,
        divergence="zero-length",
    ),
    file(
        "read-bad-address",
        lambda f: f.transfer_at_nothing("read"),
        refused(EINVAL, memfd=0, **by_fuse(Errno(EFAULT))),
        _VFS,
        divergence="bad-address",
    ),
    file("readv", lambda f: f.readv(8), refused(EINVAL, memfd=0), _VFS),
    file(
        "readv-nothing",
        lambda f: f.readv(0),
        refused(EINVAL, memfd=0, **by_fuse(0)),
        _VFS,
        divergence="zero-length",
    ),
    file("write", lambda f: f.write(64), refused(EINVAL, memfd=64), _RW, ("GM-RW-2", "SEC-3")),
    file(
        "write-nothing",
        lambda f: f.write(0),
        refused(EINVAL, memfd=0, **by_fuse(0)),
        _VFS,
        divergence="zero-length",
    ),
    file(
        "write-bad-address",
        lambda f: f.transfer_at_nothing("write"),
        refused(EINVAL, memfd=Errno(EFAULT), **by_fuse(Errno(EFAULT))),
        _VFS,
        divergence="bad-address",
    ),
    file("writev", lambda f: f.writev(8), refused(EINVAL, memfd=8), _VFS),
    file("pread", lambda f: f.pread(64, 0), refused(ESPIPE, memfd=0), _RW, ("GM-RW-3", "SEC-3")),
    file("pread-nothing", lambda f: f.pread(0, 0), refused(ESPIPE, memfd=0), _VFS),
    file("preadv", lambda f: f.preadv(8, 0), refused(ESPIPE, memfd=0), _VFS),
    file("pwrite", lambda f: f.pwrite(64, 0), refused(ESPIPE, memfd=64), _RW, ("GM-RW-4", "SEC-3")),
    file("pwritev", lambda f: f.pwritev(8, 0), refused(ESPIPE, memfd=8), _VFS),
    file("lseek-set", lambda f: f.lseek(os.SEEK_SET), refused(ESPIPE, memfd=0), _SEEK),
    file("lseek-cur", lambda f: f.lseek(os.SEEK_CUR), refused(ESPIPE, memfd=0), _SEEK),
    file("lseek-end", lambda f: f.lseek(os.SEEK_END), refused(ESPIPE, memfd=0), _SEEK),
    file("lseek-data", lambda f: f.lseek(os.SEEK_DATA), refused(ESPIPE, memfd=Errno(6)), _SEEK),
    file("lseek-hole", lambda f: f.lseek(os.SEEK_HOLE), refused(ESPIPE, memfd=Errno(6)), _SEEK),
    file("lseek-unknown", lambda f: f.lseek(5), everywhere(Errno(EINVAL)), "lseek(2)"),
    file(
        "splice-out",
        _sized(lambda f: f.splice_out()),
        _FULL,
        _SPLICE,
        divergence="splice-out",
    ),
    file(
        "splice-out-offset",
        _sized(lambda f: f.splice_out(0)),
        refused(EINVAL, memfd=PAGE_SIZE),
        _SPLICE,
    ),
    file("splice-out-empty", lambda f: f.splice_out(), _EMPTY, _SPLICE, divergence="splice-empty"),
    file("splice-in", lambda f: f.splice_in(), refused(EINVAL, memfd=7), _SPLICE),
    file("splice-in-offset", lambda f: f.splice_in(0), refused(EINVAL, memfd=7), _SPLICE),
    file("sendfile-into", lambda f: f.sendfile_into(), refused(EINVAL, memfd=7), _SPLICE),
    file(
        "sendfile-from",
        _sized(lambda f: f.sendfile_from()),
        _FULL,
        _SPLICE,
        divergence="splice-out",
    ),
    file(
        "sendfile-from-offset",
        _sized(lambda f: f.sendfile_from(0)),
        refused(ESPIPE, memfd=PAGE_SIZE),
        _SPLICE,
    ),
    file(
        "sendfile-from-empty",
        lambda f: f.sendfile_from(),
        _EMPTY,
        _SPLICE,
        divergence="splice-empty",
    ),
    file("copy-out", _sized(lambda f: f.copy_out()), everywhere(Errno(EXDEV)), _COPY),
    file("copy-in", lambda f: f.copy_in(), everywhere(Errno(EXDEV)), _COPY),
    file(
        "copy-between-empty",
        lambda f: f.copy_between(),
        {"proposal": 0, "secret": 0, "memfd": 0, "gmem": Errno(EINVAL)},
        _COPY,
    ),
    file(
        "copy-between-sized",
        _sized(lambda f: f.copy_between()),
        {**refused(EINVAL, memfd=PAGE_SIZE), "proposal": 0, "descriptor": Errno(EINVAL)},
        _COPY,
        divergence="copy-between",
    ),
    file(
        "readahead",
        _sized(lambda f: f.readahead()),
        {
            **dict.fromkeys(("proposal", "secret", "gmem"), Since(Errno(EINVAL), 0, ANON_FILE)),
            **by_fuse(0),
            "memfd": 0,
        },
        "readahead(2); mm/readahead.c, ksys_readahead",
        divergence="readahead",
    ),
    file(
        "fadvise-willneed",
        lambda f: f.fadvise(os.POSIX_FADV_WILLNEED),
        everywhere(0),
        "posix_fadvise(2)",
    ),
    file(
        "fadvise-dontneed",
        lambda f: f.fadvise(os.POSIX_FADV_DONTNEED),
        everywhere(0),
        "posix_fadvise(2)",
    ),
    file(
        "ficlone",
        handles.clone_out,
        {**everywhere(Errno(EXDEV)), "memfd": Errno(EOPNOTSUPP)},
        f"{POSTING}; ioctl_ficlone(2)",
    ),
    file(
        "read-direct",
        handles.read_direct,
        everywhere(Errno(EINVAL)),
        f"{POSTING}: no direct I/O; fcntl(2)",
    ),
)
