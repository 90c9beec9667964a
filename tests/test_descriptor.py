"""Everything an owner can do to the descriptor, against what v9 and v10 say, and beside the descriptors the kernel has.

One row, one operation. ``proposal`` is what memfd_restricted(2) answers. Where FUSE cannot express
that, ``here`` is what it answers instead and ``key`` names the row of
docs/reference/divergences.md. The other columns are what a memfd, memfd_secret (a file made by the
proposal's own recipe) and guest_memfd answer, where that was measured; they run on what the machine
has.
"""

import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import (
    EBADF,
    EFAULT,
    EFBIG,
    EINVAL,
    EIO,
    ENODEV,
    ENOSYS,
    ENOTDIR,
    ENOTTY,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
    ESPIPE,
    EXDEV,
)
from pathlib import Path
from typing import Any

import pytest

import descriptor_operations as do
from descriptor_operations import (
    PAGE,
    PRIVATE,
    SHARED,
    Operation,
    R,
    Thing,
    W,
    X,
    allocate,
    map_,
    punch,
    sizes,
)
from outcomes import Errno, in_child, outcome
from restrictedmem.abi import kvm, memory, process
from restrictedmem.abi.memory import PUNCH, FallocMode, fallocate
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import MAX_FILE_BYTES

DIVERGENCES = Path(__file__).parent.parent / "docs" / "reference" / "divergences.md"
KEEP = int(FallocMode.KEEP_SIZE)


class _Same:
    """Stands for the proposal's answer, in another column."""


class _Unsaid:
    """Stands for an answer that nobody states."""


SAME, UNSAID = _Same(), _Unsaid()

_RELEASE = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])


#: Whether FIBMAP gets further than its capability, CAP_SYS_RAWIO.
_RAWIO = process.effective_capabilities() >> 17 & 1


def since(release: tuple[int, int], answer: object, before: object) -> object:
    """Return an answer of this kernel, which gave another ``before`` a release; seen on 6.1, 6.12, 6.18 and 7.3."""
    return answer if release <= _RELEASE else before


@dataclass(frozen=True)
class Row:
    """One operation and its outcomes; ``gmem`` is guest_memfd with flags 0, ``gmem_mmap`` with MMAP (None: the same)."""

    id: str
    operation: Operation
    proposal: object
    key: str = ""
    here: object = SAME
    memfd: object = UNSAID
    secret: object = UNSAID
    gmem: object = UNSAID
    gmem_mmap: object = None

    def expected(self, subject: str) -> object:
        columns: dict[str, object] = {
            "v9": self.here,
            "v10": self.here,
            "memfd": self.memfd,
            "secret": self.secret,
            "gmem": self.gmem,
            "gmem-mmap": self.gmem if self.gmem_mmap is None else self.gmem_mmap,
        }
        found = columns[subject]
        return self.proposal if found is SAME else found


def row(id: str, operation: Operation, proposal: object, **columns: Any) -> Row:
    """Write a row; ``all_same`` says that secret and both kinds of guest_memfd answer as the proposal."""
    if columns.pop("all_same", False):
        columns = {"secret": SAME, "gmem": SAME, **columns}
    return Row(id, operation, proposal, **columns)


def refused(id: str, operation: Operation, errno: int, **columns: Any) -> Row:
    """Write a row for an operation that the proposal refuses, and with it secret and guest_memfd unless a column says otherwise."""
    return row(id, operation, Errno(errno), **{"all_same": True, **columns})


def no_fallocate(id: str, operation: Operation, proposal: object, **columns: Any) -> Row:
    """Write a row that memfd answers as the proposal does: the shmem half of it."""
    return row(id, operation, proposal, **{"memfd": SAME, **columns})


