"""A guest_memfd: memory of one VM that its owner allocates and frees.

The owner can read or map it only as far as its flags allow.
"""

import mmap
import os
from typing import final

from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd


@final
class GuestMemfd(OwnedFd):
    """The descriptor of KVM_CREATE_GUEST_MEMFD.

    The file keeps its VM alive, but the VM does not keep the file alive. With the last descriptor
    and mapping, the guest loses the memory that slots have bound.
    """

    __slots__ = ("flags",)

    def __init__(self, fd: int, flags: int) -> None:
        super().__init__(fd)
        #: The ``GUEST_MEMFD_FLAG_*`` that it was created with.
        self.flags = flags

    def fstat(self) -> os.stat_result:
        """Return fstat(2); ``st_blocks`` is always 0."""
        return os.fstat(self.fileno())

    @property
    def size(self) -> int:
        """Return the bytes, which are fixed at creation."""
        return self.fstat().st_size

    def allocate(self, offset: int, length: int) -> None:
        """Allocate the pages of a byte range (fallocate(2), FALLOC_FL_KEEP_SIZE).

        The kernel clears the pages when they are first touched.

        Raises:
            OSError: EINVAL unless aligned and within the size; EINTR with part of it allocated.
        """
        memory.fallocate(self.fileno(), memory.FallocMode.KEEP_SIZE, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Free the pages of a byte range, and remove them from the guest and from mappings.

        A range past the end has no effect.

        Raises:
            OSError: EINVAL unless aligned.
        """
        memory.fallocate(self.fileno(), memory.PUNCH, offset, length)

    def resident_pages(self, offset: int, length: int) -> int:
        """Count the allocated pages of a byte range (cachestat(2)).

        This works without GUEST_MEMFD_FLAG_MMAP, too.
        """
        return memory.resident_pages(self.fileno(), offset, length)

    def mmap(self, offset: int, length: int) -> mmap.mmap:
        """Map a byte range, shared.

        Without GUEST_MEMFD_FLAG_INIT_SHARED, an access to the mapping is SIGBUS.

        Raises:
            OSError: ENODEV without GUEST_MEMFD_FLAG_MMAP.
            ValueError: past the size (mmap(2) itself would accept it).
        """
        return mmap.mmap(self.fileno(), length, offset=offset)
