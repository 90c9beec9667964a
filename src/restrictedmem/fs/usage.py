"""What the owners of a mount's files have done, and the most memory that the files had at once."""

from itertools import chain
from typing import final

from restrictedmem import sync
from restrictedmem.mm.restrictedmem import RestrictedFile


@final
class Usage:
    """Counts since the start; sizes in bytes.

    Memory is looked at when there may be more: after an allocation, and before pages go of a file
    that consumers have had, who take theirs without a word. What they take and give back in between
    is missed, and what outlives its last descriptor.
    """

    def __init__(self) -> None:
        self.created = 0
        #: Files whose size was set, and to how much in all.
        self.sized = 0
        self.sized_bytes = 0
        #: Holes that were punched.
        self.punched = 0
        self.punched_bytes = 0
        self.peak_bytes = 0
        self._mutex = sync.mutex()
        #: By open file: what it had when it was looked at; and which have been punched since.
        self._known: dict[RestrictedFile, int] = {}
        self._stale: set[RestrictedFile] = set()
        self._bytes = 0

    def create(self, file: RestrictedFile) -> None:
        """Count a file."""
        with self._mutex:
            self.created += 1
            self._known[file] = 0

    def size(self, length: int) -> None:
        """Count a size that was set."""
        with self._mutex:
            self.sized += 1
            self.sized_bytes += length

    def before_punch(self, file: RestrictedFile) -> None:
        """Look at the memory of a file that consumers have, who take theirs without a word, before a hole is punched."""
        with self._mutex:
            if file.holder is not None:
                self._look(file)

    def punch(self, file: RestrictedFile, length: int) -> None:
        """Count a hole that was punched."""
        with self._mutex:
            self.punched += 1
            self.punched_bytes += length
            self._stale.add(file)

    def allocate(self, file: RestrictedFile) -> None:
        """Look at the memory of a file that was allocated."""
        with self._mutex:
            self._look(file)

    def close(self, file: RestrictedFile) -> None:
        """Forget a file that its owners are about to let go of."""
        with self._mutex:
            if file.holder is not None:
                self._look(file)
            self._stale.discard(file)
            self._bytes -= self._known.pop(file, 0)

    def _look(self, *files: RestrictedFile) -> None:
        # Preconditions: _mutex held. Those that were punched first: they make the sum smaller.
        for file in chain(self._stale, files):
            known = self._known.get(file)
            # None of one that was closed meanwhile.
            if known is not None:
                found = self._known[file] = file.backing.resident()
                self._bytes += found - known
        self._stale.clear()
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def report(self, files: list[RestrictedFile]) -> dict[str, int]:
        """Return the counts, after a look at files that consumers had, among ``files``, of which some may be closed by now."""
        with self._mutex:
            self._look(*(file for file in files if file.holder is not None))
            return {
                "created": self.created,
                "sized": self.sized,
                "sized_bytes": self.sized_bytes,
                "punched": self.punched,
                "punched_bytes": self.punched_bytes,
                "peak_bytes": self.peak_bytes,
            }
