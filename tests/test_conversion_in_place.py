"""Conversion in place: what only the guest_memfd of this project has, or can show.

The cases of the conformance suite ask the rest (test_conformance_in_place.py).
"""

import errno
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from in_place_calls import set_memory_attributes
from restrictedmem.abi import memory
from restrictedmem.abi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    KVM_SET_MEMORY_ATTRIBUTES2,
    kvm_memory_attributes2,
)
from restrictedmem.conformance.in_place_machine import (
    SHARED,
    InPlace,
    machine,
)
from restrictedmem.conformance.machines import DATA
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.conformance.steps import Steps
from restrictedmem.fd import OwnedFd
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vm

pytestmark = pytest.mark.requires("fuse")
P = 4096
A, B, C, D, E = b"ABCDE"
Make = Callable[..., AbstractContextManager[InPlace]]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start(Options(guest_memfd=True)) as service:
        yield service


@pytest.fixture
def make(service: Service) -> Make:
    return lambda *args, **named: machine(service, Steps(), *args, **named)


def test_the_owner_itself_is_killed(make: Make, service: Service) -> None:
    """A process that made, mapped and converted a file, and holds no guest."""

    def own() -> None:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        fd = service.create_guest_memfd(2 * P, SHARED)
        with mmap.mmap(fd, 2 * P) as mapping:
            mapping[0] = mapping[P] = A
            set_memory_attributes(fd, 0, P, private=True)
            assert mapping[P] == A
            print(mapping[0])

    assert Steps().in_child(own) == "SIGBUS"


def test_a_store_after_the_last_fault_is_kept(make: Make) -> None:
    """The page is in the owner's page tables, and dirty, when the conversion takes it out."""
    with make(2) as it:
        for value in range(1, 100):
            it.store(0, value)
            it.convert(0, private=True)
            assert it.guest(0, value + 100) == value
            it.convert(0, private=False)
            assert it.load(0) == value + 100


def test_attributes_set_before_the_slot_count(service: Service) -> None:
    """The engine is told of them when the slot is made."""
    with OwnedFd(service.create_guest_memfd(4 * P, SHARED)) as fd:
        for page in (1, 3):
            set_memory_attributes(fd.fileno(), page * P, P, private=True)
        with Vm(service) as vm:
            vm.set_user_memory_region2(
                slot=0, guest_phys_addr=DATA, memory_size=4 * P, guest_memfd=fd.fileno()
            )
            vcpu = vm.create_vcpu()
            for page in range(4):
                vcpu.pre_fault_memory(DATA + page * P, P)
            statistics = vm.statistics()
            vcpu.close()
    assert (statistics["faults_private"], statistics["faults_shared"]) == (2, 2)


def test_a_slot_shows_a_part_of_the_file(service: Service) -> None:
    with OwnedFd(service.create_guest_memfd(4 * P, SHARED)) as fd, Vm(service) as vm:
        number = fd.fileno()
        # The second slot is told by name which file it shows.
        for slot, page in enumerate((2, 0)):
            vm.set_user_memory_region2(
                slot=slot,
                guest_phys_addr=DATA + slot * P,
                memory_size=P,
                guest_memfd=number,
                guest_memfd_offset=page * P,
            )
        set_memory_attributes(number, 2 * P, P, private=True)
        vcpu = vm.create_vcpu()
        vcpu.pre_fault_memory(DATA, P)
        assert (vm.statistics()["faults_private"], vm.statistics()["faults_shared"]) == (1, 0)
        vcpu.pre_fault_memory(DATA + P, P)
        assert (vm.statistics()["faults_private"], vm.statistics()["faults_shared"]) == (1, 1)
        vcpu.close()


def test_no_room_for_a_shared_page_is_an_exit() -> None:
    """The guest gets an errno, and the owner SIGBUS; neither kills the engine."""
    with (
        Service.start(Options(guest_memfd=True, memory_max=P)) as service,
        machine(service, Steps(), 2) as it,
    ):
        it.store(0, A)
        assert it.guest(1) == f"MEMORY_FAULT flags=0x0 gpa={DATA + P:#x} size=0x1000"
        assert it.touch(1) == "SIGBUS"
        it.punch(0)
        assert it.machine.go_on() == 0


# Errnos.


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        *((size, SHARED) for size in (0, 1, P - 1, 1 << 63, -P)),
        *((P, flag | SHARED) for flag in (4, 1 << 63)),
        # Upstream has a file without MMAP, too.
        *((P, flags) for flags in (0, GUEST_MEMFD_FLAG_INIT_SHARED)),
    ],
)
def test_creation_is_refused(service: Service, size: int, flags: int) -> None:
    assert outcome(lambda: service.create_guest_memfd(size, flags)) == Errno(errno.EINVAL)


