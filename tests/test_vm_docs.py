"""docs/use/vm.md: the program runs as it stands there, and the page names every exit and method."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from restrictedmem.protocol import exits
from restrictedmem.vmm.vm import Vcpu, Vm

PAGE = (Path(__file__).parent.parent / "docs" / "use" / "vm.md").read_text(encoding="utf-8")


@pytest.mark.requires("fuse")
def test_the_whole_vmm_runs_and_prints_what_the_page_says() -> None:
    ((program, printed),) = re.findall(
        r"^```python\n(.*?)^```\n.*?^```text\n(.*?)^```\n", PAGE, re.MULTILINE | re.DOTALL
    )
    assert len([line for line in program.splitlines() if line.strip()]) < 65
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (printed, "")


def test_each_exit_has_its_row_with_its_fields() -> None:
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", PAGE, re.MULTILINE)
    assert dict(rows) == {
        kind.__name__: ", ".join(field.name for field in dataclasses.fields(kind))
        for kind in get_args(exits.Exit)
    }


@pytest.mark.parametrize("kind", [Vm, Vcpu])
def test_each_method_is_named(kind: type) -> None:
    for name in vars(kind):
        if not name.startswith("_"):
            assert re.search(rf"\b{name}\b", PAGE), name
