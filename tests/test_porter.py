"""The porter's hands: a caller that does not run keeps one of them, and nobody else."""

import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EAGAIN, EINTR, EIO, ELIBACC, ENOMEM
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from outcomes import Errno, outcome
from restrictedmem import threads
from restrictedmem.abi import memory, process, seccomp
from restrictedmem.fd import OwnedFd, receive_with_fds, send_with_fds
from restrictedmem.syscall import porter
from restrictedmem.syscall.filter import program
from restrictedmem.syscall.porter import Porter
from waiting import wait_until

#: Calls by their ids: one whose caller does not run before it is let, and one whose does at once.
_STARVED, _QUICK = 1, 2
#: Words shared with the porter: whether starved callers run; answers to either kind; the most
#: starved callers at once; its process id; the last errno that a call was answered with.
_RUN, _PUT, _MOST, _PID, _ERRNO = range(5)


class _Service:
    device = 1

    def memfd_restricted(self, _flags: int) -> int:
        return os.memfd_create("given")


@contextmanager
def _porter(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[], object] = _Service
) -> Generator[tuple[Porter, "memoryview[int]"]]:
    """Yield a porter whose callers are not there, and what it shares with the test."""
    words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    lock, starved = threading.Lock(), [0]

    def give(_listener: object, call: int, _fd: object) -> None:
        words[_PID] = os.getpid()
        with lock:
            starved[0] += call == _STARVED
            words[_MOST] = max(words[_MOST], starved[0])
        while call == _STARVED and not words[_RUN]:
            time.sleep(0.001)
        with lock:
            starved[0] -= call == _STARVED
            words[_PUT] += 1

    def respond(_listener: object, _call: int, error: int) -> None:
        words[_PID], words[_ERRNO] = os.getpid(), error

    monkeypatch.setattr(porter, "give", give)
    monkeypatch.setattr(porter, "respond", respond)
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    door.bind(b"\0" + os.urandom(8).hex().encode())
    door.listen()
    with door, OwnedFd(os.memfd_create("listener")) as listener:
        asked = Porter(listener, door, cast("Any", start))
        try:
            yield asked, words
        finally:
            # When the caller is gone, the porter ends, whatever its hands wait for.
            asked._pipe.close()  # pyright: ignore[reportPrivateUsage]
            os.waitpid(words[_PID] or -1, 0)


def test_callers_that_do_not_run_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with _porter(monkeypatch) as (asked, words):
        for _ in range(50):
            asked.ask(_STARVED, 0)
        asked.ask(_QUICK, 0)
        wait_until(lambda: words[_PUT], "the caller that runs to be answered")
        assert words[_RUN] == 0
        words[_RUN] = 1
        wait_until(lambda: words[_PUT] == 51, "the others to be answered")


def test_hands_are_no_more_than_there_may_be_and_do_not_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(porter, "_HANDS", 20)
    with _porter(monkeypatch) as (asked, words):
        for _ in range(30):
            asked.ask(_STARVED, 0)
        wait_until(lambda: words[_MOST] == 20, "all hands to be full")
        held = Path(f"/proc/{words[_PID]}/fd").iterdir()
        assert len([fd for fd in held if "given" in os.readlink(fd)]) == 20
        words[_RUN] = 1
        wait_until(lambda: words[_PUT] == 30, "all to be answered")
        assert words[_MOST] == 20
        # These come beside the thread that accepts connections.
        wait_until(lambda: len(os.listdir(f"/proc/{words[_PID]}/task")) <= 5, "hands to go")


def test_where_there_is_no_further_thread_calls_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = [True]
    start = threads.start

    def only_once(run: Any) -> None:
        if not first:
            raise OSError(EAGAIN, "no thread to be had")
        first.clear()
        start(run)

    monkeypatch.setattr(threads, "start", only_once)
    with _porter(monkeypatch) as (asked, words):
        for call in (_STARVED, _QUICK, _STARVED):
            asked.ask(call, 0)
        words[_RUN] = 1
        wait_until(lambda: words[_PUT] == 3, "all to be answered")
        assert words[_MOST] == 1


