"""A parser for guests: static x86-64 ELFs, of which only loadable segments count (elf(5))."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENOEXEC
from typing import Final

from restrictedmem.failure import failed

MAGIC: Final = b"\x7fELF"
_EHDR: Final = struct.Struct("<4s5B7xHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_PT_LOAD: Final = 1
_ET_EXEC: Final = 2
_EM_X86_64: Final = 62
_CLASS64: Final = 2
#: The name of the call in errors.
_CALL: Final = "exec"


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes to put at a guest physical address.

    ``size`` is the size in guest memory. The bytes beyond ``data`` are zero.
    """

    gpa: int
    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Image:
    """A guest program: its entry point and its segments."""

    entry: int
    segments: tuple[Segment, ...]

    @property
    def end(self) -> int:
        """Return the first address after the image."""
        return max(segment.gpa + segment.size for segment in self.segments)


def parse(data: bytes) -> Image:
    """Read a static ELF.

    Raises:
        OSError: ENOEXEC for any other file.
    """
    if not data.startswith(MAGIC):
        raise failed(_CALL, ENOEXEC, "not a static x86-64 ELF")
    try:
        _, klass, _, _, _, _, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, _, _, _ = (
            _EHDR.unpack_from(data)
        )
        if (
            klass != _CLASS64
            or kind != _ET_EXEC
            or machine != _EM_X86_64
            or phentsize != _PHDR.size
        ):
            raise failed(_CALL, ENOEXEC, "not a static x86-64 ELF")
        # The offset may lie anywhere up to 2^64, far beyond the file, where nothing can be sliced
        # or unpacked.
        headers = data[min(phoff, len(data)) :][: phnum * _PHDR.size]
        if len(headers) != phnum * _PHDR.size:
            raise failed(_CALL, ENOEXEC, "ELF is cut short")
        segments = list(_segments(data, headers))
    except struct.error:
        raise failed(_CALL, ENOEXEC, "ELF is cut short") from None
    if not segments:
        raise failed(_CALL, ENOEXEC, "ELF has no segment to load")
    return Image(entry, tuple(segments))


def _segments(data: bytes, headers: bytes) -> Iterator[Segment]:
    """Yield the segments to load, whose contents together are no larger than the file.

    Without this limit, the 65,535 headers of a small file could each name the whole file.
    """
    left = len(data)
    for header in _PHDR.iter_unpack(headers):
        segment = _segment(data, *header)
        if segment is not None:
            left -= len(segment.data)
            if left < 0:
                raise failed(_CALL, ENOEXEC, "ELF's segments are together larger than the file")
            yield segment


def _segment(
    data: bytes,
    kind: int,
    flags: int,
    offset: int,
    vaddr: int,
    gpa: int,
    filesz: int,
    memsz: int,
    align: int,
) -> Segment | None:
    """Return the segment that a program header describes; None if it loads nothing."""
    if kind != _PT_LOAD or not memsz:
        return None
    content = data[offset : offset + filesz]
    if len(content) != filesz or memsz < filesz:
        raise failed(_CALL, ENOEXEC, "ELF is cut short")
    return Segment(gpa, content, memsz)