CONTENT = [
    refused("read", lambda t: os.read(t.fd, 10), EINVAL),
    refused("read sized", do.sized(lambda t: os.read(t.fd, 10)), EINVAL),
    refused("read 0 bytes", lambda t: os.read(t.fd, 0), EINVAL, key="zero-length", here=b""),
    refused("readv", lambda t: os.readv(t.fd, [bytearray(4)]), EINVAL),
    refused(
        "readv 0 bytes", lambda t: os.readv(t.fd, [bytearray()]), EINVAL, key="zero-length", here=0
    ),
    refused("read O_DIRECT", do.read_direct, EINVAL),
    refused("write", lambda t: os.write(t.fd, b"x"), EINVAL),
    refused("write 0 bytes", lambda t: os.write(t.fd, b""), EINVAL, key="zero-length", here=0),
    refused("writev", lambda t: os.writev(t.fd, [b"x"]), EINVAL),
    refused("pread", lambda t: os.pread(t.fd, 1, 0), ESPIPE),
    refused("pread 0 bytes", lambda t: os.pread(t.fd, 0, 0), ESPIPE),
    refused("pwrite", lambda t: os.pwrite(t.fd, b"x", 0), ESPIPE),
    refused("preadv", lambda t: os.preadv(t.fd, [bytearray(1)], 0), ESPIPE),
    refused("pwritev", lambda t: os.pwritev(t.fd, [b"x"], 0), ESPIPE),
    refused("lseek SET", do.lseek(os.SEEK_SET), ESPIPE),
    refused("lseek CUR", do.lseek(os.SEEK_CUR), ESPIPE),
    refused("lseek END", do.lseek(os.SEEK_END), ESPIPE),
    refused("lseek DATA", do.lseek(os.SEEK_DATA), ESPIPE),
    refused("lseek HOLE", do.lseek(os.SEEK_HOLE), ESPIPE),
    refused("lseek unknown", do.lseek(5), EINVAL),
    refused("mmap shared r", map_(SHARED, R), ENODEV, secret=0, gmem_mmap=0),
    refused("mmap shared rw", map_(SHARED, R | W), ENODEV, secret=0, gmem_mmap=0),
    refused("mmap shared none", map_(SHARED, 0), ENODEV, secret=0, gmem_mmap=0),
    refused("mmap shared_validate", map_(3, R), ENODEV, secret=0, gmem_mmap=0),
    refused(
        "mmap private r",
        map_(PRIVATE, R),
        ENODEV,
        key="map-private",
        here=0,
        secret=Errno(EINVAL),
        gmem_mmap=Errno(EINVAL),
    ),
    refused(
        "mmap private rw",
        map_(PRIVATE, R | W),
        ENODEV,
        key="map-private",
        here=0,
        secret=Errno(EINVAL),
        gmem_mmap=Errno(EINVAL),
    ),
    refused(
        "mmap private none",
        map_(PRIVATE, 0),
        ENODEV,
        key="map-private",
        here=0,
        secret=Errno(EINVAL),
        gmem_mmap=Errno(EINVAL),
    ),
    refused("mmap shared x", map_(SHARED, R | X), EPERM, gmem=since((6, 18), SAME, Errno(ENODEV))),
    refused(
        "mmap private x", map_(PRIVATE, R | X), EPERM, gmem=since((6, 18), SAME, Errno(ENODEV))
    ),
    refused("mmap 0 bytes", map_(SHARED, R, length=0), EINVAL),
    refused("mmap unaligned offset", map_(SHARED, R, offset=1), EINVAL),
    refused("mmap beyond the end", map_(SHARED, R, offset=1 << 30), ENODEV, secret=0, gmem_mmap=0),
    refused("mmap hugetlb", map_(SHARED | do.MAP_HUGETLB, R), EINVAL),
    refused("mmap private hugetlb", map_(PRIVATE | do.MAP_HUGETLB, R), EINVAL),
    refused("mmap neither", map_(0, R), EINVAL),
    row("touch shared", do.touch(SHARED, R), "ENODEV", gmem=SAME, gmem_mmap="SIGBUS"),
    row(
        "touch private r",
        do.touch(PRIVATE, R),
        "ENODEV",
        key="map-private",
        here="SIGBUS",
        gmem=SAME,
        gmem_mmap="EINVAL",
    ),
    row(
        "touch private w",
        do.touch(PRIVATE, R | W),
        "ENODEV",
        key="map-private",
        here="SIGBUS",
        gmem=SAME,
        gmem_mmap="EINVAL",
    ),
    refused(
        "splice out",
        do.sized(do.splice_out(None)),
        EINVAL,
        key="splice-out",
        here=since((7, 3), Errno(EIO), SAME),
    ),
    refused("splice out offset", do.sized(do.splice_out(0)), EINVAL),
    refused(
        "splice out empty",
        do.splice_out(None),
        EINVAL,
        key="splice-empty",
        here=since((6, 5), 0, SAME),
    ),
    refused("splice in", do.splice_in(None), EINVAL),
    refused("splice in offset", do.splice_in(0), EINVAL),
    refused("sendfile into", do.sendfile_into, EINVAL),
    refused(
        "sendfile from",
        do.sized(do.sendfile_from(None)),
        EINVAL,
        key="splice-out",
        here=since((7, 3), Errno(EIO), SAME),
    ),
    refused("sendfile from offset", do.sized(do.sendfile_from(0)), ESPIPE, gmem=UNSAID),
    refused(
        "sendfile from empty",
        do.sendfile_from(None),
        EINVAL,
        key="splice-empty",
        here=since((6, 5), 0, SAME),
    ),
    refused("copy_file_range out", do.copy_out, EXDEV, memfd=SAME),
    refused("copy_file_range in", do.copy_in, EXDEV, memfd=SAME),
    row("copy_file_range between, size 0", do.copy_between, 0, secret=SAME),
    row(
        "copy_file_range between, sized",
        do.sized(do.copy_between),
        0,
        key="copy-between",
        here=Errno(EINVAL),
    ),
    refused(
        "readahead",
        do.readahead,
        EINVAL,
        key="readahead",
        here=0,
        secret=since((6, 18), SAME, 0),
        gmem=since((6, 18), SAME, 0),
    ),
    row(
        "posix_fadvise",
        lambda t: os.posix_fadvise(t.fd, 0, PAGE, os.POSIX_FADV_WILLNEED),
        None,
        all_same=True,
    ),
    refused("FICLONE", do.clone_out, EXDEV),
]

