"""A third party's consumer beside the engines on one file.

They share lost pages, punches that reach each slot, and ranges that only one may bind.
"""

import os
from errno import EACCES, EINVAL, EPROTO

import pytest

from outcomes import Errno, outcome
from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.protocol import exits
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vm
from third_parties import Device, Puppet, fd, punch, service, serving

__all__ = ["fd", "service"]


# Memory errors.


@pytest.mark.requires("fuse")
def test_a_lost_page_is_refused_until_it_is_punched(service: Service, fd: int) -> None:
    with Puppet(service) as puppet, Device(service) as device:
        file = puppet.bind(fd, 0, 8)
        puppet("call", file, "get_page", 2)
        service.error_page(fd, 2, 4)
        assert puppet("heard", file) == [["error", 2, 4]]
        for lost in (2, 3):
            for name in ("get_page", "get_page_noalloc"):
                assert outcome(lambda: puppet("call", file, name, lost)) == Errno(EHWPOISON)  # noqa: B023
        assert puppet("call", file, "get_page", 4) == 0
        punch(fd, 2)
        assert puppet("call", file, "get_page", 2) == 0
        assert outcome(lambda: puppet("call", file, "get_page", 3)) == Errno(EHWPOISON)
        puppet("call", file, "close")
        # The device's fault path.
        device.attach(fd, 0, 0, 8)
        device.fill(0, 4 * PAGE, 1)
        service.error_page(fd, 1, 2)
        assert (device.status()["mapped"], device.status()["errors"]) == (3, 1)
        assert outcome(lambda: device.fill(0, 2 * PAGE, 2)) == Errno(EHWPOISON)
        punch(fd, 1)
        device.fill(0, 2 * PAGE, 2)


@pytest.mark.requires("fuse")
def test_who_may_say_that_a_page_is_lost(service: Service, fd: int) -> None:
    with Service.start() as other:
        assert outcome(lambda: other.error_page(fd, 0, 1)) == Errno(EACCES)
    for start, end in ((1, 1), (2, 1), (0, (1 << 18) + 1)):
        assert outcome(lambda: service.error_page(fd, start, end)) == Errno(EINVAL)  # noqa: B023
    forged = wire.ERROR_REQUEST.pack(bytes(16), 0, 1)
    assert outcome(lambda: service._call(wire.ERROR_PAGE, forged)) == Errno(EACCES)
    assert outcome(lambda: service._call(wire.ERROR_PAGE, forged[:-1])) == Errno(EPROTO)
    # Nobody is there to hear of it.
    service.error_page(fd, 0, 1 << 18)


# The engines.


ENGINES = ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]
GPA = 0x4000_0000
#: mov al, [0x40001000]; test al, al; jz 1f; ud2; 1: xor ecx, ecx; div ecx
READER = bytes.fromhex("8a04 25 00100040 84c0 7402 0f0b 31c9 f7f1").ljust(PAGE, b"\0")
#: How it ends: the byte was zero, or not.
ZERO, NOT_ZERO = exits.Shutdown(0), exits.Shutdown(6)


def slot(vm: Vm, fd: int, number: int, gpa: int, start: int, npages: int) -> None:
    vm.set_user_memory_region(
        slot=number,
        guest_phys_addr=gpa,
        memory_size=npages * PAGE,
        restricted_fd=fd,
        restricted_offset=start * PAGE,
    )
    vm.set_memory_attributes(gpa, npages * PAGE, private=True)


@pytest.mark.requires("fuse")
def test_a_guest_that_touches_a_lost_page_exits_until_it_is_punched(
    service: Service, fd: int
) -> None:
    with Vm(service, engine="software") as vm:
        slot(vm, fd, 0, GPA, 0, 8)
        vm.launch_update(GPA, READER + bytes([7]) * PAGE)
        with vm.create_vcpu() as vcpu:
            vcpu.set_regs(rip=GPA)
            service.error_page(fd, 1, 2)
            lost = vcpu.run()
            assert isinstance(lost, exits.MemoryFault)
            assert (lost.gpa, lost.errno) == (GPA + PAGE, EHWPOISON)
            punch(fd, 1)
            assert vcpu.run() == ZERO


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("design", ["v10", "bindings", "bindings+teardown"])
def test_a_punch_reaches_every_slot_of_a_file(design: str, engine: str) -> None:
    with serving(design=design) as service, Vm(service, engine=engine) as vm:
        fd = service.memfd_restricted()
        for number in range(3):
            slot(vm, fd, number, GPA + number * 0x10_0000, 8 * number, 8)
            vm.launch_update(GPA + number * 0x10_0000, bytes([number + 1]) * PAGE * 2)
        before = freed(vm)
        for number in range(3):
            punch(fd, 8 * number)
            assert freed(vm) - before == number + 1
        # Two at once, and what no slot shows.
        punch(fd, 1, 9)
        punch(fd, 100)
        assert freed(vm) - before == 5
        assert service.status()["descriptors"][0]["notifiers"] == (
            1 if engine == "kernel" and design == "v10" else 3
        )
        os.close(fd)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("design", ["bindings", "bindings+teardown"])
def test_a_bound_range_is_one_slots(design: str, engine: str) -> None:
    with serving(design=design) as service, Vm(service, engine=engine) as vm:
        fd = service.memfd_restricted()
        slot(vm, fd, 0, GPA, 0, 8)
        assert outcome(lambda: slot(vm, fd, 1, GPA + 0x10_0000, 7, 1)) == Errno(EINVAL)
        vm.launch_update(GPA, READER + bytes([7]) * PAGE)
        # The slot may go and come back: it is not in its own way.
        vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=0)
        assert service.status()["descriptors"][0]["notifiers"] == 0
        slot(vm, fd, 0, GPA, 0, 8)
        vm.launch_update(GPA, READER)
        with vm.create_vcpu() as vcpu:
            vcpu.set_regs(rip=GPA)
            # A guest_memfd keeps nothing that its owner could punch unheard.
            assert vcpu.run() == (NOT_ZERO if engine == "software" else ZERO)
        os.close(fd)


def freed(vm: Vm) -> int:
    found = vm.statistics()["pages_freed"]
    assert isinstance(found, int)
    return found
