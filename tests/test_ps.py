"""``ps`` among strangers: whoever took a service's name answers what it likes, or never."""

import json
import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from errno import EPROTO, ESRCH, ETIMEDOUT
from functools import partial
from typing import Any

import pytest

from outcomes import Errno, in_child, outcome
from restrictedmem.abi import process
from restrictedmem.fd import send_with_fds
from restrictedmem.service import discover, wire
from restrictedmem.service.client import Service
from rogues import (
    HEAD,
    LATE,
    ROGUE,
    alone_by_name,
    answers,
    lines_of,
    ps,
    real,
    rogue,
    said,
    service,
    silent,
    state,
)
from waiting import PATIENCE, wait_until

__all__ = ["alone_by_name", "service"]

pytestmark = pytest.mark.requires("fuse", "root")


def with_a_pipe(sock: socket.socket) -> None:
    sock.recv(100)
    reader, _ = os.pipe()
    send_with_fds(sock, HEAD.pack(0, 0), [reader])
    sock.recv(1)


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


NO_STATE = "its answer is not a service's state"
NO_JSON = "its answer is not JSON"
NO_ANSWER = "its answer is not a service's"

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\r\nservice 1: uid 0, all is well\u202e\ud800"

MODES: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "no key": (answers(said(b"{}")), NO_STATE),
    "a list": (answers(said(b"[1,2]")), NO_STATE),
    "a key of another type": (answers(state(descriptors={})), NO_STATE),
    "a little too deep": (answers(state(other=nested(20))), NO_STATE),
    "a number without an end": (answers(state(owner_uid=10**400)), NO_STATE),
    "a negative number": (answers(state(owner_pid=-1)), NO_STATE),
    "a bool": (answers(state(owner_pid=True)), NO_STATE),
    "a descriptor without a size": (answers(state(descriptors=[{"ino": 1}])), NO_STATE),
    "deep": (answers(said(b"[" * 100_000)), NO_JSON),
    "not a number": (answers(state(other=float("nan"))), NO_JSON),
    "infinity": (answers(said(b'{"a": 1e999}')), NO_JSON),
    "no text": (answers(said(b"\xff\xfe")), NO_JSON),
    "an errno": (answers(HEAD.pack(0xFFFF_FFFF, 0)), NO_ANSWER),
    "an error with escapes": (answers(HEAD.pack(13, 0) + b"\x1b[2J"), r"\x1b[2J"),
    "a head alone": (answers(HEAD.pack(0, 0)), NO_ANSWER),
    "half a head": (answers(b"xyz"), NO_ANSWER),
    "too long": (answers(bytes(wire.MAX_MESSAGE + 100)), NO_ANSWER),
    "no state": (answers(said(b"")), NO_ANSWER),
    # A kernel that refuses descriptors to the sender has it die of that.
    "a pipe": (with_a_pipe, ""),
    "a hang-up": (lambda _: None, "ended, or answers nobody of this user"),
    "silent": (silent, LATE),
    "byte by byte": (answers(said(b" ", 1 << 60)), LATE),
    "many values": (answers(said(b"," * 100_000, 1_100_000)), "say more than 1048576 values"),
    "without an end": (answers(said(bytes(100_000), 1 << 63)), "say more than"),
}


def test_every_service_and_one_line_for_each_stranger(service: Service) -> None:
    with ExitStack() as stack:
        # Each of its own uid: one's flood is not another's.
        pids = {
            name: stack.enter_context(rogue(serve, uid=ROGUE + number))
            for number, (name, (serve, _)) in enumerate(MODES.items())
        }
        shown, data = ps(), json.loads(ps("--json"))
    assert real(service) in shown
    entries = {entry["pid"]: entry for entry in data["services"]}
    assert entries[service.info["pid"]]["owner_pid"] == os.getpid()
    for number, (name, pid) in enumerate(pids.items()):
        (line,) = lines_of(pid, shown)
        assert MODES[name][1] in line, name
        assert line.endswith(f" (uid {ROGUE + number})"), name
        assert entries[pid].keys() == {"pid", "uid", "error"}, name
    assert all(line.isprintable() for line in shown.splitlines())


