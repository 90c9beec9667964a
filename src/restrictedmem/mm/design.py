"""The designs of the thread: what consumers of a file hear of a punch, in which ranges and order, and what is freed when.

One small class each behind one seam, ``Design``; ``RestrictedFile`` calls it with the notifier
semaphore held. A file, a VM or a study picks one by name (``make``). docs/understand/designs.md has
whose each is and what is known to be wrong with it.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from errno import EINVAL
from typing import ClassVar, Final, Protocol, final

from restrictedmem import sync
from restrictedmem.abi.memory import FallocMode
from restrictedmem.mm.backing import Backing
from restrictedmem.mm.notifier import Notifier
from restrictedmem.mm.punched import BLOCK_ORDER, Punched, blocks, outside, round_out
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import PAGE_SHIFT, PageRange, pgoff_t

#: First page, page after the last, and the order of the folio that the range lies in; None where
#: the design passes none.
Callback = tuple[pgoff_t, pgoff_t, int | None]

_PUNCH_HOLE: Final = int(FallocMode.PUNCH_HOLE)
TEARDOWN: Final = "+teardown"


class File(Protocol):
    """The file a design works on, as far as it needs it. All of it under the file's notifier semaphore."""

    @property
    def backing(self) -> Backing:
        """Where the pages lie."""
        ...

    @property
    def size(self) -> int:
        """Its size in bytes, which says nothing about where its pages lie."""
        ...

    def sequence(self) -> InvalidationSequence:
        """Return the page that fault paths check."""
        ...

    def notifiers(self, start: pgoff_t, end: pgoff_t) -> Sequence[Notifier]:
        """Return those who are to hear of a range of pages, newest first."""
        ...


class Design:
    """Base of all designs: exact ranges, one pair of callbacks around each operation that notifies.

    One instance for each file, under the file's locks. With ``teardown`` a consumer is told that
    what it bound goes when it lets go of it.
    """

    name: ClassVar[str]
    #: Whether consumers bind ranges of their own instead of hearing of the whole file.
    binds: ClassVar[bool] = False
    #: Whether consumers hear of pages that the machine has lost: since v10.
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
        """Invalidate a range around the block that changes it: consumers hear the start before, and the end after it.

        Each consumer that heard a start hears the end, whatever the block raises. The file's
        semaphore is held for reading.
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
        """Return the range in which no fault maps anything while a punch of ``span`` is under way: at least what ``callbacks`` tells of."""
        return span

    def callbacks(self, file: File, span: PageRange) -> Iterable[Callback]:
        """Yield what consumers hear before an operation on ``span``, in order; they hear each before the next is asked for.

        Raises:
            OSError: what looking at the backing failed with; the operation is not done then.
        """
        return ((span.start, span.end, None),)

    def allocate(self, file: File, offset: int, length: int, abandoned: Callable[[], bool]) -> None:
        """Make present what an owner allocates, in bytes, unless it is ``abandoned``; called with the file's mutex held.

        Raises:
            OSError: what the backing failed with.
        """
        file.backing.allocate(offset, length, abandoned)

    def punch(self, file: File, offset: int, length: int) -> None:
        """Free what an owner's punch frees, in bytes; called with the file's mutex held, in an ``invalidation`` or with nobody to tell.

        Raises:
            OSError: what the backing failed with.
        """
        file.backing.punch(offset, length)

    def forget(self) -> None:
        """Forget what was punched: nothing of the file is left, and nobody is registered. Both locks of the file are held."""

    def leave(self, file: File, notifier: Notifier, span: PageRange) -> None:
        """Let a consumer go from ``span``, which it had bound; the semaphore is held for writing."""
        if self.teardown:
            self.invalidate_all(file, notifier, span)

    def invalidate_all(self, file: File, notifier: Notifier, span: PageRange) -> None:
        """Tell one consumer that everything it bound goes."""
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
        """Yield what a consumer hears that loses all of ``span``, in order and without a gap.

        Raises:
            OSError: what looking at the backing failed with; the consumer hears of the rest without
                an order then.
        """
        return ((span.start, span.end, None),)


def _to_the_end(callbacks: Iterable[Callback], span: PageRange) -> Iterator[Callback]:
    """Yield callbacks of all of ``span``: where looking at the backing fails, one without an order for what is left.

    A consumer that goes cannot stay because the kernel does not tell what its pages are made of.
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
    """Only punches notify (2 December 2022). The default."""

    name = "v10"
    __slots__ = ()


