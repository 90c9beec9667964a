"""A guest_memfd: memory of one VM that its owner allocates and frees, and reads or maps only as far as its flags let it."""

import mmap
import os
from typing import final

from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd


@final
class GuestMemfd(OwnedFd):
    """The descriptor of KVM_CREATE_GUEST_MEMFD.

    The file keeps its VM alive, not the other way round: what slots have bound is lost to the guest
    with the last descriptor and mapping.
    """

    __slots__ = ("flags",)

    def __init__(self, fd: int, flags: int) -> None:
        super().__init__(fd)
        #: ``GUEST_MEMFD_FLAG_*`` it was created with.
        self.flags = flags

    def fstat(self) -> os.stat_result:
        """Return fstat(2); ``st_blocks`` is always 0."""
        return os.fstat(self.fileno())

    @property
    def size(self) -> int:
        """Bytes, set for good at creation."""
        return self.fstat().st_size

    def allocate(self, offset: int, length: int) -> None:
        """Allocate the pages of a byte range (fallocate(2), FALLOC_FL_KEEP_SIZE); they are cleared when first touched.

        Raises:
            OSError: EINVAL unless aligned and within the size; EINTR with part of it allocated.
        """
        memory.fallocate(self.fileno(), memory.FallocMode.KEEP_SIZE, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Free the pages of a byte range, and take them from the guest and from mappings; a range past the end is none.

        Raises:
            OSError: EINVAL unless aligned.
        """
        memory.fallocate(self.fileno(), memory.PUNCH, offset, length)

    def resident_pages(self, offset: int, length: int) -> int:
        """Count the allocated pages of a byte range (cachestat(2)), which works without MMAP too."""
        return memory.resident_pages(self.fileno(), offset, length)

    def mmap(self, offset: int, length: int) -> mmap.mmap:
        """Map a byte range, shared; a touch is SIGBUS without INIT_SHARED.

        Raises:
            OSError: ENODEV without GUEST_MEMFD_FLAG_MMAP.
            ValueError: past the size (mmap(2) itself would take it).
        """
        return mmap.mmap(self.fileno(), length, offset=offset)
