"""The words of an owner's process to the file system: names to create, and one ioctl."""

import re
import stat
from typing import Final

from restrictedmem.abi._ioctl import Dir, request_number

#: The name of a restricted file. /proc/PID/fd shows it as ``/restrictedmem (deleted)``.
NAME: Final = b"restrictedmem"
#: The bit of the mode of a create that asks for folios of 2 MiB (``RMFD_HUGEPAGE``). Only the name
#: and the mode go through open(2) unchanged.
HUGEPAGE_MODE: Final = stat.S_ISVTX
#: ioctl(fd, PROVE, token) shows the service that the caller holds this descriptor. The token has 16
#: bytes, direction write, magic 'R'.
TOKEN_BYTES: Final = 16
PROVE: Final = request_number(ord("R"), 1, Dir.WRITE, TOKEN_BYTES)

_GUEST_MEMFD: Final = rb"guest_memfd-([0-9a-f]{1,16})-([0-9a-f]{1,16})"


def name_of(size: int, flags: int) -> bytes:
    """Return the name whose creation makes a guest_memfd of ``size`` bytes.

    A name is all of a request that can carry both numbers.
    """
    return f"guest_memfd-{size:x}-{flags:x}".encode()


def parse_name(name: bytes) -> tuple[int, int] | None:
    """Return the size and the flags in a name; None for another name."""
    found = re.fullmatch(_GUEST_MEMFD, name)
    return None if found is None else (int(found[1], 16), int(found[2], 16))
