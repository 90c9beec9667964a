"""Attacks on others' commands: serve, exec and ps go on beside whoever takes their time."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from attacks_on_others import request
from field import Attack, Field, works
from restrictedmem.fd import readable
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.exec_service import PACKAGE_ROOT
from under_exec import PRELUDE
from users import ORDINARY, as_user
from waiting import PATIENCE, wait_until


@contextmanager
def _forks(count: int, body: Callable[[], None]) -> Generator[None]:
    """Run something in some children, again and again, which are killed at the end."""
    pids: list[int] = []
    for _ in range(count):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                while True:
                    body()
            finally:
                os._exit(1)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def connect_loops(field: Field) -> Iterator[None]:
    yield

    def connect() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, suppress(OSError):
            sock.connect(str(field.place / "socket"))

    with _forks(2, connect):
        for _ in field.until_over():
            os.sched_yield()


def _serve(place: Path) -> None:
    command = [sys.executable, "-m", "restrictedmem", "serve", "--socket", str(place / "socket")]
    with open(place / "log", "wb") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            wait_until((place / "socket").exists, "the server", 20)
            for _ in range(5):
                # Another uid than the attacker's, root's or not.
                assert as_user(lambda: _served(place / "socket"), ORDINARY - 1, fuse=False)
            assert server.poll() is None
        finally:
            server.terminate()
            server.wait(PATIENCE)


def _served(path: Path) -> bool:
    began = time.monotonic()
    with Service.connect(str(path)) as service:
        found = works(service)
    assert time.monotonic() - began < 20
    return found


def rogue_status_sockets(field: Field) -> Iterator[None]:
    yield
    words = b"\x1b[2J\x1b]0;owned\x07"
    replies: Sequence[bytes | None] = (
        None,
        b"x",
        request(13) + words,
        request(0) + bytes(8),
        request(0, b"\xff" * 9),
        bytes(wire.MAX_MESSAGE),
    )
    with ExitStack() as stack:
        for number, reply in enumerate(replies):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(f"\0restrictedmem/{os.getpid()}/{secrets.token_hex(8)}{number:x}")
            listener.listen(9)
            stack.enter_context(_forks(1, partial(_answer, listener, reply)))
        for _ in field.until_over():
            os.sched_yield()


def _answer(listener: socket.socket, reply: bytes | None) -> None:
    with listener.accept()[0] as sock:
        while sock.recv(100):
            if reply is not None:
                sock.send(reply)


def _ps(_: Path) -> None:
    with Service.start() as service:
        done = subprocess.run(
            [sys.executable, "-m", "restrictedmem", "ps"],
            capture_output=True,
            check=True,
            timeout=60,
        )
        shown = done.stdout.decode()
        assert f"service {service.info['pid']}: uid 0" in shown
        assert all(line.isprintable() for line in shown.splitlines()), shown


def a_file_under_exec(field: Field) -> Iterator[None]:
    mute = field.mute()
    root = mute.root
    command = [
        sys.executable,
        "-m",
        "restrictedmem",
        "exec",
        "--",
        sys.executable,
        "-c",
        PRELUDE + _UNDER_EXEC,
        PACKAGE_ROOT,
        str(root),
    ]
    pipe = subprocess.PIPE
    program = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, pass_fds=[root], start_new_session=True
    )
    with program:
        try:
            # It gives its capabilities up itself: before that it needs a service.
            assert _line(program) == "ready"
            yield
            assert program.stdin is not None
            program.stdin.write("go\n")
            program.stdin.flush()
            assert _line(program) == "0"
        finally:
            # A process that waits for the file ends with the file's server.
            field.end_mutes()
            os.killpg(program.pid, signal.SIGKILL)


def _line(program: "subprocess.Popen[str]") -> str:
    assert program.stdout is not None
    assert readable([program.stdout], 20), "waited 20 s for a line of the program"
    return program.stdout.readline().rstrip()


_UNDER_EXEC: Final = """
sys.path.insert(0, sys.argv[1])
from restrictedmem.audit.attacker import drop_capabilities
def private(fd):
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, ctypes.c_size_t(4096), 1, 2, fd, ctypes.c_long(0))
    return ctypes.get_errno() if at == ctypes.c_void_p(-1).value else 0
def forked(body):
    pid = os.fork()
    if pid == 0:
        try: body()
        finally: os._exit(0)
    return pid
plain = os.open(sys.executable, os.O_RDONLY)
assert call(0) > 0
drop_capabilities()
print("ready", flush=True)
sys.stdin.readline()
reader, writer = os.pipe()
def map_mute():
    file = os.open("f", os.O_RDWR, dir_fd=int(sys.argv[2]))
    os.write(writer, b".")
    private(file)
forked(map_mute)
os.read(reader, 1)
# Whenever it comes to the mapping, the others' go on.
for _ in range(300):
    assert private(plain) == 0
    other = forked(lambda: os.write(writer, b"0" if private(plain) == 0 else b"1"))
    os.waitpid(other, 0)
    assert os.read(reader, 1) == b"0"
print(0, flush=True)
sys.stdin.readline()
"""

ATTACKS: Final = {
    "two connect loops at serve": Attack(
        "another user is served", connect_loops, _serve, seconds=150
    ),
    "a FUSE file under exec": Attack("other programs' calls go on", a_file_under_exec, seconds=100),
    "rogue status sockets": Attack(
        "ps shows the others, and no escape sequence", rogue_status_sockets, _ps, seconds=100
    ),
}
