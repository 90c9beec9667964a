"""ioctl requests, computed as <asm-generic/ioctl.h> does.

The parts are magic, number, direction and argument size.
"""

import ctypes
from dataclasses import dataclass
from enum import IntFlag
from typing import Final, Generic, Protocol, TypeVar

from restrictedmem.abi._syscall import libc, raise_errno


class HasFileno(Protocol):
    """Anything with a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor's number."""
        ...


class Dir(IntFlag):
    """The direction of the argument, as the caller sees it."""

    NONE = 0
    WRITE = 1
    READ = 2


#: ioctl(2) itself, which returns -1 and sets the errno of ``ctypes.get_errno()``. fcntl.ioctl takes
#: no integer beyond 31 bits.
raw_ioctl: Final = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, use_errno=True
)(("ioctl", libc))

A = TypeVar("A", bound=ctypes.Structure)


def request_number(magic: int, nr: int, direction: Dir = Dir.NONE, size: int = 0) -> int:
    """Return the 32-bit number of a request whose argument has ``size`` bytes (_IOC)."""
    return direction << 30 | size << 16 | magic << 8 | nr


@dataclass(frozen=True, slots=True)
class Ioctl(Generic[A]):
    """A request that takes a pointer to a struct; call it as ``NAME(fd, struct)``."""

    name: str
    magic: int
    nr: int
    direction: Dir
    argument: type[A]

    @property
    def request(self) -> int:
        """Return the 32-bit request number."""
        size = ctypes.sizeof(self.argument)
        return request_number(self.magic, self.nr, self.direction, size)

    def __call__(self, fd: HasFileno | int, argument: A) -> int:
        """Issue the request; the kernel writes its results into ``argument``.

        Raises:
            OSError: the kernel's errno, with the request's name.
        """
        return _ioctl(self.name, fd, self.request, ctypes.byref(argument))


@dataclass(frozen=True, slots=True)
class IoctlInt:
    """A request that takes a plain integer instead of a pointer."""

    name: str
    magic: int
    nr: int

    @property
    def request(self) -> int:
        """Return the 32-bit request number."""
        return request_number(self.magic, self.nr)

    def __call__(self, fd: HasFileno | int, argument: int = 0) -> int:
        """Issue the request and return its value.

        Raises:
            OSError: the kernel's errno, with the request's name.
        """
        return _ioctl(self.name, fd, self.request, argument)


def _ioctl(name: str, fd: HasFileno | int, request: int, argument: object) -> int:
    result: int = raw_ioctl(fd if isinstance(fd, int) else fd.fileno(), request, argument)
    if result < 0:
        raise_errno(name)
    return result
