"""The base of the explorer tests' small programs, and the ways to search all of one."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

#: Every kind of search that must find whatever there is.
WHOLE: tuple[dict[str, Any], ...] = ({}, {"reduce": True})


class Base:
    """A program of bodies, with nothing plain that is shared."""

    bodies: Sequence[Callable[[], None]] = ()

    def actors(self) -> Sequence[tuple[str, Callable[[], None]]]:
        return [(name, body) for name, body in zip("abcd", self.bodies, strict=False)]

    def state(self) -> Hashable:
        return ()

    def check(self) -> None:
        pass

    def finish(self) -> None:
        pass