_GMEM_NAME = since((7, 3), "/[kvm-gmem] (deleted)", "anon_inode:[kvm-gmem]")
_FIXED = (Errno(EINVAL), 4 * PAGE)
SIZE = [
    refused("create flags 99", lambda t: t.make(99), EINVAL, memfd=SAME),
    refused("create flags 1<<31", lambda t: t.make(1 << 31), EINVAL, gmem=UNSAID),
    row("ftruncate 0", sizes(0), (None, 0), gmem=_FIXED),
    row("ftruncate 0, 0, then a size", sizes(0, 0, PAGE), (None, PAGE), gmem=_FIXED),
    row("ftruncate aligned", sizes(PAGE), (None, PAGE), memfd=SAME, secret=SAME, gmem=_FIXED),
    row("ftruncate unaligned", sizes(PAGE + 1), (Errno(EINVAL), 0), gmem=_FIXED),
    row("ftruncate unaligned, then aligned", sizes(1, PAGE), (None, PAGE)),
    row("ftruncate again, same", sizes(PAGE, PAGE), (Errno(EPERM), PAGE), gmem=_FIXED),
    row("ftruncate again, 0", sizes(PAGE, 0), (Errno(EPERM), PAGE), gmem=_FIXED),
    row("ftruncate again, larger", sizes(PAGE, 2 * PAGE), (Errno(EPERM), PAGE), gmem=_FIXED),
    row("ftruncate again, unaligned", sizes(PAGE, PAGE + 1), (Errno(EPERM), PAGE), gmem=_FIXED),
    row("ftruncate negative", sizes(-1), (Errno(EINVAL), 0), memfd=SAME, secret=SAME),
    row("ftruncate again, negative", sizes(PAGE, -1), (Errno(EINVAL), PAGE), memfd=SAME),
    row("ftruncate to the maximum", sizes(MAX_FILE_BYTES), (None, MAX_FILE_BYTES), memfd=SAME),
    row("ftruncate beyond the maximum", sizes((1 << 63) - 1), (Errno(EINVAL), 0)),
    row("truncate by /proc/self/fd", do.size_by_path, PAGE, memfd=SAME),
    row(
        "ftruncate over RLIMIT_FSIZE",
        do.over_limit(lambda fd: os.ftruncate(fd, 4 * PAGE)),
        "(EFBIG, 1)",
        memfd=SAME,
    ),
    row(
        "ftruncate unaligned over RLIMIT_FSIZE",
        do.over_limit(lambda fd: os.ftruncate(fd, 4 * PAGE + 1)),
        "(EINVAL, 0)",
        key="rlimit-fsize",
        here="(EFBIG, 1)",
    ),
    row(
        "ftruncate again over RLIMIT_FSIZE",
        do.over_limit(do.set_twice),
        "(EPERM, 0)",
        key="rlimit-fsize",
        here="(EFBIG, 1)",
    ),
    row(
        "fallocate over RLIMIT_FSIZE",
        do.over_limit(lambda fd: fallocate(fd, 0, 0, 4 * PAGE)),
        "(EFBIG, 1)",
        memfd=SAME,
    ),
    row(
        "fallocate KEEP_SIZE over RLIMIT_FSIZE",
        do.over_limit(lambda fd: fallocate(fd, KEEP, 0, 4 * PAGE)),
        "(EFBIG, 1)",
        key="rlimit-fsize",
        here="(None, 0)",
        memfd=SAME,
    ),
]

