"""A VM from the owner's side, in the engine process: slots, attributes, launch, runs, errnos."""

import mmap
import os
from collections.abc import Iterator
from typing import Any

import pytest

from processes import descriptors
from restrictedmem.abi import memory
from restrictedmem.abi.kvm import KVM_MEMORY_EXIT_FLAG_PRIVATE
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import exits, vm_wire
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Call
from restrictedmem.vmm.vm import Vcpu, Vm
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse")

GPA = 0x4000_0000
MIB = 1 << 20
PAGE = 4096
EPERM, EEXIST, EINVAL, EFAULT, EOPNOTSUPP, EPROTO = 1, 17, 22, 14, 95, 71
# out %al, $0x42; jmp back
OUT_LOOP = bytes.fromhex("e642 ebfc")


@pytest.fixture(scope="module", params=["v10", "v9"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with Service.start(Options(api=request.param)) as found:
        yield found


@pytest.fixture
def fd(service: Service) -> Iterator[int]:
    found = service.memfd_restricted()
    os.ftruncate(found, MIB)
    yield found
    os.close(found)


@pytest.fixture
def vm(service: Service) -> Iterator[Vm]:
    with Vm(service, engine="software") as found:
        yield found


def private_slot(vm: Vm, service: Service, fd: int, gpa: int = GPA, slot: int = 0) -> None:
    vm.set_user_memory_region(slot=slot, guest_phys_addr=gpa, memory_size=MIB, restricted_fd=fd)
    if service.info["api"] == "v10":
        vm.set_memory_attributes(gpa, MIB, private=True)


def start(vm: Vm, code: bytes, gpa: int = GPA) -> Vcpu:
    vm.launch_update(gpa, code.ljust(PAGE, b"\0"))
    vcpu = vm.create_vcpu()
    vcpu.set_regs(rip=gpa)
    return vcpu


def errno_of(call: object, *args: object, **kwargs: object) -> int:
    assert callable(call)
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)
    assert caught.value.errno is not None
    return caught.value.errno


def test_a_vm_that_cannot_be_made(service: Service) -> None:
    with pytest.raises(OSError, match=r"KVM_CREATE_VM: .*'nonsense'") as caught:
        Vm(service, engine="nonsense")
    assert caught.value.errno == EINVAL
    with Vm(service, engine="software") as vm:
        assert vm.engine == "software"


def test_a_guest_runs_in_private_memory(service: Service, vm: Vm, fd: int) -> None:
    private_slot(vm, service, fd)
    with start(vm, OUT_LOOP) as vcpu:
        assert vcpu.run() == exits.PortOut(0x42, 1, 0)
        assert vcpu.run() == exits.PortOut(0x42, 1, 0)
    assert os.fstat(fd).st_blocks * 512 >= PAGE
    assert errno_of(os.pread, fd, 1, 0) == 29


def test_content_and_registers_are_the_owners_before_the_first_run_only(
    service: Service, vm: Vm, fd: int
) -> None:
    private_slot(vm, service, fd)
    with start(vm, OUT_LOOP) as vcpu:
        vm.launch_update(GPA + PAGE, bytes(PAGE))
        vcpu.set_regs(rip=GPA)
        vcpu.run()
        assert errno_of(vm.launch_update, GPA, bytes(PAGE)) == EPERM
        assert errno_of(vcpu.set_regs, rip=GPA) == EPERM


def test_launch_update_is_for_private_memory(service: Service, vm: Vm, fd: int) -> None:
    private_slot(vm, service, fd)
    assert errno_of(vm.launch_update, GPA - PAGE, bytes(PAGE)) == EFAULT
    assert errno_of(vm.launch_update, GPA + MIB - PAGE, bytes(2 * PAGE)) == EFAULT
    if service.info["api"] == "v10":
        vm.set_memory_attributes(GPA, PAGE, private=False)
    else:
        vm.memory_encrypt_region(GPA, PAGE, private=False)
    assert errno_of(vm.launch_update, GPA, bytes(PAGE)) == EFAULT


@pytest.mark.parametrize(
    ("wrong", "errno"),
    [
        ({"guest_phys_addr": GPA + 1}, EINVAL),
        ({"memory_size": PAGE + 1}, EINVAL),
        ({"restricted_offset": 1}, EINVAL),
        ({"restricted_offset": (1 << 64) - PAGE}, EINVAL),
        ({"slot": 1 << 20}, EINVAL),
        ({"guest_phys_addr": (1 << 64) - PAGE}, EINVAL),
        ({"guest_phys_addr": 0x10_0000}, EEXIST),
    ],
)
def test_errnos_of_a_slot(vm: Vm, fd: int, wrong: dict[str, int], errno: int) -> None:
    right: dict[str, Any] = {
        "slot": 0,
        "guest_phys_addr": GPA,
        "memory_size": MIB,
        "restricted_fd": fd,
        "restricted_offset": 0,
    }
    assert errno_of(vm.set_user_memory_region, **{**right, **wrong}) == errno
    vm.set_user_memory_region(**right)


def test_a_private_slot_needs_a_restricted_descriptor(vm: Vm) -> None:
    with memory.memfd_create("plain") as plain:
        assert (
            errno_of(
                vm.set_user_memory_region,
                slot=0,
                guest_phys_addr=GPA,
                memory_size=MIB,
                restricted_fd=plain.fileno(),
            )
            == EINVAL
        )
        closed = plain.fileno()
    assert (
        errno_of(
            vm.set_user_memory_region,
            slot=0,
            guest_phys_addr=GPA,
            memory_size=MIB,
            restricted_fd=closed,
        )
        == EINVAL
    )


def test_slots_do_not_overlap_and_are_not_modified(service: Service, vm: Vm, fd: int) -> None:
    private_slot(vm, service, fd)
    assert errno_of(private_slot, vm, service, fd, gpa=GPA + MIB - PAGE, slot=1) == EEXIST
    assert errno_of(private_slot, vm, service, fd) == EINVAL
    assert errno_of(private_slot, vm, service, fd, gpa=GPA + MIB) == EINVAL
    # Two slots on one range of the file: accepted in v9 and v10.
    private_slot(vm, service, fd, gpa=GPA + MIB, slot=1)


def test_a_slot_holds_the_file_until_it_is_deleted(service: Service, vm: Vm) -> None:
    fd = service.memfd_restricted()
    os.ftruncate(fd, MIB)
    private_slot(vm, service, fd)
    os.close(fd)
    with start(vm, OUT_LOOP) as vcpu:
        assert vcpu.run() == exits.PortOut(0x42, 1, 0)
        vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=0)
        # In v10 the page is private, slot or no slot; v9 asks only where there is one.
        private = KVM_MEMORY_EXIT_FLAG_PRIVATE if service.info["api"] == "v10" else 0
        assert vcpu.run() == exits.MemoryFault(private, GPA, PAGE, EFAULT)
    assert errno_of(vm.set_user_memory_region, slot=0, guest_phys_addr=GPA, memory_size=0) == EINVAL


