"""A guest that holds the pattern, the attacker, and an attempt: each with doubles."""

import io
import os
import select
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from errno import ECHILD, EIO, EPERM, ETIMEDOUT
from typing import Any, Final, NoReturn, cast

import pytest

from hidden_pattern import SEED, START, owner_of, pattern
from outcomes import Errno, outcome
from planting import always, stub
from restrictedmem.audit import attacker, held_guest
from restrictedmem.audit import attempt as attempts
from restrictedmem.audit.attacker import Attacker, fork_twin
from restrictedmem.audit.attempt import Attempt, Outcome, Route, attempt
from restrictedmem.audit.held_guest import HeldGuest
from restrictedmem.audit.pattern import Pattern, content
from restrictedmem.child import end_child
from restrictedmem.fd import OwnedFd, readable

__all__ = ["pattern"]

READY: Final = b"ready 4000 8000\n"
PATIENCE: Final = 10


def held() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@contextmanager
def pipe() -> Generator[tuple[int, int]]:
    reader, writer = map(OwnedFd, os.pipe())
    with reader, writer:
        yield reader.fileno(), writer.fileno()


# The guest's words.


@contextmanager
def guest_that_says(words: bytes, runs: object = None) -> Generator[tuple[HeldGuest, int]]:
    """Yield a guest, and the end of the pipe on which requests come."""
    with pipe() as (replies, said), pipe() as (asked, requests):
        os.write(said, words)
        os.set_blocking(asked, False)
        yield HeldGuest(stub(), requests, replies, cast(Any, runs)), asked


def test_a_guest_says_where_its_heap_is() -> None:
    with guest_that_says(READY) as (guest, _):
        assert (guest.start, guest.end) == (0x4000, 0x8000)


@pytest.mark.parametrize("words", [b"no 4000 8000\n", b"ready 4000\n", b"ready 1 2 3\n"])
def test_a_guest_that_is_not_ready_is_none(words: bytes) -> None:
    with pytest.raises(OSError, match="did not say that it is ready") as caught:
        guest_that_says(words).__enter__()
    assert caught.value.errno == EIO


def test_requests_are_lines_and_answers_come_in_pieces() -> None:
    with guest_that_says(READY) as (guest, asked):
        answers = iter([b"int", b"act", b"\n"])

        def read(_: int, __: int) -> bytes:
            return next(answers)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(held_guest, "readable", always(True))
            patch.setattr(os, "read", read)
            assert guest.check(0x5000, 0x7000) == "intact"
        assert os.read(asked, 100) == b"check 5000 2000\n"
        guest.send(b"\xff bytes")
        assert os.read(asked, 100) == b"\xff bytes\n"


def test_a_guest_that_ends_is_told_from_one_that_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(held_guest, "DEADLINE", 0)
    with pipe() as (replies, _), pytest.raises(OSError, match="did not answer") as caught:
        HeldGuest(stub(), -1, replies, stub())
    assert caught.value.errno == ETIMEDOUT
    replies, said = os.pipe()
    os.close(said)
    with OwnedFd(replies), pytest.raises(OSError, match="the guest ended") as caught:
        HeldGuest(stub(), -1, replies, stub())
    assert caught.value.errno == EIO


def test_idle_is_in_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe() as (first, go_on), pipe() as (second, end):

        def wait() -> None:
            os.read(first, 1)
            poll = select.poll()
            poll.register(second, select.POLLIN)
            poll.poll()

        runs = threading.Thread(target=wait)
        runs.start()
        try:
            with guest_that_says(READY, runs) as (guest, _):
                with monkeypatch.context() as patch:
                    patch.setattr(held_guest, "DEADLINE", 0)
                    assert outcome(guest.wait_idle) == Errno(ETIMEDOUT)

                before, slept = time.sleep, list[float]()

                def sleep(seconds: float) -> None:
                    if not slept:
                        os.write(go_on, b".")
                    slept.append(seconds)
                    before(seconds)

                # It is not idle at first.
                monkeypatch.setattr(held_guest, "DEADLINE", PATIENCE)
                monkeypatch.setattr(time, "sleep", sleep)
                guest.wait_idle()
        finally:
            os.write(go_on, b".")
            os.write(end, b".")
            runs.join()


def test_the_end_is_waited_for_with_a_deadline() -> None:
    waited = list[float]()
    with guest_that_says(READY, stub(join=waited.append)) as (guest, _):
        guest.wait_end()
    assert waited == [held_guest.DEADLINE]


class Machine:
    """A VMM whose guest says that it is ready, and ends when it is stopped."""

    made: "Machine"

    def __init__(self, *arguments: object, **named: object) -> None:
        Machine.made = self
        self.notes: list[object] = [(*arguments, named)]
        self._stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self.notes.append("closed")

    def load(self, image: object, arguments: list[str]) -> None:
        self.notes.append((image, arguments))

    def run(self, stdin: io.FileIO, stdout: io.FileIO, stderr: io.FileIO) -> None:
        self.thread = threading.current_thread()
        self.notes.append((type(stdin), type(stdout), stderr is stdout))
        stdout.write(READY)
        assert self._stopped.wait(PATIENCE)
        # An answer would be heard at once; and an error ends the guest's output.
        raise OSError(EIO, "stopped")

    def stop(self) -> None:
        self.notes.append("stop")
        self._stopped.set()


