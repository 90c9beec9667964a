"""The end of a third party's consumer.

With it end its process and what that forked, and the service forgets it.
"""

import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from errno import EINVAL

import pytest

from outcomes import in_child
from processes import be_idle, family, high, process, wait_gone
from restrictedmem.abi import memory
from restrictedmem.consumer import Consumer
from restrictedmem.fd import OwnedFd, readable
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.patience import Patience
from restrictedmem.service import consumer_process as service_consumer
from restrictedmem.service.client import Service
from restrictedmem.service.consumers import Consumers, Troubles
from restrictedmem.service.options import Options
from restrictedmem.service.signing import Signer
from restrictedmem.service.tokens import Tokens
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.units import PageRange, pgoff_t
from third_parties import Device, Puppet, fd, service, serving
from waiting import wait_until

__all__ = ["fd", "service"]


def _bound_to_a_child() -> tuple[Consumers, service_consumer.ConsumerProcess, RestrictedFile, int]:
    """Make a consumer that has bound a file twice. Its process is a child that does nothing."""
    consumers = Consumers(Tokens(), Options(), Signer(), Troubles())
    consumer = consumers.add("third")
    for sock in consumer.give_sockets():
        sock.close()
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    for ino in range(2):
        consumer.bind(ino, file, PageRange(pgoff_t(0), pgoff_t(0)), exclusive=False)
    child = os.fork()
    if child == 0:
        be_idle()
    return consumers, consumer, file, child


@pytest.mark.parametrize("end", ["killed", "hangs up"])
@pytest.mark.requires("fuse")
def test_what_a_consumer_forked_goes_with_it(end: str, service: Service, fd: int) -> None:
    with Device(service) as device:
        with Puppet(service) as puppet:
            puppet.bind(fd, 0, 8)
            left, pid = process(puppet("leave")), puppet("pid")
            assert left is not None
            # While the consumer lives, the child concerns only the consumer.
            wait_until(
                lambda: (found := process(left.pid)) is not None and found.parent == pid,
                "the consumer to be its parent",
            )
            assert puppet("pid") == pid
            if end == "killed":
                os.kill(pid, signal.SIGKILL)
        device.attach(fd, 0, 0, 8)
        wait_gone([left])
        assert [found["name"] for found in service.status()["consumers"]] == ["dma"]


@pytest.mark.requires("fuse")
def test_what_a_consumer_forked_goes_with_the_service() -> None:
    with serving() as service, Puppet(service) as puppet:
        everybody, left = family(service), process(puppet("leave"))
        assert left is not None
        os.kill(service.info["pid"], signal.SIGKILL)
        wait_gone([*everybody, left])


def test_a_consumers_end_is_its_process_end() -> None:
    """A process that a consumer forked may keep its sockets, and answers nobody.

    Neither the consumer's file nor a punch waits for it.
    """
    consumers = Consumers(Tokens(), Options(deadline=3600), Signer(), Troubles())
    consumer = consumers.add("third")
    requests, notify = consumer.give_sockets()
    child = os.fork()
    if child == 0:
        be_idle()
    consumer.process = OwnedFd(os.pidfd_open(child))
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    consumer.bind(1, file, PageRange(pgoff_t(0), pgoff_t(0)), exclusive=False)
    serving = threading.Thread(target=consumers.serve, args=(consumer,))
    punching = threading.Thread(target=file.fallocate, args=(memory.PUNCH, 0, PAGE))
    for thread in (serving, punching):
        thread.start()
    with requests, notify:
        assert notify.recv(100)
        os.kill(child, signal.SIGKILL)
        for thread in (serving, punching):
            thread.join(10)
            assert not thread.is_alive()
    assert (file.notifier_count, consumers.all(), consumers._troubles.last) == (0, [], "")
    os.waitpid(child, 0)
    file.put()


def test_a_consumer_whose_pidfd_has_a_high_number_is_forgotten() -> None:
    consumers, consumer, file, child = _bound_to_a_child()
    with OwnedFd(os.pidfd_open(child)) as pidfd, high(pidfd.fileno()) as copy:
        consumer.process = OwnedFd(copy.detach())
        consumers.end(consumer)
        # Its end was waited for.
        assert readable([pidfd], 0)
    assert (file.notifier_count, consumers.all()) == (0, [])
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    file.put()


def test_a_consumer_that_cannot_be_waited_for_is_forgotten_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(EINVAL, "poll")

    def fail_at_first(*_: object) -> None:
        if file.notifier_count > 1:
            fail()

    consumers, consumer, file, child = _bound_to_a_child()
    consumer.process = OwnedFd(os.pidfd_open(child))
    monkeypatch.setattr(Patience, "wait", fail)
    monkeypatch.setattr(type(file.design), "leave", fail_at_first)
    consumers.end(consumer)
    assert (file.notifier_count, consumers.all(), consumer.process.closed) == (0, [], True)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    file.put()


@pytest.mark.parametrize("said", [b"", b"?"])
def test_a_consumer_that_hears_nothing_more_ends_its_process(said: bytes) -> None:
    """Nobody tells it any more which of its pages are freed.

    Its parent kills it, too, when the service is gone, and may be late.
    """

    def body() -> str:
        service, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        notify, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        Consumer(requests, answers)
        if said:
            notify.send(said)
        else:
            notify.close()
        frames = sys._current_frames  # pyright: ignore[reportPrivateUsage]
        with suppress(AssertionError):
            wait_until(lambda: len(frames()) == 1, "the thread that listens to end")
        service.close()
        return "goes on"

    assert in_child(body) == ""
