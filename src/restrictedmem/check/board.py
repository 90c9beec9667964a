"""What the owner of the guest ``churn`` tells it, and what owners tell who watches them: words in shared memory.

The guest's side is guests/churn.c, which says what follows from which word.
"""

import mmap
import threading
import time
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


_FIELDS: Final = 6
_OPERATIONS, _PUNCHES, _PAGES, _SLOWEST, _DOING, _SINCE = range(_FIELDS)


@final
class Progress:
    """What one process is doing, as the process that watches it reads it: in shared memory, so that it is there when that one is killed."""

    def __init__(self, names: tuple[str, ...]) -> None:
        """Begin with nothing done, for this process and those it forks; ``names`` are those of all operations."""
        self._memory = mmap.mmap(-1, 8 * _FIELDS)
        self._words = memoryview(self._memory).cast("B").cast("Q")
        self._names = names

    @property
    def operations(self) -> int:
        """How many operations are over."""
        return self._words[_OPERATIONS]

    @property
    def punches(self) -> int:
        """How many of them were punches."""
        return self._words[_PUNCHES]

    @property
    def pages(self) -> int:
        """How many pages were punched."""
        return self._words[_PAGES]

    @property
    def slowest(self) -> float:
        """Seconds that the slowest punch took."""
        return self._words[_SLOWEST] / 1e9

    @contextmanager
    def doing(self, name: str) -> Generator[None]:
        """Be doing something inside the block."""
        words = self._words
        words[_SINCE] = time.monotonic_ns()
        words[_DOING] = self._names.index(name) + 1
        yield
        words[_DOING] = 0
        words[_OPERATIONS] += 1

    @contextmanager
    def punching(self, pages: int) -> Generator[None]:
        """Punch so many pages inside the block."""
        began = time.monotonic_ns()
        yield
        words = self._words
        words[_PUNCHES] += 1
        words[_PAGES] += pages
        words[_SLOWEST] = max(words[_SLOWEST], time.monotonic_ns() - began)

    def close(self) -> None:
        """Give the memory back."""
        self._words.release()
        self._memory.close()

    def stuck(self, seconds: float) -> str | None:
        """Return what has been under way for longer than so many seconds."""
        doing, since = self._words[_DOING], self._words[_SINCE]
        if not doing or time.monotonic_ns() - since < seconds * 1e9:
            return None
        return self._names[doing - 1]