_GMEM_DONE = (4 * PAGE, 0)
_NOT_SUPPORTED = Errno(EOPNOTSUPP)
SPACE = [
    no_fallocate("fallocate grows", allocate(0, 0, PAGE), (PAGE, 1), gmem=_NOT_SUPPORTED),
    no_fallocate(
        "fallocate grows unaligned", allocate(0, 0, PAGE + 1), (PAGE + 1, 2), gmem=_NOT_SUPPORTED
    ),
    no_fallocate(
        "fallocate grows from unaligned",
        allocate(0, PAGE - 1, 2),
        (PAGE + 1, 2),
        gmem=_NOT_SUPPORTED,
    ),
    no_fallocate("fallocate grows after ftruncate", do.grow_after_truncate, (4 * PAGE + 1, 5)),
    no_fallocate(
        "fallocate within", allocate(0, 0, PAGE, size=4 * PAGE), (4 * PAGE, 1), gmem=_NOT_SUPPORTED
    ),
    no_fallocate(
        "fallocate KEEP_SIZE",
        allocate(KEEP, 0, PAGE, size=4 * PAGE),
        (4 * PAGE, 1),
        gmem=_GMEM_DONE,
    ),
    no_fallocate(
        "fallocate KEEP_SIZE past the end",
        allocate(KEEP, 8 * PAGE, 2 * PAGE, size=PAGE),
        (PAGE, 2),
        gmem=Errno(EINVAL),
    ),
    no_fallocate("fallocate KEEP_SIZE, size 0", allocate(KEEP, 0, PAGE), (0, 1)),
    no_fallocate(
        "fallocate KEEP_SIZE unaligned",
        allocate(KEEP, 1, PAGE, size=4 * PAGE),
        (4 * PAGE, 2),
        gmem=Errno(EINVAL),
    ),
    no_fallocate(
        "ftruncate 0 after fallocate KEEP_SIZE",
        do.empty_again,
        (0, 0),
        key="ftruncate-empty",
        here=(0, 1),
    ),
    no_fallocate("fallocate of the last page", do.last_page, (0, 1)),
    row(
        "fallocate to the last byte",
        allocate(0, MAX_FILE_BYTES, PAGE - 1),
        (MAX_FILE_BYTES + PAGE - 1, 1),
        key="last-byte",
        here=since((7, 3), Errno(EFBIG), SAME),
        memfd=since((7, 3), Errno(EFBIG), SAME),
    ),
    no_fallocate("punch", punch(PAGE, PAGE), (4 * PAGE, 3), gmem=_GMEM_DONE),
    no_fallocate("punch all", punch(0, 4 * PAGE), (4 * PAGE, 0), gmem=_GMEM_DONE),
    no_fallocate("punch up to the maximum", punch(0, MAX_FILE_BYTES), (4 * PAGE, 0)),
    no_fallocate("punch past the end", punch(3 * PAGE, 8 * PAGE), (4 * PAGE, 3), gmem=_GMEM_DONE),
    no_fallocate("punch beyond the end", punch(8 * PAGE, PAGE), (4 * PAGE, 4), gmem=_GMEM_DONE),
    no_fallocate("punch far beyond the end", punch(1 << 40, PAGE), (4 * PAGE, 4), gmem=_GMEM_DONE),
    no_fallocate(
        "punch a hole", allocate(PUNCH, 0, PAGE, size=4 * PAGE), (4 * PAGE, 0), gmem=_GMEM_DONE
    ),
    no_fallocate("punch, size 0", allocate(PUNCH, 0, PAGE), (0, 0)),
    row("punch unaligned offset", punch(1, PAGE), Errno(EINVAL), memfd=(4 * PAGE, 4), gmem=SAME),
    row(
        "punch unaligned length", punch(0, PAGE - 1), Errno(EINVAL), memfd=(4 * PAGE, 4), gmem=SAME
    ),
    row("punch unaligned both", punch(PAGE - 1, PAGE + 1), Errno(EINVAL), gmem=SAME),
    *(
        no_fallocate(f"fallocate {text}", punch(0, PAGE, mode), _NOT_SUPPORTED, gmem=SAME)
        for text, mode in {
            "PUNCH_HOLE alone": 0x02,
            "NO_HIDE_STALE": 0x04,
            "COLLAPSE_RANGE": 0x08,
            "ZERO_RANGE": 0x10,
            "ZERO_RANGE KEEP_SIZE": 0x11,
            "ZERO_RANGE PUNCH_HOLE": 0x13,
            "INSERT_RANGE": 0x20,
            "UNSHARE_RANGE": 0x40,
            "UNSHARE_RANGE KEEP_SIZE": 0x41,
            "WRITE_ZEROES": 0x80,
            "unknown bit": 0x100,
        }.items()
    ),
    refused("fallocate length 0", allocate(0, 0, 0), EINVAL, memfd=SAME),
    refused("fallocate length negative", allocate(0, 0, -1), EINVAL, memfd=SAME),
    refused("fallocate offset negative", allocate(0, -1, PAGE), EINVAL, memfd=SAME),
    refused("fallocate overflow", allocate(0, 1 << 62, 1 << 62), EFBIG, memfd=SAME),
    refused("fallocate beyond the maximum", allocate(KEEP, (1 << 63) - 1, 1), EFBIG, memfd=SAME),
    no_fallocate("punch length 0", punch(0, 0), Errno(EINVAL)),
    no_fallocate("punch overflow", punch(MAX_FILE_BYTES, PAGE), Errno(EFBIG)),
]

