"""Strings of other parties reach a terminal as text, wherever they are shown."""

import fcntl
import importlib
import io
import json
import os
import struct
import sys
import termios
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock, call

import pytest

from restrictedmem.audit import prove
from restrictedmem.cli import doctor, guest_arguments, main, run_table
from restrictedmem.cli.errors import CommandError
from restrictedmem.machine.finding import Finding, State
from restrictedmem.text import Line, duration, plain
from restrictedmem.vmm.vmm import Ended, Vmm

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
    run_table.show(found)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isprintable() for line in lines)
    assert sum(SHOWN in line for line in lines) == 3
    shown = json.dumps(run_table.as_data(found, Ended(0)))
    assert shown.isprintable()
    assert json.loads(shown)["engine"] == EVIL


def test_findings_of_doctor() -> None:
    said = f"fusermount3:\nfailed {EVIL}"
    lines = list(doctor._finding_lines(Finding("way", State.NO, said), 30, 200, colour=False))
    (line,) = lines
    assert line.isprintable()
    assert line.endswith("fusermount3: failed " + SHOWN.replace(r"\r", " "))


def test_a_line_is_for_terminals_and_fits_them() -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 10, 0, 0))
    with open(theirs, "w", encoding="utf-8") as terminal, open(ours, "rb", buffering=0) as screen:
        line = Line(terminal, interval=1000)
        line.update(lambda: "0123456789")
        line.update(lambda: "too soon")
        line.clear()
        line.update(lambda: "a\x1b")
        Line(terminal, show=False).update(lambda: "hidden")
        expected = b"\r\x1b[K012345678\r\x1b[K\r\x1b[Ka\\x1b"
        # The kernel hands on what was written in its own time (flush_to_ldisc).
        found = b""
        while len(found) < len(expected):
            found += screen.read(100)
        assert found == expected
    file = io.StringIO()
    plain_line = Line(file)
    plain_line.update(lambda: "x")
    plain_line.clear()
    assert file.getvalue() == ""


def test_a_line_is_shown_and_cleared_at_once() -> None:
    """It has no end of line, at which a terminal's file would be flushed by itself."""
    file = Mock()
    file.fileno.side_effect = OSError
    line = Line(file)
    line.update(lambda: "x")
    assert file.mock_calls[-2:] == [call.write("\r\x1b[Kx"), call.flush()]
    file.reset_mock()
    line.clear()
    assert file.mock_calls == [call.write("\r\x1b[K"), call.flush()]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.9, 67, 3600 + 2 * 60 + 3)] == [
        "0:00",
        "1:07",
        "1:02:03",
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "hint"),
    [
        (
            "sha256",
            ["--memory=4M"],
            "hint: --memory=4M is an argument of the guest; options go before GUEST\n",
        ),
        (
            "sha256",
            ["x", "--memory"],
            "hint: --memory is an argument of the guest; options go before GUEST\n",
        ),
        ("sha256", ["--other"], ""),
        # One of somebody's own may have such an option.
        ("./mine", ["--memory"], ""),
    ],
)
def test_options_behind_the_guest(
    name: str, arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    guest_arguments.warn(name, arguments, {"--memory", "--quiet"})
    assert capsys.readouterr().err == hint


class Terminal(io.StringIO):
    """A terminal without a size."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stdout", "shown"),
    [(io.StringIO(), "guest runs  4 KiB"), (Terminal(), "")],
    ids=["a file", "a terminal"],
)
def test_no_line_stands_between_the_guests_words(
    stdout: io.StringIO, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(run_table, "_input_size", lambda: None)
    with run_table.progress(cast(Vmm, SimpleNamespace(bytes_in=4096)), show=True) as tick:
        tick()
        said = cast(Terminal, sys.stderr).getvalue()
    assert said.removeprefix("\r\x1b[K").startswith(shown) if shown else said == ""


def test_the_table_of_a_proof_is_wrapped_on_terminals_alone() -> None:
    rows = [
        ("target", "outcome", "tried"),
        ("descriptor", "refused EINVAL", ", ".join(["read", "readv"] * 20)),
    ]
    whole = list(prove._table(rows, None))
    assert len(whole) == len(rows)
    wrapped = list(prove._table(rows, 60))
    assert len(wrapped) > len(rows)
    assert max(map(len, wrapped)) <= 60
    assert "".join("".join(wrapped).split()) == "".join("".join(whole).split())
