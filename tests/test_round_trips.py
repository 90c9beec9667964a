"""Requests whose answer nobody has read: no other request is given it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from errno import EMSGSIZE, ENOTCONN
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest

from outcomes import Errno, outcome
from restrictedmem.fd import send_with_fds
from restrictedmem.mm import design
from restrictedmem.mm.design import Callback, File
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.service import consumer_process as service_consumer
from restrictedmem.service import wire
from restrictedmem.service.consumer_process import Binding, ConsumerProcess
from restrictedmem.service.wire import Call, Channel
from restrictedmem.units import PageRange, pgoff_t

ASKED = Call("ASKED", 7)
SPAN = PageRange(pgoff_t(0), pgoff_t(1))


def no_memory(*_: object, **__: object) -> NoReturn:
    raise MemoryError


# A channel.


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """Make a channel and its other end."""
    channel, theirs = Channel.pair("the peer", takes_fds=True)
    with closing(channel), theirs:
        yield channel, theirs


def answered(sock: socket.socket, fds: tuple[int, ...] = ()) -> threading.Thread:
    """Answer one request by its own body."""

    def answer() -> None:
        request = sock.recv(1000)
        send_with_fds(sock, bytes(8) + request[8:], fds)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def test_a_call_that_is_given_up_is_the_last(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    channel.sock.settimeout(0.001)
    with pytest.raises(TimeoutError):
        channel.call(ASKED, b"first")
    with suppress(BrokenPipeError):
        theirs.send(bytes(8) + b"first")
    assert outcome(lambda: channel.call(ASKED, b"second")) == Errno(ENOTCONN)


def test_a_call_that_runs_out_of_memory_is_the_last(
    pair: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, theirs = pair
    monkeypatch.setattr(wire, "receive_with_fds", no_memory)
    with pytest.raises(MemoryError):
        channel.call(ASKED, b"first")
    monkeypatch.undo()
    with suppress(BrokenPipeError):
        theirs.send(bytes(8) + b"first")
    assert outcome(lambda: channel.call(ASKED, b"second")) == Errno(ENOTCONN)


def test_a_call_that_was_not_made_is_no_ones(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    assert outcome(lambda: channel.call(ASKED, bytes(1 << 24))) == Errno(EMSGSIZE)
    thread = answered(theirs)
    assert channel.call(ASKED, b"second") == (b"second", [])
    thread.join()


def test_an_answer_that_was_cut_off_is_no_other_calls(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    thread = answered(theirs, (0,) * 7)
    assert outcome(lambda: channel.call(ASKED, b"first")) == Errno(EMSGSIZE)
    thread.join()
    thread = answered(theirs)
    assert channel.call(ASKED, b"second") == (b"second", [])
    thread.join()


# The service and a consumer.


@pytest.fixture
def consumer() -> Iterator[tuple[ConsumerProcess, socket.socket, list[str]]]:
    """Make a consumer, the end where it is notified, and what it failed with."""
    failures: list[str] = []
    consumer = ConsumerProcess("third", 7, 5.0, lambda _, reason: failures.append(reason))
    requests, notify = consumer.give_sockets()
    yield consumer, notify, failures
    requests.close()
    notify.close()
    consumer.close()


@pytest.mark.parametrize("where", ["receive_flags", "Patience", "_wrong"])
def test_a_consumer_whose_answer_was_not_read_is_ended(
    consumer: tuple[ConsumerProcess, socket.socket, list[str]],
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, notify, failures = consumer
    notify.send(bytes(8))
    monkeypatch.setattr(service_consumer, where, no_memory)
    with pytest.raises(MemoryError):
        asked.notify(wire.INVALIDATE_START, b"first", 0)
    monkeypatch.undo()
    assert failures == ["a call of a consumer was broken off"]
    assert asked.notify(wire.INVALIDATE_START, b"second", 0) == b""
    notify.setblocking(False)
    heard: list[bytes] = []
    with suppress(BlockingIOError):
        while True:
            heard.append(notify.recv(100)[8:])
    # Patience is had before anything is sent.
    assert heard == ([] if where == "Patience" else [b"first"])


def test_a_consumer_that_cannot_be_told_of_an_end_is_ended(
    consumer: tuple[ConsumerProcess, socket.socket, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, _, failures = consumer
    binding = Binding(asked, 1, 2, cast(RestrictedFile, None))
    monkeypatch.setattr(asked, "tell", no_memory)
    # Others are told after it, so it raises nothing.
    binding.invalidate_end(pgoff_t(0), pgoff_t(1), None)
    assert failures == ["a call of a consumer was broken off"]


class Listener:
    """Notes what it hears, and has no memory at the start if it is told so."""

    def __init__(self, *, broken: bool) -> None:
        self.heard: list[str] = []
        self._broken = broken

    def invalidate_start(self, *_: object) -> None:
        self.heard.append("start")
        if self._broken:
            raise MemoryError

    def invalidate_end(self, *_: object) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("kind", [design.V10, design.FolioPoc])
def test_an_end_comes_to_whom_a_start_came(
    kind: type[design.Design], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callback = (pgoff_t(0), pgoff_t(1), None)
    listeners = [Listener(broken=False), Listener(broken=True), Listener(broken=False)]

    def callbacks(*_: object) -> Iterator[Callback]:
        yield whole

    def notifiers(*_: object) -> list[Listener]:
        return listeners

    def nothing(*_: object) -> None:
        return

    monkeypatch.setattr(kind, "callbacks", callbacks)
    sequence = SimpleNamespace(begin=nothing, end=nothing)
    file = cast(File, SimpleNamespace(sequence=lambda: sequence, notifiers=notifiers))
    with pytest.raises(MemoryError), kind(teardown=False).invalidation(file, SPAN):
        no_memory()
    assert [listener.heard for listener in listeners] == [["start", "end"], ["start", "end"], []]