ATTRIBUTES = [
    # st_mode, nlink, uid, gid, size, blocks, blksize, rdev; the proposal's with the repair that
    # takes them from the inner inode.
    no_fallocate(
        "fstat",
        do.fields,
        ("-rwxrwxrwx", 0, 0, 0, 0, 0, PAGE, 0),
        gmem=("-rw-------", 1, 0, 0, 4 * PAGE, 0, PAGE, 0),
    ),
    row("fstat times of a new file", do.fresh_times, True, all_same=True, memfd=SAME),
    no_fallocate("fstat times after sizing", do.size_moves_times, (True, True, True)),
    no_fallocate("fstat st_ino and st_dev", do.identity, (True, True, True), all_same=True),
    row(
        "fstat by O_PATH after the last close",
        do.after_close,
        (PAGE, 0),
        key="path-after-close",
        memfd=(PAGE, 1),
    ),
    row(
        "fstatfs",
        do.statfs,
        ("0x5245534d", PAGE, 255),
        key="statfs",
        here=("0x65735546", PAGE, 255),
        secret=("0x5345434d", PAGE, 255),
    ),
    row("fchmod", do.chmod, "-rw-r-----", memfd=SAME, gmem=Errno(EINVAL)),
    row("fchown", do.chown, (0, 0), memfd=SAME, gmem=Errno(EINVAL)),
    row("futimens", do.utimens, (1_000_000_001, 2_000_000_002), memfd=SAME, gmem=Errno(EINVAL)),
    row("flistxattr", do.listxattr, 0, key="listxattr", here=Errno(EOPNOTSUPP), secret=SAME),
    row("fsetxattr", do.setxattr, Errno(EOPNOTSUPP), all_same=True),
    row("fgetxattr", lambda t: os.getxattr(t.fd, "user.x"), Errno(EOPNOTSUPP), all_same=True),
]