def test_a_service_makes_them_only_when_asked() -> None:
    with Service.start() as service:
        assert outcome(lambda: service.create_guest_memfd(P, SHARED)) == Errno(errno.EACCES)


EINVAL, EOPNOTSUPP, ENOTTY = 22, 95, 25


def test_a_restricted_descriptor_has_no_conversion(service: Service) -> None:
    with OwnedFd(service.memfd_restricted()) as restricted:
        argument = kvm_memory_attributes2(offset=0, size=P, attributes=8)
        refused = outcome(lambda: KVM_SET_MEMORY_ATTRIBUTES2(restricted, argument))
        assert refused == Errno(ENOTTY)


def test_a_write_that_is_refused_has_changed_nothing(make: Make) -> None:
    with make(1) as it:
        it.store(0, A)
        assert outcome(lambda: os.write(it.fd, bytes(P))) == Errno(EINVAL)
        assert it.load(0) == A


def refused_region(service: Service, **changes: int) -> object:
    with OwnedFd(service.create_guest_memfd(4 * P, SHARED)) as fd, Vm(service) as vm:
        arguments: dict[str, Any] = {
            "slot": 0,
            "guest_phys_addr": DATA,
            "memory_size": 4 * P,
            "restricted_fd": fd.fileno(),
            "shared_fd": fd.fileno(),
            **changes,
        }
        return outcome(lambda: vm.set_user_memory_region(**arguments))


def test_a_slot_is_refused(service: Service) -> None:
    with (
        OwnedFd(service.create_guest_memfd(4 * P, SHARED)) as other,
        OwnedFd(service.memfd_restricted()) as restricted,
        OwnedFd(memory.memfd_create("other").detach()) as memfd,
    ):
        os.ftruncate(restricted.fileno(), 4 * P)
        os.ftruncate(memfd.fileno(), 4 * P)
        assert refused_region(service) is None
        for changes in (
            {"restricted_offset": P},
            {"memory_size": 5 * P},
            {"readonly": 1},
            {"shared_fd": other.fileno()},
            {"shared_fd": memfd.fileno()},
            {"restricted_fd": restricted.fileno()},
        ):
            assert refused_region(service, **changes) == Errno(EINVAL), changes


def test_a_file_stays_with_its_first_vm(make: Make, service: Service) -> None:
    with make(1) as it:
        with Vm(service) as other:
            second = outcome(
                lambda: other.set_user_memory_region2(
                    slot=0, guest_phys_addr=DATA, memory_size=P, guest_memfd=it.fd
                )
            )
        assert second == Errno(EINVAL)
        assert it.guest(0, A) == 0


def test_attributes_of_a_guest_address_are_refused(make: Make) -> None:
    with make(1) as it:
        assert outcome(lambda: it.machine.set_attributes(DATA, P)) == Errno(EINVAL)


def test_explicit_conversion_and_the_kernel_engine_do_not_go_with_it(service: Service) -> None:
    with (
        OwnedFd(service.create_guest_memfd(P, SHARED)) as fd,
        Vm(service, explicit=True) as vm,
    ):
        vm.set_user_memory_region2(
            slot=0, guest_phys_addr=DATA, memory_size=P, guest_memfd=fd.fileno()
        )
        assert outcome(vm.launch_finish) == Errno(EINVAL)


@pytest.mark.requires("kvm")
def test_the_kernel_engine_refuses(service: Service) -> None:
    with OwnedFd(service.create_guest_memfd(P, SHARED)) as fd, Vm(service, engine="kernel") as vm:
        refused = outcome(
            lambda: vm.set_user_memory_region2(
                slot=0, guest_phys_addr=DATA, memory_size=P, guest_memfd=fd.fileno()
            )
        )
    assert refused == Errno(EOPNOTSUPP)


def test_a_restricted_descriptor_still_has_no_mapping(service: Service) -> None:
    with OwnedFd(service.memfd_restricted()) as fd:
        os.ftruncate(fd.fileno(), P)
        os.posix_fallocate(fd.fileno(), 0, P)
        assert outcome(lambda: mmap.mmap(fd.fileno(), P)) == Errno(errno.ENODEV)
        assert outcome(lambda: os.read(fd.fileno(), P)) == Errno(errno.EINVAL)
