"""Rows for a descriptor's space and attributes."""

import os
from errno import EFBIG, EINVAL, EOPNOTSUPP
from typing import Any

import descriptor_handle as handle
import descriptor_operations as do
from descriptor_operations import PAGE, Operation, allocate, punch
from descriptor_rows import KEEP, SAME, Row, refused, row, since
from outcomes import Errno
from restrictedmem.abi.memory import PUNCH
from restrictedmem.units import MAX_FILE_BYTES


def no_fallocate(id: str, operation: Operation, proposal: object, **columns: Any) -> Row:
    """Write a row that memfd answers as the proposal does: the shmem half of it."""
    columns.setdefault("memfd", SAME)
    return row(id, operation, proposal, **columns)


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
    row("flistxattr", handle.listxattr, 0, key="listxattr", here=Errno(EOPNOTSUPP), secret=SAME),
    row("fsetxattr", handle.setxattr, Errno(EOPNOTSUPP), all_same=True),
    row("fgetxattr", lambda t: os.getxattr(t.fd, "user.x"), Errno(EOPNOTSUPP), all_same=True),
]
