"""Reads of a process's memory and of files, without the pages that are not there."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import EFAULT, ENXIO
from typing import Final

from restrictedmem.audit import syscalls
from restrictedmem.audit.pattern import Buffer
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE

_CHUNK: Final = 1 << 20
#: The highest bytes of entries of /proc/PID/pagemap whose pages are there: in memory (bit 63) or in
#: swap (bit 62).
_THERE: Final = re.compile(rb"[\x40-\xff]+")

#: A function that reads at an address or offset (first argument) at most so many bytes (second).
Read = Callable[[int, int], bytes]


def of_process(pid: int, below: str = "") -> Iterator[Buffer]:
    """Yield the memory of a process through /proc/PID/mem, or a mem file ``below`` PID.

    Raises:
        OSError: EACCES or EPERM if the caller may not read it.
    """
    memory = os.open(f"/proc/{pid}/{below}mem", os.O_RDONLY)
    try:
        yield from _of(lambda at, size: os.pread(memory, size, at), regions(pid))
    finally:
        os.close(memory)


def by_process_vm_readv(pid: int) -> Iterator[Buffer]:
    """Yield the memory of a process through process_vm_readv(2).

    Raises:
        OSError: EPERM if the caller may not read it.
    """
    try:
        # Nothing is mapped at address 8, so a caller that may read gets EFAULT. This comes before
        # /proc/PID/maps, which the kernel might refuse for other reasons.
        syscalls.process_vm_readv(pid, 8, 8)
    except OSError as error:
        if error.errno != EFAULT:
            raise
    yield from _of(lambda at, size: syscalls.process_vm_readv(pid, at, size), regions(pid))


def of_file(fd: int) -> Iterator[Buffer]:
    """Yield the content of a regular file without its holes.

    Raises:
        OSError: the kernel refuses to read the file.
    """
    size = os.fstat(fd).st_size
    yield from _of(lambda at, count: os.pread(fd, count, at), _data(fd, size))


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def of_descriptors() -> Iterator[Buffer]:
    """Yield the content of each open regular file, and the names in each open directory."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with suppress(OSError):
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode):
                yield from of_file(fd)
            elif stat.S_ISDIR(mode):
                yield "\0".join(os.listdir(f"/proc/self/fd/{fd}")).encode(errors="surrogateescape")


def _of(read: Read, spans: Iterator[tuple[int, int]]) -> Iterator[Buffer]:
    for start, end in spans:
        at = start
        while at < end:
            try:
                chunk = read(at, min(_CHUNK, end - at))
            except OSError:
                # The mapping cannot be read (a device's), or is gone meanwhile.
                if at == start == 0:
                    raise
                break
            if not chunk:
                break
            yield chunk
            at += len(chunk)


def regions(pid: int) -> Iterator[tuple[int, int]]:
    """Yield the address ranges of a process's pages that are there, in memory or in swap.

    The source is /proc/PID/maps and pagemap.

    Raises:
        OSError: EACCES or EPERM if the caller may not read them.
    """
    # Read bytes: only "\n" ends a line, and a file's name may contain "\r".
    with open(f"/proc/{pid}/maps", "rb") as maps:
        lines = [line.rstrip(b"\n").split(maxsplit=5) for line in maps]
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for span, rights, _, _, _, *path in lines:
            start, end = (int(number, 16) >> PAGE_SHIFT for number in span.split(b"-"))
            # A shared mapping may have pages that this process did not touch, and pagemap does not
            # show them. Routes read a file through its descriptor; shared anonymous memory is read
            # whole here. The kernel's vsyscall page has no entry in pagemap.
            if rights[:1] != b"r":
                continue
            if rights[3:] == b"s" and path == [b"/dev/zero (deleted)"]:
                yield start << PAGE_SHIFT, end << PAGE_SHIFT
            else:
                entries = os.pread(pagemap.fileno(), (end - start) * 8, start * 8)
                for run in _THERE.finditer(entries[7::8]):
                    yield (start + run.start()) * PAGE_SIZE, (start + run.end()) * PAGE_SIZE
