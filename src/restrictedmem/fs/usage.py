"""Counts of what the owners of a mount's files do, and the files' peak of memory."""

from itertools import chain
from typing import final

from restrictedmem import sync
from restrictedmem.mm.restrictedmem import RestrictedFile


@final
class Usage:
    """Counts since the start; sizes in bytes.

    The memory of a file is read when it may have grown: after an allocation. Consumers take pages
    without a message. So the memory of a file that consumers have had is also read before its pages
    go. The peak does not include pages that consumers take and give back in between, nor memory
    that outlives its last descriptor.
    """

    def __init__(self) -> None:
        self.created = 0
        #: Files whose size was set, and the sum of these sizes.
        self.sized = 0
        self.sized_bytes = 0
        #: Holes that were punched.
        self.punched = 0
        self.punched_bytes = 0
        self.peak_bytes = 0
        self._mutex = sync.mutex()
        #: By open file: its memory at the last look. _stale has the files that were punched since
        #: then.
        self._known: dict[RestrictedFile, int] = {}
        self._stale: set[RestrictedFile] = set()
        self._bytes = 0

    def create(self, file: RestrictedFile) -> None:
        """Count a new file."""
        with self._mutex:
            self.created += 1
            self._known[file] = 0

    def size(self, length: int) -> None:
        """Count a size that was set."""
        with self._mutex:
            self.sized += 1
            self.sized_bytes += length

    def before_punch(self, file: RestrictedFile) -> None:
        """Read the memory of a file before a punch, if consumers have had the file.

        Consumers take pages without a message.
        """
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
        """Read the memory of a file after an allocation."""
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
        # Preconditions: _mutex held. Punched files come first, because they make the sum smaller.
        for file in chain(self._stale, files):
            known = self._known.get(file)
            # A file that was closed meanwhile is not in _known.
            if known is not None:
                found = self._known[file] = file.backing.resident()
                self._bytes += found - known
        self._stale.clear()
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def report(self, files: list[RestrictedFile]) -> dict[str, int]:
        """Return the counts, after a look at those of ``files`` that consumers have had.

        Some of ``files`` may be closed by now.
        """
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
