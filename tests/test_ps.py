"""``ps`` among strangers: names are anybody's to take, and whoever took one answers what it likes, or never."""

import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import EPROTO, ESRCH, ETIMEDOUT
from functools import partial
from typing import Any, NoReturn

import pytest

from outcomes import Errno, in_child, outcome
from restrictedmem.abi import process
from restrictedmem.fd import send_with_fds
from restrictedmem.service import discover, wire
from restrictedmem.service.client import Service
from users import own_network
from waiting import PATIENCE, wait_until

pytestmark = pytest.mark.requires("fuse", "root")

ROGUE = 64001
GOOD: dict[str, Any] = {
    "pid": 1,
    "owner_pid": 1,
    "owner_uid": 0,
    "way": "own mount",
    "api": "v10",
    "descriptors": [],
    "consumers": [],
    "last_error": "",
}
_CLONE_NEWPID = 0x2000_0000
_HEAD = struct.Struct("=II")
#: Far above what it takes, far below what one after the other would.
SOON = discover.PATIENCE + 28


def said(text: bytes, total: int | None = None) -> bytes:
    """Return a reply to STATUS."""
    return _HEAD.pack(0, 0) + wire.NUMBER.pack(len(text) if total is None else total) + text


def state(**changes: object) -> bytes:
    return said(json.dumps({**GOOD, **changes}).encode())


def answers(*replies: bytes) -> Callable[[socket.socket], None]:
    """Answer each request with the next of some replies, the last of them again and again."""

    def serve(sock: socket.socket) -> None:
        left = list(replies)
        while sock.recv(100):
            sock.send(left.pop(0) if len(left) > 1 else left[0])

    return serve


def with_a_pipe(sock: socket.socket) -> None:
    sock.recv(100)
    reader, _ = os.pipe()
    send_with_fds(sock, _HEAD.pack(0, 0), [reader])
    sock.recv(1)


def silent(sock: socket.socket) -> None:
    while sock.recv(100):
        pass


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


NO_STATE = "its answer is no service's state"
NO_JSON = "its answer is no JSON"
NO_ANSWER = "its answer is no service's"
LATE = f"did not answer within {discover.PATIENCE:g} s"
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
    "an errno": (answers(_HEAD.pack(0xFFFF_FFFF, 0)), NO_ANSWER),
    "an error with escapes": (answers(_HEAD.pack(13, 0) + b"\x1b[2J"), r"\x1b[2J"),
    "a head alone": (answers(_HEAD.pack(0, 0)), NO_ANSWER),
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


@contextmanager
def rogue(
    serve: Callable[[socket.socket], None],
    name: str = "restrictedmem/{pid}",
    uid: int = ROGUE,
    first: Callable[[], object] = os.getpid,
    more: int = 0,
) -> Generator[int, None, None]:
    """Run a process of another user that listens on a name like a service's, and on ``more`` that nobody serves; yields its pid."""
    ready, said_ready = os.pipe()
    child = os.fork()
    if child == 0:
        first()
        _be_rogue(serve, name.format(pid=os.getpid()), uid, said_ready, more)
    try:
        os.close(said_ready)
        with open(ready, "rb") as pipe:
            assert pipe.read(1) == b"."
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _be_rogue(
    serve: Callable[[socket.socket], None], name: str, uid: int, ready: int, more: int
) -> NoReturn:
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"\0{name}")
        listener.listen(9)
        kept = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(more)]
        for number, sock in enumerate(kept):
            sock.bind(f"\0{name}/{number:x}")
            sock.listen(9)
        os.write(ready, b".")
        os.close(ready)
        while True:
            sock, _ = listener.accept()
            with sock, suppress(OSError):
                serve(sock)
    finally:
        os._exit(1)


@pytest.fixture(autouse=True)
def alone_by_name() -> Iterator[None]:
    """Other tests' services are not listed, and their names not taken."""
    with own_network():
        yield


@pytest.fixture
def service() -> Generator[Service, None, None]:
    with Service.start() as service:
        yield service


