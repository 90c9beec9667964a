"""ioctl requests, computed from magic, number, direction and argument size as <asm-generic/ioctl.h> does."""

import ctypes
import fcntl
import os
from dataclasses import dataclass
from enum import IntFlag
from errno import EIO
from typing import Generic, Protocol, TypeVar


class HasFileno(Protocol):
    """Anything with a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor's number."""
        ...


class Dir(IntFlag):
    """Which way the argument travels, from the caller's side."""

    NONE = 0
    WRITE = 1
    READ = 2


A = TypeVar("A", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class Ioctl(Generic[A]):
    """One request of a driver that takes a pointer to a struct; call it as ``NAME(fd, struct)``."""

    name: str
    magic: int
    nr: int
    direction: Dir
    argument: type[A]

    @property
    def request(self) -> int:
        """The 32-bit request number."""
        return self.direction << 30 | ctypes.sizeof(self.argument) << 16 | self.magic << 8 | self.nr

    def __call__(self, fd: HasFileno | int, argument: A) -> int:
        """Issue the request; what the kernel writes back is in ``argument`` afterwards.

        Raises:
            OSError: the kernel's errno, with the request's name.
        """
        return _ioctl(self.name, fd, self.request, argument)


@dataclass(frozen=True, slots=True)
class IoctlInt:
    """One request that takes a plain integer instead of a pointer."""

    name: str
    magic: int
    nr: int

    @property
    def request(self) -> int:
        """The 32-bit request number."""
        return self.magic << 8 | self.nr

    def __call__(self, fd: HasFileno | int, argument: int = 0) -> int:
        """Issue the request and return its value.

        Raises:
            OSError: the kernel's errno, with the request's name.
        """
        return _ioctl(self.name, fd, self.request, argument)


def _ioctl(name: str, fd: HasFileno | int, request: int, argument: ctypes.Structure | int) -> int:
    try:
        # A ctypes struct is a writable buffer, so fcntl passes its own address for up to 1024 bytes through a copy it writes back.
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        number = error.errno or EIO
        raise OSError(number, f"{name}: {os.strerror(number)}") from None
