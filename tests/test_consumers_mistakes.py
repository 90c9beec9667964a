"""Mistakes of a third party's consumer, which cost others nothing."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from errno import ENOMEM, ENOTCONN, EPERM, EPROTO
from functools import partial

import pytest

from outcomes import Errno, outcome
from processes import family, go_on, process, stop, wait_gone
from restrictedmem.fd import send_with_fds
from restrictedmem.service import consumer_process as service_consumer
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.consumers import Consumers, Troubles
from restrictedmem.service.options import Options
from restrictedmem.service.signing import Signer
from restrictedmem.service.tokens import Tokens
from restrictedmem.service.wire import Call, Channel
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.units import pgoff_t
from third_parties import DEADLINE, PUPPET, Device, Puppet, fd, punch, resident, service, serving
from waiting import wait_until

__all__ = ["fd", "service"]


# Mistakes.


def _punch_while(fd: int, during: Callable[[], object]) -> float:
    """Punch page 0 while something else goes on; returns the seconds it took."""
    took: list[float] = []

    def body() -> None:
        began = time.monotonic()
        punch(fd, 0)
        took.append(time.monotonic() - began)

    thread = threading.Thread(target=body)
    thread.start()
    during()
    thread.join()
    return took[0]


#: Nothing, when its end was noticed before its silence.
_GONE = r"(puppet 1: INVALIDATE_START: puppet 1 is gone)?"
_MISTAKES = {
    # manner: whether the deadline has to pass, what ps says
    "stop": (True, rf"puppet 1 did not answer INVALIDATE_START within {DEADLINE:g} s"),
    "die": (False, _GONE),
    "raise": (False, _GONE),
    "garbage": (False, r"puppet 1 answered INVALIDATE_START with a reply of another size"),
    "refuse": (False, r"puppet 1 answered INVALIDATE_START with EINVAL"),
    "refuse in numbers": (False, r"puppet 1 answered INVALIDATE_START with errno 2147483653"),
    "short": (False, r"puppet 1 answered INVALIDATE_START with a malformed reply"),
    "empty": (False, r"puppet 1: INVALIDATE_START: puppet 1 is gone"),
}


@pytest.mark.requires("fuse")
@pytest.mark.alone("who answers may not be late by a second")
@pytest.mark.parametrize("manner", _MISTAKES)
def test_a_mistake_ends_a_consumer_and_nothing_else(service: Service, fd: int, manner: str) -> None:
    late, words = _MISTAKES[manner]
    puppet, other = Puppet(service), service.memfd_restricted()
    with Device(service) as device:
        device.attach(other, 0, 0, 8)
        device.fill(0, PAGE, 3)
        file = puppet.bind(fd, 0, 8)
        puppet("call", file, "get_page", 0)
        victim = next(found for found in family(service) if found.name == "rmem-puppet")
        puppet("manner", file, manner)
        took = _punch_while(fd, lambda: None)
        assert took >= DEADLINE if late else took < DEADLINE
        assert resident(fd) == 0
        wait_gone([victim])
        wait_until(
            lambda: [found["name"] for found in service.status()["consumers"]] == ["dma"],
            "the consumer's end",
        )
        assert re.fullmatch(words, service.status()["last_error"])
        assert outcome(lambda: puppet("pid")) == Errno(ENOTCONN)
        # Nobody else was harmed, and the file is the next one's.
        assert device.equal(0, 0, PAGE) == PAGE
        device.attach(fd, 0x100000, 0, 8)
        device.fill(0x100000, PAGE, 1)
        punch(fd, 0)
        assert device.status()["invalidations"] == 1
    puppet.channel.close()
    os.close(other)


@pytest.mark.alone("who answers may not be late by a second")
@pytest.mark.requires("fuse")
def test_a_late_answer_is_waited_for(service: Service, fd: int) -> None:
    with Puppet(service) as puppet:
        file, pid = puppet.bind(fd, 0, 8), puppet("pid")
        puppet("manner", file, "stop")

        def let_go_on() -> None:
            wait_until(
                lambda: (found := process(pid)) is not None and found.state == "T",
                "the consumer to stop",
            )
            os.kill(pid, signal.SIGCONT)

        assert _punch_while(fd, let_go_on) < DEADLINE
        assert puppet("heard", file) == [["start", 0, 1, None], ["end", 0, 1, None]]
        assert service.status()["last_error"] == ""


#: The head of a reply: errno, and zero.
_FINE = bytes(8)
_START, _COUNT = wire.INVALIDATE_START, wire.PAGE_COUNT
_ANSWERS: dict[str, tuple[Call, bytes, bool, str]] = {
    # name: what is asked, of 8 pages; what is answered, and whether with a descriptor; what is said
    # of that
    "done": (_START, _FINE, False, ""),
    "a count": (_COUNT, _FINE + (3).to_bytes(8, "little"), False, ""),
    "a count of all": (_COUNT, _FINE + (8).to_bytes(8, "little"), False, ""),
    "the smallest errno": (_START, (1).to_bytes(8, "little"), False, "EPERM"),
    "no errno that there is": (
        _START,
        (0x7FFF_FFFF).to_bytes(8, "little"),
        False,
        "errno 2147483647",
    ),
    "an errno that is no int": (
        _START,
        (0x8000_0000).to_bytes(8, "little"),
        False,
        "errno 2147483648",
    ),
    "the largest errno": (_START, (0xFFFF_FFFF).to_bytes(8, "little"), False, "errno 4294967295"),
    "an errno and a text": (_START, (5).to_bytes(8, "little") + b"\x1b[2J", False, "EIO"),
    "an errno for a count": (
        _COUNT,
        (0xFFFF_FFFF).to_bytes(8, "little") + bytes(8),
        False,
        "errno 4294967295",
    ),
    "one byte": (_START, b"x", False, "a malformed reply"),
    "half a head": (_COUNT, bytes(7), False, "a malformed reply"),
    "a byte more": (_START, _FINE + b"x", False, "a reply of another size"),
    "100 KiB": (_START, bytes(100 << 10), False, "a reply of another size"),
    "no count": (_COUNT, _FINE, False, "a reply of another size"),
    "half a count": (_COUNT, _FINE + bytes(4), False, "a reply of another size"),
    "more than a count": (_COUNT, _FINE + bytes(9), False, "a reply of another size"),
    "a count of one more": (_COUNT, _FINE + (9).to_bytes(8, "little"), False, "9 of 8 pages"),
    "the largest count": (_COUNT, _FINE + b"\xff" * 8, False, f"{(1 << 64) - 1} of 8 pages"),
    "a descriptor": (_START, _FINE, True, "descriptors"),
    "a count and a descriptor": (_COUNT, _FINE + bytes(8), True, "descriptors"),
}


@pytest.mark.parametrize("name", _ANSWERS)
def test_a_malformed_answer_ends_who_gave_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Act as a kernel that cannot refuse descriptors to the sender.
    def let_through(_: socket.socket) -> None:
        """Refuse nothing."""

    monkeypatch.setattr(service_consumer, "refuse_fds", let_through)
    call, answer, with_descriptor, wrong = _ANSWERS[name]
    failures: list[str] = []
    consumer = service_consumer.ConsumerProcess(
        "third", 7, 5.0, lambda consumer, reason: failures.append(reason)
    )
    binding = service_consumer.Binding(consumer, 1, 1, None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    start, end = pgoff_t(0), pgoff_t(8)
    asking: dict[Call, Callable[[], object]] = {
        _START: lambda: binding.invalidate_start(start, end, None),
        _COUNT: lambda: binding.page_count(start, end),
    }
    requests, notify = consumer.give_sockets()

    def respond() -> None:
        assert notify.recv(100)
        send_with_fds(notify, answer, [notify.fileno()] if with_descriptor else [])

    before = len(os.listdir("/proc/self/fd"))
    thread = threading.Thread(target=respond)
    thread.start()
    expected = None if call is _START else 0 if wrong else int.from_bytes(answer[8:], "little")
    assert asking[call]() == expected
    thread.join()
    # This process never had the descriptors that came with it.
    assert len(os.listdir("/proc/self/fd")) == before
    assert failures == ([f"third 7 answered {call.name} with {wrong}"] if wrong else [])
    if wrong:
        # It is asked nothing any more, and hears that it has lost its connection.
        assert (binding.page_count(start, end), requests.recv(1)) == (0, b"")
    binding.invalidate_end(start, end, None)
    requests.close()
    notify.close()
    consumer.close()


@pytest.mark.requires("fuse")
def test_only_a_vm_has_reports_signed() -> None:
    launch = wire.LAUNCH.pack(2, b"kernel", bytes(48))
    with serving(("puppet", PUPPET)) as service, Puppet(service) as puppet:
        assert outcome(lambda: puppet("request", wire.LAUNCHED.number, launch.hex())) == Errno(
            EPERM
        )
        assert outcome(lambda: puppet("request", wire.SIGN.number, bytes(64).hex())) == Errno(EPERM)


def test_a_request_that_memory_was_short_for_ends_its_consumer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    consumers = Consumers(Tokens(), Options(), Signer(), Troubles())
    consumer = consumers.add("third")
    requests, notify = consumer.give_sockets()
    with requests, notify:
        requests.settimeout(10)
        monkeypatch.setattr(Channel, "receive", no_memory)
        consumers.serve(consumer)
        assert (requests.recv(1000)[0], requests.recv(1)) == (ENOMEM, b"")
    assert consumers.all() == []


_DEEP = b'{"a":' * 100 + b"1" + b"}" * 100
_REPORTS = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"a": "\xff"}',
    "a list": b"[1]",
    "a number": b"1",
    "nested": _DEEP,
    "nested without end": b"[" * 50_000,
    "nested in lists": b'{"a":' + b"[" * 9 + b"]" * 9 + b"}",
    "no number": b'{"a": NaN}',
    "a number too large": b'{"a": 1e999}',
    "a number of 50,000 digits": b'{"a": ' + b"1" * 50_000 + b"}",
    "half a character": b'{"a": "\\ud800"}',
    "words for a terminal": b'{"a": "\\u001b[2J"}',
    "words for a terminal in a key": b'{"\\u001b[2J": 1}',
}


@pytest.mark.requires("fuse")
def test_a_malformed_report_is_refused_and_no_one_else_sees_it(service: Service) -> None:
    with Puppet(service) as puppet:
        good: dict[str, object] = {"pid": 1, "text": "a text", "list": [[1.5, None]]}
        puppet("request", wire.REPORT.number, json.dumps(good).encode().hex())
        for name, body in _REPORTS.items():
            assert outcome(partial(puppet, "request", wire.REPORT.number, body.hex())) == Errno(
                EPROTO
            ), name
            status = service.status()
            assert (status["consumers"][0]["report"], status["last_error"]) == (good, ""), name


@pytest.mark.parametrize("engine", [b"\xc3\xa9", b"\xff" * 16, b"soft\0ware", b"\x1b[2J", b"\n"])
def test_an_engine_has_a_name_in_printable_ascii(engine: bytes) -> None:
    consumer = service_consumer.ConsumerProcess("kvm", 1, 1.0, lambda _, reason: None)
    assert outcome(lambda: consumer.launched(0, engine.ljust(16, b"\0"), bytes(48))) == Errno(
        EPROTO
    )
    consumer.launched(0, b"software".ljust(16, b"\0"), bytes(48))
    assert consumer.report_over(bytes(64), "v10", bytes(32)).engine == "software"
    for sock in consumer.give_sockets():
        sock.close()
    consumer.close()


# Time in which nobody ran.


@pytest.mark.alone("who answers may not be late by a second")
@pytest.mark.requires("fuse")
def test_time_in_which_the_service_did_not_run_is_no_consumers_fault(
    service: Service, fd: int
) -> None:
    with Puppet(service) as puppet:
        file, pid, service_pid = puppet.bind(fd, 0, 8), puppet("pid"), service.info["pid"]
        puppet("manner", file, "stop")

        def freeze_and_thaw() -> None:
            wait_until(
                lambda: (found := process(pid)) is not None and found.state == "T",
                "the consumer to stop",
            )
            stop(service_pid)
            thaw = time.monotonic() + 2 * DEADLINE
            wait_until(lambda: time.monotonic() > thaw, "twice the deadline to pass")
            # The service is thawed first, and looks at the clock.
            go_on(service_pid)
            os.kill(pid, signal.SIGCONT)

        assert _punch_while(fd, freeze_and_thaw) > 2 * DEADLINE
        assert puppet("heard", file) == [["start", 0, 1, None], ["end", 0, 1, None]]
        assert service.status()["last_error"] == ""
