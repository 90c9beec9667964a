"""Who is told that a range goes away, and which calls tell."""

from enum import Enum
from typing import Protocol

from restrictedmem.abi.memory import FallocMode
from restrictedmem.units import pgoff_t


class Api(Enum):
    """Which posting of the series a file follows."""

    V9 = "v9"
    """25 October 2022: every fallocate that reaches the shim notifies; a VM's pages are private until said otherwise."""

    V10 = "v10"
    """2 December 2022: only hole punching notifies; a VM's pages are shared until said otherwise."""

    def notifies(self, mode: int) -> bool:
        """Say whether fallocate with this mode issues invalidate_start and invalidate_end."""
        return self is Api.V9 or bool(mode & FallocMode.PUNCH_HOLE)


class Notifier(Protocol):
    """``struct restrictedmem_notifier_ops``: what a consumer hears about a file.

    Ranges are half-open and in pages of the file. Callbacks run with the file's notifier semaphore held for reading: they may sleep and
    may run at the same time as callbacks for another range, but must not register, unregister or punch on the same file. They cannot
    refuse; whatever they raise would leave a pair unbalanced, so they must not raise.
    """

    def invalidate_start(self, start: pgoff_t, end: pgoff_t) -> None:
        """Stop using the pages of a range, and map none of them until the matching end."""
        ...

    def invalidate_end(self, start: pgoff_t, end: pgoff_t) -> None:
        """Go on: the range is what it will be, whether the operation worked or failed."""
        ...
