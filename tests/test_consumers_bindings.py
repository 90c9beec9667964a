"""Bindings of a third party's consumer.

The tests try who may bind a range, what the consumer learns of it, and when the binding ends.
"""

import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from errno import EINVAL, EIO, ENOENT, ENOMEM, EPROTO, ETOOMANYREFS
from functools import partial
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest

from outcomes import Errno, in_child, outcome
from restrictedmem import sync
from restrictedmem.consumer import Bound, BoundFile, Consumer
from restrictedmem.fd import close_all, readable, receive_with_fds
from restrictedmem.mm.backing import MemfdBacking, make_backing
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.service import consumer_process as service_consumer
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.consumers import Consumers, Troubles
from restrictedmem.service.options import Options
from restrictedmem.service.signing import Signer
from restrictedmem.service.tokens import Tokens
from restrictedmem.service.wire import Channel
from restrictedmem.units import MAX_FILE_BYTES, PageRange, pgoff_t
from restrictedmem.units import PAGE_SIZE as PAGE
from third_parties import Device, Puppet, fd, punch, resident, service, serving
from waiting import wait_until

__all__ = ["fd", "service"]


# The interface.


@pytest.mark.requires("fuse")
def test_bindings_are_exclusive_or_not() -> None:
    with serving(design="bindings") as service, Puppet(service) as puppet:
        fd = service.memfd_restricted()
        first, last = puppet.bind(fd, 0, 8), puppet.bind(fd, 8, 16)
        assert outcome(lambda: puppet.bind(fd, 7, 8)) == Errno(EINVAL)
        assert outcome(lambda: puppet.bind(fd, 15, 17)) == Errno(EINVAL)
        assert outcome(lambda: puppet.bind(fd, 16, 20, exclusive=False)) == Errno(EINVAL)
        assert outcome(lambda: puppet.bind(fd, 16, 16)) == Errno(EINVAL)
        assert outcome(
            lambda: puppet("register_notifier", service.token_for(fd).hex(), 16, 20)
        ) == Errno(EINVAL)
        punch(fd, 7)
        punch(fd, 7, 2)
        punch(fd, 100)
        assert [len(puppet("heard", file)) // 2 for file in (first, last)] == [2, 1]
        # A range is free again once it is unbound.
        puppet("call", last, "close")
        assert puppet("heard", puppet.bind(fd, 9, 20)) == []
        shared = service.memfd_restricted()
        both = [
            puppet.bind(shared, 0, 8, exclusive=False),
            puppet.bind(shared, 0, 8, exclusive=False),
        ]
        assert outcome(lambda: puppet.bind(shared, 20, 24)) == Errno(EINVAL)
        punch(shared, 0)
        assert [len(puppet("heard", file)) for file in both] == [2, 2]
        os.close(fd)
        os.close(shared)


@pytest.mark.requires("fuse")
def test_one_consumer_a_file(service: Service, fd: int) -> None:
    with Puppet(service) as first, Device(service) as device:
        file = first.bind(fd, 0, 8)
        first("call", file, "get_page", 0)
        first("write", file, 0, 9)
        assert outcome(lambda: device.attach(fd, 0, 0, 8)) == Errno(EINVAL)
        first("call", file, "close")
        assert resident(fd) == 1
        device.attach(fd, 0, 0, 8)
        assert device.equal(0, PAGE, PAGE) == PAGE
        assert outcome(lambda: first.bind(fd, 0, 8)) == Errno(EINVAL)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("arguments", ["", "careless"], ids=["unbinds", "just ends"])
@pytest.mark.parametrize("design", ["v10", "v10+teardown"])
def test_the_next_consumer_need_not_wait_for_the_last_ones_end(design: str, arguments: str) -> None:
    with serving(design=design) as service:
        fd = service.memfd_restricted()
        for _ in range(5):
            with Puppet(service, arguments) as puppet:
                for start in range(0, 64, 8):
                    puppet("call", puppet.bind(fd, start, start + 8), "get_page", start)
                assert resident(fd) == 8
        wait_until(lambda: not service.status()["consumers"], "the consumers' end")
        assert service.status()["last_error"] == ""
        os.close(fd)


def test_the_next_consumer_waits_so_long_for_the_last_ones_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumers = Consumers(Tokens(), Options(), Signer(), Troubles())
    file, waited = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0)), list[float]()

    def wait_for(_: Callable[[], bool], timeout: float) -> None:
        waited.append(timeout)

    monkeypatch.setattr(consumers._idle, "wait_for", wait_for)
    with closing(consumers.add("puppet")) as consumer:
        for sock in consumer.give_sockets():
            sock.close()
        consumers._let_end(consumer, file)
    # In parts: time in which the service did not run does not count.
    assert len(waited) == 4
    assert sum(waited) == pytest.approx(0.2)
    file.put()


