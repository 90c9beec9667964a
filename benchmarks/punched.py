"""Guests that fault while another process punches their memory, beside threads and a memfd."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

from benchmarks.common import BenchError, Figure, Lab, alternate, service
from benchmarks.guest import HEAP_OFFSET, OVERHEAD, SPIN
from restrictedmem.abi import memory
from restrictedmem.fd import receive_with_fds, send_with_fds
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SHIFT
from restrictedmem.vmm.vmm import Vmm

_VCPUS: Final = (1, 2, 4, 8)
_HEAP: Final = 32 << 20
#: Bytes of a punch: as many as one fault of the software engine maps.
_CHUNK: Final = 64 << 10
#: Seconds that a guest may take to touch its heap once.
_PATIENCE: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Counted:
    """Counts of pages that were faulted in and of punches, and the seconds."""

    pages: int
    punches: int
    seconds: float

    @property
    def each(self) -> float:
        """The microseconds that a page took."""
        return self.seconds * 1e6 / max(self.pages, 1)

    def __str__(self) -> str:
        pages, punches = self.pages / self.seconds, self.punches / self.seconds
        return f"{pages:,.0f} pages and {punches:,.0f} punches a second"


@contextmanager
def _guest(started: Service, vcpus: int, engine: str) -> Generator[tuple[int, Callable[[], int]]]:
    """Start a process whose guest writes to its whole heap, over and over.

    Yields the guest's descriptor, and a function that returns how many pages it has taken.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        _be_owner(started, vcpus, engine, theirs)
    theirs.close()
    try:
        _, fds = receive_with_fds(ours, 64)
        if not fds:
            raise BenchError("a guest did not start", "scripts/test tests/test_run.py says why")
        with fds[0] as descriptor:
            yield descriptor.fileno(), partial(_pages, ours)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ours.close()


def _pages(sock: socket.socket) -> int:
    sock.send(b"?")
    found: dict[str, Any] = json.loads(sock.recv(1 << 16))
    return int(found["pages_taken"])


def _be_owner(started: Service, vcpus: int, engine: str, parent: socket.socket) -> NoReturn:
    try:
        with Vmm(_HEAP + OVERHEAD + vcpus * OVERHEAD, started, vcpus=vcpus, engine=engine) as vmm:
            vmm.load(SPIN, ["loop"])
            vmm.launch_finish()
            send_with_fds(parent, b"ready", [vmm.restricted_fd])
            parent.recv(1)
            parent.send(json.dumps(vmm.vm.statistics()).encode())
            for vcpu in vmm.vcpus:
                threading.Thread(target=vcpu.run, daemon=True).start()
            while parent.recv(1):
                parent.send(json.dumps(vmm.vm.statistics()).encode())
    finally:
        os._exit(0)


def _touched_once(started: Service, vcpus: int, engine: str) -> _Counted:
    with _guest(started, vcpus, engine) as (_, pages):
        before, began = pages(), time.perf_counter()
        all_of_it = before + (_HEAP >> PAGE_SHIFT)
        while (now := pages()) < all_of_it:
            if time.perf_counter() - began > _PATIENCE:
                raise BenchError(
                    f"{vcpus} vCPUs did not touch their memory once in {_PATIENCE:g} s",
                    "a vCPU hangs: report this as a bug",
                )
            time.sleep(0.002)
        return _Counted(now - before, 0, time.perf_counter() - began)


def _punched(started: Service, vcpus: int, engine: str, seconds: float) -> _Counted:
    with _guest(started, vcpus, engine) as (fd, pages):
        pages()
        before, began, punches = pages(), time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            memory.fallocate(fd, memory.PUNCH, HEAP_OFFSET + punches * _CHUNK % _HEAP, _CHUNK)
            punches += 1
        return _Counted(pages() - before, punches, time.perf_counter() - began)


def _floor(lab: Lab, threads: int, seconds: float, *, punching: bool) -> _Counted:
    pages, nanoseconds, punches = lab.run(
        "punched", _HEAP, _CHUNK, threads, round(seconds * 1000), int(punching)
    )
    return _Counted(pages, punches, nanoseconds / 1e9)


def _faults_punched(engine: str, lab: Lab) -> Iterator[Figure]:
    """Fault with several vCPUs while another process punches as fast as it can."""
    seconds = lab.amount(1500, 100) / 1000
    with service() as started:
        for vcpus in _VCPUS:
            for punching in (False, True):
                measured: list[_Counted] = []
                floors: list[_Counted] = []

                def ours(
                    vcpus: int = vcpus,
                    punching: bool = punching,
                    measured: list[_Counted] = measured,
                ) -> float:
                    one = (
                        _punched(started, vcpus, engine, seconds)
                        if punching
                        else _touched_once(started, vcpus, engine)
                    )
                    measured.append(one)
                    return one.each

                def floor(
                    vcpus: int = vcpus, punching: bool = punching, floors: list[_Counted] = floors
                ) -> float:
                    floors.append(_floor(lab, vcpus, seconds, punching=punching))
                    return floors[-1].each

                pairs = alternate(floor, ours, lab.rounds(3))
                what = f"{engine}, {vcpus} vCPUs, " + (
                    "punched meanwhile; a page" if punching else "first touch; a page"
                )
                yield pairs.figure(what, "µs", None, f"{measured[-1]}; floor {floors[-1]}")


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {
    "faults-punched": partial(_faults_punched, "software"),
    "kvm-faults-punched": partial(_faults_punched, "kernel"),
}