def ps(*arguments: str, start: tuple[str, ...] = ()) -> str:
    """Return what the command writes to a terminal that knows UTF-8."""
    began = time.monotonic()
    done = subprocess.run(
        [*start, sys.executable, "-m", "restrictedmem", "ps", *arguments],
        capture_output=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert time.monotonic() - began < SOON
    return done.stdout.decode()


def real(service: Service) -> str:
    """Return how the line of a service of this process begins."""
    return f"service {service.info['pid']}: uid 0, owner {os.getpid()}, "


def lines_of(pid: int, shown: str) -> list[str]:
    return [line for line in shown.splitlines() if line.startswith(f"service {pid}:")]


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
    # Whose it is says the kernel.
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


def test_both_forms_of_a_name() -> None:
    with rogue(answers(state()), "restrictedmem/{pid}/0123456789abcdef") as pid:
        assert discover.names()[f"restrictedmem/{pid}/0123456789abcdef"] == pid
        assert discover.status_of(pid)["uid"] == ROGUE


def test_who_asks_stays_as_dumpable_as_it_was() -> None:
    def ask(dumpable: int) -> int:
        process.prctl(process.PR_SET_DUMPABLE, dumpable)
        assert discover.status_of(pid)["uid"] == ROGUE
        return process.prctl(process.PR_GET_DUMPABLE)

    with rogue(answers(state())) as pid:
        assert [in_child(partial(ask, dumpable)) for dumpable in (0, 1)] == ["0", "1"]


def test_a_service_in_a_pid_namespace_of_its_own() -> None:
    def inside() -> None:
        process.unshare(_CLONE_NEWPID)
        if os.fork():
            os.wait()
            os._exit(0)
        process.prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
        assert os.getpid() == 1

    secret = f"restrictedmem/1/{os.getpid():x}"
    with rogue(answers(state(api="inside")), secret, uid=0, first=inside) as outer:
        (entry,) = [each for each in discover.statuses() if each.get("api") == "inside"]
        assert entry["pid"] > outer
        assert discover.status_of(1)["pid"] == entry["pid"]


def test_a_number_is_first_of_all_one_of_this_pid_namespace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers_of = discover._numbers_of

    def two_for_one(peer: int) -> set[int]:
        return {peer, pid} if peer == below else numbers_of(peer)

    with (
        rogue(answers(state(api="here"))) as pid,
        rogue(answers(state(api="below")), f"restrictedmem/{pid}/ab") as below,
    ):
        monkeypatch.setattr(discover, "_numbers_of", two_for_one)
        for names in (
            [f"restrictedmem/{pid}", f"restrictedmem/{pid}/ab"],
            [f"restrictedmem/{pid}/ab", f"restrictedmem/{pid}"],
        ):
            monkeypatch.setattr(discover, "names", lambda: dict.fromkeys(names, pid))  # noqa: B023  called at once
            assert discover.status_of(pid)["api"] == "here"


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


def test_names_with_junk_are_nobodys(service: Service) -> None:
    junk = [
        b"restrictedmem/",
        b"restrictedmem/x",
        b"restrictedmem/-1",
        b"restrictedmem/1 ",
        b"restrictedmem/1/",
        b"restrictedmem/1/XYZ",
        b"restrictedmem/1/00/00",
        b"restrictedmem/99999999999",
        "restrictedmem/\u0661".encode(),
        b"restrictedmem/1\n",
        b"x@restrictedmem/1",
        b"x\n0: 2 0 00010000 0005 01 1 @restrictedmem/1",
        b"\xff\xfe\x1b[2J@restrictedmem/1",
    ]
    with ExitStack() as stack:
        for name in junk:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.bind(b"\0" + name)
            sock.listen()
        stream = stack.enter_context(socket.socket(socket.AF_UNIX))
        stream.bind("\0restrictedmem/1")
        stream.listen()
        shown = ps()
    assert real(service) in shown
    assert not lines_of(1, shown)
    with ExitStack() as stack:
        before = discover.names()
        for name in junk:
            if b"\n" not in name:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                sock.bind(b"\0" + name)
                sock.listen()
        assert "restrictedmem/1" not in discover.names().keys() - before.keys()


def test_thousands_of_names_in_bounded_time(service: Service) -> None:
    count = 3000
    with ExitStack() as stack:
        pid = os.getpid()
        for number in range(count):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.bind(f"\0restrictedmem/{pid}/{number:x}")
            # A backlog that is full at once for a third of them; nobody ever accepts.
            sock.listen(0 if number % 3 else 9)
        shown = ps()
    assert real(service) in shown
    assert len(lines_of(pid, shown)) <= discover_shown()
    assert re.search(r"^… \d+ more that say no state, of uid 0 ", shown, re.MULTILINE)


def test_names_beyond_the_descriptors_of_who_asks(service: Service) -> None:
    """With few left, so many of a uid are asked at a time, and nobody's answer is that there was none."""
    with rogue(silent, more=1000) as one, rogue(silent, uid=ROGUE + 1, more=1000) as other:
        shown = ps("--json", start=("prlimit", "--nofile=1600"))
    entries = json.loads(shown)["services"]
    assert [each["owner_pid"] for each in entries if each["pid"] == service.info["pid"]] == [
        os.getpid()
    ]
    for pid, uid in (one, ROGUE), (other, ROGUE + 1):
        said_so = Counter(each["error"] for each in entries if each["pid"] == pid)
        assert said_so.keys() == {LATE, f"was not asked: others of uid {uid} did not answer"}
        assert sum(said_so.values()) == 1001
        assert said_so[LATE] >= discover._AT_ONCE


def discover_shown() -> int:
    from restrictedmem.cli import ps as command

    return command._SHOWN


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
