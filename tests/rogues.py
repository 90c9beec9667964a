"""Strangers who take the names of services, and answer what they like, or never."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import pytest

from restrictedmem.service import discover, wire
from restrictedmem.service.client import Service
from users import own_network

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

HEAD = struct.Struct("=II")
#: Seconds: far above the time it takes, far below the time for one service after the other.
SOON = discover.PATIENCE + 28


def said(text: bytes, total: int | None = None) -> bytes:
    """Return a reply to STATUS."""
    return HEAD.pack(0, 0) + wire.NUMBER.pack(len(text) if total is None else total) + text


def state(**changes: object) -> bytes:
    return said(json.dumps({**GOOD, **changes}).encode())


def answers(*replies: bytes) -> Callable[[socket.socket], None]:
    """Answer each request with the next of some replies, the last of them again and again."""

    def serve(sock: socket.socket) -> None:
        left = list(replies)
        while sock.recv(100):
            sock.send(left.pop(0) if len(left) > 1 else left[0])

    return serve


def silent(sock: socket.socket) -> None:
    while sock.recv(100):
        pass


LATE = f"did not answer within {discover.PATIENCE:g} s"


@contextmanager
def rogue(
    serve: Callable[[socket.socket], None],
    name: str = "restrictedmem/{pid}",
    uid: int = ROGUE,
    first: Callable[[], object] = os.getpid,
    more: int = 0,
) -> Generator[int, None, None]:
    """Run another user's process that listens on a name like a service's; yield its pid.

    The process also listens on ``more`` further names, which nobody serves.
    """
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