@pytest.mark.parametrize(
    ("failure", "errno"),
    [
        (MemoryError(), ENOMEM),
        (ImportError("no room"), ELIBACC),
        (RuntimeError("can't allocate read lock"), ENOMEM),
        (KeyError(1), EIO),
        (OSError(EAGAIN, "x"), EAGAIN),
    ],
    ids=repr,
)
def test_what_the_service_cannot_start_with_is_one_calls_errno(
    failure: Exception, errno: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [failure]

    def start() -> object:
        if failures:
            raise failures.pop()
        return _Service()

    with _porter(monkeypatch, start) as (asked, words):
        asked.ask(_QUICK, 0)
        wait_until(lambda: words[_ERRNO], "the call to be answered")
        assert words[_ERRNO] == errno
        asked.ask(_QUICK, 0)
        wait_until(lambda: words[_PUT], "the next one to be answered")


# Descriptors for a caller that does not run.


@contextmanager
def _starved_calls(count: int) -> Generator[tuple[OwnedFd, int]]:
    """Yield the listener of a program that calls and hardly runs, and a pipe with what it got."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    cpu = min(os.sched_getaffinity(0))
    pids: list[int] = []

    def forked(body: Any) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                process.prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
                os.sched_setaffinity(0, {cpu})
                body()
            finally:
                os._exit(0)
        pids.append(pid)

    def loop() -> None:
        while True:
            pass

    def call() -> None:
        process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
        flags = seccomp.FilterFlag.NEW_LISTENER | seccomp.FilterFlag.WAIT_KILLABLE_RECV
        with seccomp.install(program(os.uname().machine, 451), flags) as listener:
            send_with_fds(theirs, b".", [listener.fileno()])
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        for _ in range(count):
            found = outcome(lambda: memory.memfd_restricted().detach())
            os.write(writer, f"{found!r} {len(os.listdir('/proc/self/fd'))}\n".encode())

    try:
        for body in (loop, loop, call):
            forked(body)
        with receive_with_fds(ours, 1)[1][0] as listener:
            yield listener, reader
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for end in (reader, writer):
            os.close(end)
        ours.close()
        theirs.close()


@pytest.mark.requires("seccomp")
def test_who_is_interrupted_while_a_caller_does_not_run_has_given_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It gives again, and the caller has one descriptor, and never 0 for a call that gave none."""
    if not seccomp.flags_known(
        seccomp.FilterFlag.NEW_LISTENER | seccomp.FilterFlag.WAIT_KILLABLE_RECV
    ):
        pytest.skip("Linux before 5.19 has one step")
    interrupted, done, this = 0, threading.Event(), threading.get_ident()

    def interrupt() -> None:
        while not done.wait(0.001):
            signal.pthread_kill(this, signal.SIGUSR1)

    def ignore(_number: int, _frame: object) -> None:
        pass

    put = seccomp.SECCOMP_IOCTL_NOTIF_ADDFD

    def counting(listener: OwnedFd, gift: seccomp.seccomp_notif_addfd) -> int:
        nonlocal interrupted
        try:
            return put(listener, gift)
        except InterruptedError:
            interrupted += 1
            raise

    monkeypatch.setattr(seccomp, "SECCOMP_IOCTL_NOTIF_ADDFD", counting)

    interrupter = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGUSR1, ignore)
    try:
        with _starved_calls(500) as (listener, told), OwnedFd(os.memfd_create("given")) as fd:
            interrupter.start()
            counts: list[int] = []
            # Until it was interrupted, which takes a few.
            while len(counts) < 20 or not interrupted:
                asked = seccomp.seccomp_notif()
                while outcome(partial(seccomp.SECCOMP_IOCTL_NOTIF_RECV, listener, asked)) == Errno(
                    EINTR
                ):
                    pass
                seccomp.give(listener, asked.id, fd)
                number, count = map(int, os.read(told, 100).split())
                assert number > 2
                counts.append(count)
            assert counts == list(range(counts[0], counts[0] + len(counts)))
    finally:
        done.set()
        interrupter.join()
        signal.signal(signal.SIGUSR1, before)
