"""The result of a case on a column."""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Self


class Verdict(Enum):
    """What a result says."""

    PASS = "pass"  # noqa: S105  not a password
    FAIL = "fail"
    KNOWN = "known"
    """An answer of earlier kernels (``facts``)."""
    NOT_APPLICABLE = "not applicable"
    UNSUPPORTED = "unsupported"
    """Something that the case needs is missing on this machine."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a case expected of a column, and what it saw."""

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

    @classmethod
    def load(cls, found: dict[str, Any]) -> Self:
        """Return the result that ``dump`` made this dictionary of.

        Raises:
            KeyError, TypeError, ValueError: for any other dictionary.
        """
        return cls(
            **{**found, "verdict": Verdict(found["verdict"]), "steps": tuple(found["steps"])}
        )
