"""The progress of a process of a run, in memory shared with the process that watches it."""

import mmap
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, final

_FIELDS: Final = 6
_OPERATIONS, _PUNCHES, _PAGES, _SLOWEST, _DOING, _SINCE = range(_FIELDS)


@final
class Progress:
    """The words of one process; they stay readable after a kill of the process."""

    def __init__(self, names: tuple[str, ...]) -> None:
        """Begin with nothing done; ``names`` are the names of all operations.

        This process and the processes that it forks share the words.
        """
        self._memory = mmap.mmap(-1, 8 * _FIELDS)
        self._words = memoryview(self._memory).cast("B").cast("Q")
        self._names = names

    @property
    def operations(self) -> int:
        """The number of operations that have ended."""
        return self._words[_OPERATIONS]

    @property
    def punches(self) -> int:
        """The number of punches."""
        return self._words[_PUNCHES]

    @property
    def pages(self) -> int:
        """The number of punched pages."""
        return self._words[_PAGES]

    @property
    def slowest(self) -> float:
        """The duration of the slowest punch in seconds."""
        return self._words[_SLOWEST] / 1e9

    @contextmanager
    def doing(self, name: str) -> Generator[None]:
        """Record that the operation ``name`` is under way inside the block."""
        words = self._words
        words[_SINCE] = time.monotonic_ns()
        words[_DOING] = self._names.index(name) + 1
        yield
        words[_DOING] = 0
        words[_OPERATIONS] += 1

    @contextmanager
    def punching(self, pages: int) -> Generator[None]:
        """Record that the block punches so many pages."""
        began = time.monotonic_ns()
        yield
        words = self._words
        words[_PUNCHES] += 1
        words[_PAGES] += pages
        words[_SLOWEST] = max(words[_SLOWEST], time.monotonic_ns() - began)

    def close(self) -> None:
        """Release the memory."""
        self._words.release()
        self._memory.close()

    def stuck(self, seconds: float) -> str | None:
        """Return the operation that has been under way for more than ``seconds``, or None."""
        doing, since = self._words[_DOING], self._words[_SINCE]
        if not doing or time.monotonic_ns() - since <= seconds * 1e9:
            return None
        return self._names[doing - 1]
