"""Tests take turns: those that are alone, and all others side by side."""

import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

import turns
from conftest import hear_all_signals
from outcomes import in_child
from turns import Turns


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Turns]]:
    """Make turns of further processes; who would have to wait fails."""
    for name in "gate", "machine":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(turns, "_PATIENCE", 0)
    with ExitStack() as stack:
        yield lambda: stack.enter_context(
            closing(Turns(str(tmp_path / "gate"), str(tmp_path / "machine")))
        )


def has_to_wait(turn: Turns, *, alone: bool) -> bool:
    try:
        turn.begin(alone=alone)
    except AssertionError:
        return True
    return False


def test_one_alone_or_many_side_by_side(place: Callable[[], Turns]) -> None:
    one, other, third = place(), place(), place()
    one.begin(alone=False)
    other.begin(alone=False)
    assert has_to_wait(third, alone=True)
    one.end(more=False)
    assert has_to_wait(third, alone=True)
    other.end(more=True)
    third.begin(alone=True)
    assert has_to_wait(one, alone=False)
    assert has_to_wait(one, alone=True)
    third.end(more=False)
    one.begin(alone=False)


def test_one_stays_alone_for_all_of_its_tests(place: Callable[[], Turns]) -> None:
    one, other = place(), place()
    one.begin(alone=True)
    one.end(more=True)
    assert has_to_wait(other, alone=False)
    one.begin(alone=True)
    one.end(more=False)
    other.begin(alone=False)


def test_nobody_begins_while_one_waits_to_be_alone(
    place: Callable[[], Turns], tmp_path: Path
) -> None:
    one = place()
    gate = os.open(tmp_path / "gate", os.O_RDONLY)
    fcntl.flock(gate, fcntl.LOCK_EX)
    assert has_to_wait(one, alone=False)
    os.close(gate)
    one.begin(alone=False)


def test_children_of_a_test_keep_no_turn(place: Callable[[], Turns]) -> None:
    one, other = place(), place()
    one.begin(alone=False)
    child = os.fork()
    if child == 0:
        signal.pause()
    one.end(more=False)
    try:
        other.begin(alone=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    "number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD], ids=lambda s: s.name
)
def test_what_a_test_starts_ignores_no_signal(number: signal.Signals) -> None:
    """The parent of the tests may ignore signals: nohup does, and a shell for background jobs."""

    def body() -> object:
        signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        hear_all_signals()
        os.kill(os.getpid(), number)
        # A bit for each signal that is ignored: SIGPIPE and SIGXFSZ are Python's, and undone by
        # subprocess.
        line = "sed -n 's/^SigIgn:.//p' /proc/self/status"
        return int(
            subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout, 16
        )

    assert in_child(body) == "0"
