"""What commands that take a guest have in common: finding and reading it, and the size of its memory."""

import argparse
from errno import ENOEXEC
from pathlib import Path
from typing import TYPE_CHECKING

from restrictedmem import guests
from restrictedmem.cli.errors import CommandError
from restrictedmem.units import PAGE_MASK, parse_size

if TYPE_CHECKING:
    from restrictedmem.kvm.elf import Image

#: For ``help=``.
KINDS = "one of: " + ", ".join(guests.names()) + "; or a path to an ELF"


def memory_size(text: str) -> int:
    """Read a size that is whole pages (for ``type=``)."""
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not size or size & PAGE_MASK:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of pages")
    return size


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
