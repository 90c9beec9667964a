"""``Refusals``: what a process that refused a connection keeps of it, and for how long."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from errno import EACCES

import pytest

from restrictedmem.fd import readable
from restrictedmem.service import refusals
from restrictedmem.service.refusals import Refusals
from waiting import PATIENCE

REFUSAL = OSError(EACCES, "no")


@pytest.fixture
def kept() -> Iterator[Refusals]:
    with closing(Refusals()) as kept:
        yield kept


def refused(kept: Refusals, uid: int) -> socket.socket:
    """Return the other end of a connection that was refused."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept.refuse(ours, uid, REFUSAL)
    theirs.setblocking(False)
    return theirs


def test_the_error_comes_and_then_the_end(kept: Refusals) -> None:
    with refused(kept, 1) as theirs:
        assert theirs.recv(100) == EACCES.to_bytes(4, "little") + bytes(4) + b"no"
        assert theirs.recv(100) == b""


def read(sock: socket.socket) -> None:
    sock.recv(100)


@pytest.mark.parametrize("end", [read, socket.socket.close])
def test_what_was_read_or_cannot_be_is_kept_no_more(
    kept: Refusals, end: Callable[[socket.socket], None]
) -> None:
    before = os.listdir("/proc/self/fd")
    with refused(kept, 1) as theirs:
        end(theirs)
        kept.hear()
        assert not kept._unread
    assert os.listdir("/proc/self/fd") == before


def test_one_that_is_shut_down_is_kept_until_it_is_closed(kept: Refusals) -> None:
    with refused(kept, 1) as theirs:
        theirs.shutdown(socket.SHUT_RDWR)
        kept.hear()
        assert len(kept._unread) == 1
    kept.hear()
    assert not kept._unread


def test_so_many_of_a_uid_and_in_all(kept: Refusals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_MOST", 10)
    uids = [1] * 9 + [2] * 3
    theirs = [refused(kept, uid) for uid in uids]
    told = [bool(sock.recv(1, socket.MSG_PEEK)) for sock in theirs]
    assert told == [True] * 8 + [False] + [True] * 2 + [False]
    # A client that reads makes room, before another message comes.
    theirs[0].recv(100)
    with refused(kept, 2) as late:
        assert late.recv(100)
    for sock in theirs:
        sock.close()


def test_descriptors_that_wait_in_a_refused_connection_go_with_it(kept: Refusals) -> None:
    reader, writer = os.pipe()
    with refused(kept, 1) as theirs:
        socket.send_fds(theirs, [b"."], [writer])
        os.close(writer)
    kept.hear()
    # A child holds the last copy of the socket, and has to end first.
    assert readable([reader], PATIENCE)
    assert os.read(reader, 1) == b""
    os.close(reader)
