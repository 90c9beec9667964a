"""The cases, by subject."""

from collections.abc import Mapping
from itertools import chain
from typing import Final

from restrictedmem.conformance.case import Case
from restrictedmem.conformance.cases import content

SUBJECTS: Final[Mapping[str, tuple[Case, ...]]] = {
    "content": content.CASES,
}
CASES: Final = tuple(chain.from_iterable(SUBJECTS.values()))
