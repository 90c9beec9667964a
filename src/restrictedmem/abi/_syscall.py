"""The handle on libc, and the function that turns its failures into OSError."""

import ctypes
from typing import NoReturn

from restrictedmem.failure import failed

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def raise_errno(call: str, errno: int | None = None) -> NoReturn:
    """Raise OSError for a failed call; ``errno`` defaults to libc's."""
    number = ctypes.get_errno() if errno is None else errno
    raise failed(call, number)


def syscall(name: str, number: int, *arguments: int | bytes | None) -> int:
    """Make a system call that libc has no wrapper for (syscall(2)).

    Integers are widened to ``long``.

    Raises:
        OSError: the kernel's errno, with ``name``.
    """
    wide = [
        ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments
    ]
    result: int = libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        raise_errno(name)
    return result
