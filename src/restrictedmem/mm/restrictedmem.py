"""A restricted file: what its owner may do to it, and who hears of it (mm/restrictedmem.c of v9 and v10)."""

from errno import EFBIG, EINVAL, EOPNOTSUPP, EPERM
from typing import Final, final

from restrictedmem import sync
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.mm.backing import Backing
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.notifier import Api, Notifier
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import MAX_FILE_BYTES, PAGE_MASK, PageRange

_ALLOCATE: Final = (0, int(FallocMode.KEEP_SIZE))
_PUNCH_HOLE: Final = int(FallocMode.PUNCH_HOLE)


@final
class RestrictedFile:
    """One file: a size that is set once, a backing, an inode and the notifiers of its consumers.

    Lock order: ``_notifiers_sem``, then ``_mutex`` or the sequence's own. The semaphore is held for reading over the whole of start,
    operation and end (Sean Christopherson's order), so nobody can register or unregister in between and leave a pair unbalanced.
    """

    __slots__ = ("_mutex", "_notifiers", "_notifiers_sem", "_references", "_sequence", "api", "backing", "holder", "inode", "size")

    def __init__(self, api: Api, backing: Backing, inode: Inode) -> None:
        """Make an empty file of size 0, held by one reference: the caller's."""
        self.api = api
        self.backing = backing
        self.inode = inode
        #: Bytes; under ``_mutex`` for writing.
        self.size = 0
        #: Whose content the pages hold: a number of whoever registers notifiers, None for nobody's yet.
        self.holder: int | None = None
        self._mutex = sync.mutex()
        self._notifiers_sem = sync.RwSem()
        self._notifiers: tuple[Notifier, ...] = ()
        self._sequence: InvalidationSequence | None = None
        self._references = 1

    # What the owner does.

    def ftruncate(self, length: int) -> None:
        """Set the size, in bytes, once; to 0 as often as it is 0.

        Raises:
            OSError: EPERM once the size is not 0, whatever the length; EINVAL for a length that is not a multiple of the page size;
                EFBIG beyond the largest file.
        """
        with self._mutex:
            if self.size:
                raise OSError(EPERM, "ftruncate: size is already set")
            if length & PAGE_MASK:
                raise OSError(EINVAL, "ftruncate: size is not page aligned")
            if length > MAX_FILE_BYTES:
                raise OSError(EFBIG, "ftruncate: larger than any file")
            self.size = length
            self.inode.modified()

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Allocate or free pages; offset and length in bytes, as fallocate(2).

        Mode 0 and KEEP_SIZE allocate and know no alignment; mode 0 past the end grows the size, ftruncate or not. A punch must be
        aligned, may lie beyond the end, and frees; in v10 it alone notifies, in v9 every mode does, those that fail included.

        Raises:
            OSError: EINVAL for an unaligned punch (nobody is notified); EOPNOTSUPP for other modes; ENOSPC, ENOMEM.
        """
        if mode & _PUNCH_HOLE and (offset | length) & PAGE_MASK:
            raise OSError(EINVAL, "fallocate: hole is not page aligned")
        with self._mutex:
            # Nobody to tell, and nobody can register before this is over: no need of the semaphore, which costs three times as much.
            if not self._notifiers:
                self._fallocate(mode, offset, length)
                return
        self._notifiers_sem.down_read()
        try:
            if self.api.notifies(mode):
                self._fallocate_notifying(PageRange.around_bytes(offset, length), mode, offset, length)
            else:
                with self._mutex:
                    self._fallocate(mode, offset, length)
        finally:
            self._notifiers_sem.up_read()

    def _fallocate_notifying(self, span: PageRange, mode: int, offset: int, length: int) -> None:
        # Preconditions: _notifiers_sem held for reading, at least one notifier. Ends are delivered whatever the operation says.
        sequence = self.sequence()
        sequence.begin(span.start, span.end)
        for notifier in self._notifiers:
            notifier.invalidate_start(span.start, span.end)
        try:
            with self._mutex:
                self._fallocate(mode, offset, length)
        finally:
            sequence.end()
            for notifier in self._notifiers:
                notifier.invalidate_end(span.start, span.end)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        # Preconditions: _mutex held. Allocations of one file take turns, as tmpfs makes them do under the inode's lock.
        if mode == PUNCH:
            self.backing.punch(offset, length)
        elif mode in _ALLOCATE:
            self.backing.allocate(offset, length)
            if mode == 0:
                self.size = max(self.size, offset + length)
        else:
            raise OSError(EOPNOTSUPP, f"fallocate: mode {mode:#x}")
        self.inode.modified()

    # What consumers do.

    def register_notifier(self, notifier: Notifier) -> None:
        """Add a notifier, newest first, for the whole file (``restrictedmem_register_notifier``); waits for a running invalidation.

        Does not hold the file: the consumer needs a reference of its own until it has unregistered.

        Raises:
            OSError: EMFILE, ENFILE or ENOMEM when the file's sequence page cannot be made.
        """
        self._notifiers_sem.down_write()
        try:
            self.sequence()
            with self._mutex:
                self._notifiers = (notifier, *self._notifiers)
        finally:
            self._notifiers_sem.up_write()

    def unregister_notifier(self, notifier: Notifier) -> None:
        """Remove a notifier; when this returns, no callback of it runs or will run. Silent, as in v9 and v10."""
        self._notifiers_sem.down_write()
        try:
            with self._mutex:
                self._notifiers = tuple(other for other in self._notifiers if other is not notifier)
        finally:
            self._notifiers_sem.up_write()

    @property
    def notifier_count(self) -> int:
        """How many consumers an invalidation waits for."""
        return len(self._notifiers)

    def sequence(self) -> InvalidationSequence:
        """Return the page that fault paths check, made at the first call.

        Raises:
            OSError: EMFILE, ENFILE, ENOMEM.
        """
        with self._mutex:
            if self._sequence is None:
                self._sequence = InvalidationSequence.create()
            return self._sequence

    # How long it lives.

    def get(self) -> None:
        """Take a reference (``get_file``)."""
        with self._mutex:
            self._references += 1

    def get_unless_zero(self) -> bool:
        """Take a reference unless the last one is gone (``kref_get_unless_zero``); say whether there is one now."""
        with self._mutex:
            self._references += self._references > 0
            return self._references > 0

    def put(self) -> None:
        """Drop a reference (``fput``); with the last one the pages go, and nobody is notified."""
        with self._mutex:
            self._references -= 1
            last = not self._references
        if last:
            self.backing.close()
            if self._sequence is not None:
                self._sequence.close()
