"""The board: words in shared memory by which the owner tells the guest ``churn`` what it does.

guests/churn.c is the guest's side, and says what the guest concludes from each word.
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
#: Guest address and number of pages of the slot that the owner adds and deletes.
EXTRA_BASE: Final = 0x8000_0000
EXTRA_PAGES: Final = 64

# Words of 32 bits from the window's start; the first page is for the guest's output.
_STOP: Final = PAGE_SIZE // 4
_EXTRA: Final = _STOP + 1
_EXTRA_USERS: Final = _STOP + 2
_STEPS: Final = _STOP + 4
_BEGUN: Final = _STEPS + 2 * MAX_VCPUS
_DONE: Final = _BEGUN + LANES * MAX_PAGES
_EXPOSED: Final = _DONE + LANES * MAX_PAGES

_BLOCK: Final = 0x20_0000


def place(pages: int, *, image_end: int, vcpus: int) -> tuple[int, int]:
    """Return the bytes of private memory that a guest with so many pages needs, and an offset.

    This is the offset of the pages in the memory, a multiple of 2 MiB.
    """
    offset = -(-(image_end - guest_abi.PRIVATE_BASE) // _BLOCK) * _BLOCK
    return offset + (pages << PAGE_SHIFT) + vcpus * guest_abi.STACK_SIZE, offset


@final
class Board:
    """The words that owner and guest share, in the guest's shared window."""

    def __init__(self, window: mmap.mmap) -> None:
        self._words = memoryview(window).cast("I")
        self._steps = memoryview(window)[4 * _STEPS : 4 * _BEGUN].cast("Q")

    @property
    def extra(self) -> int:
        """The number of the file that the guest finds at ``EXTRA_BASE``; 0 for none.

        A number never comes again.
        """
        return self._words[_EXTRA]

    @extra.setter
    def extra(self, value: int) -> None:
        self._words[_EXTRA] = value

    @property
    def extra_users(self) -> int:
        """The number of vCPUs that are about to touch this file."""
        return self._words[_EXTRA_USERS]

    @contextmanager
    def exposing(self, pages: range) -> Generator[None]:
        """Tell the guest that the owner makes pages shared inside the block, unasked."""
        for page in pages:
            self._words[_EXPOSED + page] += 1
        yield
        for page in pages:
            self._words[_EXPOSED + page] += 1

    def stop(self) -> None:
        """Tell the guest to end."""
        self._words[_STOP] = 1

    def begin_anew(self, pages: int) -> None:
        """Reset the words of one guest; generations belong to the descriptor and go on."""
        for word in (_STOP, _EXTRA, _EXTRA_USERS, *range(_EXPOSED, _EXPOSED + pages)):
            self._words[word] = 0
        for vcpu in range(MAX_VCPUS):
            self._steps[vcpu] = 0

    def steps(self, vcpu: int) -> int:
        """Return the number of steps that a vCPU has done."""
        return self._steps[vcpu]

    def lane(self, number: int) -> "Lane":
        """Return the words of one process."""
        return Lane(self._words, _BEGUN + number * MAX_PAGES, _DONE + number * MAX_PAGES)

    def close(self) -> None:
        """Release the window's memory."""
        self._words.release()
        self._steps.release()


@final
class Lane:
    """The words by which one process says that it takes pages away, and that they are gone."""

    def __init__(self, words: memoryview, begun: int, done: int) -> None:
        """Use the words of a board that begin at these two indexes."""
        self._words, self._begun, self._done = words, begun, done
        self._mutex = threading.Lock()
        #: The generation only rises, also from one process that has the lane to the next.
        self._generation = max(words[begun + page] for page in range(MAX_PAGES))

    @contextmanager
    def taking(self, pages: range) -> Generator[None]:
        """Announce that the block takes pages away; if it raises, they may be gone or not."""
        with self._mutex:
            self._generation += 1
            # Word by word: only the store of a single word is atomic.
            for page in pages:
                self._words[self._begun + page] = self._generation
            yield
            for page in pages:
                self._words[self._done + page] = self._generation
