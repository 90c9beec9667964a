"""What other parties say reaches a terminal as text, wherever it is shown."""

import importlib
import json
from typing import Any

import pytest

from restrictedmem.cli import doctor, main, table
from restrictedmem.cli.errors import CommandError
from restrictedmem.kvm.vmm import Ended
from restrictedmem.machine.finding import Finding, State
from restrictedmem.text import plain

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x7f\u202e\ud800"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\x7f\u202e\ud800"


def test_plain() -> None:
    assert plain(EVIL) == SHOWN
    assert plain("a\nb\tc\u2028d") == r"a\nb\tc\u2028d"
    assert plain("Zürich → 東京 …, 64 MiB \\x1b") == "Zürich → 東京 …, 64 MiB \\x1b"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(5, f"READY: {EVIL}"), f"error: READY: {SHOWN}\n"),
        (OSError(5, EVIL, "file\x1b"), f"error: file\\x1b: {SHOWN}\n"),
        (CommandError(EVIL, EVIL), f"error: {SHOWN}\nhint: {SHOWN}\n"),
        (CommandError("a\nhint: b\n  c"), "error: a\n  hint: b\n  c\n"),
    ],
)
def test_errors(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(importlib.import_module("restrictedmem.cli.ps"), "main", fail)
    assert main.main(["ps"]) == 1
    assert capsys.readouterr().err == words


def test_the_closing_table(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {
        "engine": EVIL,
        "way": "own mount",
        "measurement": "00",
        "bytes_in": 0,
        "bytes_out": 0,
        "time_total_ns": 0,
        "time_in_guest_ns": 0,
        "time_outside_ns": 0,
        "pages_taken": 0,
        "private_bytes": 0,
        "invalidations": 0,
        "exits": {EVIL: 1},
        "locked_bytes": 0,
        "unlocked_because": "",
        "cgroup": f"/{EVIL}",
        "platform": {},
    }
    table.show(found)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isprintable() for line in lines)
    assert sum(SHOWN in line for line in lines) == 3
    shown = json.dumps(table.as_data(found, Ended(0)))
    assert shown.isprintable()
    assert json.loads(shown)["engine"] == EVIL


def test_findings_of_doctor() -> None:
    said = f"fusermount3:\nfailed {EVIL}"
    lines = list(doctor._finding_lines(Finding("way", State.NO, said), 30, 200, colour=False))
    (line,) = lines
    assert line.isprintable()
    assert line.endswith("fusermount3: failed " + SHOWN.replace(r"\r", " "))
