"""The output and exit status of ``scripts/test``, by the results of its checks."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
_FINE: Final = "#!/bin/sh\nexit 0\n"
_BAD: Final = "#!/bin/sh\nexit 3\n"


def put(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a directory with the script, where each check passes and does nothing."""
    text = (ROOT / "scripts" / "test").read_text(encoding="utf-8")
    put(tmp_path / "scripts" / "setup.sh", "setup_venv() { :; }\n")
    put(tmp_path / "scripts" / "demo", "exit 0\n")
    for program in re.findall(r"\.venv/bin/\w+|scripts/[a-z-]+|\.ci/run", text):
        if not (tmp_path / program).exists():
            put(tmp_path / program, _FINE)
    shutil.copy(ROOT / "scripts" / "test", tmp_path / "scripts" / "test")
    return tmp_path


def run(copy: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [copy / "scripts" / "test", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("arguments", [(), ("--long",)], ids=["all", "long"])
def test_all_is_well_when_each_check_passes(copy: Path, arguments: tuple[str, ...]) -> None:
    status, said = run(copy, *arguments)
    assert said.endswith("\nall checks passed\n")
    assert status == 0


@pytest.mark.parametrize(
    "program",
    [".venv/bin/pytest", ".venv/bin/pyright", "scripts/coverage-report", "scripts/check-package"],
)
def test_a_check_that_fails_is_named(copy: Path, program: str) -> None:
    put(copy / program, _BAD)
    status, said = run(copy)
    assert status == 1
    assert re.search(rf"\nFAILED: {re.escape(program)}[^\n]*\n$", said)
    assert "all checks passed" not in said
