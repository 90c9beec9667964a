"""The result of a case on a column."""

import math
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

_T = TypeVar("_T")


class Verdict(Enum):
    """The judgement on an answer."""

    PASS = "pass"  # noqa: S105  not a password
    FAIL = "fail"
    KNOWN = "known"
    """An answer of earlier kernels (``facts``)."""
    NOT_APPLICABLE = "not applicable"
    UNSUPPORTED = "unsupported"
    """Something that the case needs is missing on this machine."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer of a column to a case, and the answer that the case expected."""

    case: str
    column: str
    verdict: Verdict
    expected: str = ""
    seen: str = ""
    #: Why there is no answer, or the id of the fact that explains it.
    why: str = ""
    #: The calls that were made, as a person would write them.
    steps: tuple[str, ...] = ()
    seconds: float = 0.0

    def dump(self) -> dict[str, Any]:
        """Return the result as a dictionary for JSON."""
        return {**asdict(self), "verdict": self.verdict.value}


def load(kind: type[_T], found: object, place: str = "") -> _T:
    """Return the object of a class that JSON describes; each field has to be there.

    A field is text, a number, an Enum, a dataclass, or a tuple of one of these. ``place`` says in
    errors where in the JSON something is.

    Raises:
        ValueError: for anything else.
    """
    return cast(_T, _load(kind, found, place))


def _load(kind: Any, found: Any, place: str) -> object:
    if get_origin(kind) is tuple:
        if type(found) is list:
            (inner, _), items = get_args(kind), cast("list[object]", found)
            return tuple(_load(inner, each, f"{place}[{at}]") for at, each in enumerate(items))
    elif is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        if type(found) is dict and sorted(cast("dict[str, object]", found)) == sorted(names):
            kinds, start = get_type_hints(kind), f"{place}." if place else ""
            values = {name: _load(kinds[name], found[name], f"{start}{name}") for name in names}
            return cast("type", kind)(**values)
    elif kind is float:
        if type(found) in (int, float) and _is_finite(found):
            return float(found)
    elif issubclass(kind, Enum):
        if found in [each.value for each in kind]:
            return kind(found)
    elif type(found) is kind:
        return found
    raise ValueError(f"{place or 'the whole'} has another form")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False
