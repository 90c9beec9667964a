"""Third parties' consumers, run by a test.

The service knows the DMA device and the puppet; the owner's side of both is here.
"""

import json
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, final

import dma
import pytest

import hugetlb
from restrictedmem.abi import memory
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Call, Channel
from restrictedmem.units import PAGE_SIZE as PAGE

ROOT = Path(__file__).parent.parent
DMA = ROOT / "clients" / "dma" / "dma.py"
PUPPET = Path(__file__).parent / "consumers" / "puppet.py"

DEADLINE = 1.0


@contextmanager
def serving(*programs: tuple[str, Path], **options: Any) -> Generator[Service, None, None]:
    named = tuple(
        (name, str(path)) for name, path in programs or (("dma", DMA), ("puppet", PUPPET))
    )
    backing = str(options.get("backing"))
    with ExitStack() as stack:
        if backing in hugetlb.SIZES:
            stack.enter_context(hugetlb.reserved(hugetlb.SIZES[backing], 4))
        yield stack.enter_context(
            Service.start(Options(consumers=named, deadline=DEADLINE, **options))
        )


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as found:
        yield found


@pytest.fixture
def fd(service: Service) -> Iterator[int]:
    found = service.memfd_restricted()
    yield found
    os.close(found)


def punch(fd: int, start: int, npages: int = 1) -> None:
    memory.fallocate(fd, memory.PUNCH, start * PAGE, npages * PAGE)


def resident(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512 // PAGE


@final
class Device:
    """The owner's side of a DMA device."""

    def __init__(self, service: Service, name: str = "dma") -> None:
        self.service = service
        self.channel = Channel(service.spawn(name), "the device")

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def attach(self, fd: int, address: int, start: int, end: int) -> None:
        self.channel.call(
            dma.ATTACH, dma.ATTACH_BODY.pack(self.service.token_for(fd), address, start, end)
        )

    def detach(self, address: int) -> None:
        self.channel.call(dma.DETACH, dma.DETACH_BODY.pack(address))

    def copy(self, source: int, destination: int, length: int) -> None:
        self.channel.call(dma.COPY, dma.COPY_BODY.pack(source, destination, length))

    def fill(self, address: int, length: int, byte: int) -> None:
        self.channel.call(dma.FILL, dma.FILL_BODY.pack(address, length, byte))

    def equal(self, one: int, other: int, length: int) -> int:
        reply, _ = self.channel.call(dma.COMPARE, dma.COMPARE_BODY.pack(one, other, length))
        found: int = dma.EQUAL.unpack(reply)[0]
        return found

    def status(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.channel.call(dma.STATUS)[0])
        return found


@final
class Puppet:
    """A consumer that does what it is told (consumers/puppet.py)."""

    def __init__(self, service: Service, arguments: str = "") -> None:
        self.service = service
        self.channel = Channel(service.spawn("puppet", arguments), "the puppet")

    def __enter__(self) -> "Puppet":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def __call__(self, name: str, *arguments: object) -> Any:
        return json.loads(
            self.channel.call(Call(name, 1), json.dumps([name, *arguments]).encode())[0]
        )

    def bind(self, fd: int, start: int, end: int, *, exclusive: bool = True) -> int:
        found: int = self("bind", self.service.token_for(fd).hex(), start, end, exclusive)
        return found
