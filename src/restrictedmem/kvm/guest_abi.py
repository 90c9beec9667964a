"""What a guest and whoever runs it agree on: guests/include/restrictedmem/guest.h in Python."""

from typing import Final

#: Guest physical addresses have this many bits; a guest is identity mapped, and #PF is what it gets beyond.
GPA_BITS: Final = 44

# Guest physical addresses and sizes, in bytes.
HYPERCALL_PAGE: Final = 0x0010_0000
SHARED_BASE: Final = 0x1000_0000
PRIVATE_BASE: Final = 0x4000_0000
PRIVATE_SIZE_DEFAULT: Final = 0x0400_0000
PRIVATE_SIZE_MIN: Final = 0x0010_0000
BOOT_SIZE: Final = 0x0001_0000
IMAGE_BASE: Final = PRIVATE_BASE + BOOT_SIZE
STACK_SIZE: Final = 0x0001_0000

BOOT_MAGIC: Final = 0x544F_4F42_4D45_4D52
BOOT_VERSION: Final = 1

# Hypercalls (HYPERCALL_* there), and the streams of WRITE.
EXIT: Final = 0
READ: Final = 1
WRITE: Final = 2
STREAM_OUT: Final = 1
STREAM_ERR: Final = 2