@pytest.mark.requires("root")
def test_the_service_keeps_the_memory_of_a_slots_file(service: Service) -> None:
    with Service.start(Options(api=service.info["api"])) as own, Vm(own, engine="software") as vm:

        def held() -> int:
            return descriptors(own.info["pid"]).count("/memfd:restrictedmem (deleted)")

        with OwnedFd(own.memfd_restricted()) as fd:
            # Made with the first page.
            before = held()
            private_slot(vm, own, fd.fileno())
            assert held() == before + 1
        wait_until(lambda: own.status()["descriptors"] == [], "the service to hear of the close")
        assert held() == before + 1
        vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=0)
        assert held() == before


def test_the_default_attribute_is_the_postings(service: Service, vm: Vm, fd: int) -> None:
    with memory.memfd_create("window") as window:
        os.ftruncate(window.fileno(), MIB)
        os.pwrite(window.fileno(), OUT_LOOP, 0)
        vm.set_user_memory_region(
            slot=0,
            guest_phys_addr=GPA,
            memory_size=MIB,
            restricted_fd=fd,
            shared_fd=window.fileno(),
        )
    with vm.create_vcpu() as vcpu:
        vcpu.set_regs(rip=GPA)
        # v10 starts with the shared half, where the code is; v9 with the private one, of zeroes:
        # add %al, (%rax), a store to gpa 0.
        if service.info["api"] == "v10":
            assert vcpu.run() == exits.PortOut(0x42, 1, 0)
        else:
            assert vcpu.run() == exits.MmioRead(0, 1)


def test_each_posting_has_its_own_call_for_attributes(service: Service, vm: Vm) -> None:
    mine, other = vm.set_memory_attributes, vm.memory_encrypt_region
    if service.info["api"] == "v9":
        mine, other = other, mine
    mine(GPA, PAGE, private=True)
    assert errno_of(other, GPA, PAGE, private=True) == EOPNOTSUPP
    for address, size in ((GPA, 0), (GPA + 1, PAGE), (GPA, 1), ((1 << 64) - PAGE, PAGE)):
        assert errno_of(mine, address, size, private=True) == EINVAL


