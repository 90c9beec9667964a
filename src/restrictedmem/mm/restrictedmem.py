"""A restricted file: what its owner may do to it, and who hears of it (mm/restrictedmem.c of v9 and v10)."""

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
    """A notifier and the pages it hears of."""

    notifier: Notifier
    start: pgoff_t
    end: pgoff_t
    exclusive: bool
    #: Grows with each registration of the file: what is newest.
    number: int


class RestrictedFile:
    """One file: a size that is set once, a backing, an inode and the notifiers of its consumers.

    Lock order: ``_notifiers_sem``, then ``_mutex`` or the sequence's own. The semaphore is held for
    reading over the whole of start, operation and end (Sean Christopherson's order), so nobody can
    register or unregister in between and leave a pair unbalanced.
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
        """Make an empty file of size 0, held by one reference: the caller's; ``design`` is its own.

        ``account`` hears by how many bytes the file holds more, or fewer: before it allocates,
        after it has freed, and, for what consumers have allocated, when one goes.
        """
        self.design = design
        self.backing = backing
        self.inode = inode
        #: Bytes; under ``_mutex`` for writing.
        self.size = 0
        #: Whose content the pages hold: a number of whoever registers notifiers, None for nobody's
        #: yet.
        self.holder: int | None = None
        #: Held while that changes, until whoever takes the file has registered.
        self.taking = sync.mutex()
        self._mutex = sync.mutex()
        self._account = account
        #: Bytes that it has heard of.
        self._held = 0
        self._notifiers_sem = sync.RwSem()
        #: By id of the notifier, newest first, and how many in all; changed with the semaphore held
        #: for writing and ``_mutex`` held.
        self._registrations: dict[int, tuple[Registration, ...]] = {}
        self._count = 0
        #: The exclusive bindings, which are all or none and do not overlap, as they lie in the
        #: file.
        self._exclusive: list[tuple[pgoff_t, pgoff_t]] = []
        self._last = 0
        #: All of them and whose they are, for who walks them; None from a change to the next walk
        #: (``registrations``).
        self._newest_first: tuple[Registration, ...] | None = ()
        self._notifiers: tuple[Notifier, ...] = ()
        self._sequence: InvalidationSequence | None = None
        self._references = 1
        # Of its own: who takes a reference must not wait for gigabytes under ``_mutex``.
        self._references_lock = sync.mutex()

    # What the owner does.

    def ftruncate(self, length: int) -> None:
        """Set the size, in bytes, once; to 0 as often as it is 0.

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

        Mode 0 and KEEP_SIZE allocate and know no alignment; mode 0 past the end grows the size,
        ftruncate or not. A punch must be aligned, may lie beyond the end, and frees. Who is told of
        what, and what is freed when, is the design's business. ``abandoned`` says, now and then,
        whether nobody waits for an allocation any more.

        Raises:
            OSError: EINVAL for an unaligned punch (nobody is notified); EOPNOTSUPP for other modes;
                ENOSPC, ENOMEM; EINTR for an allocation that was abandoned.
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
        """Do ``fallocate`` if there is nobody to tell, which waits for no consumer; false when there is somebody.

        Raises:
            OSError: as ``fallocate``.
        """
        if mode & _PUNCH_HOLE and (offset | length) & PAGE_MASK:
            raise failed("fallocate", EINVAL, "hole is not page aligned")
        with self._mutex:
            # Nobody can register before this is over: no need of the semaphore, which costs three
            # times as much.
            if self._registrations:
                return False
            self._fallocate(mode, offset, length, abandoned)
            return True

    def _fallocate(
        self, mode: int, offset: int, length: int, abandoned: Callable[[], bool]
    ) -> None:
        # Preconditions: _mutex held. Allocations of one file take turns, as tmpfs makes them do
        # under the inode's lock.
        try:
            if mode == PUNCH:
                self.design.punch(self, offset, length)
            elif mode in _ALLOCATE:
                # Before: the kernel may look for a process to kill meanwhile.
                self._tell(length)
                self.design.allocate(self, offset, length, abandoned)
                if mode == 0:
                    self.size = max(self.size, offset + length)
            else:
                raise failed("fallocate", EOPNOTSUPP, f"mode {mode:#x}")
        finally:
            self._tell()
        self.inode.modified()

    def _tell(self, more: int = 0) -> None:
        # Preconditions: _mutex held, or no reference left.
        if self._account is not None:
            held = self.backing.resident() + more
            change, self._held = held - self._held, held
            self._account(change)

    # What consumers do.

    def register_notifier(self, notifier: Notifier) -> None:
        """Add a notifier, newest first, for the whole file (``restrictedmem_register_notifier``); waits for a running invalidation.

        Does not hold the file: the consumer needs a reference of its own until it has unregistered.

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
        """Add a notifier for a range of pages (``restrictedmem_bind`` of Sean Christopherson's series).

        Raises:
            OSError: EINVAL where the design has no bindings, for a range that is empty or beyond
                the largest file, while others are bound that are not exclusive as this one is or is
                not, and, if exclusive, when a page of the range is bound; EMFILE, ENFILE, ENOMEM as
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
            # Of those that begin before this one's end, the last reaches farthest.
            before = bisect_left(self._exclusive, (span.end, span.end))
            if len(self._exclusive) != exclusive * self._count or (
                before and self._exclusive[before - 1][1] > span.start
            ):
                raise failed(
                    "bind",
                    EINVAL,
                    f"pages {span.start:#x} to {span.end:#x} are bound, or others not exclusive alike",
                )
            self._last += 1
            new = Registration(notifier, span.start, span.end, exclusive, self._last)
            self._set_registrations(notifier, (new, *self._registrations.get(id(notifier), ())))
        finally:
            self._notifiers_sem.up_write()

    def unregister_notifier(self, notifier: Notifier) -> None:
        """Remove a notifier and its bindings; when this returns, no callback of it runs or will run.

        Silent, as in v9 and v10, unless the design is one with invalidation at teardown.
        """
        self._remove(notifier, _WHOLE)

    def unbind(self, start: pgoff_t, end: pgoff_t, notifier: Notifier) -> None:
        """Remove a notifier from a range, which may be a part of what it has bound (``restrictedmem_unbind``).

        Others keep what they have bound there; the series stores nothing over the range, whoever
        has it.

        Raises:
            OSError: EINVAL when it has no page of the range bound.
        """
        if not self.design.binds or not self._remove(notifier, PageRange(start, end)):
            raise failed("unbind", EINVAL, f"no binding in pages {start:#x} to {end:#x}")

    def _remove(self, notifier: Notifier, span: PageRange) -> bool:
        """Cut a range out of a notifier's registrations, and say whether there was anything to cut."""
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
                # Whatever became of the last words: a registration that stayed would keep the file
                # from everybody else.
                self._set_registrations(notifier, tuple(stay))
            return bool(going)
        finally:
            self._notifiers_sem.up_write()

    def _set_registrations(
        self, notifier: Notifier, registrations: tuple[Registration, ...]
    ) -> None:
        # Preconditions: _notifiers_sem held for writing. The mutex keeps out who found nobody
        # registered and does without the semaphore.
        with self._mutex:
            before = self._registrations.pop(id(notifier), ())
            for old in before if before and before[0].exclusive else ():
                del self._exclusive[bisect_left(self._exclusive, (old.start, old.end))]
            for new in registrations if registrations and registrations[0].exclusive else ():
                insort(self._exclusive, (new.start, new.end))
            if registrations:
                self._registrations[id(notifier)] = registrations
            self._count += len(registrations) - len(before)
            # A walk makes these: thousands may come or go before the next one.
            self._newest_first = None
            self._tell()

    def registrations(self) -> tuple[Registration, ...]:
        """Return all registrations, newest first; under the semaphore."""
        found = self._newest_first
        if found is None:
            # Two readers at once make the same. What is left of a binding that was cut has one
            # number, and stays in order.
            every = chain.from_iterable(self._registrations.values())
            found = tuple(sorted(every, key=lambda registration: -registration.number))
            self._notifiers = tuple(registration.notifier for registration in found)
            self._newest_first = found
        return found

    def renew(self) -> None:
        """Free every page, and drop the memfd and the sequence page: who kept a descriptor of either reaches nothing that comes after.

        Raises:
            OSError: EINVAL while anybody is registered; what the pages could not be freed with,
                which nobody reaches by the file any more.
        """
        self._notifiers_sem.down_write()
        try:
            with self._mutex:
                if self._registrations:
                    raise failed("renew", EINVAL, "a consumer has the file")
                free = self.backing.renew()
                self._tell()
                self.design.forget()
                sequence, self._sequence = self._sequence, None
                if sequence is not None:
                    sequence.close()
                self.inode.modified()
        finally:
            self._notifiers_sem.up_write()
        # They may be gigabytes, and whoever waits for a lock may be who serves the whole mount.
        free()

    def notifiers(self, start: pgoff_t, end: pgoff_t) -> Sequence[Notifier]:
        """Return those who are to hear of a range of pages, newest first; under the semaphore."""
        every = self.registrations()
        if not self.design.binds:
            return self._notifiers
        return [r.notifier for r in every if start < r.end and end > r.start]

    def error_page(self, start: pgoff_t, end: pgoff_t) -> None:
        """Tell consumers that the machine has lost pages (``restrictedmem_error_page`` of v10, as it was meant); in v9 nobody is told."""
        self._notifiers_sem.down_read()
        try:
            for notifier in self.notifiers(start, end) if self.design.tells_errors else ():
                notifier.error(start, end)
        finally:
            self._notifiers_sem.up_read()

    @property
    def notifier_count(self) -> int:
        """How many registrations there are: consumers of the whole file, or bindings."""
        return self._count

    def sequence(self) -> InvalidationSequence:
        """Return the page that fault paths check, made at the first call, and at the first one after ``renew``.

        Raises:
            OSError: EMFILE, ENFILE, ENOMEM.
        """
        made = self._sequence
        # Never another while there is a consumer: whoever holds the semaphore for reading finds it,
        # and saves the mutex at each punch.
        return made if made is not None else self._make_sequence()

    def _make_sequence(self) -> InvalidationSequence:
        with self._mutex:
            if self._sequence is None:
                self._sequence = InvalidationSequence.create()
            return self._sequence

    # How long it lives.

    def get(self) -> None:
        """Take a reference (``get_file``)."""
        with self._references_lock:
            self._references += 1

    def get_unless_zero(self) -> bool:
        """Take a reference unless the last one is gone (``kref_get_unless_zero``); say whether there is one now."""
        with self._references_lock:
            self._references += self._references > 0
            return self._references > 0

    def put(self) -> None:
        """Drop a reference (``fput``); with the last one the pages go, and nobody is notified."""
        with self._references_lock:
            self._references -= 1
            last = not self._references
        if last:
            self.backing.close()
            self._tell()
            if self._sequence is not None:
                self._sequence.close()
