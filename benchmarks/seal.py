"""The guest ``seal``: the cost of a signature that the owner could not have made itself."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Final

from benchmarks.common import BenchError, Figure, Lab, alternate, service
from restrictedmem import guests
from restrictedmem.service.client import Service
from restrictedmem.vmm import elf
from restrictedmem.vmm.vmm import Vmm

_REQUEST: Final = b"sign " + bytes(range(65, 65 + 26)) * 2 + b"0123456789ab" + b"\n"
_ANSWER: Final = 65
ENGINES: Final = ("software", "kernel")


def requests(sock: socket.socket, count: int) -> float:
    """Have ``count`` messages of 64 bytes signed, one after the other; return how many a second."""
    began = time.perf_counter()
    for _ in range(count):
        sock.sendall(_REQUEST)
        if len(sock.recv(_ANSWER, socket.MSG_WAITALL)) != _ANSWER:
            raise BenchError("the guest stopped", "restrictedmem run seal, and type: sign hello")
    return count / (time.perf_counter() - began)


@contextmanager
def _guest(started: Service, engine: str) -> Generator[socket.socket]:
    try:
        vmm = Vmm(4 << 20, started, engine=engine)
    except OSError as error:
        raise BenchError(
            f"no {engine} engine: {error.strerror}", "restrictedmem doctor says what is missing"
        ) from None
    ours, theirs = socket.socketpair()
    with vmm, ours, theirs, theirs.makefile("rwb", buffering=0) as stream:
        vmm.load(elf.parse(guests.path("seal").read_bytes()))
        thread = threading.Thread(target=vmm.run, args=(stream, stream, stream))
        thread.start()
        yield ours
        ours.shutdown(socket.SHUT_WR)
        thread.join()


@contextmanager
def _process(lab: Lab) -> Generator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [lab.program("seal"), str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        yield ours
        ours.shutdown(socket.SHUT_WR)
        process.wait()


def seal(lab: Lab) -> Iterator[Figure]:
    """Sign messages of 64 bytes, beside a process that does the same over such a socket."""
    count = lab.amount(2000, 20)
    for engine in ENGINES:
        with service() as started, _process(lab) as process, _guest(started, engine) as guest:
            pairs = alternate(
                lambda: requests(process, count), lambda: requests(guest, count), lab.rounds(5)
            )
        yield pairs.figure(f"seal, {engine} engine: signatures of 64-byte messages", "/s")


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {"seal": seal}