# Mistakes.


@pytest.mark.parametrize(
    ("failure", "errno"),
    [
        (OSError(ETOOMANYREFS, "sendmsg"), ETOOMANYREFS),
        (MemoryError(), ENOMEM),
        (ValueError("a bug"), EIO),
    ],
    ids=repr,
)
def test_a_binding_that_its_consumer_is_not_told_of_goes(
    failure: Exception, errno: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The consumer gets the error before the binding is removed.

    A punch may be waiting for its answer, which it gives once it knows.
    """
    tokens = Tokens()
    consumers = Consumers(tokens, Options(), Signer(), Troubles())
    consumer = consumers.add("third")
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    token = tokens.issue([])
    tokens.prove(token, 1, file)
    reply = Channel.reply

    def fail(channel: Channel, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        if channel is not consumer.requests:
            reply(channel, body, fds)
            return
        assert (file.notifier_count, len(fds)) == (1, 2)
        # A punch begins.
        file._notifiers_sem.down_read()
        raise failure

    monkeypatch.setattr(Channel, "reply", fail)
    requests, notify = consumer.give_sockets()
    serving = threading.Thread(target=consumers.serve, args=[consumer], daemon=True)
    with requests, notify:
        requests.settimeout(10)
        requests.send(
            struct.pack("=II", wire.BIND.number, 0) + wire.BIND_REQUEST.pack(token, 0, 0, 0)
        )
        serving.start()
        assert requests.recv(1000)[0] == errno
        file._notifiers_sem.up_read()
        wait_until(lambda: not (file.notifier_count or consumer.bindings), "the binding to go")
    serving.join()
    assert file._references == 1
    file.put()


def test_a_bind_that_fails_holds_nothing() -> None:
    consumer = service_consumer.ConsumerProcess("third", 7, 5.0, lambda _, reason: None)
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    file.register_notifier(service_consumer.Binding(consumer, 99, 1, file))
    file.holder = 8
    assert outcome(
        lambda: consumer.bind(1, file, PageRange(pgoff_t(0), pgoff_t(0)), exclusive=False)
    ) == Errno(EINVAL)
    assert (consumer.bindings, file._references) == ({}, 1)
    for sock in consumer.give_sockets():
        sock.close()
    consumer.close()
    file.put()


def test_a_consumer_answers_for_a_binding_that_it_was_not_told_of() -> None:
    """The service has made it, and its descriptors could not be sent; meanwhile a punch came."""

    requests, theirs = Channel.pair("consumer")
    notify, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def refuse(_: Bound) -> BoundFile:
        raise AssertionError("bound all the same")

    def body() -> object:
        consumer = Consumer(theirs, answers)
        came: list[object] = []
        asking = threading.Thread(
            target=lambda: came.append(
                outcome(lambda: consumer.register_notifier(bytes(16), refuse))
            )
        )
        asking.start()
        message = requests.receive()
        assert message is not None
        assert message.number == wire.BIND.number
        invalidation = wire.INVALIDATION.pack(1, 0, 1, wire.NO_FOLIO)
        notify.send(struct.pack("=II", wire.INVALIDATE_START.number, 0) + invalidation)
        frames = sys._current_frames  # pyright: ignore[reportPrivateUsage]
        wait_until(
            lambda: any(f.f_code.co_name == "wait" for f in frames().values()),
            "the consumer to wait for its BIND",
        )
        requests.reply_error(OSError(ETOOMANYREFS, "sendmsg"))
        asking.join()
        answer = readable([notify], 10) and notify.recv(100)
        notify.send(struct.pack("=II", wire.PAGE_COUNT.number, 0) + invalidation)
        return came, answer, readable([notify], 10) and notify.recv(100)

    with closing(requests), theirs, notify, answers:
        assert in_child(body) == repr(([Errno(ETOOMANYREFS)], bytes(8), bytes(16)))


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("design", ["v10", "bindings"])
def test_a_binding_of_no_range_is_refused(design: str) -> None:
    with serving(design=design) as service, Puppet(service) as puppet:
        fd = service.memfd_restricted()
        os.posix_fallocate(fd, 0, PAGE)
        last = MAX_FILE_BYTES // PAGE
        for start, end in (
            (5, 3),
            (0, last + 1),
            (last, last + 1),
            (1 << 63, (1 << 63) + 1),
            (0, (1 << 64) - 1),
            ((1 << 64) - 1, 0),
        ):
            body = wire.BIND_REQUEST.pack(service.token_for(fd), start, end, 0)
            assert outcome(partial(puppet, "request", wire.BIND.number, body.hex())) == Errno(
                EINVAL
            ), (start, end)
            assert outcome(lambda: puppet("request", wire.BIND.number, "00")) == Errno(EPROTO)
            assert service.status()["descriptors"][0]["notifiers"] == 0
        assert (resident(fd), service.status()["last_error"]) == (1, "")
        assert puppet.bind(fd, last - 1, last) == 0
        os.close(fd)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("design", ["v10", "bindings"])
def test_a_file_is_bound_again_by_a_binding_of_ones_own(design: str) -> None:
    with serving(design=design) as service, Puppet(service) as puppet, Puppet(service) as other:
        fd = service.memfd_restricted()
        os.posix_fallocate(fd, 0, 16 * PAGE)

        def again(who: Puppet, number: int, start: int = 8, end: int = 16) -> object:
            body = wire.BIND_REQUEST.pack(
                wire.NUMBER.pack(number), start, end, wire.BindFlag.AGAIN | wire.BindFlag.EXCLUSIVE
            )
            return outcome(partial(who, "request", wire.BIND.number, body.hex()))

        def unbind(number: int) -> object:
            return outcome(
                partial(puppet, "request", wire.UNBIND.number, wire.NUMBER.pack(number).hex())
            )

        def notifiers() -> int:
            return int(service.status()["descriptors"][0]["notifiers"])

        assert again(puppet, 1) == Errno(ENOENT)
        assert puppet.bind(fd, 0, 8) == 0
        assert again(other, 1) == again(puppet, 2) == Errno(ENOENT)
        assert notifiers() == 1
        found = again(puppet, 1)
        assert isinstance(found, str)
        assert wire.BINDING.unpack(bytes.fromhex(found))[:2] == (2, os.fstat(fd).st_ino)
        assert notifiers() == 2
        if design == "bindings":
            assert (
                again(puppet, 2, 15, 17)
                == again(puppet, 1, 0, 1)
                == again(puppet, 1, 5, 3)
                == Errno(EINVAL)
            )
        assert unbind(2) == ""
        assert unbind(2) == again(puppet, 2) == Errno(ENOENT)
        assert notifiers() == 1
        assert puppet("call", 0, "get_page", 0) == 0
        puppet("call", 0, "close")
        assert again(puppet, 1) == Errno(ENOENT)
        assert (resident(fd), notifiers(), service.status()["last_error"]) == (16, 0, "")
        os.close(fd)
        wait_until(lambda: service.status()["descriptors"] == [], "the file's end")


@pytest.mark.parametrize(
    ("options", "flags"), [(Options(), 0), (Options(pin=True), 2), (Options(design="bindings"), 4)]
)
@pytest.mark.parametrize(("kind", "hugepage"), [("memfd", 0), ("thp", 1)])
def test_what_a_binding_says_of_its_file_and_brings_once(
    options: Options, flags: int, kind: str, hugepage: int
) -> None:
    tokens = Tokens()
    consumers = Consumers(tokens, options, cast("Signer", None), Troubles())
    consumer = consumers.add("kvm")
    file = RestrictedFile(make(options.design or options.api), make_backing(kind), Inode.make(0, 0))
    token = tokens.issue([])
    tokens.prove(token, 7, file)
    requests, notify = consumer.give_sockets()
    with requests, notify:
        for number, (proof, flag, descriptors) in enumerate(
            ((token, 1, 2), (wire.NUMBER.pack(1), 3, 0), (wire.NUMBER.pack(2), 3, 0)), 1
        ):
            body = wire.BIND_REQUEST.pack(proof, 8 * number, 8 * number + 8, flag)
            consumers._dispatch(consumer, wire.Message(wire.BIND.number, body, []))
            reply, fds = receive_with_fds(requests, 100)
            assert wire.BINDING.unpack(reply[8:]) == (number, 7, 0, flags | hugepage, 0)
            assert len(fds) == descriptors
            close_all(fds)
    consumers.end(consumer)
    file.put()


# The wire's document.


def test_a_notifier_that_cannot_be_made_is_unbound_and_its_error_told() -> None:
    unbound: list[bytes] = []

    def call(_: object, body: bytes) -> None:
        unbound.append(body)

    def fail() -> NoReturn:
        raise MemoryError

    made = Consumer.__new__(Consumer)
    made._known, made._notifiers = sync.condition(sync.mutex()), {}
    made.requests = cast(wire.Channel, SimpleNamespace(call=call))
    with pytest.raises(MemoryError):
        made._register(5, fail)
    assert (unbound, made._notifiers) == ([wire.NUMBER.pack(5)], {})
