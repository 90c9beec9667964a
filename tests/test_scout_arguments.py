"""A scout's answers on arguments in a program's memory.

For memory that the program may not read itself, it returns nothing.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import pytest

from restrictedmem.abi import memory, process
from restrictedmem.fd import OwnedFd
from restrictedmem.syscall import scout

PAGE: Final = mmap.PAGESIZE
#: ``struct mmap_arg_struct`` of i386: address, length, protection, flags, descriptor, offset.
ARGUMENTS: Final = struct.Struct("=6I")
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS = 1, 2, 0x20


@contextmanager
def looks() -> Generator[tuple[scout._Looks, mmap.mmap, int]]:
    """Yield a scout that reads this process, two pages, and their address.

    The second page cannot be read.
    """
    with process.proc() as proc, mmap.mmap(-1, 2 * PAGE) as pages:
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + PAGE), PAGE, 0) == 0
        yield scout._Looks(proc), pages, address


@pytest.fixture
def restricted() -> Generator[tuple[OwnedFd, int]]:
    """Yield a file that is taken for a restricted descriptor, and its device."""
    with memory.memfd_create(scout._NAME) as fd:
        yield fd, os.fstat(fd.fileno()).st_dev


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (MAP_PRIVATE, True),
        (MAP_SHARED, False),
        (MAP_PRIVATE | MAP_ANONYMOUS, False),
        (3, False),
    ],
)
def test_the_first_mmap_of_i386(flags: int, answer: bool, restricted: tuple[OwnedFd, int]) -> None:
    fd, device = restricted
    with looks() as (eyes, pages, address):
        pages[: ARGUMENTS.size] = ARGUMENTS.pack(0, PAGE, 3, flags, fd.fileno(), 0)
        assert eyes.is_mapped_privately(os.getpid(), address, device) is answer
        assert not eyes.is_mapped_privately(os.getpid(), address, device + 1)


def test_what_cannot_be_read_is_no_argument(restricted: tuple[OwnedFd, int]) -> None:
    fd, device = restricted
    with looks() as (eyes, pages, address):
        last = PAGE - ARGUMENTS.size
        pages[last:PAGE] = ARGUMENTS.pack(0, PAGE, 3, MAP_PRIVATE, fd.fileno(), 0)
        assert eyes.is_mapped_privately(os.getpid(), address + last, device)
        # A byte of it is in the next page.
        pages[last + 1 : PAGE] = pages[last : PAGE - 1]
        assert not eyes.is_mapped_privately(os.getpid(), address + last + 1, device)
        # The kernel would read it all the same, through /proc/PID/mem.
        assert not eyes.is_mapped_privately(os.getpid(), address + PAGE, device)


def test_spans_are_those_with_the_right() -> None:
    with looks() as (_, _, address), open("/proc/self/maps", "rb") as maps:
        spans = list(scout._spans(maps, b"r"))
        assert scout._covers(spans, address, PAGE)
        assert not scout._covers(spans, address, PAGE + 1)
