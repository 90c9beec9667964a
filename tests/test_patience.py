"""A deadline that counts only time in which the process runs that waits."""

import os
import resource
import select
import signal
import time
from collections.abc import Callable

import pytest

from outcomes import in_child as apart
from processes import stop
from restrictedmem.patience import Patience
from restrictedmem.probe import in_child
from waiting import wait_until

pytestmark = pytest.mark.alone("measures tenths of a second")

SECONDS = 0.4


def test_it_is_at_an_end_after_so_many_seconds() -> None:
    reader, writer = os.pipe()
    began = time.monotonic()
    patience = Patience(SECONDS)
    assert not patience.wait(reader, select.POLLIN)
    assert SECONDS <= time.monotonic() - began < 10 * SECONDS
    # Then it looks once more, and waits no more.
    began = time.monotonic()
    assert not patience.wait(reader, select.POLLIN)
    assert time.monotonic() - began < SECONDS
    os.close(writer)
    assert patience.wait(reader, select.POLLIN | select.POLLHUP)
    os.close(reader)


def test_what_comes_at_once_uses_it_up_too() -> None:
    """A peer that always sends another message is not listened to for ever."""
    reader, writer = os.pipe()
    os.write(writer, b"x")
    began, patience, last = time.monotonic(), Patience(SECONDS), 0.0
    while patience.wait(reader, select.POLLIN) and not last > 10 * SECONDS:
        last = time.monotonic() - began
        if last > 2 * SECONDS:
            os.read(reader, 1)
    assert SECONDS < last < 10 * SECONDS
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("rises", [False, True])
def test_it_waits_under_a_limit_that_lets_nobody_wait(rises: bool) -> None:
    """poll(2) is EINVAL then."""

    def body() -> object:
        reader, writer = os.pipe()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))

        def rise(*_: object) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (8, hard))
            os.write(writer, b"x")

        if rises:
            signal.signal(signal.SIGALRM, rise)
            signal.setitimer(signal.ITIMER_REAL, SECONDS / 4)
        return Patience(SECONDS).wait(reader, select.POLLIN)

    assert apart(body) == str(rises)


@pytest.mark.parametrize("stopped", [0.0, 3 * SECONDS])
def test_a_stopped_process_loses_none_of_it(stopped: float) -> None:
    reader, writer = os.pipe()
    said, says = os.pipe()

    def wait() -> float:
        began = time.monotonic()
        os.write(says, os.getpid().to_bytes(4, "little"))
        Patience(SECONDS).wait(reader, select.POLLIN)
        return time.monotonic() - began

    took = _while_it_waits(wait, said, stopped)
    # It was in the middle of a slice when it was stopped, and that one counts.
    assert SECONDS / 2 + stopped < took
    for fd in (reader, writer, said, says):
        os.close(fd)


def _while_it_waits(wait: Callable[[], float], said: int, stopped: float) -> float:
    """Run something in a child that is stopped for so many seconds meanwhile."""
    helper = os.fork()
    if helper == 0:
        pid = int.from_bytes(os.read(said, 4), "little")
        if stopped:
            stop(pid)
            thaw = time.monotonic() + stopped
            wait_until(lambda: time.monotonic() > thaw, "the deadline to pass", 10 * stopped)
            os.kill(pid, signal.SIGCONT)
        os._exit(0)
    took = in_child(wait, 60)
    assert os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]) == 0
    return took
