"""The answer of an operation as text: a value, an errno, or the signal that killed a process."""

from collections.abc import Callable
from dataclasses import dataclass
from errno import EOPNOTSUPP, errorcode
from typing import cast


@dataclass(frozen=True, slots=True)
class Errno:
    """The answer of an operation that was refused."""

    number: int

    def __str__(self) -> str:
        # On Linux ENOTSUP is another name for it, which errorcode prefers.
        if self.number == EOPNOTSUPP:
            return "EOPNOTSUPP"
        return errorcode.get(self.number, f"errno {self.number}")


def outcome(operation: Callable[[], object]) -> object:
    """Return what an operation returns, its errno when it is refused."""
    try:
        return operation()
    except OSError as error:
        return Errno(error.errno or 0)


def spell(answer: object) -> str:
    """Return an answer as text; a call without a result answers 0, as in C."""
    match answer:
        case None:
            return "0"
        case bool():
            return "yes" if answer else "no"
        case tuple():
            return ", ".join(map(spell, cast("tuple[object, ...]", answer)))
        case _:
            return str(answer)
