"""Programs under exec that wait, while others call."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from foreign_fuse import Foreign
from restrictedmem.fd import readable
from under_exec import EXEC, PRELUDE, supervisor_of
from waiting import wait_until

MAGIC = 0x5245534D
FUSE_MAGIC = 0x65735546
#: The answer of another program whose calls all go on.
WELL = (0, MAGIC, True)

CALLS = f"""
import signal, socket, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
libc.mmap.restype = ctypes.c_void_p
NOWHERE = ctypes.c_void_p(-1).value

def private(fd):
    "Map a file privately; return an errno."
    at = libc.mmap(None, ctypes.c_size_t(4096), 1, 2, fd, ctypes.c_long(0))
    return ctypes.get_errno() if at == NOWHERE else 0

def kind(fd, at=None):
    "Return the file system's magic number that fstatfs says, or writes to an address."
    found = (ctypes.c_uint64 * 15)() if at is None else (ctypes.c_uint64 * 15).from_address(at)
    return -ctypes.get_errno() if libc.fstatfs(fd, ctypes.byref(found)) else found[0]

plain = os.open(sys.executable, os.O_RDONLY)

class Other:
    "Another program: on request, it makes each of the calls that stop, and reports the results."
    def __init__(self):
        self.sock, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.sock.close()
            while theirs.recv(1):
                theirs.send(repr((private(plain), kind(fd), call(0) > 0)).encode())
            os._exit(0)
        theirs.close()
        self.sock.settimeout(10)

    def goes_on(self):
        self.sock.send(b".")
        return eval(self.sock.recv(99))

def forked(body):
    "Run body in a program of its own."
    pid = os.fork()
    if pid == 0:
        try: body()
        finally: os._exit(0)
    return pid

def let_stop():
    "Have the foreign server stopped."
    print("None", flush=True); sys.stdin.readline()

def until(what, holds):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, what
        os.sched_yield()

def enters(pid, number):
    "Wait until a program is in a system call, and the supervisor's or the kernel's to answer."
    path = f"/proc/{{pid}}/syscall"
    until("a call to begin", lambda: open(path).read().split()[0] == str(number))

def watched():
    "Map a page whose first touch waits until the descriptor that is returned is closed."
    from restrictedmem.abi import userfaultfd as uffd
    at = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0))
    watch = uffd.userfaultfd(0)
    uffd.UFFDIO_API(watch, uffd.uffdio_api(api=uffd.UFFD_API, features=0))
    missing = uffd.UFFDIO_REGISTER_MODE_MISSING
    uffd.UFFDIO_REGISTER(watch, uffd.uffdio_register(start=at, len=4096, mode=missing))
    return at, watch
"""

#: The beginning of programs.
FIRST = "fd = call(0)\n"


@contextmanager
def program(
    code: str, mark: str, server: Foreign | None = None, first: str = FIRST
) -> Generator[subprocess.Popen[str]]:
    """Run Python code under exec in a session of its own; ``root`` is that of ``server``'s mount.

    All of it is killed at the end, the server first, without which a call that waits for it would
    never end.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [
            *EXEC,
            "--",
            sys.executable,
            "-c",
            f"{PRELUDE}{CALLS}{first}root = {server and server.root}\n{code}",
        ],
        stdin=pipe,
        stdout=pipe,
        text=True,
        env={**os.environ, "MARK": mark},
        pass_fds=[] if server is None else [server.root],
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if server is not None:
            server.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        for end in (process.stdin, process.stdout):
            assert end is not None
            end.close()
        wait_until(lambda: supervisor_of(mark) is None, "the supervisor to end")


def said(code: str, mark: str, server: Foreign | None = None, first: str = FIRST) -> Any:
    """Return the value that Python code prints first."""
    with program(code, mark, server, first) as process:
        return heard(process)


def heard(process: subprocess.Popen[str]) -> Any:
    """Return the value of the next line that a program prints, or fail after its patience."""
    assert process.stdout is not None
    ready = readable([process.stdout], 30)
    assert ready, "the program says nothing for 30 s"
    return eval(process.stdout.readline())


def go_on(process: subprocess.Popen[str]) -> None:
    """Let a program go on that reads a line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def stop(server: Foreign, process: subprocess.Popen[str]) -> None:
    """Stop the server of a file that a program has opened."""
    assert heard(process) is None
    server.stop()
    go_on(process)


@pytest.fixture
def mark(tmp_path: Path) -> str:
    return f"{tmp_path}-{os.getpid()}"
