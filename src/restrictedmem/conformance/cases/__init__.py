"""The cases, by subject."""

from typing import Final

from restrictedmem.conformance.case import Case
from restrictedmem.conformance.cases import content

CASES: Final[tuple[Case, ...]] = (*content.CASES,)
