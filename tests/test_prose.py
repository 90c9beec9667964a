"""Prose keeps the rules of CONTRIBUTING.md, as far as a machine can see them."""

from pathlib import Path

import pytest

import prose

PAGES = [*prose.ROOT.glob("*.md"), *(prose.ROOT / "docs").rglob("*.md")]
MODULES = [*(prose.ROOT / "src").rglob("*.py")]


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda path: path.name)
def test_prose_is_plain(path: Path) -> None:
    assert list(prose.of_file(path)) == []


@pytest.mark.parametrize(
    ("text", "whole", "found"),
    [
        ("The service frees the page.", True, []),
        ("What is not listed fails.", False, ["headless"]),
        ("Whoever asks is refused.", False, ["headless"]),
        ("What does a punch cost?", False, []),
        ("A page of the file.", True, ["no verb"]),
        ("A page of the file.", False, []),
        ("The consumer maps it. " + "Word " * 31, False, ["31 words"]),
        (f"See [{'a ' * 10}](b) and ``{'c ' * 30}``.", False, []),
    ],
)
def test_it_finds(text: str, whole: bool, found: list[str]) -> None:
    faults = list(prose.faults(prose.Prose("page:1", text, whole_sentences=whole)))
    assert len(faults) == len(found)
    assert all(words in fault for words, fault in zip(found, faults, strict=True))


def test_it_reads_docstrings(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""A module."""\n\n\ndef call() -> None:\n    """Return.\n\n    Nothing here.\n\n'
        '    Raises:\n        OSError: EINVAL.\n    """\n'
    )
    assert [fault.partition(": ")[2] for fault in prose.of_file(module)] == [
        "has no verb: Nothing here."
    ]
