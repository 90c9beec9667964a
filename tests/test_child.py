"""The code that runs in a forked child ends with the child, whatever happens."""

import os
import signal
from errno import EAGAIN, ENOENT, ENOMEM
from pathlib import Path
from typing import NoReturn

import pytest

from outcomes import Errno, in_child, outcome
from restrictedmem.child import end_child, ends, fork
from restrictedmem.failure import FAULT
from restrictedmem.patience import Patience

GONE = 128 + signal.SIGKILL


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_one_whose_body_returns_ends_with_0() -> None:
    assert exit_code(fork(lambda: 7)) == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(ENOENT, "gone"), ENOENT),
        (OSError("without an errno"), FAULT),
        (OSError(1000, "larger than a status"), FAULT),
        (MemoryError(), ENOMEM),
        (ValueError(), FAULT),
        (KeyboardInterrupt(), FAULT),
        (SystemExit(0), FAULT),
    ],
    ids=repr,
)
def test_one_whose_body_raises_ends_with_a_status_that_says_so(
    error: BaseException, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> NoReturn:
        raise error

    assert exit_code(fork(body)) == status
    assert capfd.readouterr() == ("", "")


def test_one_that_cannot_even_tell_its_error_ends_all_the_same() -> None:
    class OddError(OSError):
        @property
        def errno(self) -> int:  # type: ignore[override]
            raise ValueError

    def body() -> NoReturn:
        raise OddError

    assert exit_code(fork(body)) == FAULT


def test_what_the_body_has_is_not_closed_before_the_end() -> None:
    """The end of a process does not wait for a lingering socket in a queue, as close(2) would."""

    class Held:
        def __del__(self) -> None:
            os.write(writer, b"closed")

    def body() -> NoReturn:
        held = Held()
        raise ValueError(id(held))

    reader, writer = os.pipe()
    assert exit_code(fork(body)) == FAULT
    os.close(writer)
    with open(reader, "rb") as said:
        assert said.read() == b""


def test_it_has_the_name_and_the_descriptors_that_it_is_given() -> None:
    reader, writer = os.pipe()

    def body() -> None:
        comm = Path("/proc/self/comm").read_text(encoding="ascii")
        with os.scandir("/proc/self/fd") as found:
            kept = {int(one.name) for one in found if "pipe:" in os.readlink(one)}
        os.write(writer, f"{comm}{kept - {0, 1, 2}}".encode())

    assert exit_code(fork(body, name="a-name", keep=[writer])) == 0
    assert os.read(reader, 100) == f"a-name\n{ {writer} }".encode()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(("bound", "status"), [(True, GONE), (False, 0)])
def test_a_bound_one_does_nothing_for_a_parent_that_is_gone(
    bound: bool, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pretend that another process forked the child, and this one adopted it.
    monkeypatch.setattr(os, "getpid", lambda: 1 << 30)
    assert exit_code(fork(lambda: None, bound=bound)) == status


def test_a_bound_one_is_killed_with_its_parent() -> None:
    reader, writer = os.pipe()

    def body() -> None:
        fork(signal.pause, bound=True)
        os.write(writer, b".")
        signal.pause()

    parent = fork(body)
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read(1) == b"."
        end_child(parent)
        # The end of the pipe: nobody has the other end any more.
        assert pipe.read() == b""


def test_a_child_that_does_not_end_in_time() -> None:
    child = fork(signal.pause)
    assert not ends(child, Patience(0.05))
    os.kill(child, signal.SIGKILL)
    assert ends(child, Patience(10))
    # It was not reaped.
    end_child(child)
    with pytest.raises(ChildProcessError):
        os.waitpid(child, 0)


def test_a_fork_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(EAGAIN, os.strerror(EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert outcome(lambda: fork(lambda: None)) == Errno(EAGAIN)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM, signal.SIGRTMAX])
def test_a_signal_at_a_fork_comes_behind_it(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[int] = []

    def with_an_interrupt() -> int:
        signal.raise_signal(number)
        forked.append(1)
        return 1

    monkeypatch.setattr(os, "fork", with_an_interrupt)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fork(lambda: None)
    finally:
        signal.signal(number, before)
    assert forked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM, signal.SIGRTMAX])
def test_a_signal_that_a_child_finds_ends_the_child(number: int) -> None:
    def body() -> str:
        this, forks = os.getpid(), os.fork

        def with_an_interrupt() -> int:
            pid = forks()
            if not pid:
                signal.raise_signal(number)
            return pid

        os.fork = with_an_interrupt
        signal.signal(number, signal.default_int_handler)
        try:
            child = fork(lambda: None)
        except KeyboardInterrupt:
            assert os.getpid() == this, "the child came back"
            raise
        return str(exit_code(child))

    assert in_child(body) == repr(str(FAULT))
