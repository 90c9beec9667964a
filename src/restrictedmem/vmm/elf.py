"""Reading a guest: a static x86-64 ELF, of which only the loadable segments matter (elf(5))."""

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
#: What errors call this.
_CALL: Final = "exec"


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes to put at a guest address; ``size`` counts the zeroes after them too."""

    gpa: int
    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Image:
    """A guest program: where it starts and what it is made of."""

    entry: int
    segments: tuple[Segment, ...]

    @property
    def end(self) -> int:
        """The first address after the image."""
        return max(segment.gpa + segment.size for segment in self.segments)


def parse(data: bytes) -> Image:
    """Read a static ELF.

    Raises:
        OSError: ENOEXEC for anything that is not one.
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
        # Numbers beyond the file, up to 2^64, are for no slice and no offset.
        headers = data[min(phoff, len(data)) :][: phnum * _PHDR.size]
        if len(headers) != phnum * _PHDR.size:
            raise failed(_CALL, ENOEXEC, "ELF is cut short")
        segments = list(_segments(data, headers))
    except struct.error:
        raise failed(_CALL, ENOEXEC, "ELF is cut short") from None
    if not segments:
        raise failed(_CALL, ENOEXEC, "ELF has nothing to load")
    return Image(entry, tuple(segments))


def _segments(data: bytes, headers: bytes) -> Iterator[Segment]:
    """Yield what is to be loaded, which is not more than there is: of a small file, 65,535 headers could name all."""
    left = len(data)
    for header in _PHDR.iter_unpack(headers):
        segment = _segment(data, *header)
        if segment is not None:
            left -= len(segment.data)
            if left < 0:
                raise failed(_CALL, ENOEXEC, "ELF has more to load than there is in the file")
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
    """Return what a program header says is to be loaded."""
    if kind != _PT_LOAD or not memsz:
        return None
    content = data[offset : offset + filesz]
    if len(content) != filesz or memsz < filesz:
        raise failed(_CALL, ENOEXEC, "ELF is cut short")
    return Segment(gpa, content, memsz)
