"""Page frames, and the answers of the reverse map table, for tests of the platform."""

from typing import Final

from restrictedmem.units import PageRange, pgoff_t

PMD: Final = 512
PUD: Final = PMD * PMD
#: A page at the start of a GiB, and a guest's address as aligned.
PFN: Final = 3 * PUD
GPA: Final = 1 << 30
FILE: Final = 7


def pages(start: int, end: int) -> PageRange:
    return PageRange(pgoff_t(start), pgoff_t(end))
