"""A VM of the software engine and memory for its slots."""

import os
from collections.abc import Iterator
from typing import Final

import pytest

from restrictedmem.abi import memory
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vm

MIB: Final = 1 << 20
GPA: Final = 0x4000_0000


@pytest.fixture(scope="module", params=["v10", "v9"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with Service.start(Options(api=request.param)) as found:
        yield found


@pytest.fixture
def vm(service: Service) -> Iterator[Vm]:
    with Vm(service, engine="software") as found:
        yield found


@pytest.fixture
def fd(service: Service) -> Iterator[int]:
    found = service.memfd_restricted()
    os.ftruncate(found, 4 * MIB)
    yield found
    os.close(found)


@pytest.fixture
def window() -> Iterator[int]:
    with memory.memfd_create("window") as made:
        os.ftruncate(made.fileno(), 4 * MIB)
        yield made.fileno()


def errno_of(call: object, *args: object, **kwargs: object) -> int:
    assert callable(call)
    try:
        call(*args, **kwargs)
    except OSError as error:
        return error.errno or -1
    return 0