def test_what_a_stranger_says_of_itself_is_shown_as_text(service: Service) -> None:
    files = [{"ino": 1, "size": 2, "resident": (1 << 64) - 1, "notifiers": 0}] * 2
    report = {"pid": ESCAPES, "locked_bytes": 0, "unlocked_because": ESCAPES}
    vm: dict[str, Any] = {
        "name": ESCAPES,
        "number": 1,
        "files": [],
        "invalidations": 0,
        "report": report,
    }
    reports: list[object] = [[], None, 7, {"locked_bytes": "x"}, {"locked_bytes": -1}]
    odd = [{**vm, "report": each} for each in reports]
    said_so = state(last_error=ESCAPES, way=ESCAPES, consumers=[vm, *odd], descriptors=files)
    with rogue(answers(said_so)) as pid:
        shown = ps()
        entry = next(each for each in json.loads(ps("--json"))["services"] if each["pid"] == pid)
    assert real(service) in shown
    # The kernel says whose process it is.
    (line,) = lines_of(pid, shown)
    assert line.startswith(f"service {pid}: uid {ROGUE} for uid 0, ")
    assert (entry["pid"], entry["uid"]) == (pid, ROGUE)
    assert not lines_of(1, shown)
    assert all(each.isprintable() for each in shown.splitlines())


def test_what_a_stranger_says_of_itself_takes_a_few_lines(service: Service) -> None:
    vm: dict[str, Any] = {
        "name": "x",
        "number": 1,
        "files": [7] * 30,
        "invalidations": 0,
        "report": 0,
    }
    whole = {**vm, "files": [8] * 20}
    long = "x" * 20_000
    with rogue(answers(state(consumers=[whole] + [vm] * 29, last_error=long, way=long))) as pid:
        shown = ps()
        entry = next(each for each in json.loads(ps("--json"))["services"] if each["pid"] == pid)
    lines = shown.splitlines()
    assert max(map(len, lines)) == 1000
    # Nothing is left out of as many as are shown.
    for files, count in ("7 " * 20 + "…", 19), ("8 " * 19 + "8", 1):
        end = f", descriptors {files}, 0 invalidations"
        assert sum(line.endswith(end) for line in lines) == count
    assert "  … 10 more VMs and consumers (--json lists all)" in lines
    assert any(line.startswith("  last error: xxx") for line in lines)
    assert (len(entry["consumers"]), entry["last_error"]) == (30, long)


def test_a_name_of_another_process(service: Service) -> None:
    pid = service.info["pid"]
    with ExitStack() as stack:
        for secret in "00", "ff":
            name = f"restrictedmem/{pid}/{secret}"
            squatter = stack.enter_context(rogue(answers(state()), name))
            assert name in discover.names()
        assert discover.status_of(pid)["owner_pid"] == os.getpid()
        shown = ps()
    lines = lines_of(pid, shown)
    held = f"the name is held by process {squatter}, of uid {ROGUE} (uid {ROGUE})"
    assert lines.count(f"service {pid}: {held}") == 1
    assert len(lines) == 3
    assert sum(line.startswith(real(service)) for line in lines) == 1


@pytest.mark.parametrize("pids", ["1", "x"])
def test_a_name_of_a_thread_is_no_line_of_its_status(service: Service, pids: str) -> None:
    """The kernel leaves "\\r" in the name, and the name stands before the pids."""
    with rogue(
        answers(state()), "restrictedmem/1/00", first=partial(process.set_name, f"\rNSpid: {pids}")
    ) as pid:
        shown = ps()
    assert real(service) in shown
    assert lines_of(1, shown) == [
        f"service 1: the name is held by process {pid}, of uid {ROGUE} (uid {ROGUE})"
    ]


