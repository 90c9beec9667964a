"""What commands that take a guest have in common: finding and reading it, and the size of its memory."""

import os
from errno import EFBIG, ENOEXEC
from pathlib import Path
from typing import TYPE_CHECKING

from restrictedmem import guests
from restrictedmem.cli.errors import CommandError

if TYPE_CHECKING:
    from restrictedmem.kvm.elf import Image

#: Bytes of the largest file that is read as a guest.
_LARGEST = 1 << 30
#: For ``help=``.
KINDS = "one of: " + ", ".join(guests.names()) + "; or a path to an ELF"


def read(name: str) -> "Image":
    """Read a guest: one of the package's by its name, or a file by a path with a slash.

    Raises:
        CommandError: when there is none, or it is no guest.
    """
    from restrictedmem.kvm import elf

    path = find(name)
    try:
        with path.open("rb") as file:
            content = file.read(len(elf.MAGIC))
            # Nothing is read of what goes on for ever, such as a device.
            content += file.read(_LARGEST) if content == elf.MAGIC else b""
        if len(content) > _LARGEST:
            raise OSError(EFBIG, os.strerror(EFBIG))
        return elf.parse(content)
    except OSError as error:
        hint = "docs/guests.md says how to build one" if error.errno == ENOEXEC else ""
        raise CommandError(f"{path}: {error.strerror}", hint) from None


def find(name: str) -> Path:
    """Return where a guest is: one of the package's by its name, or a path that has a slash.

    Raises:
        CommandError: when there is no such name.
    """
    if "/" in name:
        return Path(name)
    try:
        return guests.path(name)
    except OSError:
        known = ", ".join(guests.names())
        raise CommandError(f"no guest named {name}", f"there are {known}; a file needs a slash: ./{name}") from None
