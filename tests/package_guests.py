"""The guests of the package in the small VMM: run to their end, or talked to."""

import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Final

import pytest

from restrictedmem import guests
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm import elf
from restrictedmem.vmm.vmm import Ended, Vmm

ENGINES: Final = ("software", pytest.param("kernel", marks=pytest.mark.requires("kvm")))

#: Seconds in which what is stopped has to end; the figures are the benchmarks' to take.
SOON: Final = 5


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(scope="module", params=["v10", "v9"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with Service.start(Options(api=request.param)) as found:
        yield found


@dataclass(frozen=True)
class Done:
    ended: Ended
    out: bytes
    err: bytes


def load(vmm: Vmm, guest: str, *arguments: str) -> Vmm:
    vmm.load(elf.parse(guests.path(guest).read_bytes()), arguments)
    return vmm


def run(vmm: Vmm, stdin: bytes = b"") -> Done:
    with (
        TemporaryFile(buffering=0) as source,
        TemporaryFile(buffering=0) as out,
        TemporaryFile(buffering=0) as err,
    ):
        source.write(stdin)
        source.seek(0)
        ended = vmm.run(source, out, err)
        out.seek(0)
        err.seek(0)
        return Done(ended, out.read(), err.read())


@dataclass
class Talk:
    """A guest that runs in a thread, and the other ends of its streams."""

    vmm: Vmm
    say: io.FileIO
    hear: io.BufferedReader
    thread: threading.Thread
    ended: list[Ended]

    def ask(self, request: str) -> str:
        self.say.write(request.encode() + b"\n")
        return self.hear.readline().decode().rstrip("\n")

    def end(self) -> Ended:
        self.say.close()
        return self.wait()

    def wait(self) -> Ended:
        self.thread.join(SOON)
        assert self.ended, f"the guest still ran after {SOON} s"
        self.hear.close()
        return self.ended[0]


def talk(vmm: Vmm) -> Talk:
    (guest_in, say), (hear, guest_out) = os.pipe(), os.pipe()
    ended: list[Ended] = []

    def body() -> None:
        with (
            open(guest_in, "rb", buffering=0) as stdin,
            open(guest_out, "wb", buffering=0) as stdout,
        ):
            ended.append(vmm.run(stdin, stdout, stdout))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return Talk(vmm, io.FileIO(say, "w"), open(hear, "rb"), thread, ended)