@final
class Bindings(Design):
    """Consumers bind ranges, and hear of a punch, in its own range, when it touches theirs (Sean Christopherson, January 2023)."""

    name = "bindings"
    binds = True
    __slots__ = ()


@final
class Folio(Design):
    """One callback for each folio with its order, cut where the punch begins and ends (Michael Roth, 1 November 2022, as he meant it).

    Together they are the punch, so a run of pages that are missing is told of too, with no order.
    """

    name = "folio"
    __slots__ = ()

    def callbacks(self, file: File, span: PageRange) -> Iterator[Callback]:
        """Yield folio by folio."""
        for start, end, order in file.backing.folios(span):
            yield max(start, span.start), min(end, span.end), order

    def everything(self, file: File, span: PageRange) -> Iterator[Callback]:
        """Yield folio by folio: at teardown a consumer gives back what it could not while a folio lay half in a punch."""
        return self.callbacks(file, span)


@final
class FolioPoc(Design):
    """The proof of concept that the mail of 1 November 2022 links, as it computes: not what the mail says.

    Chunks have the length of the distance from the *first* page to the end of the folio after, so
    that one may reach into the next folio; missing pages are passed over; all is over before the
    operation begins, and nothing is in progress while it runs.
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
        """Yield chunk by chunk, each with the order of the folio that its first page lies in."""
        offset = span.start
        for _, end, order in file.backing.folios(span):
            if order is None:
                offset = max(offset, end)
            elif offset < min(end, span.end):
                # (1 << order) - (start - ALIGN(start, 1 << order)): ``start``, not ``offset``, and
                # ALIGN rounds up.
                chunk = (1 << order) + -span.start % (1 << order)
                after = pgoff_t(min(offset + chunk, span.end))
                yield offset, after, order
                offset = after

    def invalidate_all(self, file: File, notifier: Notifier, span: PageRange) -> None:
        """Tell every consumer, as its TODO admits, of the pages below the file's size: of none, if nobody ever set that."""
        below = PageRange(pgoff_t(0), pgoff_t(file.size >> PAGE_SHIFT))
        self._tell(file, below, _to_the_end(self.callbacks(file, below), below))


#: Blocks that a punch is walked through one by one.
_MANY: Final = 1 << 12


class _Remembering(Design):
    """A design that remembers what was punched. Punches of one file take turns, or two halves would each wait for the other."""

    __slots__ = ("_punched", "_turn")

    def __init__(self, *, teardown: bool) -> None:
        super().__init__(teardown=teardown)
        #: Written under the file's mutex, or with its semaphore held for writing.
        self._punched = Punched()
        self._turn = sync.mutex()

    @contextmanager
    def invalidation(self, file: File, span: PageRange) -> Generator[None]:
        """Do what other designs do, one punch at a time.

        A consumer must not punch the file it hears of, so no turn waits for itself.
        """
        with self._turn, super().invalidation(file, span):
            yield

    def allocate(self, file: File, offset: int, length: int, abandoned: Callable[[], bool]) -> None:
        """Allocate, and forget that the pages were punched. What consumers allocate is not known here."""
        super().allocate(file, offset, length, abandoned)
        self._punched.discard(PageRange.around_bytes(offset, length))

    def forget(self) -> None:
        """Begin again with no page punched."""
        self._punched = Punched()

    def _blocks(
        self, span: PageRange, order: int, there: Backing | None = None
    ) -> Iterable[PageRange]:
        """Return the blocks that a punch touches; of very many those at its ends, those in which something was, and what is ``there``."""
        around, size = round_out(span, order), 1 << order
        if len(around) <= _MANY << order:
            return blocks(span, order)
        starts = {around.start, pgoff_t(around.end - size)}
        starts.update(pgoff_t(block.start & -size) for block in self._punched.touched(span))
        if there is not None:
            starts.update(
                pgoff_t(start & -size)
                for start, _, found in there.folios(span)
                if found is not None
            )
        return [PageRange(start, pgoff_t(start + size)) for start in sorted(starts)]


