"""What the owner of the guest ``churn`` tells it: words in shared memory.

The guest's side is guests/churn.c, which says what follows from which word.
"""

import mmap
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, final

from restrictedmem.protocol import guest_abi
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE

MAX_PAGES: Final = 8192
LANES: Final = 2
MAX_VCPUS: Final = 64
#: Guest address and pages of the range that comes and goes.
EXTRA_BASE: Final = 0x8000_0000
EXTRA_PAGES: Final = 64

# Bytes from the window's start: the first page is for what the guest prints.
_STOP: Final = PAGE_SIZE
_EXTRA: Final = _STOP + 4
_EXTRA_USERS: Final = _STOP + 8
_STEPS: Final = _STOP + 16
_BEGUN: Final = _STEPS + 8 * MAX_VCPUS
_DONE: Final = _BEGUN + 4 * LANES * MAX_PAGES
_EXPOSED: Final = _DONE + 4 * LANES * MAX_PAGES

_BLOCK: Final = 0x20_0000


def place(pages: int, *, image_end: int, vcpus: int) -> tuple[int, int]:
    """Return the private memory, in bytes, that a guest on so many pages needs, and where in it they begin: on a 2 MiB boundary."""
    offset = -(-(image_end - guest_abi.PRIVATE_BASE) // _BLOCK) * _BLOCK
    return offset + (pages << PAGE_SHIFT) + vcpus * guest_abi.STACK_SIZE, offset


@final
class Board:
    """The words that owner and guest share, in the guest's shared window."""

    def __init__(self, window: mmap.mmap) -> None:
        self._words = memoryview(window).cast("I")
        self._steps = memoryview(window)[_STEPS : _STEPS + 8 * MAX_VCPUS].cast("Q")

    @property
    def extra(self) -> int:
        """Which file the guest finds at ``EXTRA_BASE``, by a number that never comes again; 0 for none."""
        return self._words[_EXTRA >> 2]

    @extra.setter
    def extra(self, value: int) -> None:
        self._words[_EXTRA >> 2] = value

    @property
    def extra_users(self) -> int:
        """How many vCPUs are about to touch it."""
        return self._words[_EXTRA_USERS >> 2]

    @contextmanager
    def exposing(self, pages: range) -> Generator[None]:
        """Have the guest see shared pages inside the block, without its word."""
        for page in pages:
            self._words[(_EXPOSED >> 2) + page] += 1
        yield
        for page in pages:
            self._words[(_EXPOSED >> 2) + page] += 1

    def stop(self) -> None:
        """Tell the guest to end."""
        self._words[_STOP >> 2] = 1

    def begin_anew(self, pages: int) -> None:
        """Forget what is one guest's; generations are the descriptor's and go on."""
        for word in (_STOP, _EXTRA, _EXTRA_USERS, *range(_EXPOSED, _EXPOSED + 4 * pages, 4)):
            self._words[word >> 2] = 0
        for vcpu in range(MAX_VCPUS):
            self._steps[vcpu] = 0

    def steps(self, vcpu: int) -> int:
        """Return how far a vCPU is."""
        return self._steps[vcpu]

    def lane(self, number: int) -> "Lane":
        """Return one process's words."""
        return Lane(
            self._words, (_BEGUN >> 2) + number * MAX_PAGES, (_DONE >> 2) + number * MAX_PAGES
        )

    def close(self) -> None:
        """Give the window back."""
        self._words.release()
        self._steps.release()


@final
class Lane:
    """What one process says of the pages it takes away: before, and when they are gone."""

    def __init__(self, words: memoryview, begun: int, done: int) -> None:
        """Write the words of a board from these two on."""
        self._words, self._begun, self._done = words, begun, done
        self._mutex = threading.Lock()
        #: It only rises, whoever had the lane before.
        self._generation = max(words[begun + page] for page in range(MAX_PAGES))

    @contextmanager
    def taking(self, pages: range) -> Generator[None]:
        """Take pages away inside the block; when it raises, they may or may not be gone."""
        with self._mutex:
            self._generation += 1
            # Word by word: a store of several bytes is whole only as one word.
            for page in pages:
                self._words[self._begun + page] = self._generation
            yield
            for page in pages:
                self._words[self._done + page] = self._generation
