"""Pages and bytes, kept apart by type.

The v9 posting passed byte offsets to callbacks that were declared in pages. A type checker finds
that mistake here. Pages have their kernel type: ``pgoff_t`` is pages in a file, ``gfn_t`` pages in
a guest. Bytes are plain integers.
"""

import os
import re
from dataclasses import dataclass
from errno import EINVAL
from typing import Final, NewType, Self

from restrictedmem.failure import failed

pgoff_t = NewType("pgoff_t", int)
gfn_t = NewType("gfn_t", int)

#: The largest number in 64 bits (<linux/limits.h>), and the mask that keeps them.
U64_MAX: Final = (1 << 64) - 1

PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")
PAGE_SHIFT: Final = PAGE_SIZE.bit_length() - 1
PAGE_MASK: Final = PAGE_SIZE - 1

#: Largest page-aligned file size that tmpfs takes (MAX_LFS_FILESIZE rounded down to a page).
MAX_FILE_BYTES: Final = ((1 << 63) - 1) & ~PAGE_MASK


@dataclass(frozen=True, slots=True)
class PageRange:
    """A half-open range of pages in a file; empty when ``start == end``."""

    start: pgoff_t
    end: pgoff_t

    @classmethod
    def of_bytes(cls, offset: int, length: int) -> Self:
        """Return the range that ``length`` bytes at ``offset`` cover exactly.

        Raises:
            OSError: EINVAL when either number is not a multiple of the page size.
        """
        if (offset | length) & PAGE_MASK:
            raise failed("range", EINVAL, "not page aligned")
        return cls(pgoff_t(offset >> PAGE_SHIFT), pgoff_t((offset + length) >> PAGE_SHIFT))

    @classmethod
    def around_bytes(cls, offset: int, length: int) -> Self:
        """Return the smallest range that contains ``length`` bytes at ``offset``."""
        return cls(
            pgoff_t(offset >> PAGE_SHIFT), pgoff_t((offset + length + PAGE_MASK) >> PAGE_SHIFT)
        )

    def __len__(self) -> int:
        return max(0, self.end - self.start)

    def clip(self, other: "PageRange") -> "PageRange":
        """Return the part of ``other`` that lies in this range, empty when there is none."""
        start = max(self.start, other.start)
        return PageRange(start, max(start, min(self.end, other.end)))

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
#: Characters that an error shows of a text that is not a size.
_SHOWN = 40
_SUFFIXES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Parse a size in bytes such as ``4096``, ``64K``, ``64M`` or ``1G`` (powers of 1024).

    Raises:
        ValueError: when the text is not a size, or the size is larger than any file's.
    """
    # No size has more digits. For a text of many digits int() is slow, or fails.
    found = re.fullmatch(r"([0-9]{1,20})([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f"not a size: {text[:_SHOWN]!r} (write 4096, 64K, 64M or 1G)")
    size = int(found[1]) << _SUFFIXES[found[2].upper()]
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{text}: larger than any file ({MAX_FILE_BYTES})")
    return size


def format_size(count: int) -> str:
    """Format a number of bytes for a person: ``64 MiB``, ``1.5 GiB``, ``512 B``."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, len(_UNITS))
    return f"{count / (1 << 10 * power):.1f} {_UNITS[power - 1]}".replace(".0 ", " ")