@final
class Batched(_Remembering):
    """Parts of 2 MiB are freed unheard; with the last of them one callback for all (Michael Roth, 1 November 2022).

    Sound only where pages are converted, and so unmapped, before they are punched: a consumer that
    still maps a page is not told of it.
    """

    name = "batched"
    __slots__ = ()

    def kept_out(self, file: File, span: PageRange) -> PageRange:
        """Return the blocks of 2 MiB that the punch touches."""
        return round_out(span)

    def callbacks(self, file: File, span: PageRange) -> Iterator[Callback]:
        """Yield the blocks that the punch completes, each of the order it has if it was one folio."""
        for block in self._blocks(span, BLOCK_ORDER, file.backing):
            if self._punched.has(outside(block, span)):
                yield block.start, block.end, BLOCK_ORDER

    def punch(self, file: File, offset: int, length: int) -> None:
        """Free at once, and remember which part of its block is gone."""
        span = PageRange.of_bytes(offset, length)
        touched = self._blocks(span, BLOCK_ORDER)
        super().punch(file, offset, length)
        for block in touched:
            if self._punched.has(outside(block, span)):
                self._punched.discard(block)
            else:
                self._punched.add(block.clip(span))


@final
class Lazy(_Remembering):
    """For huge pages that cannot be split: nothing is freed until all of one was punched (Michael Roth, 31 October 2022).

    The punch itself is told of exactly. Of a huge page that it covers in part, the backing clears
    that part (hugetlbfs does), and the page goes with its last part, told of whole and with its
    order; not while a consumer has a page of it that was punched before and then touched again. On
    a backing of small pages it is v10.
    """

    name = "lazy"
    __slots__ = ("_told",)

    def __init__(self, *, teardown: bool) -> None:
        super().__init__(teardown=teardown)
        #: The huge pages that consumers were told of in this turn.
        self._told: set[pgoff_t] = set()

    def kept_out(self, file: File, span: PageRange) -> PageRange:
        """Return all of the huge pages that the punch touches."""
        return round_out(span, file.backing.base_order)

    def callbacks(self, file: File, span: PageRange) -> Iterator[Callback]:
        """Yield the punch, and then each huge page that goes with it."""
        self._told.clear()
        yield span.start, span.end, None
        if not file.backing.base_order:
            return
        touched = self._blocks(span, file.backing.base_order, file.backing)
        going = {folio.start for folio in touched if self._goes(file, outside(folio, span))}
        for start, end, order in file.backing.folios(span) if going else ():
            if order is not None and start in going:
                self._told.add(start)
                yield start, end, order

    def everything(self, file: File, span: PageRange) -> Iterable[Callback]:
        """Yield folio by folio: whatever was punched in part goes now."""
        for start, end, order in file.backing.folios(span):
            yield max(start, span.start), min(end, span.end), order

    def _goes(self, file: File, rest: Sequence[PageRange]) -> bool:
        """Say whether the rest of a huge page was punched before and is nobody's. What the punch covers, consumers let go of just now."""
        return self._punched.has(rest) and not any(
            notifier.page_count(part.start, part.end)
            for part in rest
            for notifier in file.notifiers(part.start, part.end)
        )

    def punch(self, file: File, offset: int, length: int) -> None:
        """Free the huge pages that the punch covers, and those of which it was the last part."""
        span, order = PageRange.of_bytes(offset, length), file.backing.base_order
        touched = self._blocks(span, order) if order else ()
        super().punch(file, offset, length)
        for folio in touched:
            rest = outside(folio, span)
            told = folio.start in self._told or not file.notifiers(folio.start, folio.end)
            if rest and not (told and self._punched.has(rest)):
                self._punched.add(folio.clip(span))
                continue
            if rest:
                super().punch(file, folio.start << PAGE_SHIFT, len(folio) << PAGE_SHIFT)
            self._punched.discard(folio)

    def leave(self, file: File, notifier: Notifier, span: PageRange) -> None:
        """Forget the punches of blocks that the consumer has pages of: it has touched them again, and nobody will say so after it."""
        if notifier.page_count(span.start, span.end):
            for block in self._punched.touched(span):
                if notifier.page_count(block.start, block.end):
                    self._punched.discard(block)
        super().leave(file, notifier, span)


_DESIGNS: Final[dict[str, type[Design]]] = {
    design.name: design for design in (V9, V10, Bindings, Folio, FolioPoc, Batched, Lazy)
}
#: The designs by name; each may have ``TEARDOWN`` appended.
NAMES: Final = tuple(_DESIGNS)


def make(name: str) -> Design:
    """Make a file's design from its name, such as ``v10`` or ``folio+teardown``.

    Raises:
        OSError: EINVAL for a name that is not one of ``NAMES``.
    """
    plain = name.removesuffix(TEARDOWN)
    if plain not in _DESIGNS:
        raise OSError(
            EINVAL, f"no design {name!r}: one of {', '.join(NAMES)}, with or without {TEARDOWN}"
        )
    return _DESIGNS[plain](teardown=plain != name)
