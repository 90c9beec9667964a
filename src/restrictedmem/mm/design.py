"""The designs of the mailing-list thread: what consumers hear of a punch, what is freed when.

A design says which ranges consumers hear of and in which order. Each design is a small class behind
one interface, ``Design``. ``RestrictedFile`` calls it with the notifier semaphore held. ``make``
picks a design by name for a file. docs/understand/designs.md names the author and the known defects
of each.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Final, Protocol, final

from restrictedmem.abi.memory import FallocMode
from restrictedmem.mm.backing import Backing
from restrictedmem.mm.notifier import Notifier
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import PAGE_SHIFT, PageRange, pgoff_t

#: First page, page after the last, and the order of the folio that the range lies in. The order is
#: None where the design passes none.
Callback = tuple[pgoff_t, pgoff_t, int | None]

_PUNCH_HOLE: Final = int(FallocMode.PUNCH_HOLE)
TEARDOWN: Final = "+teardown"


class File(Protocol):
    """The part of a file that a design uses; the caller holds the file's notifier semaphore."""

    @property
    def backing(self) -> Backing:
        """Return the file's memory."""
        ...

    @property
    def size(self) -> int:
        """Return the file's size in bytes; pages may lie beyond it."""
        ...

    def sequence(self) -> InvalidationSequence:
        """Return the page that fault paths check."""
        ...

    def notifiers(self, start: pgoff_t, end: pgoff_t) -> Sequence[Notifier]:
        """Return the notifiers that hear of a range of pages, newest first."""
        ...


class Design:
    """Base class of all designs: one pair of callbacks with the exact range.

    Each operation that notifies gets one pair. Each file has an instance of its own, which the
    file's locks protect. With ``teardown``, a consumer that unregisters or unbinds first hears an
    invalidation of its whole range.
    """

    name: ClassVar[str]
    #: Whether consumers bind ranges of their own instead of hearing of the whole file.
    binds: ClassVar[bool] = False
    #: Whether consumers hear of pages that the machine has lost; true since v10.
    tells_errors: ClassVar[bool] = True

    __slots__ = ("teardown",)

    def __init__(self, *, teardown: bool) -> None:
        self.teardown = teardown

    def __str__(self) -> str:
        return self.name + (TEARDOWN if self.teardown else "")

    def notifies(self, mode: int) -> bool:
        """Say whether fallocate with this mode tells consumers (``invalidation``)."""
        return bool(mode & _PUNCH_HOLE)

    @contextmanager
    def invalidation(self, file: File, span: PageRange) -> Generator[None]:
        """Tell consumers the start before the block and the end after it.

        The block changes the range ``span``. Each consumer that heard a start hears the end,
        whatever the block raises. Preconditions: the file's semaphore is held for reading.
        """
        sequence = file.sequence()
        kept_out = self.kept_out(file, span)
        told: list[tuple[Callback, Notifier]] = []
        sequence.begin(kept_out.start, kept_out.end)
        try:
            for callback in self.callbacks(file, span):
                for notifier in file.notifiers(*callback[:2]):
                    told.append((callback, notifier))
                    notifier.invalidate_start(*callback)
            yield
        finally:
            sequence.end()
            for callback, notifier in told:
                notifier.invalidate_end(*callback)

    def kept_out(self, file: File, span: PageRange) -> PageRange:
        """Return the range in which faults install no translation during a punch of ``span``.

        The range includes all ranges that ``callbacks`` yields.
        """
        return span

    def callbacks(self, file: File, span: PageRange) -> Iterable[Callback]:
        """Yield the callbacks that consumers hear before an operation on ``span``, in order.

        Consumers hear each callback before the next one is computed.

        Raises:
            OSError: looking at the backing failed. The operation is then not done.
        """
        return ((span.start, span.end, None),)

    def allocate(self, file: File, offset: int, length: int, abandoned: Callable[[], bool]) -> None:
        """Allocate a range (in bytes) for the owner, unless the request is ``abandoned``.

        Preconditions: the file's mutex is held.

        Raises:
            OSError: what the backing failed with.
        """
        file.backing.allocate(offset, length, abandoned)

    def punch(self, file: File, offset: int, length: int) -> None:
        """Free a range (in bytes) for the owner's punch.

        Preconditions: the file's mutex is held. An ``invalidation`` runs around this call, or there
        is no consumer to tell.

        Raises:
            OSError: what the backing failed with.
        """
        file.backing.punch(offset, length)

    def forget(self) -> None:
        """Forget what was punched, because no page of the file is left.

        Preconditions: no consumer is registered; both locks of the file are held.
        """

    def leave(self, file: File, notifier: Notifier, span: PageRange) -> None:
        """Handle a consumer that leaves ``span``, which it had bound.

        Preconditions: the semaphore is held for writing.
        """
        if self.teardown:
            self.invalidate_all(file, notifier, span)

    def invalidate_all(self, file: File, notifier: Notifier, span: PageRange) -> None:
        """Tell one consumer that all of its range ``span`` goes."""
        sequence = file.sequence()
        told: list[Callback] = []
        sequence.begin(span.start, span.end)
        try:
            for callback in _to_the_end(self.everything(file, span), span):
                told.append(callback)
                notifier.invalidate_start(*callback)
        finally:
            sequence.end()
            for callback in told:
                notifier.invalidate_end(*callback)

    def everything(self, file: File, span: PageRange) -> Iterable[Callback]:
        """Yield, in order and without a gap, callbacks for a consumer that loses ``span``.

        Raises:
            OSError: looking at the backing failed. The consumer then hears of the rest without an
                order.
        """
        return ((span.start, span.end, None),)


