"""Who is told that a range goes away (``struct restrictedmem_notifier_ops``)."""

from enum import Enum
from typing import Protocol

from restrictedmem.units import pgoff_t


class Api(Enum):
    """Which posting of the series a file follows."""

    V9 = "v9"
    """25 October 2022: every fallocate that reaches the shim notifies; a VM's pages are private until said otherwise."""

    V10 = "v10"
    """2 December 2022: only hole punching notifies; a VM's pages are shared until said otherwise."""


class Notifier(Protocol):
    """What a consumer hears about a file.

    Ranges are half-open and in pages of the file. ``order`` is that of the folio the whole range
    lies in, by designs that tell it (``mm.design``), else None. Callbacks run with the file's
    notifier semaphore held: they may sleep and may run at the same time as callbacks for another
    range, but must not register, unregister or punch on the same file. They cannot refuse; whatever
    they raise would leave a pair unbalanced, so they must not raise.
    """

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Stop using the pages of a range, and map none of them until the matching end."""
        ...

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Go on: the range is what it will be, whether the operation worked or failed."""
        ...

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Give up the pages of a range: the machine has lost them, and they stay lost until they are punched (v10 only)."""
        ...

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        """Return how many pages of a range this consumer holds a reference to (``folio_ref_count``, as far as it is the consumer's)."""
        ...
