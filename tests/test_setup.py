"""scripts/setup.sh finds an interpreter, and says nothing of those that it does not take."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: The file that pyenv has in PATH for a version that is not installed.
SHIM = '#!/bin/sh\necho "pyenv: $0: command not found" >&2\nexit 127\n'
OLD = "#!/bin/sh\nexit 1\n"


def find_python(path: Path) -> tuple[int, str, str]:
    script = f". {ROOT}/scripts/setup.sh; find_python"
    done = subprocess.run(
        ["/bin/bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(path)},
    )
    return done.returncode, done.stdout, done.stderr


def put(place: Path, name: str, script: str) -> None:
    (place / name).write_text(script)
    (place / name).chmod(0o755)


def test_shims_are_passed_over_without_a_word(tmp_path: Path) -> None:
    put(tmp_path, "python3.14", SHIM)
    put(tmp_path, "python3.13", OLD)
    (tmp_path / "python3").symlink_to(sys.executable)
    assert find_python(tmp_path) == (0, "python3\n", "")


def test_without_an_interpreter_it_says_what_is_needed(tmp_path: Path) -> None:
    put(tmp_path, "python3", SHIM)
    status, out, err = find_python(tmp_path)
    assert (status, out) == (1, "")
    assert err.splitlines()[0] == "error: Python 3.11 or later is needed"
    assert "pyenv" not in err


def test_inherited_settings_of_python_are_dropped() -> None:
    script = f"set -eu; . {ROOT}/scripts/setup.sh; env"
    inherited = {"PYTHONPATH": "/other", "PYTEST_ADDOPTS": "-x", "PYENV_VERSION": "3.11"}
    for extra in ({}, inherited):
        done = subprocess.run(
            ["/bin/bash", "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": os.defpath, **extra},
        )
        names = {line.partition("=")[0] for line in done.stdout.splitlines()}
        assert names & inherited.keys() == extra.keys() & {"PYENV_VERSION"}
