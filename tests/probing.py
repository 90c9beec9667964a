"""Ways to tell a probe of the doctor what it finds."""

from collections.abc import Callable
from typing import TypeVar

import pytest

from restrictedmem.abi import process
from restrictedmem.probe import in_child

T = TypeVar("T")


def without_capabilities(probe: Callable[[], T]) -> T:
    def attempt() -> T:
        process.set_capabilities(0)
        return probe()

    return in_child(attempt)


def say(monkeypatch: pytest.MonkeyPatch, module: object, **texts: str | None) -> None:
    """Let a module read made-up settings; the key is the last part of the path."""

    def setting(path: str) -> str | None:
        return texts.get(path.rpartition("/")[2])

    monkeypatch.setattr(module, "setting", setting)
