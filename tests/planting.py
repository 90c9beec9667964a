"""Errors planted where code calls other code, and objects with only the parts that code needs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

_T = TypeVar("_T")


class PlantedError(Exception):
    """The error of a planted failure."""


class Stub(SimpleNamespace):
    """An object that is equal to itself alone."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def fail(*_: object, **__: object) -> NoReturn:
    raise PlantedError


def stub(**parts: object) -> Any:
    """Return an object with these attributes; it passes for any type."""
    return Stub(**parts)


def noting(into: list[tuple[object, ...]], *words: object) -> Callable[..., None]:
    """Make a function that adds a tuple to a list: these words, and its arguments."""

    def note(*of: object) -> None:
        into.append((*words, *of))

    return note


def always(answer: _T) -> Callable[..., _T]:
    """Make a function that gives the same answer to everything."""
    return lambda *_: answer