DESCRIPTOR = [
    row("F_GETFL", lambda t: fcntl.fcntl(t.fd, fcntl.F_GETFL), 0x8002, all_same=True),
    row(
        "F_GETFD",
        lambda t: fcntl.fcntl(t.fd, fcntl.F_GETFD),
        0,
        key="cloexec",
        here=fcntl.FD_CLOEXEC,
        all_same=True,
    ),
    refused(
        "F_SETFL O_DIRECT",
        lambda t: fcntl.fcntl(t.fd, fcntl.F_SETFL, os.O_DIRECT),
        EINVAL,
        key="o-direct",
        here=0,
    ),
    refused("F_GET_SEALS", do.seals, EINVAL, memfd=1),
    refused("F_ADD_SEALS", do.add_seals, EINVAL, memfd=Errno(EPERM)),
    row("dup", do.duplicate, (True, 4 * PAGE), all_same=True, memfd=SAME),
    row("fork", do.fork_, ("None", 4 * PAGE), all_same=True, memfd=SAME),
    row("SCM_RIGHTS", do.pass_on, (True, 4 * PAGE), all_same=True, memfd=SAME),
    row(
        "name",
        do.name,
        "/restrictedmem (deleted)",
        secret="/secretmem (deleted)",
        gmem=since((7, 3), "/[kvm-gmem] (deleted)", "anon_inode:[kvm-gmem]"),
    ),
    refused("reopen O_RDONLY", do.reopen(os.O_RDONLY), ENXIO),
    refused("reopen O_RDWR", do.reopen(os.O_RDWR), ENXIO),
    refused("reopen O_TRUNC", do.reopen(os.O_RDWR | os.O_TRUNC), ENXIO),
    row("reopen O_PATH", do.reopen(os.O_PATH), 0, secret=SAME),
    row("execveat", do.execute, "EACCES", secret=SAME),
    refused("fsync", lambda t: os.fsync(t.fd), EINVAL),
    refused("fdatasync", lambda t: os.fdatasync(t.fd), EINVAL),
    refused("getdents", lambda t: os.listdir(t.fd), ENOTDIR),
    refused("epoll_ctl ADD", do.epoll_add, EPERM, key="epoll", here=0, memfd=SAME),
    row("poll", do.poll, 5, all_same=True, memfd=SAME),
    refused("ioctl unknown", do.ioctl(0x12345), ENOTTY, memfd=SAME),
    refused("ioctl unknown, 8 bytes", do.ioctl_of(8), ENOTTY, memfd=SAME),
    refused("ioctl unknown, as long as one can be", do.ioctl_of(2**14 - 1), ENOTTY, memfd=SAME),
    refused(
        "ioctl unknown, at no address",
        do.ioctl_of(8, 0),
        ENOTTY,
        key="ioctl-argument",
        here=Errno(EFAULT),
        memfd=SAME,
    ),
    row(
        "ioctl FIBMAP",
        do.ioctl(do.FIBMAP),
        Errno(EINVAL if _RAWIO else EPERM),
        key="fibmap",
        here=0 if _RAWIO else SAME,
        memfd=SAME,
    ),
    row("ioctl FIONREAD", do.ioctl(do.FIONREAD), 0, key="fionread", here=4 * PAGE),
    refused(
        "ioctl FS_IOC_GETFLAGS",
        do.ioctl(do.FS_IOC_GETFLAGS),
        ENOTTY,
        key="fileattr",
        here=Errno(ENXIO),
    ),
    row("flock", do.flock, 0, all_same=True, memfd=SAME),
    row("fcntl lock", do.record_lock, "EAGAIN", all_same=True, memfd=SAME),
    row("inotify", do.inotify, do.IN_MODIFY, memfd=SAME, secret=SAME),
]

ROWS = [*CONTENT, *SIZE, *SPACE, *ATTRIBUTES, *DESCRIPTOR]

Make = Callable[[int], int]
_MARKS = {
    "v9": [pytest.mark.requires("fuse")],
    "v10": [pytest.mark.requires("fuse")],
    "gmem": [pytest.mark.requires("kvm")],
    "gmem-mmap": [pytest.mark.requires("kvm")],
}


def _guest_memfd(base: int) -> Make:
    def make(flags: int) -> int:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        try:
            vm = kvm.KVM_CREATE_VM(device)
        finally:
            os.close(device)
        try:
            return kvm.KVM_CREATE_GUEST_MEMFD(
                vm, kvm.kvm_create_guest_memfd(size=4 * PAGE, flags=base | flags)
            )
        finally:
            os.close(vm)

    return make


