"""The invalidation sequence of a file, which a fault path checks before it maps a page.

KVM keeps ``mmu_invalidate_seq``, ``mmu_invalidate_in_progress`` and the range for each VM. Here
each file has a page with them. The shim writes this page, and every consumer maps it read-only. So
a fault costs no message.

The rule (v10 4/9): a translation of page ``pgoff`` may be installed only if two things hold. No
invalidation is in progress over the page, and the sequence is the same as before get_page.
"""

import fcntl
import mmap
import os
from typing import Final, Self, final

from restrictedmem import sync
from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd
from restrictedmem.units import PAGE_SIZE, pgoff_t

_F_SEAL_FUTURE_WRITE: Final = 0x10
_SEALS: Final = _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_SEQ: Final = 0
_IN_PROGRESS: Final = 1
_START: Final = 2
_END: Final = 3


@final
class InvalidationSequence:
    """Sequence, count and range in shared memory, with one writer (the shim) and any readers."""

    __slots__ = ("_mapping", "_memory", "_mutex", "_words", "fd")

    def __init__(self, fd: OwnedFd, *, writable: bool) -> None:
        """Map the page behind ``fd``, which this object owns from now on."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.fd = fd
        self._mapping = mmap.mmap(fd.fileno(), PAGE_SIZE, mmap.MAP_SHARED, protection)
        self._memory = memoryview(self._mapping)
        self._words = sync.SharedWords(self._memory)
        self._mutex = sync.mutex()

    @classmethod
    def create(cls) -> Self:
        """Make a new page, with no invalidation in progress, that only this object can write.

        Any other process that has the page's descriptor can only read.

        Raises:
            OSError: EMFILE, ENFILE, ENOMEM; EINVAL before Linux 5.1.
        """
        fd = memory.memfd_create("restrictedmem-sequence")
        try:
            os.ftruncate(fd.fileno(), PAGE_SIZE)
            made = cls(fd, writable=True)
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            fd.close()
            raise
        return made

    def begin(self, start: pgoff_t, end: pgoff_t) -> None:
        """Enter an invalidation.

        Ranges of invalidations that overlap in time merge to their hull until all have ended, as in
        KVM.
        """
        words = self._words
        with self._mutex:
            in_progress = words.read(_IN_PROGRESS)
            if in_progress:
                start = min(start, pgoff_t(words.read(_START)))
                end = max(end, pgoff_t(words.read(_END)))
            words.write(_START, start)
            words.write(_END, end)
            words.write(_IN_PROGRESS, in_progress + 1)

    def end(self) -> None:
        """Leave an invalidation.

        The sequence rises before the count falls, so a reader sees at least one of the two.
        """
        words = self._words
        with self._mutex:
            words.write(_SEQ, words.read(_SEQ) + 1)
            words.write(_IN_PROGRESS, words.read(_IN_PROGRESS) - 1)

    def snapshot(self) -> int:
        """Return the sequence; call this before get_page."""
        return self._words.read(_SEQ)

    def busy(self) -> bool:
        """Say whether any invalidation is in progress.

        After ``close``, which another thread may call meanwhile, the answer is no.
        """
        try:
            return self._words.read(_IN_PROGRESS) > 0
        except ValueError:
            return False

    def busy_over(self, start: pgoff_t, end: pgoff_t) -> bool:
        """Say whether an invalidation is in progress over any of pages ``start`` to ``end``."""
        words = self._words
        return (
            words.read(_IN_PROGRESS) > 0 and start < words.read(_END) and end > words.read(_START)
        )

    def retry(self, snapshot: int, start: pgoff_t, end: pgoff_t) -> bool:
        """Say whether translations of pages ``start`` to ``end`` must not be installed.

        This is ``mmu_invalidate_retry_gfn``.
        """
        return self.busy_over(start, end) or self._words.read(_SEQ) != snapshot

    def close(self) -> None:
        """Unmap the page and close its descriptor."""
        self._words.release()
        self._memory.release()
        self._mapping.close()
        self.fd.close()
