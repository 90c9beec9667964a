"""/proc/PID/pagemap: the pages behind a mapping.

The sources are <linux/fs.h> and Documentation/admin-guide/mm/pagemap.rst.
"""

import ctypes
import os
from collections.abc import Iterator
from enum import IntFlag
from typing import Final

from restrictedmem.abi._ioctl import Dir, Ioctl
from restrictedmem.abi._struct import c_struct, u64

_PATH: Final = "/proc/self/pagemap"
_ENTRY_BYTES: Final = 8
_REGIONS: Final = 64
_PFN_MASK: Final = (1 << 55) - 1


class Category(IntFlag):
    """``PAGE_IS_*``."""

    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    HUGE = 1 << 6


@c_struct(size=24)
class page_region(ctypes.Structure):
    """A range of addresses whose pages have the same categories."""

    start: u64 = 0
    end: u64 = 0
    categories: u64 = 0


@c_struct(size=96)
class pm_scan_arg(ctypes.Structure):
    """A scan from ``start`` to ``end`` (addresses) into ``vec_len`` regions at ``vec``."""

    size: u64
    flags: u64 = 0
    start: u64
    end: u64
    walk_end: u64 = 0
    vec: u64
    vec_len: u64
    max_pages: u64 = 0
    category_inverted: u64 = 0
    category_mask: u64 = 0
    category_anyof_mask: u64 = 0
    return_mask: u64 = 0


PAGEMAP_SCAN: Final = Ioctl("PAGEMAP_SCAN", ord("f"), 16, Dir.READ | Dir.WRITE, pm_scan_arg)


def runs(category: Category, address: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of addresses of this process that are in all of the categories.

    Each is a pair of the first address and the address after the last.

    Raises:
        OSError: ENOTTY where the kernel has no PAGEMAP_SCAN (before Linux 6.7).
    """
    regions = (page_region * _REGIONS)()
    scan = pm_scan_arg(
        size=ctypes.sizeof(pm_scan_arg),
        start=address,
        end=address + length,
        vec=ctypes.addressof(regions),
        vec_len=len(regions),
        category_mask=category,
        return_mask=category,
    )
    pagemap = os.open(_PATH, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while scan.start < scan.end:
            count = PAGEMAP_SCAN(pagemap, scan)
            yield from [(region.start, region.end) for region in regions[:count]]
            scan.start = scan.walk_end
    finally:
        os.close(pagemap)


def bytes_in(category: Category, address: int, length: int) -> int:
    """Count the bytes of a range of this process that are in all categories (``runs``)."""
    return sum(end - start for start, end in runs(category, address, length))


def frame_number(address: int) -> int:
    """Return the page frame behind an address of this process.

    It is 0 where the kernel does not tell (no CAP_SYS_ADMIN, Linux 4.2).
    """
    with open(_PATH, "rb", buffering=0) as pagemap:
        entry = os.pread(
            pagemap.fileno(), _ENTRY_BYTES, address // os.sysconf("SC_PAGE_SIZE") * _ENTRY_BYTES
        )
    return int.from_bytes(entry, "little") & _PFN_MASK
