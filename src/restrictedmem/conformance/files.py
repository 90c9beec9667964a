"""A descriptor under test, and what an owner can do to it.

Each method makes one system call, notes it, and returns its answer: a number or a text, so that
answers can be compared.
"""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import final

from restrictedmem.abi import memory
from restrictedmem.abi.memory import FallocMode
from restrictedmem.conformance.steps import Steps
from restrictedmem.units import PAGE_SIZE


@final
class File:
    """A descriptor of some column, of four pages where a size is fixed at creation.

    ``make`` creates another of its kind, with creation flags. The descriptors that this object
    makes are its own, and are closed with it.
    """

    def __init__(self, make: Callable[[int], int], steps: Steps, creation: str) -> None:
        self._make = make
        self._creation = creation
        self.steps = steps
        self.fd = steps.call(f"fd = {creation}", partial(make, 0))

    def create(self, flags: int) -> int:
        """Create another descriptor and close it."""
        text = f"{self._creation}, with flags {flags:#x}"
        os.close(self.steps.call(text, lambda: self._make(flags)))
        return 0

    def resize(self, size: int) -> None:
        """Give the file its size where it takes one (guest_memfd has had it since creation)."""
        with suppress(OSError):
            self.ftruncate(size)

    def read(self, count: int) -> int:
        """Return the number of bytes read."""
        return self.steps.call(f"read(fd, buf, {count})", lambda: len(os.read(self.fd, count)))

    def pread(self, count: int, offset: int) -> int:
        """Return the number of bytes read."""
        return self.steps.call(
            f"pread(fd, buf, {count}, {offset:#x})", lambda: len(os.pread(self.fd, count, offset))
        )

    def write(self, data: bytes) -> int:
        """Return the number of bytes written."""
        return self.steps.call(f"write(fd, buf, {len(data)})", lambda: os.write(self.fd, data))

    def ftruncate(self, size: int) -> None:
        """Set the size."""
        self.steps.call(f"ftruncate(fd, {size:#x})", lambda: os.ftruncate(self.fd, size))

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Allocate or punch."""
        self.steps.call(
            f"fallocate(fd, {mode:#x}, {offset:#x}, {length:#x})",
            lambda: memory.fallocate(self.fd, mode, offset, length),
        )

    def held(self) -> tuple[int, int]:
        """Return size and pages, by fstat."""
        found = self.steps.call("fstat(fd, &st)", lambda: os.fstat(self.fd))
        return found.st_size, found.st_blocks * 512 // PAGE_SIZE

    @contextmanager
    def another(self) -> Generator[int]:
        """Create another descriptor of the kind; yield its number."""
        fd = self.steps.call(f"fd2 = {self._creation}", lambda: self._make(0))
        try:
            yield fd
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


KEEP = int(FallocMode.KEEP_SIZE)