def test_attributes_may_come_before_the_slot(service: Service, vm: Vm, fd: int) -> None:
    if service.info["api"] == "v10":
        vm.set_memory_attributes(GPA, PAGE, private=True)
    vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd)
    vm.launch_update(GPA, bytes(PAGE))


def test_the_shared_window_is_seen_by_both(service: Service, vm: Vm, fd: int) -> None:
    private_slot(vm, service, fd)
    with memory.memfd_create("window") as window:
        os.ftruncate(window.fileno(), PAGE)
        view = mmap.mmap(window.fileno(), PAGE)
        vm.set_user_memory_region(
            slot=1, guest_phys_addr=0x1000_0000, memory_size=PAGE, shared_fd=window.fileno()
        )
        # The window cannot be shrunk under the engine any more.
        assert errno_of(os.ftruncate, window.fileno(), 0) == EPERM
    view[0] = 0x5A
    # mov 0x10000000, %al; inc %al; mov %al, 0x10000001; out %al, $0x42; jmp back to the start
    code = bytes.fromhex("8a042500000010 fec0 88042501000010 e642 ebec")
    with start(vm, code) as vcpu:
        assert vcpu.run() == exits.PortOut(0x42, 1, 0x5B)
        assert view[1] == 0x5B
        view[0] = 0x10
        assert vcpu.run() == exits.PortOut(0x42, 1, 0x11)
    view.close()


def test_a_shared_window_that_ends_early_is_einval(vm: Vm) -> None:
    with memory.memfd_create("window") as window:
        os.ftruncate(window.fileno(), PAGE)
        assert (
            errno_of(
                vm.set_user_memory_region,
                slot=1,
                guest_phys_addr=GPA,
                memory_size=2 * PAGE,
                shared_fd=window.fileno(),
            )
            == EINVAL
        )
    read, write = os.pipe()
    assert (
        errno_of(
            vm.set_user_memory_region, slot=1, guest_phys_addr=GPA, memory_size=PAGE, shared_fd=read
        )
        == EINVAL
    )
    os.close(read)
    os.close(write)


def test_a_punch_takes_code_away_and_the_next_fault_brings_zeroes(
    service: Service, vm: Vm, fd: int
) -> None:
    private_slot(vm, service, fd)
    with start(vm, OUT_LOOP) as vcpu:
        assert vcpu.run() == exits.PortOut(0x42, 1, 0)
        memory.fallocate(fd, memory.PUNCH, 0, MIB)
        assert os.fstat(fd).st_blocks == 0
        # add %al, (%rax) with rax = 0.
        assert vcpu.run() == exits.MmioRead(0, 1)
    found = vm.statistics()
    assert (found["invalidations"], found["pages_freed"]) == (1, found["pages_taken"] - 16)
    assert found["entries_zapped"] == 16


def test_allocation_invalidates_in_v9_alone(service: Service, vm: Vm, fd: int) -> None:
    private_slot(vm, service, fd)
    os.posix_fallocate(fd, 0, MIB)
    assert vm.statistics()["invalidations"] == (1 if service.info["api"] == "v9" else 0)


def test_a_vcpu_alone_keeps_the_vm(service: Service, fd: int) -> None:
    vm = Vm(service, engine="software")
    private_slot(vm, service, fd)
    with start(vm, OUT_LOOP) as vcpu:
        vm.close()
        assert vcpu.run() == exits.PortOut(0x42, 1, 0)


def test_a_malformed_request_is_answered_and_harms_no_vm(service: Service, vm: Vm, fd: int) -> None:
    private_slot(vm, service, fd)
    with start(vm, OUT_LOOP) as vcpu:
        for channel in (vm._channel, vcpu._channel):
            assert errno_of(channel.call, Call("NONSENSE", 0xDEAD)) == EPROTO
            assert errno_of(channel.call, Call("NONSENSE", 0xDEAD), bytes(1000)) == EPROTO
        for call in (
            vm_wire.SET_USER_MEMORY_REGION,
            vm_wire.SET_MEMORY_ATTRIBUTES,
            vm_wire.ENCRYPT_REG_REGION,
            vm_wire.LAUNCH_UPDATE,
        ):
            assert errno_of(vm._channel.call, call, b"short") == EPROTO
        for call in (vm_wire.SET_REGS, vm_wire.RUN):
            assert errno_of(vcpu._channel.call, call, b"short") == EPROTO
        assert vcpu.run() == exits.PortOut(0x42, 1, 0)
