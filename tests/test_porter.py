"""What the porter gives to callers that do not run."""

import os
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from errno import EINTR
from functools import partial
from typing import Any

import pytest

from outcomes import Errno, outcome
from restrictedmem.abi import memory, process, seccomp
from restrictedmem.fd import OwnedFd, receive_with_fds, send_with_fds
from restrictedmem.syscall.filter import program


@contextmanager
def _starved_calls(count: int) -> Generator[tuple[OwnedFd, int]]:
    """Yield the listener of a program that makes calls and hardly runs, and a pipe that says what they came to."""
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
def test_who_is_interrupted_while_a_caller_does_not_run_has_given_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives again, and the caller has one descriptor, and never 0 for a call that gave none."""
    if not seccomp.flags_known(seccomp.FilterFlag.NEW_LISTENER | seccomp.FilterFlag.WAIT_KILLABLE_RECV):
        pytest.skip("Linux before 5.19 has one step")
    interrupted, done, this = 0, threading.Event(), threading.get_ident()

    def interrupt() -> None:
        while not done.wait(0.001):
            signal.pthread_kill(this, signal.SIGUSR1)

    def ignore(_number: int, _frame: object) -> None:
        pass

    interrupter = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGUSR1, ignore)
    try:
        with _starved_calls(20) as (listener, told), OwnedFd(os.memfd_create("given")) as fd:
            interrupter.start()
            counts: list[int] = []
            for _ in range(20):
                asked = seccomp.seccomp_notif()
                while outcome(partial(seccomp.SECCOMP_IOCTL_NOTIF_RECV, listener, asked)) == Errno(EINTR):
                    pass
                while outcome(partial(seccomp.give, listener, asked.id, fd)) == Errno(EINTR):
                    interrupted += 1
                number, count = map(int, os.read(told, 100).split())
                assert number > 2
                counts.append(count)
            assert counts == list(range(counts[0], counts[0] + 20))
    finally:
        done.set()
        interrupter.join()
        signal.signal(signal.SIGUSR1, before)
    assert interrupted
