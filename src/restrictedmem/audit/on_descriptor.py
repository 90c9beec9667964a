"""Routes by the restricted descriptor: every operation that could return its content."""

import mmap
import os
from collections.abc import Callable, Iterator
from typing import Final

from restrictedmem.abi import memory
from restrictedmem.audit import syscalls
from restrictedmem.audit.attacker import Attacker
from restrictedmem.audit.attempt import Route
from restrictedmem.audit.pattern import Buffer
from restrictedmem.fd import OwnedFd

_LENGTH: Final = 1 << 16


def _readv(fd: int) -> bytes:
    into = bytearray(_LENGTH)
    return bytes(into[: os.readv(fd, [into])])


def _preadv(fd: int) -> bytes:
    into = bytearray(_LENGTH)
    return bytes(into[: os.preadv(fd, [into], 0)])


def _map(fd: int, flags: int, protection: int) -> bytes:
    with mmap.mmap(fd, _LENGTH, flags, protection) as mapping, memory.memfd_create("copy") as copy:
        # write(2) makes the kernel read the mapping: it returns EFAULT where an access by this
        # process would raise SIGBUS.
        return os.pread(copy.fileno(), os.write(copy.fileno(), mapping), 0)


def _into_pipe(move: Callable[[int], int]) -> bytes:
    reader, writer = (OwnedFd(fd) for fd in os.pipe())
    with reader, writer:
        return os.read(reader.fileno(), move(writer.fileno()))


def _into_file(move: Callable[[int], int]) -> bytes:
    with memory.memfd_create("copy") as copy:
        return os.pread(copy.fileno(), move(copy.fileno()), 0)


def _open_again(fd: int, flags: int) -> bytes:
    with OwnedFd(os.open(f"/proc/self/fd/{fd}", flags)) as again:
        return os.read(again.fileno(), _LENGTH)


_GETS: Final[dict[str, Callable[[int], bytes]]] = {
    "read": lambda fd: os.read(fd, _LENGTH),
    "readv": _readv,
    "pread": lambda fd: os.pread(fd, _LENGTH, 0),
    "preadv": _preadv,
    "mmap shared": lambda fd: _map(fd, mmap.MAP_SHARED, mmap.PROT_READ),
    "mmap shared, writable": lambda fd: _map(fd, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    "mmap private": lambda fd: _map(fd, mmap.MAP_PRIVATE, mmap.PROT_READ),
    "splice": lambda fd: _into_pipe(lambda pipe: os.splice(fd, pipe, _LENGTH)),
    "splice, with an offset": lambda fd: _into_pipe(lambda pipe: os.splice(fd, pipe, _LENGTH, 0)),
    "sendfile": lambda fd: _into_file(lambda file: os.sendfile(file, fd, None, _LENGTH)),
    "sendfile, with an offset": lambda fd: _into_file(
        lambda file: os.sendfile(file, fd, 0, _LENGTH)
    ),
    "copy_file_range": lambda fd: _into_file(lambda file: os.copy_file_range(fd, file, _LENGTH, 0)),
    "io_uring read": lambda fd: syscalls.io_uring_read(fd, _LENGTH),
    "re-open to read": lambda fd: _open_again(fd, os.O_RDONLY),
    "re-open to read and write": lambda fd: _open_again(fd, os.O_RDWR),
}


def _route(name: str, get: Callable[[int], bytes]) -> Route:
    def run(owner: Attacker) -> Iterator[Buffer]:
        yield get(owner.fd)

    return Route("descriptor", name, run)


ROUTES: Final = tuple(_route(name, get) for name, get in _GETS.items())
