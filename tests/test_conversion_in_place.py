"""Conversion in place: a guest_memfd, its owner's real mappings, and a real guest.

The cases IPC-1 to IPC-8 do what the selftest guest_memfd_conversions_test.c of the series does, in
the same order and with the same values. Errnos are those of kvm_gmem_set_attributes and
kvm_gmem_fallocate.
"""

import errno
import fcntl
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from restrictedmem.abi import memory
from restrictedmem.abi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    KVM_SET_MEMORY_ATTRIBUTES2,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    KVM_SET_MEMORY_ATTRIBUTES2_ZERO,
    kvm_memory_attributes2,
)
from restrictedmem.conformance.in_place import (
    DATA,
    PRIVATE,
    SHARED,
    InPlace,
    machine,
    set_memory_attributes,
)
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.conformance.steps import Steps
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol.exits import MemoryFault
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


# The selftest's steps.


def check_private(it: InPlace, page: int, starting: int, write: int) -> None:
    assert it.touch(page, write) == "SIGBUS"
    assert it.guest(page, write) == starting
    assert it.touch(page) == "SIGBUS"


def to_private(it: InPlace, page: int, starting: int, write: int) -> None:
    it.convert(page, private=True)
    check_private(it, page, starting, write)


def host_rmw(it: InPlace, page: int, expected: int, write: int) -> None:
    assert it.load(page) == expected
    it.store(page, write)


def check_shared(it: InPlace, page: int, starting: int, host: int, write: int) -> None:
    host_rmw(it, page, starting, host)
    assert it.guest(page, write) == host
    assert it.load(page) == write


def to_shared(it: InPlace, page: int, starting: int, host: int, write: int) -> None:
    it.convert(page, private=False)
    check_shared(it, page, starting, host, write)


def test_ipc_1_init_private(make: Make) -> None:
    with make(1, PRIVATE) as it:
        check_private(it, 0, 0, A)
        to_shared(it, 0, A, B, C)
        to_private(it, 0, C, E)


def test_ipc_2_init_shared(make: Make) -> None:
    with make(1) as it:
        check_shared(it, 0, 0, A, B)
        to_private(it, 0, B, C)
        to_shared(it, 0, C, D, E)


@pytest.mark.parametrize("page", range(4))
def test_ipc_3_indexing(make: Make, page: int) -> None:
    def value(of: int, step: int) -> int:
        return (of << 4) + step

    with make(4) as it:
        for i in reversed(range(4)):
            check_shared(it, i, 0, value(i, 1), value(i, 2))
        to_private(it, page, value(page, 2), value(page, 3))
        for i in range(4):
            if i == page:
                check_private(it, i, value(i, 3), value(i, 4))
            else:
                check_shared(it, i, value(i, 2), value(i, 3), value(i, 4))
        to_shared(it, page, value(page, 4), value(page, 5), value(page, 6))
        for i in range(4):
            check_shared(it, i, value(i, 6 if i == page else 4), value(i, 7), value(i, 8))


def test_ipc_4_before_allocation_shared(make: Make) -> None:
    with make(1) as it:
        to_private(it, 0, 0, A)


def test_ipc_5_before_allocation_private(make: Make) -> None:
    with make(1, PRIVATE) as it:
        to_shared(it, 0, 0, A, B)


@pytest.mark.parametrize("page", range(8))
def test_ipc_6_unallocated_folios(make: Make, page: int) -> None:
    with make(8) as it:
        faulted = {page, 4}
        for i in sorted(faulted):
            host_rmw(it, i, 0, A)
        it.convert(0, 8, private=True)
        for i in range(8):
            check_private(it, i, A if i in faulted else 0, B)
        for i in range(8):
            to_shared(it, i, B, C, D)


def test_ipc_7_truncate(make: Make) -> None:
    with make(1) as it:
        host_rmw(it, 0, 0, A)
        it.punch(0)
        host_rmw(it, 0, 0, A)
        to_private(it, 0, A, B)
        it.punch(0)
        check_private(it, 0, 0, A)


def test_ipc_8_forked_accesses(make: Make) -> None:
    """The child has touched its own page tables before the conversion takes the page out."""
    with make(1) as it:
        check_shared(it, 0, 0, 0xA, 0xB)
        ours, theirs = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            try:
                signal.alarm(60)
                signal.signal(signal.SIGBUS, signal.SIG_DFL)
                if it.mapping[0] == 0xB:
                    it.mapping[0] = 0xC
                    os.write(ours[1], b"r")
                    os.read(theirs[0], 1)
                    # A load kills this child. A store is tried by a child of its own.
                    if it.touch(0, 0xDD) == "SIGBUS":
                        os.write(ours[1], b"s")
                        print(it.mapping[0])
            finally:
                os._exit(1)
        assert os.read(ours[0], 1) == b"r"
        to_private(it, 0, 0xC, 0xD)
        os.write(theirs[1], b"g")
        assert os.read(ours[0], 1) == b"s"
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS
        for end in (*ours, *theirs):
            os.close(end)


# What the selftest does not ask.


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


@pytest.mark.parametrize("flags", [0, KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE])
def test_content_is_kept(make: Make, flags: int) -> None:
    with make(1) as it:
        it.store(0, A)
        it.convert(0, private=True, flags=flags)
        assert it.guest(0, B) == A
        it.convert(0, private=False, flags=flags)
        assert it.load(0) == B


def test_zero_applies_to_the_pages_that_change(make: Make) -> None:
    with make(3) as it:
        for page in range(3):
            it.store(page, A)
        it.convert(0, private=True)
        it.convert(2, private=True)
        it.convert(0, 3, private=False, flags=KVM_SET_MEMORY_ATTRIBUTES2_ZERO)
        assert [it.load(page) for page in range(3)] == [0, A, 0]
        assert [it.guest(page) for page in range(3)] == [0, A, 0]


