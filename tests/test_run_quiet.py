"""``run --quiet`` shows no line while the guest runs."""

import io
from typing import Any

import pytest

from planting import stub
from restrictedmem.cli import run, run_table


class Terminal(io.StringIO):
    """An object that passes for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stdout", [True, False])
@pytest.mark.parametrize("quiet", [True, False])
def test_the_line_is_shown_unless_quiet_and_beside_no_output(
    quiet: bool, stdout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guest(_stdin: object, _stdout: object, _stderr: object, tick: Any) -> str:
        tick()
        return "ended"

    stream = stub(buffer=stub(), isatty=lambda: stdout)
    monkeypatch.setattr(run_table, "_input_size", lambda: None)
    monkeypatch.setattr(run, "sys", stub(stdin=stream, stdout=stream, stderr=stream))
    shown = Terminal()
    monkeypatch.setattr(run_table, "sys", stub(stdout=stream, stderr=shown))
    vmm: Any = stub(run=guest, bytes_in=1 << 20)
    ended: object = run._to_its_end(vmm, quiet=quiet)
    assert ended == "ended"
    assert ("guest runs" in shown.getvalue()) is not (quiet or stdout)
