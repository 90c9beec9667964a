"""The guest programs that come with the package.

Static x86-64 ELFs for guest ABI version 2, built from ``guests/`` in the source tree
by its Makefile; ``toolchain.json`` says with what.
"""

import errno
import json
from pathlib import Path
from typing import TypedDict, cast

from restrictedmem.failure import failed

__all__ = ["BuiltGuest", "Toolchain", "names", "path", "toolchain"]

_DIRECTORY = Path(__file__).parent


class BuiltGuest(TypedDict):
    """Identify one built guest."""

    sha256: str
    size: int


class Toolchain(TypedDict):
    """Tell how the packaged guests were built.

    ``compiler`` and ``linker`` are the first lines of what the tools print
    for ``--version``; ``guests`` is keyed by guest name.
    """

    compiler: str
    linker: str
    cflags: list[str]
    ldflags: list[str]
    guests: dict[str, BuiltGuest]


def names() -> list[str]:
    """List the packaged guests.

    The names are in alphabetical order, as :func:`path` takes them.
    """
    return sorted(elf.stem for elf in _DIRECTORY.glob("*.elf"))


def path(name: str) -> Path:
    """Find a packaged guest's ELF by name.

    Raises :class:`OSError` with ``errno`` ENOENT and the name as ``filename``
    when there is no such guest; a name is never taken for a path.
    """
    if name not in names():
        raise failed("guest", errno.ENOENT, path=name)
    return _DIRECTORY / f"{name}.elf"


def toolchain() -> Toolchain:
    """Read the record of what the packaged guests were built with.

    It is written at build time, by the Makefile that builds the guests.
    """
    text = (_DIRECTORY / "toolchain.json").read_text(encoding="utf-8")
    return cast(Toolchain, json.loads(text))
