"""A case, and the answers that it expects of each column."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from restrictedmem.conformance.facts import Fact


class Family(Enum):
    """The kind of object that a case needs."""

    FILE = "file"
    """A descriptor (``files.File``)."""
    VM = "vm"
    """A VM without slots, on which guests run."""


@dataclass(frozen=True, slots=True)
class Since:
    """An answer that kernels changed: the answer of today, and an earlier one."""

    now: object
    before: object
    fact: Fact


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """Instead of an answer: the case makes no sense for the column."""

    why: str


UNSAID: Final = NotApplicable("nobody states the answer")


class UnsupportedError(Exception):
    """This machine lacks something that the column or the case needs."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to do, and what each kind of memory answers.

    ``expected`` has an answer for each name of ``Column.answers`` that differs from the
    next name's.
    """

    id: str
    family: Family
    does: Callable[[Any], object]
    expected: Mapping[str, object]
    #: Where the answers are from: a selftest with its assertion, a commit, or a manual page.
    source: str
    #: Assertions of the kernel's selftests that this case makes, by their id in ``selftests``.
    covers: tuple[str, ...] = ()
    #: What the column must have (``Subject.lacks``); without it the case is unsupported.
    needs: tuple[str, ...] = ()
    #: The row of docs/reference/divergences.md that explains where ``descriptor`` differs.
    divergence: str = field(default="", kw_only=True)

    def expects(self, answers: tuple[str, ...]) -> object:
        """Return the answer for a column, which is called by these names, the nearest first."""
        return next((self.expected[name] for name in answers if name in self.expected), UNSAID)
