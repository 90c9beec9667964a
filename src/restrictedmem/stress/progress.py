"""What a process of a run tells the process that watches it: words in shared memory."""

import mmap
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, final

_FIELDS: Final = 6
_OPERATIONS, _PUNCHES, _PAGES, _SLOWEST, _DOING, _SINCE = range(_FIELDS)


@final
class Progress:
    """The words of one process; they stay readable when it is killed."""

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