def test_a_conversion_to_what_pages_are_changes_nothing(make: Make) -> None:
    with make(2) as it:
        it.store(0, A)
        it.convert(0, 2, private=False, flags=KVM_SET_MEMORY_ATTRIBUTES2_ZERO)
        assert it.load(0) == A
        it.convert(0, 2, private=True)
        it.convert(0, 2, private=True)
        assert it.guest(0) == A


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
        assert it.guest(1) == MemoryFault(0, DATA + P, P, errno.EFAULT)
        assert it.touch(1) == "SIGBUS"
        it.punch(0)
        assert it.again() == 0


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


EINVAL, EFAULT, EOPNOTSUPP, ENOTTY = 22, 14, 95, 25


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"flags": 4}, EINVAL),
        ({"flags": 3}, EINVAL),
        ({"error_offset": P}, EINVAL),
        ({"reserved": (0,) * 10 + (1,)}, EINVAL),
        ({"attributes": 1}, EINVAL),
        ({"size": 0}, EINVAL),
        ({"offset": (1 << 64) - P, "size": 2 * P}, EINVAL),
        ({"offset": 1}, EINVAL),
        ({"size": P + 1}, EINVAL),
        ({"offset": 4 * P}, EINVAL),
        ({"offset": 3 * P, "size": 2 * P}, EINVAL),
        ({"flags": KVM_SET_MEMORY_ATTRIBUTES2_ZERO}, EOPNOTSUPP),
    ],
    ids=str,
)
def test_a_conversion_is_refused(make: Make, fields: dict[str, Any], number: int) -> None:
    with make(4) as it:
        it.store(0, A)
        all_fields: dict[str, Any] = {"offset": 0, "size": P, "attributes": 8, **fields}
        asked = kvm_memory_attributes2(**all_fields)
        refused = outcome(lambda: KVM_SET_MEMORY_ATTRIBUTES2(it.fd, asked))
        assert refused == Errno(number)
        assert [it.load(page) for page in range(4)] == [A, 0, 0, 0]


def test_other_ioctls_and_pointers(make: Make, service: Service) -> None:
    with make(1) as it, OwnedFd(service.memfd_restricted()) as restricted:
        request = KVM_SET_MEMORY_ATTRIBUTES2.request
        # 8 is no address of this process.
        assert outcome(lambda: fcntl.ioctl(it.fd, request, 8)) == Errno(EFAULT)
        assert outcome(lambda: fcntl.ioctl(it.fd, request + 1, bytes(128))) == Errno(ENOTTY)
        argument = kvm_memory_attributes2(offset=0, size=P, attributes=8)
        restricted_too = outcome(lambda: KVM_SET_MEMORY_ATTRIBUTES2(restricted, argument))
        assert restricted_too == Errno(ENOTTY)


KEEP, PUNCH = 1, 3


@pytest.mark.parametrize(
    ("mode", "offset", "length", "answer"),
    [
        (0, 0, P, EOPNOTSUPP),
        (KEEP, 0, 4 * P, 0),
        (KEEP, 1, P, EINVAL),
        (KEEP, 0, P - 1, EINVAL),
        (KEEP, 4 * P, P, EINVAL),
        (KEEP, 3 * P, 2 * P, EINVAL),
        (PUNCH, 4 * P, P, 0),
        (PUNCH, 3 * P, 2 * P, 0),
        (PUNCH, P, P - 1, EINVAL),
        (PUNCH, 1, P, EINVAL),
        (0x10 | KEEP, 0, P, EOPNOTSUPP),
    ],
)
def test_fallocate(make: Make, mode: int, offset: int, length: int, answer: int) -> None:
    with make(4) as it:
        found = outcome(lambda: memory.fallocate(it.fd, mode, offset, length))
        assert found == (Errno(answer) if answer else None)


def test_file_operations_answer_as_a_guest_memfd(make: Make) -> None:
    with make(4) as it:
        calls: dict[str, Callable[[], object]] = {
            "read": lambda: os.read(it.fd, P),
            "readv": lambda: os.readv(it.fd, [bytearray(P)]),
            "write": lambda: os.write(it.fd, bytes(P)),
            "ftruncate": lambda: os.ftruncate(it.fd, 4 * P),
            "fchmod": lambda: os.fchmod(it.fd, 0o600),
            "fsync": lambda: os.fsync(it.fd),
            "pread": lambda: os.pread(it.fd, P, 0),
            "pwrite": lambda: os.pwrite(it.fd, b"x", 0),
            "lseek": lambda: os.lseek(it.fd, 0, os.SEEK_SET),
            "open": lambda: os.open(f"/proc/self/fd/{it.fd}", os.O_RDWR),
            "mmap PROT_EXEC": lambda: mmap.mmap(it.fd, P, prot=mmap.PROT_EXEC),
        }
        it.store(0, A)
        answers = {name: outcome(call) for name, call in calls.items()}
        einval = ("read", "readv", "write", "ftruncate", "fchmod", "fsync")
        assert answers == {
            **dict.fromkeys(einval, Errno(errno.EINVAL)),
            **dict.fromkeys(("pread", "pwrite", "lseek"), Errno(errno.ESPIPE)),
            "open": Errno(errno.ENXIO),
            "mmap PROT_EXEC": Errno(errno.EPERM),
        }
        assert it.load(0) == A, "a refused write has changed nothing"
        found = os.fstat(it.fd)
        assert (found.st_mode, found.st_size) == (0o100600, 4 * P)
        assert (found.st_blocks, found.st_blksize) == (0, P)


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
        assert outcome(lambda: it.vm.set_memory_attributes(DATA, P, private=True)) == Errno(EINVAL)


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
