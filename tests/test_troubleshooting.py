"""docs/use/troubleshooting.md: the program prints each text it quotes, and it has each hint."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from restrictedmem.cli import hints

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "use" / "troubleshooting.md").read_text(encoding="utf-8")
#: The first column of every table; a heading's is no text of the program.
QUOTED = re.findall(r"^\| `(.*?)` \|", PAGE, re.MULTILINE)
#: Stands for a value in an f-string.
VALUE = "\0"


@cache
def texts() -> str:
    """Return the strings of all modules, each on lines of its own."""
    found: list[str] = []
    for path in (ROOT / "src" / "restrictedmem").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        str(part.value) if isinstance(part, ast.Constant) else VALUE
                        for part in node.values
                    )
                )
    return "\n".join(found)


def test_the_page_quotes_many_texts() -> None:
    assert len(QUOTED) > 100
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_program_has_the_text(quoted: str) -> None:
    # A value, whose place an f-string has, or what a call puts behind the text.
    pattern = re.escape(quoted.rstrip("… ")).replace("…", f"[^\n{VALUE}]{{0,3}}{VALUE}")
    assert re.search(pattern, texts()), quoted


def test_the_page_has_each_hint() -> None:
    for name, hint in vars(hints).items():
        if isinstance(hint, str) and name.strip("_").isupper():
            assert f"| `{hint}` |" in PAGE, name