def test_who_asks_stays_as_dumpable_as_it_was() -> None:
    def ask(dumpable: int) -> int:
        process.prctl(process.PR_SET_DUMPABLE, dumpable)
        assert discover.status_of(pid)["uid"] == ROGUE
        return process.prctl(process.PR_GET_DUMPABLE)

    with rogue(answers(state())) as pid:
        assert [in_child(partial(ask, dumpable)) for dumpable in (0, 1)] == ["0", "1"]


def test_a_service_without_room_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = threading.Event()
    honest = discover._Question.connect

    def connect(question: Any, admit: Callable[[int], bool]) -> bool:
        done = honest(question, admit)
        if not done:
            refused.set()
        return done

    monkeypatch.setattr(discover._Question, "connect", connect)
    kind = socket.AF_UNIX, socket.SOCK_SEQPACKET
    found: list[dict[str, Any]] = []
    with socket.socket(*kind) as listener, socket.socket(*kind) as guest:
        name = f"\0restrictedmem/{os.getpid()}/ab"
        listener.bind(name)
        listener.listen(0)
        guest.connect(name)
        asking = threading.Thread(target=lambda: found.append(discover.status_of(os.getpid())))
        asking.start()
        assert refused.wait(PATIENCE)
        listener.settimeout(0.1)
        while asking.is_alive():
            with suppress(TimeoutError), listener.accept()[0] as sock:
                sock.settimeout(0.1)
                if sock.recv(100):
                    sock.send(state())
                    asking.join()
    assert [each["pid"] for each in found] == [os.getpid()]


def test_no_descriptor_of_a_stranger_becomes_ours() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    with ours, theirs:
        question = discover._Question("x", 1, uid=ROGUE, sock=ours)
        send_with_fds(theirs, said(b" ", 100), [reader])
        os.close(reader)
        question.receive({})
        assert question.error is not None
        assert question.error.errno == EPROTO
        question.close()
        # The only copy was in the message, which goes with the child that has the socket at last.
        poll = select.poll()
        poll.register(writer, 0)
        assert poll.poll(PATIENCE * 1000) == [(writer, select.POLLERR)]
    os.close(writer)


def test_errors_of_one() -> None:
    for serve, number in (answers(said(b"{}")), EPROTO), (silent, ETIMEDOUT):
        with rogue(serve) as pid:
            assert outcome(lambda: discover.status_of(pid)) == Errno(number)
    assert outcome(lambda: discover.status_of(pid)) == Errno(ESRCH)


def test_a_state_longer_than_a_message(service: Service) -> None:
    fds = [service.memfd_restricted() for _ in range(6000)]
    before = service.status()["descriptors"]
    assert len(before) == 6000
    assert len(json.dumps(before)) > 2 * wire.MAX_MESSAGE
    assert discover.status_of(service.info["pid"])["descriptors"] == before
    for fd in fds:
        os.close(fd)
    wait_until(lambda: service.status()["descriptors"] == [], "the files' end")


def test_a_state_is_that_of_its_first_piece(service: Service) -> None:
    fds = [service.memfd_restricted() for _ in range(6000)]
    channel = service._own_channel()
    first, _ = channel.call(wire.STATUS)
    (total,) = wire.NUMBER.unpack_from(first)
    text = first[wire.NUMBER.size :]
    for fd in fds:
        os.close(fd)
    while len(text) < total:
        text += channel.call(wire.STATUS, wire.NUMBER.pack(len(text)))[0][wire.NUMBER.size :]
    assert len(json.loads(text)["descriptors"]) == 6000
    # It was kept to its end, and no longer.
    assert outcome(lambda: channel.call(wire.STATUS, wire.NUMBER.pack(len(text)))) == Errno(22)
    assert outcome(lambda: channel.call(wire.STATUS, b"x")) == Errno(EPROTO)
