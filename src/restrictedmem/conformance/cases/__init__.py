"""The cases, by subject."""

from collections.abc import Mapping
from itertools import chain
from typing import Final

from restrictedmem.conformance.case import Case
from restrictedmem.conformance.cases import (
    attributes,
    content,
    creation,
    handle,
    mapping,
    place,
    size,
    space,
)

SUBJECTS: Final[Mapping[str, tuple[Case, ...]]] = {
    "creation": creation.CASES,
    "content": content.CASES,
    "size": size.CASES,
    "space": space.CASES,
    "attributes": attributes.CASES,
    "handle": handle.CASES,
    "mapping": mapping.CASES,
    "place": place.CASES,
}
CASES: Final = tuple(chain.from_iterable(SUBJECTS.values()))
