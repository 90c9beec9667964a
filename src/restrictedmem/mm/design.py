"""The designs of the thread: what consumers of a file hear of a punch, in which ranges and order, and what is freed when.

One small class each behind one seam, ``Design``; ``RestrictedFile`` calls it with the notifier semaphore held. A file, a VM or a study
picks one by name (``make``). Whoever wants to know what a design does to guests asks ``restrictedmem check`` or docs/findings.md.
"""

from collections.abc import Callable, Sequence
from errno import EINVAL
from typing import ClassVar, Final, Protocol, final

from restrictedmem.abi.memory import FallocMode
from restrictedmem.mm.backing import Backing
from restrictedmem.mm.notifier import Notifier
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import PAGE_SHIFT, PageRange, pgoff_t

#: First page, page after the last, and the order of the folio that the range lies in; None where the design passes none.
Callback = tuple[pgoff_t, pgoff_t, int | None]

_PUNCH_HOLE: Final = int(FallocMode.PUNCH_HOLE)
TEARDOWN: Final = "+teardown"


class File(Protocol):
    """The file a design works on, as far as it needs it. All of it under the file's notifier semaphore."""

    @property
    def backing(self) -> Backing:
        """Where the pages lie."""
        ...

    def sequence(self) -> InvalidationSequence:
        """Return the page that fault paths check."""
        ...

    def notifiers(self, span: PageRange) -> Sequence[Notifier]:
        """Return those who are to hear of a range, newest first."""
        ...


class Design:
    """Base of all designs: exact ranges, one pair of callbacks around each operation that notifies.

    One instance for each file, under the file's locks. With ``teardown`` a consumer is told that everything goes when it unregisters.
    """

    name: ClassVar[str]
    #: Whether consumers bind ranges of their own instead of hearing of the whole file.
    binds: ClassVar[bool] = False

    __slots__ = ("teardown",)

    def __init__(self, *, teardown: bool = False) -> None:
        self.teardown = teardown

    def __str__(self) -> str:
        return self.name + (TEARDOWN if self.teardown else "")

    def notifies(self, mode: int) -> bool:
        """Say whether fallocate with this mode tells consumers; whatever it tells of goes through ``invalidate``."""
        return bool(mode & _PUNCH_HOLE)

    def invalidate(self, file: File, span: PageRange, operate: Callable[[], None]) -> None:
        """Do ``operate`` on a range, with consumers told before and after, whatever it raises. The semaphore is held for reading."""
        sequence = file.sequence()
        kept_out = self.kept_out(span)
        sequence.begin(kept_out.start, kept_out.end)
        told: list[tuple[Notifier, Callback]] = []
        try:
            for callback in self.callbacks(file, span):
                for notifier in file.notifiers(PageRange(callback[0], callback[1])):
                    told.append((notifier, callback))
                    notifier.invalidate_start(*callback)
            operate()
        finally:
            sequence.end()
            for notifier, callback in told:
                notifier.invalidate_end(*callback)

    def kept_out(self, span: PageRange) -> PageRange:
        """Return the range in which no fault maps anything while a punch of ``span`` is under way."""
        return span

    def callbacks(self, file: File, span: PageRange) -> Sequence[Callback]:
        """Return what consumers hear of an operation on ``span``, in order; called while faults are kept out.

        Raises:
            OSError: what looking at the backing failed with; the operation is not done then.
        """
        return ((span.start, span.end, None),)

    def punch(self, file: File, span: PageRange) -> None:
        """Free what a punch of ``span`` frees; called by ``operate`` with the file's mutex held.

        Raises:
            OSError: what the backing failed with.
        """
        file.backing.punch(span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)

    def invalidate_all(self, file: File, notifier: Notifier, span: PageRange) -> None:
        """Tell one consumer that everything it bound goes, before it is unregistered; the semaphore is held for writing."""
        sequence = file.sequence()
        sequence.begin(span.start, span.end)
        told: list[Callback] = []
        try:
            for callback in self.callbacks(file, span):
                told.append(callback)
                notifier.invalidate_start(*callback)
        finally:
            sequence.end()
            for callback in told:
                notifier.invalidate_end(*callback)


@final
class V9(Design):
    """25 October 2022: every fallocate that reaches the shim notifies, plain allocation too."""

    name = "v9"
    __slots__ = ()

    def notifies(self, mode: int) -> bool:
        """Say yes."""
        return True


@final
class V10(Design):
    """2 December 2022, and the default: only punches notify."""

    name = "v10"
    __slots__ = ()


_DESIGNS: Final[dict[str, type[Design]]] = {design.name: design for design in (V9, V10)}
#: The designs by name; each may have ``TEARDOWN`` appended.
NAMES: Final = tuple(_DESIGNS)


def make(name: str) -> Design:
    """Make a file's design from its name, such as ``v10`` or ``folio+teardown``.

    Raises:
        OSError: EINVAL for a name that is not one of ``NAMES``.
    """
    plain = name.removesuffix(TEARDOWN)
    if plain not in _DESIGNS:
        raise OSError(EINVAL, f"no design {name!r}: one of {', '.join(NAMES)}, with or without {TEARDOWN}")
    return _DESIGNS[plain](teardown=plain != name)
