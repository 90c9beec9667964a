"""The interface between a guest and its VMM: guests/include/restrictedmem/guest.h."""

import os
import struct
from collections.abc import Sequence
from errno import E2BIG
from typing import Final

from restrictedmem.failure import failed

#: Bits of a guest physical address. A guest is identity mapped, and an access beyond is #PF.
GPA_BITS: Final = 44

# Guest physical addresses and sizes, in bytes.
HYPERCALL_PAGE: Final = 0x0010_0000
REPORT_PAGE: Final = 0x0010_1000
SHARED_BASE: Final = 0x1000_0000
PRIVATE_BASE: Final = 0x4000_0000
PRIVATE_SIZE_DEFAULT: Final = 0x0400_0000
PRIVATE_SIZE_MIN: Final = 0x0010_0000
BOOT_SIZE: Final = 0x0001_0000
IMAGE_BASE: Final = PRIVATE_BASE + BOOT_SIZE
STACK_SIZE: Final = 0x0001_0000

BOOT_MAGIC: Final = 0x544F_4F42_4D45_4D52
BOOT_VERSION: Final = 2
#: ``struct boot_info``, without the argument strings that follow it.
BOOT_INFO: Final = struct.Struct("=QII9Q")

# Hypercalls (HYPERCALL_* in guest.h), and the streams of WRITE.
EXIT: Final = 0
READ: Final = 1
WRITE: Final = 2
REPORT: Final = 3
PARK: Final = 4
CHECK: Final = 5
MAP_GPA_RANGE: Final = 12
STREAM_OUT: Final = 1
STREAM_ERR: Final = 2
#: How many arguments each hypercall has: the owner must not see other registers. Of an unknown
#: hypercall it sees four.
ARGUMENTS: Final = {EXIT: 1, READ: 2, WRITE: 3, REPORT: 0, PARK: 0, CHECK: 4, MAP_GPA_RANGE: 3}
#: Bytes of a guest's data in a report.
REPORT_DATA: Final = 64

#: MAP_GPA_RANGE's third argument: bits 0 to 3 are a page size, which is only a hint. With this bit
#: set pages become private, else shared.
MAP_GPA_RANGE_ENCRYPTED: Final = 1 << 4


def boot_info(
    *, private_size: int, shared_size: int, heap_base: int, vcpus: int, arguments: Sequence[str]
) -> bytes:
    """Return the content of the boot pages, which begin at ``PRIVATE_BASE``.

    It is ``struct boot_info`` and then the argument strings.

    Raises:
        OSError: E2BIG for arguments that do not fit the boot pages.
    """
    strings = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
    if BOOT_INFO.size + len(strings) > BOOT_SIZE:
        raise failed("exec", E2BIG, "arguments are too long")
    head = BOOT_INFO.pack(
        BOOT_MAGIC,
        BOOT_VERSION,
        len(arguments),
        PRIVATE_BASE,
        private_size,
        SHARED_BASE,
        shared_size,
        HYPERCALL_PAGE,
        heap_base,
        PRIVATE_BASE + BOOT_INFO.size,
        REPORT_PAGE,
        vcpus,
    )
    return head + strings
