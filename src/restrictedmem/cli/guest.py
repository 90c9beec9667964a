"""What commands that take a guest have in common: finding and reading it, and the size of its memory."""

from errno import ENOEXEC
from pathlib import Path
from typing import TYPE_CHECKING

from restrictedmem import guests
from restrictedmem.cli.errors import CommandError

if TYPE_CHECKING:
    from restrictedmem.kvm.elf import Image

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
        return elf.parse(path.read_bytes())
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
