"""A thread that dies before it begins keeps nobody waiting.

One that fails later ends its process.
"""

import _thread
import os
import threading
from collections.abc import Callable
from errno import EAGAIN
from types import MethodType

import pytest

from outcomes import Errno, outcome
from restrictedmem import threads
from restrictedmem.failure import status_of

PATIENCE = 10.0
Body = Callable[[], object]


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_PATIENCE", (2, 0.01))


def test_it_runs_and_has_begun() -> None:
    ran = threading.Event()
    assert outcome(lambda: threads.start(ran.set)) is None
    assert ran.wait(PATIENCE), "waited 10 s for the thread"


@pytest.mark.parametrize(
    "failure", [RuntimeError("can't start new thread"), MemoryError()], ids=repr
)
def test_no_thread_to_be_had(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise failure

    def waits(_: object) -> bool:
        raise AssertionError("there is nobody to wait for")

    monkeypatch.setattr(_thread, "start_new_thread", fail)
    monkeypatch.setattr(threads._Thread, "comes", waits)
    assert outcome(lambda: threads.start(fail)) == Errno(EAGAIN)


def test_one_that_dies_at_once_is_waited_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory runs out after pthread_create(3): its starter was told that there is one."""
    start = _thread.start_new_thread

    def start_another(*_: object) -> None:
        start(bool, ())

    monkeypatch.setattr(_thread, "start_new_thread", start_another)
    assert outcome(lambda: threads.start(list)) == Errno(EAGAIN)


def test_one_that_comes_late_finds_that_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Body] = []

    def keep(body: Body, _: object) -> None:
        late.append(body)

    monkeypatch.setattr(_thread, "start_new_thread", keep)
    called = threading.Event()
    assert outcome(lambda: threads.start(called.set)) == Errno(EAGAIN)
    late[0]()
    assert not called.is_set()


def test_one_that_comes_at_the_last_moment_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has begun before its starter gives up, who has not heard of it."""
    go, ran = threading.Event(), threading.Event()
    start = _thread.start_new_thread

    def be(thread: object) -> None:
        assert isinstance(thread, threads._Thread)
        assert thread._taken.acquire(blocking=False)
        go.set()
        thread._run()

    def start_silent(body: MethodType, _: object) -> None:
        start(be, (body.__self__,))
        assert go.wait(PATIENCE), "waited 10 s for the thread"

    monkeypatch.setattr(_thread, "start_new_thread", start_silent)
    assert outcome(lambda: threads.start(ran.set)) is None
    assert ran.wait(PATIENCE), "waited 10 s for what the thread was to do"


@pytest.mark.parametrize(
    "failure", [MemoryError(), OSError(EAGAIN, "x"), ValueError("a bug"), SystemExit(0)], ids=repr
)
def test_what_it_fails_with_ends_the_process(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    child = os.fork()
    if child == 0:
        # There is no memory for the log either.
        monkeypatch.setattr(threads.log, "exception", fail)
        try:
            threads.start(fail)
            threading.Event().wait(PATIENCE)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status_of(failure)


def test_one_that_is_joined_cannot_be_had_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(BlockingIOError, match=r"pthread_create: .* \(no thread can be made: .*\)"):
        threads.begin(threading.Thread())
