"""The processes of a random run: what a parent hears of them, in words and in shared memory."""

import os
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from typing import Any, Final

import pytest

from planting import stub
from restrictedmem import fd
from restrictedmem.stress import finding, party, progress
from restrictedmem.stress.finding import Finding, wait_for
from restrictedmem.stress.party import Child, reporting, told_to_stop
from restrictedmem.stress.plan import NAMES, OPERATIONS
from restrictedmem.stress.progress import Progress
from waiting import wait_until

Body = Callable[[Progress, socket.socket], None]


# Progress.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time in nanoseconds, which stands still."""
    now = [10]
    monkeypatch.setattr(progress, "time", stub(monotonic_ns=lambda: now[0]))
    return now


def numbers(of: Progress) -> tuple[int, int, int, float]:
    return of.operations, of.punches, of.pages, of.slowest


def test_progress_counts_what_has_ended(clock: list[int]) -> None:
    with closing(Progress(NAMES)) as made:
        assert numbers(made) == (0, 0, 0, 0)
        for pages, nanoseconds in ((3, 5), (4, 9), (1, 2)):
            with made.doing("punch"), made.punching(pages):
                before = numbers(made)
                clock[0] += nanoseconds
            assert numbers(made) == (before[0] + 1, before[1] + 1, before[2] + pages, made.slowest)
        with made.doing("slot"):
            pass
        assert numbers(made) == (4, 3, 8, 9e-9)


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_stuck_after_its_time(name: str, clock: list[int]) -> None:
    with closing(Progress(NAMES)) as made:
        assert made.stuck(0) is None
        with made.doing(name):
            clock[0] += 2_000_000_000
            assert made.stuck(2) is None
            clock[0] += 1
            assert made.stuck(2) == name
        assert made.stuck(0) is None
        # The next operation has its own time.
        with made.doing(name):
            assert made.stuck(1) is None


def test_the_names_are_those_of_the_operations() -> None:
    assert NAMES[: len(OPERATIONS)] == tuple(OPERATIONS)


def test_closed_progress_has_no_memory() -> None:
    made = Progress(NAMES)
    made.close()
    assert made._memory.closed


# Waits.


def test_a_wait_ends_when_it_holds_and_is_a_hang_after_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks, naps = count(), list[float]()
    monkeypatch.setattr(
        finding, "time", stub(monotonic=lambda: float(next(ticks)), sleep=naps.append)
    )
    holds = iter([False, False, True])
    wait_for("nothing", lambda: next(holds))
    assert (next(ticks), len(naps)) == (3, 2)
    # At its last moment it waits on.
    naps.clear()
    with pytest.raises(Finding, match=r"^hang: waited 20 s for a word$"):
        wait_for("a word", lambda: False)
    assert len(naps) == 20


# A process and its parent.


@contextmanager
def child(run: Body) -> Generator[Child]:
    with closing(Child("clerk", run)) as made:
        yield made


def status(of: Child) -> int | None:
    """Return the exit status of a process, which remains to be reaped; None if it still runs."""
    found = os.waitid(os.P_PID, of._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if found is None else found.si_status


def tell(**words: object) -> Body:
    def run(_: Progress, parent: socket.socket) -> None:
        with reporting(parent) as report:
            report.update(words)

    return run


def wait_for_stop(_: Progress, parent: socket.socket) -> None:
    with reporting(parent) as report:
        wait_until(lambda: told_to_stop(parent), "the parent to say stop")
        report["stopped"] = True


def test_a_report_is_taken_once() -> None:
    with child(tell(some=[1, 2])) as made:
        made.take_report()
        assert made.report == {"some": [1, 2]}
        made.take_report()
        made.poll()
        assert made.report == {"some": [1, 2]}
        wait_until(lambda: status(made) == 0, "the process to end")


def test_poll_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[object, float]]()

    def watched(files: Any, seconds: float) -> Any:
        asked.append((files, seconds))
        return fd.readable(files, seconds)

    monkeypatch.setattr(party, "readable", watched)
    with child(wait_for_stop) as made:
        made.poll()
        assert (made.report, asked) == (None, [([made.sock], 0)])
        made.stop()

        def told() -> bool:
            made.poll()
            return made.report is not None

        wait_until(told, "the report")
        assert made.report == {"stopped": True}


def refuse(error: BaseException) -> Body:
    def run(_: Progress, parent: socket.socket) -> None:
        with reporting(parent):
            raise error

    return run


ENDS: Final[dict[str, tuple[Body, str]]] = {
    "finding": (refuse(Finding("page 3")), "clerk: page 3"),
    "error": (refuse(ValueError("a value")), "clerk: ValueError: a value"),
    "exit": (refuse(SystemExit(5)), "clerk: SystemExit: 5"),
    "silence": (lambda _progress, _parent: os._exit(0), "the clerk died"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_parent_learns_why_a_process_ended(name: str) -> None:
    run, words = ENDS[name]
    with child(run) as made, pytest.raises(Finding, match=f"^{words}$"):
        made.take_report()


def test_a_parent_waits_longer_than_the_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(party, "PATIENCE", 0.02)
    with child(wait_for_stop) as made:
        with pytest.raises(Finding, match=r"^hang: waited 0.06 s for the clerk to end$"):
            made.take_report()
        assert made.sock.gettimeout() == 3 * 0.02


def test_a_process_without_a_parent_stops() -> None:
    with child(wait_for_stop) as made:
        made.sock.close()
        # Its report meets nobody, and that is an error (EPIPE).
        wait_until(lambda: status(made) is not None, "the process to end")


def test_a_process_that_has_ended_can_be_told_to_stop() -> None:
    with child(tell()) as made:
        wait_until(lambda: status(made) is not None, "the process to end")
        made.stop()


def test_progress_outlives_its_process() -> None:
    def run(progress: Progress, parent: socket.socket) -> None:
        with progress.doing("punch"), progress.punching(7):
            pass
        wait_for_stop(progress, parent)

    with ExitStack() as stack:
        made = stack.enter_context(child(run))
        wait_until(lambda: made.progress.operations, "an operation")
        pid = made._pid
        made.end()
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, 0)
        assert made.sock.fileno() == -1
        assert (made.progress.operations, made.progress.pages) == (1, 7)
        made.end()
    assert made.progress._memory.closed


def test_ctrl_c_is_for_the_parent() -> None:
    def run(_: Progress, parent: socket.socket) -> None:
        with reporting(parent) as report:
            report["ignored"] = signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    before = signal.getsignal(signal.SIGINT)
    with child(run) as made:
        made.take_report()
    assert made.report == {"ignored": True}
    assert signal.getsignal(signal.SIGINT) == before
