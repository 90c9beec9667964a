"""The interface between an engine and the host's state that follows private memory."""

from errno import EINVAL
from typing import Final, Protocol, final

from restrictedmem.platform.snp import Snp
from restrictedmem.units import PageRange, gfn_t


class Platform(Protocol):
    """The host's state, as an engine reports its mappings to it.

    Files are named by inode number, pages by their number in the file.

    Any thread may call these. An engine calls ``prepare`` under its MMU lock. Its notify thread
    calls the others, while no fault in the range is let in. Faults in other ranges go on.
    """

    def prepare(self, ino: int, span: PageRange, gfn: gfn_t, order: int) -> None:
        """Note that pages of a folio of ``order`` are about to be mapped at ``gfn``.

        This is ``kvm_arch_gmem_prepare``. For pages that are mapped already, nothing changes.

        Raises:
            OSError: EFAULT when a rule of the platform forbids it; the message tells the story of
                the page.
        """
        ...

    def invalidate(self, ino: int, span: PageRange, order: int | None) -> None:
        """Give pages back to the host (``invalidate_start``).

        The translations are gone already. The pages are not freed yet.
        """
        ...

    def freed(self, ino: int, span: PageRange) -> None:
        """Note that the host has pages back and writes to them.

        The engine may or may not have reported before that they go.
        """
        ...

    def report(self) -> dict[str, object]:
        """Return counts since the start, and the violated rules with the story of each page."""
        ...


@final
class NoPlatform:
    """A host that has no state to keep in step (``Platform``)."""

    def prepare(self, ino: int, span: PageRange, gfn: gfn_t, order: int) -> None:
        """Do nothing."""

    def invalidate(self, ino: int, span: PageRange, order: int | None) -> None:
        """Do nothing."""

    def freed(self, ino: int, span: PageRange) -> None:
        """Do nothing."""

    def report(self) -> dict[str, object]:
        """Return an empty report."""
        return {}


#: The platforms that a user can ask for.
NAMES: Final = ("snp", "snp-unmapped")


def make(name: str) -> Platform:
    """Make a platform by its name; an empty name gives ``NoPlatform``.

    Raises:
        OSError: EINVAL for a name that is not one of ``NAMES``.
    """
    match name:
        case "":
            return NoPlatform()
        case "snp" | "snp-unmapped":
            return Snp(unmap=name == "snp-unmapped")
        case _:
            raise OSError(EINVAL, f"no platform {name!r}: one of {', '.join(NAMES)}")
