"""Requests on a guest_memfd: its page cache, and its conversions.

docs/understand/conversion-in-place.md has the design.
"""

from errno import EINVAL, EOPNOTSUPP
from typing import Final, NamedTuple, Self, final

from restrictedmem.abi import fuse
from restrictedmem.abi.fuse import OpenFlag
from restrictedmem.abi.kvm import (
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    KVM_SET_MEMORY_ATTRIBUTES2_ZERO,
    kvm_memory_attributes2,
)
from restrictedmem.mm.guest_memfd_file import GuestMemfdFile
from restrictedmem.units import PAGE_MASK, PAGE_SIZE, PageRange

_MODES: Final = KVM_SET_MEMORY_ATTRIBUTES2_ZERO | KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE
#: Bytes that the kernel reads around a fault, as many as an engine maps at one
#: (``kvm.page_fault.FAULT_AROUND``). With a page at a time, a first touch takes ten times as long.
READ_AROUND: Final = 16 * PAGE_SIZE
#: The most bytes that the kernel writes back at a time: as many pages as it sends if a server does
#: not negotiate more (FUSE_DEFAULT_MAX_PAGES_PER_REQ). With a page at a time, the conversion of
#: changed pages to private takes twice as long.
WRITE_BACK: Final = 32 * PAGE_SIZE
#: Bytes of a buffer that has room for any request. The longest is a WRITE; an ioctl has an argument
#: of 16,383 bytes at most (_IOC_SIZEBITS).
REQUEST_BUFFER: Final = fuse.MIN_READ_BUFFER + WRITE_BACK
#: Without DIRECT_IO there is a page cache, and so the file can be mapped.
OPEN_FLAGS: Final = OpenFlag.NONSEEKABLE | OpenFlag.STREAM | OpenFlag.NOFLUSH


def read(file: GuestMemfdFile, body: bytes) -> bytes:
    """Return pages for the page cache; refuse read(2), as a file without it does.

    Raises:
        OSError: EINVAL for a read(2), which a descriptor with O_DIRECT marks; else as
            ``GuestMemfdFile.read``.
    """
    _fh, offset, size, read_flags, *_ = fuse.READ_IN.unpack_from(body)
    if read_flags & fuse.FUSE_READ_LOCKOWNER:
        raise OSError(EINVAL, "read: the file has no such operation")
    return file.read(offset, size)


def write(file: GuestMemfdFile, body: bytes) -> bytes:
    """Take pages that the page cache writes back; refuse write(2).

    Raises:
        OSError: EINVAL for a write(2); else as ``GuestMemfdFile.write_back``.
    """
    _fh, offset, size, write_flags, *_ = fuse.WRITE_IN.unpack_from(body)
    if not write_flags & fuse.FUSE_WRITE_CACHE:
        raise OSError(EINVAL, "write: the file has no such operation")
    file.write_back(offset, body[fuse.WRITE_IN.size :][:size])
    return fuse.WRITE_OUT.pack(size, 0)


@final
class AttributesRequest(NamedTuple):
    """A request of KVM_SET_MEMORY_ATTRIBUTES2."""

    span: PageRange
    private: bool
    #: Whether pages that change read as zero afterwards. Else they keep their content.
    zero: bool

    @classmethod
    def of(cls, asked: kvm_memory_attributes2, size: int) -> Self:
        """Check a request for a file of ``size`` bytes.

        Raises:
            OSError: EINVAL, EOPNOTSUPP as kvm_gmem_set_attributes of v8.
        """
        if (
            asked.flags & ~_MODES
            or asked.flags == _MODES
            or asked.error_offset
            or any(asked.reserved)
            or asked.attributes & ~KVM_MEMORY_ATTRIBUTE_PRIVATE
            or not asked.size
            or (asked.offset | asked.size) & PAGE_MASK
            or asked.offset + asked.size > size
        ):
            raise OSError(
                EINVAL, "the range is empty, unaligned or beyond the file, or a field is unknown"
            )
        private = bool(asked.attributes)
        zero = asked.flags == KVM_SET_MEMORY_ATTRIBUTES2_ZERO
        if private and zero:
            raise OSError(EOPNOTSUPP, "pages that become private cannot be zeroed")
        return cls(PageRange.of_bytes(asked.offset, asked.size), private, zero)
