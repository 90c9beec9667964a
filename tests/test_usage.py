"""A service's counts of its owners' calls and bytes, exact to the byte."""

from typing import Any

from restrictedmem.fs.usage import Usage


class File:
    """A file of some bytes of memory, which one consumer has."""

    holder = 1

    def __init__(self) -> None:
        self.bytes = 0
        self.backing: Any = self

    def resident(self) -> int:
        """Return the bytes."""
        return self.bytes


def test_the_most_memory_of_all_files_at_once() -> None:
    usage, one, other = Usage(), File(), File()
    first: Any = one
    second: Any = other
    usage.create(first)
    usage.create(second)
    one.bytes = 4096
    usage.allocate(first)
    assert usage.peak_bytes == 4096
    other.bytes = 8192
    usage.allocate(second)
    assert usage.peak_bytes == 12288
    one.bytes = 0
    usage.punch(first, 4096)
    other.bytes = 12288
    usage.allocate(second)
    assert usage.peak_bytes == 12288
    usage.close(second)
    one.bytes = 16384
    assert usage.report([first, second])["peak_bytes"] == 16384