def test_a_guest_runs_in_a_thread_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = threading.Event()

    class Thread(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            joined.set()
            super().join(timeout)

    monkeypatch.setattr(threading, "Thread", Thread)
    monkeypatch.setattr(held_guest, "Vmm", Machine)
    monkeypatch.setattr(held_guest, "image", lambda: "image")
    service: Any = "service"
    before = held()
    with held_guest.held_guest(service, 1 << 20, 0xAB, "software") as guest:
        machine = Machine.made
        assert (guest.start, guest.end) == (0x4000, 0x8000)
        assert cast(object, guest.vmm) is machine
        assert machine.thread is not None
        assert machine.thread.daemon
        machine.stop()
        # It ended with an error, and says no more.
        assert outcome(lambda: guest.ask("check 0 0")) == Errno(EIO)
        assert not joined.is_set()
    assert joined.is_set()
    assert machine.notes == [
        (1 << 20, "service", {"engine": "software", "debug": False}),
        ("image", ["hold", "00000000000000ab"]),
        (io.FileIO, io.FileIO, True),
        "stop",
        "stop",
        "closed",
    ]
    assert held() == before
    with held_guest.held_guest(service, 1 << 20, 0xAB, "kernel", debug=True):
        assert Machine.made.notes[0] == (1 << 20, "service", {"engine": "kernel", "debug": True})


# The attacker.


def test_another_guest_has_the_same_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[object, ...]]()

    def held(*arguments: object) -> None:
        asked.append(arguments)

    monkeypatch.setattr(attacker, "held_guest", held)
    guest: Any = stub(vmm=stub(restricted_fd=7))
    service: Any = "service"
    owner = Attacker(service, guest, 5, "kernel", cast(Pattern, None), {}, 0, 0, as_root=False)
    owner.another()
    owner.another(cast(Any, "other"))
    assert asked == [("service", 2 << 20, 5, "kernel"), ("other", 2 << 20, 5, "kernel")]
    assert owner.fd == 7


def test_the_trusted_processes_are_three() -> None:
    twin = fork_twin()
    guest: Any = stub(vmm=stub(vm=stub(statistics=lambda: {"pid": 7})))
    service: Any = stub(info={"pid": twin})
    try:
        assert attacker.trusted_processes(service, guest) == {
            "engine": 7,
            "service": twin,
            "spawner": os.getpid(),
        }
    finally:
        end_child(twin)


def test_a_twin_waits_whatever_signals_come() -> None:
    before = held()
    with pipe() as (came, comes):

        def keep() -> None:
            def come(_: int, __: object) -> None:
                os.write(comes, b".")

            signal.signal(signal.SIGUSR1, come)

        twin = fork_twin(keep)
        try:
            # It has what it keeps before this process goes on.
            for _ in range(2):
                os.kill(twin, signal.SIGUSR1)
                assert readable([came], PATIENCE), f"waited {PATIENCE} s for the twin"
                os.read(came, 1)
        finally:
            end_child(twin)
    assert held() == before


# Attempts.


def test_an_attempt_has_a_deadline(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[float]()
    numbers = [ECHILD, ETIMEDOUT, EPERM]
    left = iter(numbers)

    def in_child(_: object, deadline: float) -> object:
        asked.append(deadline)
        raise OSError(next(left), "why")

    monkeypatch.setattr(attempts, "in_child", in_child)
    route = Route("target", "name", always([]), control=True)
    came = {number: attempt(route, owner_of(pattern)) for number in numbers}
    for number in (ECHILD, ETIMEDOUT):
        assert came[number] == Attempt("target", "name", Outcome.FAILED, detail="why")
    assert came[EPERM] == Attempt("target", "name", Outcome.FAILED, "EPERM", "why")
    assert asked == [attempts.DEADLINE] * 3


def test_a_refusal_without_an_errno_has_none(pattern: Pattern) -> None:
    def refuse(_: Attacker) -> NoReturn:
        raise OSError("refused")

    came = attempt(Route("target", "name", refuse), owner_of(pattern))
    assert (came.outcome, came.errno) == (Outcome.REFUSED, "None")


DETAILS: Final[list[tuple[dict[str, Any], bool, Outcome, str]]] = [
    ({}, True, Outcome.FOUND, f"the guest's {START:#x}"),
    ({"open_by": "Swap"}, True, Outcome.OPEN, f"the guest's {START:#x} (Swap)"),
    ({"root": True}, True, Outcome.OPEN, f"the guest's {START:#x} (Root)"),
    ({"power": True, "open_by": "Swap"}, False, Outcome.OPEN, "accepted (Swap)"),
    ({"open_by": "Swap"}, False, Outcome.NOTHING, ""),
    ({"control": True}, True, Outcome.CONTROL, f"the guest's {START:#x}"),
    ({"control": True}, False, Outcome.FAILED, "the search did not find the pattern"),
]


@pytest.mark.parametrize(("parts", "there", "verdict", "detail"), DETAILS)
def test_an_attempt_says_what_it_found(
    parts: dict[str, Any], there: bool, verdict: Outcome, detail: str, pattern: Pattern
) -> None:
    owner = owner_of(pattern)
    object.__setattr__(owner, "as_root", True)
    chunks = [bytes(8), content(SEED, START, 4096) if there else bytes(16), bytes(8)]
    came = attempt(Route("target", "name", lambda _: chunks, **parts), owner)
    assert (came.outcome, came.detail) == (verdict, detail)
    # A find ends the search.
    assert came.searched == (8 + 4096 if there else 32)
