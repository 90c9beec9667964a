"""scripts/fuzz: what it refuses, and what it says of a search."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "fuzz"


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_target_that_is_none_is_refused() -> None:
    ended = fuzz("--minutes", "1", "elf", "sockets")
    assert ended.returncode == 2
    assert "error: no target sockets" in ended.stderr


@pytest.mark.no_cover
@pytest.mark.requires("atheris")
def test_a_search_tells_inputs_and_edges() -> None:
    ended = fuzz("--minutes", "0.05", "--json", "elf")
    assert ended.returncode == 0, ended.stderr
    (searched,) = json.loads(ended.stdout)
    assert searched["target"] == "elf"
    assert searched["inputs"] > 100
    assert searched["edges"] > 30
    assert searched["new_edges"] >= 0
    assert searched["found"] == []
