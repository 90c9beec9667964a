"""``ps`` and the names that it finds: by the thousand, with junk, and of other namespaces."""

import json
import os
import re
import signal
import socket
from collections import Counter
from contextlib import ExitStack

import pytest

from restrictedmem.abi import process
from restrictedmem.service import discover
from restrictedmem.service.client import Service
from rogues import (
    LATE,
    ROGUE,
    alone_by_name,
    answers,
    lines_of,
    ps,
    real,
    rogue,
    service,
    silent,
    state,
)

__all__ = ["alone_by_name", "service"]

pytestmark = pytest.mark.requires("fuse", "root")

_CLONE_NEWPID = 0x2000_0000


def test_both_forms_of_a_name() -> None:
    with rogue(answers(state()), "restrictedmem/{pid}/0123456789abcdef") as pid:
        assert discover.names()[f"restrictedmem/{pid}/0123456789abcdef"] == pid
        assert discover.status_of(pid)["uid"] == ROGUE


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
    assert re.search(r"^… \d+ more without a state, of uid 0 ", shown, re.MULTILINE)


def test_names_beyond_the_descriptors_of_who_asks(service: Service) -> None:
    """With few descriptors left, ``ps`` asks a limited number of each uid's services at a time.

    No service fails for want of descriptors.
    """
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
