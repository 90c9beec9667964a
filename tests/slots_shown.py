"""A VM whose slots a test shows, names and deletes."""

import os
from collections.abc import Iterator
from typing import Final

import pytest

from restrictedmem.abi import kvm
from restrictedmem.protocol.vm_wire import SlotFiles
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vm

PAGE: Final = 4096
GPA: Final = 0x4000_0000

ENGINES: Final = ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]


@pytest.fixture(scope="module", params=["v10", "bindings", "pinned"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    options = Options(pin=True) if request.param == "pinned" else Options(design=request.param)
    with Service.start(options) as found:
        yield found


@pytest.fixture
def vm(service: Service) -> Iterator[Vm]:
    with Vm(service, engine="software", debug=True) as found:
        yield found


@pytest.fixture(params=ENGINES)
def either(request: pytest.FixtureRequest, service: Service) -> Iterator[Vm]:
    with Vm(service, engine=request.param, debug=True) as found:
        yield found


def window(content: bytes, pages: int = 8) -> int:
    """Make a memfd, each page of which begins with some bytes and its number."""
    fd = os.memfd_create("window", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, pages * PAGE)
    for page in range(pages):
        os.pwrite(fd, content + bytes([page]), page * PAGE)
    return fd


def show_private(vm: Vm, slot: int, fd: int, page: int = 0) -> None:
    gpa = GPA + slot * PAGE
    vm.set_user_memory_region(
        slot=slot,
        guest_phys_addr=gpa,
        memory_size=PAGE,
        restricted_fd=fd,
        restricted_offset=page * PAGE,
    )
    vm.set_memory_attributes(gpa, PAGE, private=True)


def delete(vm: Vm, slot: int) -> None:
    vm.set_user_memory_region(slot=slot, guest_phys_addr=0, memory_size=0)


def seen(vm: Vm, slot: int) -> bytes:
    """Return the first two bytes that the guest has in a slot."""
    return vm.read_memory(GPA + slot * PAGE, 2)


def named(
    slot: int, names: SlotFiles, *, token: bytes = bytes(16), flags: int = 0, offset: int = 0
) -> bytes:
    region = kvm.kvm_userspace_memory_region_ext(
        slot=slot,
        flags=flags,
        guest_phys_addr=GPA + slot * PAGE,
        memory_size=PAGE,
        userspace_addr=offset,
    )
    return bytes(region) + token + names.pack()
