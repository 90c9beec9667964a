"""The cases, by subject."""

from collections.abc import Mapping
from itertools import chain
from typing import Final

from restrictedmem.conformance.case import Case
from restrictedmem.conformance.cases import (
    attributes,
    binding,
    content,
    conversions,
    creation,
    exits,
    guest_memory,
    handle,
    in_place,
    mapping,
    memory_attributes,
    place,
    pre_fault,
    size,
    slots,
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
    "binding": binding.CASES,
    "slots": slots.CASES,
    "memory attributes": memory_attributes.CASES,
    "guest memory": guest_memory.CASES,
    "exits": exits.CASES,
    "conversions": conversions.CASES,
    "pre fault": pre_fault.CASES,
    "conversion in place": in_place.CASES,
}
CASES: Final = tuple(chain.from_iterable(SUBJECTS.values()))
