"""Both programs of docs/use/devkvm.md.

They run as they stand there, print what the page says, and are as short as their headings say.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "use" / "devkvm.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(
    r"^## .*? in (\d+)[^\n]*\n.*?^```python\n(.*?)^```\n.*?^```text\n(.*?)^```\n",
    PAGE,
    re.MULTILINE | re.DOTALL,
)


def test_there_are_two_programs() -> None:
    assert [lines for lines, _, _ in PROGRAMS] == ["20", "40"]


@pytest.mark.requires("kvm")
@pytest.mark.parametrize(("lines", "program", "printed"), PROGRAMS, ids=["guest", "vmm"])
def test_program(lines: str, program: str, printed: str) -> None:
    assert len([line for line in program.splitlines() if line.strip()]) <= int(lines)
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == (printed, "")


def test_the_comparison_names_rows_that_exist() -> None:
    docs = Path(__file__).parent.parent / "docs"
    comparison = (docs / "use" / "guest_memfd.md").read_text(encoding="utf-8")
    rows = (docs / "reference" / "divergences.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"`\[([\w-]+)\]`", comparison))
    assert keys <= set(re.findall(r"^\| `([\w-]+)` \|", rows, re.MULTILINE))
    assert len(keys) > 10
