"""The seam between an engine and the state of the host that has to follow its private memory."""

from errno import EINVAL
from typing import Final, Protocol, final

from restrictedmem.platform.snp import Snp
from restrictedmem.units import PageRange, gfn_t


class Platform(Protocol):
    """A host's state, told by an engine. Files are named by inode number, pages by their number in the file.

    For any thread: ``prepare`` is called under the engine's MMU lock, the others by its notify
    thread while no fault is let in on the range; faults on other ranges go on.
    """

    def prepare(self, ino: int, span: PageRange, gfn: gfn_t, order: int) -> None:
        """Take note that pages are about to be mapped at ``gfn``, out of a folio of ``order`` (``kvm_arch_gmem_prepare``).

        Again for pages that are mapped already; then nothing changes.

        Raises:
            OSError: EFAULT when a rule of the platform forbids it; the message tells the story of
                the page.
        """
        ...

    def invalidate(self, ino: int, span: PageRange, order: int | None) -> None:
        """Make pages the host's again: translations are gone, the pages not yet (``invalidate_start``)."""
        ...

    def freed(self, ino: int, span: PageRange) -> None:
        """Take note that the host has pages back and writes to them, whether it was told of it or not."""
        ...

    def report(self) -> dict[str, object]:
        """Return counts since the start, and the violated rules with the story of each page."""
        ...


@final
class NoPlatform:
    """A host that has nothing to keep in step (``Platform``)."""

    def prepare(self, ino: int, span: PageRange, gfn: gfn_t, order: int) -> None:
        """Do nothing."""

    def invalidate(self, ino: int, span: PageRange, order: int | None) -> None:
        """Do nothing."""

    def freed(self, ino: int, span: PageRange) -> None:
        """Do nothing."""

    def report(self) -> dict[str, object]:
        """Return nothing."""
        return {}


#: The platforms that can be asked for.
NAMES: Final = ("snp", "snp-unmapped")


def make(name: str) -> Platform:
    """Make a platform by its name; none for an empty one.

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
