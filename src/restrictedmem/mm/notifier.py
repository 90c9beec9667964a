"""The callbacks of a consumer about pages that go (``struct restrictedmem_notifier_ops``)."""

from enum import Enum
from typing import Protocol

from restrictedmem.units import pgoff_t


class Api(Enum):
    """The posting of the series that a file follows."""

    V9 = "v9"
    """25 October 2022: every fallocate that reaches the shim notifies.

    A VM's pages are private until its owner says otherwise.
    """

    V10 = "v10"
    """2 December 2022: only hole punching notifies.

    A VM's pages are shared until its owner says otherwise.
    """


class Notifier(Protocol):
    """The callbacks that a consumer gets about a file.

    Ranges are half-open, in pages of the file. ``order`` is the order of the folio that contains
    the whole range, in designs that tell it (``mm.design``), else None.

    The file's notifier semaphore is held during a callback. A callback may sleep, and may run at
    the same time as callbacks for another range. It must not register, unregister or punch on the
    same file. A callback cannot refuse. It must not raise, because then a pair would stay
    unbalanced.
    """

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Stop using the pages of a range, and map none of them until the matching end."""
        ...

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Go on: the operation is over, whether it worked or failed."""
        ...

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Give up the pages of a range, because the machine has lost them (v10 only).

        They stay lost until they are punched.
        """
        ...

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        """Return how many pages of a range this consumer holds a reference to.

        This is the consumer's share of ``folio_ref_count``.
        """
        ...
