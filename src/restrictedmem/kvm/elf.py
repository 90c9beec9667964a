"""Reading a guest: a static x86-64 ELF, of which only the loadable segments matter (elf(5))."""

import struct
from dataclasses import dataclass
from errno import ENOEXEC
from typing import Final

MAGIC: Final = b"\x7fELF"
_EHDR: Final = struct.Struct("<4s5B7xHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_PT_LOAD: Final = 1
_ET_EXEC: Final = 2
_EM_X86_64: Final = 62
_CLASS64: Final = 2


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
    try:
        magic, klass, _, _, _, _, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, _, _, _ = _EHDR.unpack_from(data)
        if magic != MAGIC or klass != _CLASS64 or kind != _ET_EXEC or machine != _EM_X86_64 or phentsize != _PHDR.size:
            raise OSError(ENOEXEC, "not a static x86-64 ELF")
        segments: list[Segment] = []
        for index in range(phnum):
            kind, _, offset, _, gpa, filesz, memsz, _ = _PHDR.unpack_from(data, phoff + index * _PHDR.size)
            if kind == _PT_LOAD and memsz:
                content = data[offset : offset + filesz]
                if len(content) != filesz or memsz < filesz:
                    raise OSError(ENOEXEC, "ELF is cut short")
                segments.append(Segment(gpa, content, memsz))
    except struct.error:
        raise OSError(ENOEXEC, "ELF is cut short") from None
    if not segments:
        raise OSError(ENOEXEC, "ELF has nothing to load")
    return Image(entry, tuple(segments))
