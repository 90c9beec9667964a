"""One consumer as the service keeps it: its sockets, and STATUS's account of invalidations."""

import socket
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Final

import pytest

from planting import always, stub
from restrictedmem.fd import KERNEL_REFUSES, refuses_fds
from restrictedmem.service import discover, listener, wire
from restrictedmem.service.consumer_process import Binding, ConsumerProcess
from restrictedmem.service.door import Door
from restrictedmem.service.status import of_consumer
from restrictedmem.syscall import exec_program
from restrictedmem.units import pgoff_t

START, END = pgoff_t(0), pgoff_t(8)


@pytest.fixture
def consumer() -> Generator[ConsumerProcess]:
    made = ConsumerProcess("dma", 3, 1, always(None))
    yield made
    for sock in sockets_of(made):
        sock.close()


def sockets_of(consumer: ConsumerProcess) -> list[socket.socket]:
    return [*consumer.give_sockets(), consumer.requests.sock, consumer._notify]


def counts(consumer: ConsumerProcess) -> tuple[object, object]:
    shown = of_consumer(consumer)
    return shown["invalidations"], shown["in_progress"]


def test_status_counts_each_invalidation_once_until_its_end(
    consumer: ConsumerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[str]()

    def notify(call: wire.Call, *_: object) -> bytes:
        told.append(call.name)
        return b""

    monkeypatch.setattr(consumer, "notify", notify)
    monkeypatch.setattr(consumer, "tell", notify)
    one, other = (Binding(consumer, number, 7, stub()) for number in (1, 2))
    assert counts(consumer) == (0, 0)
    one.invalidate_start(START, END, None)
    assert counts(consumer) == (1, 1)
    other.invalidate_start(START, END, 9)
    assert counts(consumer) == (2, 2)
    # Neither is an invalidation.
    one.error(START, END)
    assert one.page_count(START, END) == 0
    one.invalidate_end(START, END, None)
    assert counts(consumer) == (2, 1)
    other.invalidate_end(START, END, 9)
    assert counts(consumer) == (2, 0)
    start, end = wire.INVALIDATE_START.name, wire.INVALIDATE_END.name
    assert told == [start, start, wire.ERROR.name, wire.PAGE_COUNT.name, end, end]


def test_an_end_for_which_there_is_no_memory_ends_the_consumer_and_the_invalidation(
    consumer: ConsumerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    failures = list[str]()
    monkeypatch.setattr(consumer, "notify", always(b""))
    monkeypatch.setattr(consumer, "tell", no_memory)
    monkeypatch.setattr(consumer, "fail", failures.append)
    binding = Binding(consumer, 1, 7, stub())
    binding.invalidate_start(START, END, None)
    binding.invalidate_end(START, END, None)
    assert (counts(consumer), len(failures)) == ((1, 0), 1)


@pytest.mark.parametrize(("held", "shown", "failed"), [(0, 0, 0), (8, 8, 0), (9, 0, 1)])
def test_a_consumer_holds_no_more_pages_than_there_are(
    held: int,
    shown: int,
    failed: int,
    consumer: ConsumerProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = list[str]()
    monkeypatch.setattr(consumer, "notify", always(wire.COUNT.pack(held)))
    monkeypatch.setattr(consumer, "fail", failures.append)
    assert Binding(consumer, 1, 7, stub()).page_count(START, END) == shown
    assert len(failures) == failed


# Sockets.


def ends_of_a_channel() -> Iterable[socket.socket]:
    channel, theirs = wire.Channel.pair("the other")
    theirs.close()
    return [channel.sock]


def ends_of_a_consumer() -> Iterable[socket.socket]:
    made = ConsumerProcess("dma", 3, 1, always(None))
    theirs, notified = made.give_sockets()
    # What the consumer asks on brings it what it binds.
    theirs.close()
    return [notified, made.requests.sock, made._notify]


def a_door() -> Iterable[socket.socket]:
    door = Door(1)
    door._spare.close()
    return [door.listener]


def a_question() -> Iterable[socket.socket]:
    with closing(exec_program._door("restrictedmem-test-question")):
        asks = stub(name="restrictedmem-test-question")
        return [discover._Question._connected(asks)]


SOCKETS: Final[dict[str, Callable[[], Iterable[socket.socket]]]] = {
    "channel": ends_of_a_channel,
    "consumer": ends_of_a_consumer,
    "door": a_door,
    "question": a_question,
    "listener": lambda: [listener._socket()],
    "supervisor": lambda: [exec_program._door("restrictedmem-test-door")],
}


@pytest.mark.skipif(not KERNEL_REFUSES, reason="the kernel has no SO_PASSRIGHTS (Linux 6.16)")
@pytest.mark.parametrize("name", SOCKETS)
def test_each_socket_refuses_descriptors_from_the_first(name: str) -> None:
    made = list(SOCKETS[name]())
    try:
        assert [refuses_fds(sock) for sock in made] == [True] * len(made)
    finally:
        for sock in made:
            sock.close()
