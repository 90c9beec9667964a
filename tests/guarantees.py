"""The guarantees of SPECIFICATION.md, and the tests that each names.

guarantees.txt has for each a change of the code that one of these tests notices.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from mutation import Mutant


@dataclass(frozen=True)
class Change:
    """A change that breaks a guarantee: in a file, ``old`` becomes ``new``.

    The path is relative to the tree's root, and ``old`` occurs once.
    """

    file: str
    old: str
    new: str

    def mutant(self, root: Path) -> Mutant:
        """Return the change where it is; what is not there once is an AssertionError."""
        source = (root / self.file).read_text(encoding="utf-8")
        assert source.count(self.old) == 1, (
            f"{self.file} has {source.count(self.old)} times: {self.old}"
        )
        before, behind = (len(text.encode()) for text in source.split(self.old))
        line = source[: source.index(self.old)].count("\n") + 1
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return Mutant(self.file, line, before, len(source.encode()) - behind, self.new, old, new)


def named_tests(root: Path) -> dict[str, list[str]]:
    """Return the tests of each guarantee, as pytest names them, by its number."""
    text = (root / "SPECIFICATION.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\S*) \| .* \| (.*) \|$", text, re.MULTILINE)
    found = {
        number: [
            f"tests/{file}.py::{test}"
            for file, test in re.findall(r"`(test_\w+)::(test_\w+)`", tests)
        ]
        for number, tests in rows
    }
    assert len(found) == len(rows), "a number stands twice"
    return found


def changes(root: Path) -> dict[str, Change]:
    """Return the change for each guarantee, by its number."""
    found: dict[str, Change] = {}
    for entry in (
        (root / "tests" / "guarantees.txt").read_text(encoding="utf-8").strip().split("\n\n")
    ):
        lines = [line for line in entry.splitlines() if not line.startswith("#")]
        if not lines:
            continue
        number, file = lines[0].split()
        assert number not in found, f"{number} stands twice"
        old, new = ("\n".join(line[1:] for line in lines[1:] if line[0] == sign) for sign in "-+")
        found[number] = Change(file, old, new)
    return found
