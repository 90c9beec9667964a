"""The guest programs of the package.

They are static x86-64 ELFs for guest ABI version 2. The Makefile of ``guests/`` in the source tree
builds them. The tools that it used are in ``toolchain.json``.
"""

import errno
import json
from pathlib import Path
from typing import TypedDict, cast

from restrictedmem.failure import failed

__all__ = ["BuiltGuest", "Toolchain", "names", "path", "toolchain"]

_DIRECTORY = Path(__file__).parent


class BuiltGuest(TypedDict):
    """One built guest: its hash and its size in bytes."""

    sha256: str
    size: int


class Toolchain(TypedDict):
    """The tools that built the packaged guests.

    ``compiler`` and ``linker`` are the first lines that the tools print for ``--version``.
    ``guests`` is keyed by guest name.
    """

    compiler: str
    linker: str
    cflags: list[str]
    ldflags: list[str]
    guests: dict[str, BuiltGuest]


def names() -> list[str]:
    """Return the names of the packaged guests, in alphabetical order."""
    return sorted(elf.stem for elf in _DIRECTORY.glob("*.elf"))


def path(name: str) -> Path:
    """Return the path of a packaged guest's ELF.

    ``name`` is never taken for a path.

    Raises:
        OSError: ENOENT, with the name as ``filename``, when there is no such guest.
    """
    if name not in names():
        raise failed("guest", errno.ENOENT, path=name)
    return _DIRECTORY / f"{name}.elf"


def toolchain() -> Toolchain:
    """Return the record of the tools that built the packaged guests.

    The guests' Makefile writes it.
    """
    text = (_DIRECTORY / "toolchain.json").read_text(encoding="utf-8")
    return cast(Toolchain, json.loads(text))
