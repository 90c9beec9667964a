"""A restricted file: the owner's operations and the consumers' notifiers.

The source is mm/restrictedmem.c of v9 and v10.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from errno import EFBIG, EINVAL, EOPNOTSUPP, EPERM
from itertools import chain
from typing import Final, NamedTuple, final

from restrictedmem import sync
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.failure import failed
from restrictedmem.mm.backing import Backing
from restrictedmem.mm.design import Design
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.memfd import never
from restrictedmem.mm.notifier import Notifier
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import MAX_FILE_BYTES, PAGE_MASK, PAGE_SHIFT, PageRange, pgoff_t

_ALLOCATE: Final = (0, int(FallocMode.KEEP_SIZE))
_PUNCH_HOLE: Final = int(FallocMode.PUNCH_HOLE)
_WHOLE: Final = PageRange(pgoff_t(0), pgoff_t(MAX_FILE_BYTES >> PAGE_SHIFT))


@final
class Registration(NamedTuple):
    """A notifier and the pages that it hears of."""

    notifier: Notifier
    start: pgoff_t
    end: pgoff_t
    exclusive: bool
    #: Grows with each registration of the file, so the newest has the largest.
    number: int


class RestrictedFile:
    """One file: a size that is set once, a backing, an inode and its consumers' notifiers.

    Lock order: ``_notifiers_sem``, then ``_mutex`` or the sequence's own. The semaphore is held for
    reading over the whole of start, operation and end (Sean Christopherson's order). So no consumer
    can register or unregister in between and leave a pair unbalanced.
    """

    __slots__ = (
        "_account",
        "_count",
        "_exclusive",
        "_held",
        "_last",
        "_mutex",
        "_newest_first",
        "_notifiers",
        "_notifiers_sem",
        "_references",
        "_references_lock",
        "_registrations",
        "_sequence",
        "backing",
        "design",
        "holder",
        "inode",
        "size",
        "taking",
    )

    def __init__(
        self,
        design: Design,
        backing: Backing,
        inode: Inode,
        account: Callable[[int], None] | None = None,
    ) -> None:
        """Make an empty file of size 0, with one reference, which the caller owns.

        The file has ``design`` for itself alone. ``account`` gets the change of the bytes that the
        file holds. It is called before an allocation and after pages are freed. For pages that
        consumers have allocated, it is called when a consumer leaves.
        """
        self.design = design
        self.backing = backing
        self.inode = inode
        #: Bytes; written under ``_mutex``.
        self.size = 0
        #: Id of the consumer whose data the pages hold; None if none yet.
        self.holder: int | None = None
        #: Held while ``holder`` changes, until the consumer that takes the file has registered.
        self.taking = sync.mutex()
        self._mutex = sync.mutex()
        self._account = account
        #: Bytes that ``_account`` has heard of.
        self._held = 0
        self._notifiers_sem = sync.RwSem()
        #: By id of the notifier, newest first. ``_count`` is how many there are in all. Both are
        #: written with the semaphore held for writing and ``_mutex`` held.
        self._registrations: dict[int, tuple[Registration, ...]] = {}
        self._count = 0
        #: The exclusive bindings, sorted by page. Either all bindings are exclusive or none is, and
        #: exclusive bindings do not overlap.
        self._exclusive: list[tuple[pgoff_t, pgoff_t]] = []
        self._last = 0
        #: All registrations and their notifiers, for ``registrations``. The first is None from a
        #: change to the next call.
        self._newest_first: tuple[Registration, ...] | None = ()
        self._notifiers: tuple[Notifier, ...] = ()
        self._sequence: InvalidationSequence | None = None
        self._references = 1
        # A lock of its own: under ``_mutex``, taking a reference could wait for the allocation of
        # gigabytes.
        self._references_lock = sync.mutex()

    # The owner's operations.

    def ftruncate(self, length: int) -> None:
        """Set the size, in bytes, once; while it is 0, it may be set to 0 again.

        Raises:
            OSError: EPERM once the size is not 0, whatever the length; EINVAL for a length that is
                not a multiple of the page size; EFBIG beyond the largest file.
        """
        with self._mutex:
            if self.size:
                raise failed("ftruncate", EPERM, "size is already set")
            if length & PAGE_MASK:
                raise failed("ftruncate", EINVAL, "size is not page aligned")
            if length > MAX_FILE_BYTES:
                raise failed("ftruncate", EFBIG, "larger than any file")
            self.size = length
            self.inode.modified()

    def fallocate(
        self, mode: int, offset: int, length: int, abandoned: Callable[[], bool] = never
    ) -> None:
        """Allocate or free pages; offset and length in bytes, as fallocate(2).

        Mode 0 and KEEP_SIZE allocate, and need no alignment. Mode 0 past the end grows the size,
        even if ftruncate has set it. A punch must be aligned and frees pages; it may lie beyond the
        end. The design decides what consumers hear and when pages are freed. ``abandoned`` is
        called now and then, and says whether the caller no longer waits for the allocation.

        Raises:
            OSError: EINVAL for an unaligned punch (no consumer hears of it); EOPNOTSUPP for other
                modes; ENOSPC, ENOMEM; EINTR for an allocation that was abandoned.
        """
        if self.fallocate_unheard(mode, offset, length, abandoned):
            return
        self._notifiers_sem.down_read()
        try:
            span = PageRange.around_bytes(offset, length)
            heard = self.design.notifies(mode)
            with self.design.invalidation(self, span) if heard else nullcontext(), self._mutex:
                self._fallocate(mode, offset, length, abandoned)
        finally:
            self._notifiers_sem.up_read()

    def fallocate_unheard(
        self, mode: int, offset: int, length: int, abandoned: Callable[[], bool] = never
    ) -> bool:
        """Do ``fallocate`` if no consumer is registered; return False if one is.

        This waits for no consumer.

        Raises:
            OSError: as ``fallocate``.
        """
        if mode & _PUNCH_HOLE and (offset | length) & PAGE_MASK:
            raise failed("fallocate", EINVAL, "hole is not page aligned")
        with self._mutex:
            # ``_mutex`` keeps consumers from registering until this is over. The semaphore would do
            # so, too, but costs three times as much.
            if self._registrations:
                return False
            self._fallocate(mode, offset, length, abandoned)
            return True

    def _fallocate(
        self, mode: int, offset: int, length: int, abandoned: Callable[[], bool]
    ) -> None:
        # Preconditions: _mutex held. Allocations of one file run one at a time, as under the
        # inode's lock in tmpfs.
        try:
            if mode == PUNCH:
                self.design.punch(self, offset, length)
            elif mode in _ALLOCATE:
                # Account before the allocation, because the OOM killer may look for a process
                # meanwhile.
                self._account_change(length)
                self.design.allocate(self, offset, length, abandoned)
                if mode == 0:
                    self.size = max(self.size, offset + length)
            else:
                raise failed("fallocate", EOPNOTSUPP, f"mode {mode:#x}")
        finally:
            self._account_change()
        self.inode.modified()

    def _account_change(self, more: int = 0) -> None:
        # Tell ``_account`` what the file holds now, and ``more`` bytes that it is about to take.
        # Preconditions: _mutex held, or no reference left.
        if self._account is not None:
            held = self.backing.resident() + more
            change, self._held = held - self._held, held
            self._account(change)

    # The consumers' operations.

    def register_notifier(self, notifier: Notifier) -> None:
        """Add a notifier for the whole file (``restrictedmem_register_notifier``).

        It becomes the newest. This call waits for a running invalidation. It does not hold the file
        open: the consumer needs a reference of its own until it has unregistered.

        Raises:
            OSError: EINVAL where the design has consumers bind ranges; EMFILE, ENFILE or ENOMEM
                when the file's sequence page cannot be made.
        """
        if self.design.binds:
            raise failed(
                "register_notifier", EINVAL, f"in the design {self.design} consumers bind ranges"
            )
        self._register(notifier, _WHOLE, exclusive=False)

    def bind(self, start: pgoff_t, end: pgoff_t, notifier: Notifier, *, exclusive: bool) -> None:
        """Add a notifier for a range of pages.

        This is ``restrictedmem_bind`` of Sean Christopherson's series.

        Raises:
            OSError: EINVAL where the design has no bindings; for a range that is empty or beyond
                the largest file; while another binding of the file differs in ``exclusive``; if
                exclusive, when a page of the range is bound. EMFILE, ENFILE, ENOMEM as
                ``register_notifier``.
        """
        if not self.design.binds or not 0 <= start < end <= _WHOLE.end:
            raise failed(
                "bind", EINVAL, f"pages {start:#x} to {end:#x} in the design {self.design}"
            )
        self._register(notifier, PageRange(start, end), exclusive=exclusive)

    def _register(self, notifier: Notifier, span: PageRange, *, exclusive: bool) -> None:
        self._notifiers_sem.down_write()
        try:
            self.sequence()
            # Of the exclusive bindings that begin before this one's end, the last one reaches
            # farthest.
            before = bisect_left(self._exclusive, (span.end, span.end))
            if len(self._exclusive) != exclusive * self._count or (
                before and self._exclusive[before - 1][1] > span.start
            ):
                raise failed(
                    "bind",
                    EINVAL,
                    f"pages {span.start:#x} to {span.end:#x}: bound already, "
                    "or another binding differs in exclusive",
                )
            self._last += 1
            new = Registration(notifier, span.start, span.end, exclusive, self._last)
            self._set_registrations(notifier, (new, *self._registrations.get(id(notifier), ())))
        finally:
            self._notifiers_sem.up_write()

    def unregister_notifier(self, notifier: Notifier) -> None:
        """Remove a notifier and its bindings.

        When this returns, no callback of the notifier runs or will run. The notifier hears nothing,
        as in v9 and v10, unless the design has invalidation at teardown.
        """
        self._remove(notifier, _WHOLE)

    def unbind(self, start: pgoff_t, end: pgoff_t, notifier: Notifier) -> None:
        """Remove a notifier from a range (``restrictedmem_unbind``).

        The range may be a part of what the notifier has bound. Other consumers keep their bindings
        of this range. The series removes every binding there, whichever consumer has it.

        Raises:
            OSError: EINVAL when the notifier has no page of the range bound.
        """
        if not self.design.binds or not self._remove(notifier, PageRange(start, end)):
            raise failed("unbind", EINVAL, f"no binding in pages {start:#x} to {end:#x}")

    def _remove(self, notifier: Notifier, span: PageRange) -> bool:
        """Cut a range out of a notifier's registrations; return whether it overlapped any."""
        self._notifiers_sem.down_write()
        try:
            stay: list[Registration] = []
            going: list[PageRange] = []
            for mine in self._registrations.get(id(notifier), ()):
                gone = span.clip(PageRange(mine.start, mine.end))
                if not gone:
                    stay.append(mine)
                    continue
                going.append(gone)
                if mine.start < gone.start:
                    stay.append(mine._replace(end=gone.start))
                if gone.end < mine.end:
                    stay.append(mine._replace(start=gone.end))
            try:
                for gone in going:
                    self.design.leave(self, notifier, gone)
            finally:
                # Remove the registration even if the callbacks failed. Otherwise it would keep all
                # other consumers from the file.
                self._set_registrations(notifier, tuple(stay))
            return bool(going)
        finally:
            self._notifiers_sem.up_write()

    def _set_registrations(
        self, notifier: Notifier, registrations: tuple[Registration, ...]
    ) -> None:
        # Preconditions: _notifiers_sem held for writing. The mutex keeps out ``fallocate_unheard``,
        # which does not take the semaphore.
        with self._mutex:
            before = self._registrations.pop(id(notifier), ())
            # A notifier's registrations are alike in this, and there may be thousands.
            if before and before[0].exclusive:
                for old in before:
                    del self._exclusive[bisect_left(self._exclusive, (old.start, old.end))]
            if registrations and registrations[0].exclusive:
                for new in registrations:
                    insort(self._exclusive, (new.start, new.end))
            if registrations:
                self._registrations[id(notifier)] = registrations
            self._count += len(registrations) - len(before)
            # ``registrations`` makes these again. Before its next call, thousands may come or go.
            self._newest_first = None
            self._account_change()

    def registrations(self) -> tuple[Registration, ...]:
        """Return all registrations, newest first.

        Preconditions: the semaphore is held.
        """
        found = self._newest_first
        if found is None:
            # Two readers may do this at once; both get the same result. All parts of a binding that
            # was cut have the same number, and sorting keeps their order.
            every = chain.from_iterable(self._registrations.values())
            found = tuple(sorted(every, key=lambda registration: -registration.number))
            self._notifiers = tuple(registration.notifier for registration in found)
            self._newest_first = found
        return found

    def renew(self) -> None:
        """Free every page, and drop the memfd and the sequence page.

        A consumer that kept a descriptor of either cannot reach later content with it.

        Raises:
            OSError: EINVAL while a consumer is registered; the error of freeing the old pages,
                which are no longer part of the file.
        """
        self._notifiers_sem.down_write()
        try:
            with self._mutex:
                if self._registrations:
                    raise failed("renew", EINVAL, "a consumer has the file")
                free = self.backing.renew()
                self._account_change()
                self.design.forget()
                sequence, self._sequence = self._sequence, None
                if sequence is not None:
                    sequence.close()
                self.inode.modified()
        finally:
            self._notifiers_sem.up_write()
        # There may be gigabytes to free. A thread that waits for a lock may be the one that serves
        # the whole mount.
        free()

    def notifiers(self, start: pgoff_t, end: pgoff_t) -> Sequence[Notifier]:
        """Return the notifiers that hear of a range of pages, newest first.

        Preconditions: the semaphore is held.
        """
        every = self.registrations()
        if not self.design.binds:
            return self._notifiers
        return [r.notifier for r in every if start < r.end and end > r.start]

    def error_page(self, start: pgoff_t, end: pgoff_t) -> None:
        """Tell consumers that the machine has lost pages; in v9 no consumer hears of it.

        This is ``restrictedmem_error_page`` of v10, as it was meant.
        """
        self._notifiers_sem.down_read()
        try:
            for notifier in self.notifiers(start, end) if self.design.tells_errors else ():
                notifier.error(start, end)
        finally:
            self._notifiers_sem.up_read()

    @property
    def notifier_count(self) -> int:
        """Return how many registrations there are: consumers of the whole file, or bindings."""
        return self._count

    def sequence(self) -> InvalidationSequence:
        """Return the page that fault paths check.

        The first call makes it; so does the first call after ``renew``.

        Raises:
            OSError: EMFILE, ENFILE, ENOMEM.
        """
        made = self._sequence
        # The page does not change while a consumer is registered. So a thread that holds the
        # semaphore for reading finds it here, and a punch need not take the mutex.
        return made if made is not None else self._make_sequence()

    def _make_sequence(self) -> InvalidationSequence:
        with self._mutex:
            if self._sequence is None:
                self._sequence = InvalidationSequence.create()
            return self._sequence

    # Lifetime.

    @property
    def blocks(self) -> int:
        """Return what fstat(2) shows as ``st_blocks``: 512 bytes each."""
        return self.backing.resident() // 512

    @property
    def nlink(self) -> int:
        """Return what fstat(2) shows as ``st_nlink``: the file has no name, as a memfd has none."""
        return 0

    @property
    def blksize(self) -> int:
        """Return what fstat(2) shows as ``st_blksize``."""
        return self.backing.blksize

    def get(self) -> None:
        """Take a reference (``get_file``)."""
        with self._references_lock:
            self._references += 1

    def get_unless_zero(self) -> bool:
        """Take a reference unless the last one is gone; return whether the caller has one now.

        This is ``kref_get_unless_zero``.
        """
        with self._references_lock:
            self._references += self._references > 0
            return self._references > 0

    def put(self) -> None:
        """Drop a reference (``fput``); with the last one the pages go, without callbacks."""
        with self._references_lock:
            self._references -= 1
            last = not self._references
        if last:
            self.backing.close()
            self._account_change()
            if self._sequence is not None:
                self._sequence.close()
