"""TAP as it is printed: each part can be read at once."""

import sys
from collections.abc import Iterator

import pytest

from restrictedmem.cli.conformance import _as_tap
from restrictedmem.conformance import tap


class Output:
    """A standard output that remembers what was written, and what of it a reader has."""

    def __init__(self) -> None:
        self.written = self.read = ""

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        self.read = self.written


def lines(number: int, result: str) -> list[str]:
    return [f"{number} {result}", "more"]


def test_an_aborted_suite_is_read_to_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(tap, "lines", lines)

    def results() -> Iterator[str]:
        assert output.read == output.written == f"{tap.head(2)}\n"
        yield "good"
        assert output.read == output.written == f"{tap.head(2)}\n1 good\nmore\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(_as_tap(results(), 2))  # type: ignore[arg-type]
    assert output.read == f"{tap.head(2)}\n1 good\nmore\n{tap.ABORTED}\n"
