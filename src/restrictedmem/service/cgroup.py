"""The cgroup that memory is charged to (cgroups(7))."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

from restrictedmem.abi import process


@final
@dataclass(frozen=True, slots=True)
class Cgroup:
    """A cgroup in the hierarchy that has the memory controller."""

    version: int
    #: As in /proc/PID/cgroup, for texts.
    path: str
    #: Where the cgroup is mounted here.
    directory: Path

    @classmethod
    def own(cls) -> Self | None:
        """Find this process's cgroup; None where it is not mounted, or there is no /proc."""
        with suppress(OSError):
            for controllers, path in process.cgroups():
                if not controllers or b"memory" in controllers.split(b","):
                    version = 1 if controllers else 2
                    directory = _mounted(version, path)
                    return (
                        None
                        if directory is None
                        else cls(version, path.decode(errors="replace"), directory)
                    )
        return None


def _mounted(version: int, path: bytes) -> Path | None:
    """Find a cgroup's directory.

    A mount may show only a part of its hierarchy.
    """
    own = Path(os.fsdecode(path))
    # Read bytes: a path may hold characters that Python takes for a line's end.
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            mount, _, about = line.partition(b" - ")
            root, point = (
                Path(os.fsdecode(re.sub(rb"\\([0-7]{3})", _character, field)))
                for field in mount.split(b" ")[3:5]
            )
            kind, _, options = about.rstrip(b"\n").split(b" ", 2)
            fits = (
                kind == b"cgroup2"
                if version == 2
                else kind == b"cgroup" and b"memory" in options.split(b",")
            )
            if fits and own.is_relative_to(root):
                return point / own.relative_to(root)
    return None


def _character(found: re.Match[bytes]) -> bytes:
    """Return the character that an octal escape stands for."""
    return bytes([int(found[1], 8)])
