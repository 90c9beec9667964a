"""The guest arguments that several commands have: find a guest, and read it."""

import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from errno import EFBIG, ENOEXEC
from pathlib import Path
from typing import TYPE_CHECKING

from restrictedmem import guests
from restrictedmem.cli.errors import CommandError
from restrictedmem.failure import failed, named
from restrictedmem.text import plain

if TYPE_CHECKING:
    from restrictedmem.vmm.elf import Image

#: Size of the largest file that is read as a guest.
_LARGEST = 1 << 30
_AT_ONCE = 1 << 24
#: For ``help=``.
KINDS = "one of: " + ", ".join(guests.names()) + "; or a path to an ELF"


def read(name: str) -> "Image":
    """Read a guest: one of the package by its name, or a file by a path with a slash.

    Raises:
        CommandError: when the package has no guest of this name.
        OSError: as open(2) and read(2); EFBIG; ENOEXEC when the file is not a guest.
    """
    from restrictedmem.vmm import elf

    path = find(name)
    try:
        with path.open("rb") as file:
            content = file.read(len(elf.MAGIC))
            # A file without the magic is read no further, because it may be an endless device. The
            # pieces are limited, because Python allocates as much as it is asked to read.
            while (
                content.startswith(elf.MAGIC)
                and len(content) <= _LARGEST
                and (more := file.read(_AT_ONCE))
            ):
                content += more
    except OSError as error:
        raise named("open", error, str(path)) from None
    if len(content) > _LARGEST:
        raise failed("read", EFBIG, path=str(path))
    with naming(name):
        return elf.parse(content)


@contextmanager
def naming(name: str) -> Generator[None]:
    """Add the guest's path to ENOEXEC errors."""
    try:
        yield
    except OSError as error:
        if error.errno != ENOEXEC:
            raise
        raise OSError(error.errno, error.strerror, str(find(name))) from None


def warn(name: str, arguments: list[str], options: Iterable[str]) -> None:
    """Warn of an argument of a packaged guest that looks like an option of the command.

    The guests of the package have no options.
    """
    strays = [each for each in arguments if each.partition("=")[0] in options]
    if strays and "/" not in name:
        print(
            f"hint: {plain(strays[0])} is an argument of the guest; options go before GUEST",
            file=sys.stderr,
        )


def find(name: str) -> Path:
    """Return the path of a guest: one of the package by its name, or a path with a slash.

    Raises:
        CommandError: when the package has no guest of this name.
    """
    if "/" in name:
        return Path(name)
    try:
        return guests.path(name)
    except OSError:
        known = ", ".join(guests.names())
        raise CommandError(
            f"no guest named {name}", f"the guests are {known}; a path needs a slash: ./{name}"
        ) from None