def _to_the_end(callbacks: Iterable[Callback], span: PageRange) -> Iterator[Callback]:
    """Yield callbacks for all of ``span``; if looking fails, the last one has no order.

    A consumer can leave even when the kernel does not tell the orders of its folios.
    """
    told = span.start
    try:
        for callback in callbacks:
            yield callback
            told = callback[1]
    except OSError:
        if told < span.end:
            yield told, span.end, None


@final
class V9(Design):
    """Every fallocate that reaches the shim notifies, plain allocation too (25 October 2022)."""

    name = "v9"
    tells_errors = False
    __slots__ = ()

    def notifies(self, mode: int) -> bool:
        """Say yes."""
        return True


@final
class V10(Design):
    """Only punches notify (2 December 2022). This is the default."""

    name = "v10"
    __slots__ = ()


@final
class Bindings(Design):
    """Consumers bind ranges (Sean Christopherson, January 2023).

    A consumer hears of a punch that touches its range. It hears the punch's own range.
    """

    name = "bindings"
    binds = True
    __slots__ = ()


@final
class Folio(Design):
    """One callback for each folio, with its order (Michael Roth, 1 November 2022).

    This is the design as its author meant it. The first and the last callback are cut where the
    punch begins and ends. All callbacks together are exactly the punch. So consumers hear of a run
    of missing pages, too, with no order.
    """

    name = "folio"
    __slots__ = ()

    def callbacks(self, file: File, span: PageRange) -> Iterator[Callback]:
        """Yield one callback for each folio."""
        for start, end, order in file.backing.folios(span):
            yield max(start, span.start), min(end, span.end), order

    def everything(self, file: File, span: PageRange) -> Iterator[Callback]:
        """Yield one callback for each folio.

        At teardown, a consumer can thus give back a folio that an earlier punch covered only in
        part.
        """
        return self.callbacks(file, span)


@final
class FolioPoc(Design):
    """The proof of concept that the mail of 1 November 2022 links, as its code computes.

    It differs from the mail. Each chunk has the length of the distance from the *first* page to the
    end of the folio after. So a chunk may reach into the next folio. Missing pages are skipped. All
    callbacks, starts and ends, come before the operation begins. While the operation runs, no
    invalidation is in progress.
    """

    name = "folio-poc"
    tells_errors = False
    __slots__ = ()

    @contextmanager
    def invalidation(self, file: File, span: PageRange) -> Generator[None]:
        """Tell consumers the start and the end of each chunk, before the block."""
        self._tell(file, span, self.callbacks(file, span))
        yield

    def _tell(self, file: File, span: PageRange, callbacks: Iterable[Callback]) -> None:
        sequence = file.sequence()
        sequence.begin(span.start, span.end)
        try:
            for callback in callbacks:
                told: list[Notifier] = []
                try:
                    for notifier in file.notifiers(*callback[:2]):
                        told.append(notifier)
                        notifier.invalidate_start(*callback)
                finally:
                    for notifier in told:
                        notifier.invalidate_end(*callback)
        finally:
            sequence.end()

    def callbacks(self, file: File, span: PageRange) -> Iterator[Callback]:
        """Yield one callback for each chunk, with the order of the chunk's first page."""
        offset = span.start
        for _, end, order in file.backing.folios(span):
            if order is None:
                offset = max(offset, end)
            elif offset < min(end, span.end):
                # The original computes (1 << order) - (start - ALIGN(start, 1 << order)). It uses
                # ``start``, not ``offset``, and ALIGN rounds up.
                chunk = (1 << order) + -span.start % (1 << order)
                after = pgoff_t(min(offset + chunk, span.end))
                yield offset, after, order
                offset = after

    def invalidate_all(self, file: File, notifier: Notifier, span: PageRange) -> None:
        """Tell every consumer of the pages below the file's size, as the code's TODO admits.

        If the file was never sized, it tells of no page.
        """
        below = PageRange(pgoff_t(0), pgoff_t(file.size >> PAGE_SHIFT))
        self._tell(file, below, _to_the_end(self.callbacks(file, below), below))