@pytest.fixture(scope="module")
def makers() -> Iterator[Callable[[str], Make]]:
    """Give the function that makes descriptors of a kind; services are started at their first use."""
    services: dict[str, Service] = {}
    kinds: dict[str, Make] = {
        "memfd": lambda flags: os.memfd_create("compared", flags),
        "secret": lambda flags: memory.memfd_secret(flags).detach(),
        "gmem": _guest_memfd(0),
        "gmem-mmap": _guest_memfd(kvm.GUEST_MEMFD_FLAG_MMAP),
    }

    def maker(subject: str) -> Make:
        if subject in kinds:
            return kinds[subject]
        if subject not in services:
            services[subject] = Service.start(Options(api=subject))
        return services[subject].memfd_restricted

    yield maker
    for service in services.values():
        service.close()


def _cases() -> Iterator[Any]:
    for case in ROWS:
        for subject in ("v9", "v10", "memfd", "secret", "gmem", "gmem-mmap"):
            if case.expected(subject) is not UNSAID:
                marks = [
                    *_MARKS.get(subject, ()),
                    *([pytest.mark.requires("inotify")] if case.id == "inotify" else []),
                ]
                yield pytest.param(case, subject, id=f"{subject}-{case.id}", marks=marks)


@pytest.mark.parametrize(("case", "subject"), list(_cases()))
def test_operation(case: Row, subject: str, makers: Callable[[str], Make]) -> None:
    make = makers(subject)
    try:
        fd = make(0)
    except OSError as error:
        # guest_memfd without the MMAP flag came with 6.8, with it in 6.18; memfd_secret may be left
        # out of a kernel or disabled at boot.
        if subject in ("v9", "v10") or error.errno not in (EINVAL, ENOSYS, ENOTTY):
            raise
        pytest.skip(f"{subject} cannot be made here: {error}")
    try:
        assert outcome(lambda: case.operation(Thing(fd, make))) == case.expected(subject)
    finally:
        os.close(fd)


def test_ids_are_unique() -> None:
    ids = [case.id for case in ROWS]
    assert sorted(set(ids)) == sorted(ids)


#: The proposal reads freed memory there, and what it would answer cannot be stated; the others are
#: some kernels'.
_SOME = {"path-after-close", "fibmap", "splice-empty", "splice-out", "last-byte"}


def test_a_divergence_is_one_and_has_a_key() -> None:
    for case in ROWS:
        differs = case.here is not SAME and case.here != case.proposal
        assert differs == bool(case.key) or case.key in _SOME, case.id


def _documented() -> dict[str, list[str]]:
    """Return key and cells of every row of the descriptor's table."""
    text = (
        DIVERGENCES.read_text(encoding="utf-8")
        .partition("\n## Descriptor\n")[2]
        .partition("\n## ")[0]
    )
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert len({row[0] for row in cells}) == len(cells), "a key stands twice"
    return {row[0].strip("`"): row for row in cells}


def test_every_divergence_is_documented_and_every_row_is_shown() -> None:
    documented = _documented()
    in_table = {
        key
        for key, cells in documented.items()
        if cells[-1] == "`test_descriptor.py::test_operation`"
    }
    assert {case.key for case in ROWS if case.key} == in_table
    for key, cells in documented.items():
        file, _, function = cells[-1].strip("`").partition("::")
        assert f"def {function}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), key


@pytest.mark.requires("fuse")
def test_a_closed_number_is_ebadf(makers: Callable[[str], Make]) -> None:
    fd = makers("v10")(0)
    os.close(fd)
    for operation in (
        lambda: os.ftruncate(fd, PAGE),
        lambda: os.fstat(fd),
        lambda: fallocate(fd, 0, 0, PAGE),
    ):
        with pytest.raises(OSError) as raised:
            operation()
        assert raised.value.errno == EBADF


@pytest.mark.requires("fuse")
def test_regular_file_of_the_caller(makers: Callable[[str], Make]) -> None:
    fd = makers("v10")(0)
    try:
        assert stat.S_ISREG(os.fstat(fd).st_mode)
        assert in_child(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "None"
    finally:
        os.close(fd)
