"""Recorded runs on each engine, and the schema that their events keep to."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from restrictedmem import guests
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm import elf
from restrictedmem.vmm.recording import record
from restrictedmem.vmm.vmm import Ended, Vmm

MIB = 1 << 20


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start(Options()) as found:
        yield found


ENGINES = ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def recorded(service: Service, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the guest ``convert``."""
    folder = tmp_path_factory.mktemp("trace")
    path = folder / "run.jsonl"
    with Vmm(8 * MIB, service, engine=engine) as vmm, record(vmm, path):
        vmm.load(elf.parse(guests.path("convert").read_bytes()))
        with open(os.devnull, "rb") as empty, (folder / "out").open("wb") as out:
            assert vmm.run(empty, out, out) == Ended(0)
    return path
