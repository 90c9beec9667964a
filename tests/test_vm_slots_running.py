"""Slots, attributes and pages of a VM whose guest runs."""

import os
import threading
from typing import Any, Final

import pytest

from restrictedmem.abi import kvm, memory
from restrictedmem.abi.kvm import Cap
from restrictedmem.protocol import exits, vm_wire
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vcpu, Vm
from vm_slots import GPA, errno_of, fd, service, vm, window

__all__ = ["fd", "service", "vm", "window"]

pytestmark = pytest.mark.requires("fuse")

PAGE: Final = 4096
MIB: Final = 1 << 20

EINVAL, EFAULT, EOPNOTSUPP, ENOENT, EHWPOISON = 22, 14, 95, 2, 133
#: mov eax, [0x50000000]; out 0x42, eax; jmp back
READ_LOOP: Final = bytes.fromhex("8b042500000050 e742 ebf5")
WINDOW: Final = 0x5000_0000


# While the guest runs.


def start_reader(vm: Vm, service: Service, fd: int) -> None:
    vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd)
    vm.convert(GPA, MIB, private=True)
    vm.launch_update(GPA, READ_LOOP.ljust(PAGE, b"\0"))


def test_a_slot_moves_under_a_running_guest(service: Service, vm: Vm, fd: int, window: int) -> None:
    """Each load finds the slot at its old or new place, or no memory there.

    It never finds other memory (set_memory_region_test.c).
    """
    start_reader(vm, service, fd)
    os.pwrite(window, (1).to_bytes(4, "little"), 0)
    os.pwrite(window, (2).to_bytes(4, "little"), PAGE)
    here: dict[str, Any] = {"slot": 1, "memory_size": MIB, "shared_fd": window}
    vm.set_user_memory_region(guest_phys_addr=WINDOW, **here)
    found: list[exits.Exit] = []
    over = threading.Event()
    with vm.create_vcpu() as vcpu:
        vcpu.set_regs(rip=GPA)

        def run() -> None:
            while not over.is_set():
                found.append(vcpu.run(7))

        thread = threading.Thread(target=run)
        thread.start()
        for _ in range(20):
            vm.set_user_memory_region(guest_phys_addr=WINDOW - PAGE, **here)
            vm.set_user_memory_region(guest_phys_addr=WINDOW + MIB, **here)
            vm.set_user_memory_region(guest_phys_addr=WINDOW, **here)
        over.set()
        thread.join(20)
        assert not thread.is_alive()
        assert set(found) <= {
            exits.PortOut(0x42, 4, 1),
            exits.PortOut(0x42, 4, 2),
            exits.PortOut(0x42, 4, 7),
            exits.MmioRead(WINDOW, 4),
        }
        assert exits.PortOut(0x42, 4, 1) in (vcpu.run(7), vcpu.run(7))


def test_a_slot_is_deleted_and_made_again_under_a_running_guest(
    service: Service, vm: Vm, fd: int, window: int
) -> None:
    start_reader(vm, service, fd)
    os.pwrite(window, (1).to_bytes(4, "little"), 0)
    with vm.create_vcpu() as vcpu:
        vcpu.set_regs(rip=GPA)
        for _ in range(5):
            vm.set_user_memory_region(
                slot=1, guest_phys_addr=WINDOW, memory_size=MIB, shared_fd=window
            )
            assert exits.PortOut(0x42, 4, 1) in (vcpu.run(7), vcpu.run(7))
            vm.set_user_memory_region(slot=1, guest_phys_addr=WINDOW, memory_size=0)
            assert exits.MmioRead(WINDOW, 4) in (vcpu.run(), vcpu.run())


def test_a_private_page_without_a_slot(service: Service, vm: Vm, fd: int) -> None:
    """In v10 the attribute decides; v9 looks at attributes only where there is a slot.

    The test follows private_mem_kvm_exits_test.c.
    """
    start_reader(vm, service, fd)
    vm.convert(WINDOW, PAGE, private=True)
    with vm.create_vcpu() as vcpu:
        vcpu.set_regs(rip=GPA)
        v10 = exits.MemoryFault(kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE, WINDOW, PAGE, EFAULT)
        assert vcpu.run() == (v10 if service.info["api"] == "v10" else exits.MmioRead(WINDOW, 4))


def test_a_private_page_of_a_slot_without_private_half(
    service: Service, vm: Vm, fd: int, window: int
) -> None:
    start_reader(vm, service, fd)
    os.pwrite(window, (5).to_bytes(4, "little"), 0)
    vm.set_user_memory_region(slot=1, guest_phys_addr=WINDOW, memory_size=MIB, shared_fd=window)
    vm.convert(WINDOW, PAGE, private=True)
    with vm.create_vcpu() as vcpu:
        vcpu.set_regs(rip=GPA)
        v10 = exits.MemoryFault(kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE, WINDOW, PAGE, EFAULT)
        assert vcpu.run() == (v10 if service.info["api"] == "v10" else exits.PortOut(0x42, 4, 5))


# Capabilities, attributes.


def test_capabilities(service: Service, vm: Vm) -> None:
    v10 = service.info["api"] == "v10"
    assert vm.check_extension(Cap.NR_MEMSLOTS) == 32764
    assert vm.check_extension(Cap.MAX_VCPUS) == 64
    assert vm.check_extension(Cap.PRE_FAULT_MEMORY) == 1
    assert vm.check_extension(Cap.MEMORY_ATTRIBUTES) == (
        kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if v10 else 0
    )
    assert vm.check_extension(kvm.KVM_CAP_PRIVATE_MEM) == (0 if v10 else 1)
    assert vm.check_extension(Cap.GUEST_MEMFD) == vm.check_extension(0xFFFF_FFFF) == 0
    if v10:
        assert vm.get_supported_memory_attributes() == kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
    else:
        assert errno_of(vm.get_supported_memory_attributes) == EOPNOTSUPP


def test_vcpus_up_to_the_capability(vm: Vm) -> None:
    vcpus = [vm.create_vcpu() for _ in range(vm.check_extension(Cap.MAX_VCPUS))]
    assert [vcpu.number for vcpu in vcpus] == list(range(64))
    assert errno_of(vm.create_vcpu) == EINVAL
    for vcpu in vcpus:
        vcpu.close()


def test_attributes_of_what_is_not_supported(service: Service, vm: Vm) -> None:
    if service.info["api"] != "v10":
        pytest.skip("v9 has two calls and no attributes")
    for attributes, flags in ((1, 0), (2, 0), (4, 0), (1 << 63, 0), (8 | 1, 0), (8, 1)):
        asked = kvm.kvm_memory_attributes(
            address=GPA, size=PAGE, attributes=attributes, flags=flags
        )
        assert errno_of(vm._channel.call, vm_wire.SET_MEMORY_ATTRIBUTES, bytes(asked)) == EINVAL
    asked = kvm.kvm_memory_attributes(address=GPA, size=MIB, attributes=8)
    left = kvm.kvm_memory_attributes.from_buffer_copy(
        vm._channel.call(vm_wire.SET_MEMORY_ATTRIBUTES, bytes(asked))[0]
    )
    assert (left.address, left.size) == (GPA + MIB, 0)


def test_attributes_may_change_from_page_to_page(service: Service, vm: Vm, fd: int) -> None:
    """There are more changes than a list of requests holds.

    KVM keeps one entry a page, and the statistics show mixed blocks.
    """
    start_reader(vm, service, fd)
    for page in range(0, 256, 2):
        vm.convert(GPA + page * PAGE, PAGE, private=False)
    assert (vm.statistics()["mixed_2m"], vm.statistics()["mixed_1g"]) == (1, 1)
    vm.convert(GPA, MIB, private=True)
    assert (vm.statistics()["mixed_2m"], vm.statistics()["mixed_1g"]) == (0, 0)


# Prefault and memory failure.


def test_prefault(service: Service, vm: Vm, fd: int, window: int) -> None:
    """This follows pre_fault_memory_test.c, and adds each errno."""
    vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=2 * MIB, restricted_fd=fd)
    vm.convert(GPA, 2 * MIB, private=True)
    vm.set_user_memory_region(slot=1, guest_phys_addr=WINDOW, memory_size=MIB, shared_fd=window)
    with vm.create_vcpu() as vcpu:
        assert vcpu.pre_fault_memory(GPA, 2 * MIB) == 2 * MIB
        assert os.fstat(fd).st_blocks * 512 == 2 * MIB
        assert vm.statistics()["pages_taken"] == 512
        assert vcpu.pre_fault_memory(GPA, PAGE) == PAGE
        assert vm.statistics()["pages_taken"] == 512
        # Up to the end of the slot, and not beyond: that is for the next call to say.
        assert vcpu.pre_fault_memory(GPA + 2 * MIB - PAGE, 2 * PAGE) == PAGE
        v10 = service.info["api"] == "v10"
        assert errno_of(vcpu.pre_fault_memory, GPA + 2 * MIB, PAGE) == ENOENT
        for gpa, size in ((GPA + 1, PAGE), (GPA, 0), (GPA, 1), ((1 << 64) - PAGE, PAGE)):
            assert errno_of(vcpu.pre_fault_memory, gpa, size) == EINVAL
        asked = kvm.kvm_pre_fault_memory(gpa=GPA, size=PAGE, flags=1)
        assert errno_of(vcpu._channel.call, vm_wire.PRE_FAULT_MEMORY, bytes(asked)) == EINVAL
        assert vcpu.pre_fault_memory(WINDOW, MIB) == MIB
        assert os.fstat(window).st_blocks * 512 == MIB
        vm.convert(WINDOW, PAGE, private=True)
        vm.convert(0x7000_0000, PAGE, private=True)
        assert errno_of(vcpu.pre_fault_memory, WINDOW, PAGE) == (EFAULT if v10 else 0)
        assert errno_of(vcpu.pre_fault_memory, 0x7000_0000, PAGE) == (EFAULT if v10 else ENOENT)
        memory.fallocate(fd, memory.PUNCH, 0, MIB)
        assert os.fstat(fd).st_blocks * 512 == MIB
        assert vcpu.pre_fault_memory(GPA, MIB) == MIB


def test_prefault_of_more_than_there_is(service: Service) -> None:
    with (
        Service.start(Options(api=service.info["api"], memory_max=64 * PAGE)) as small,
        Vm(small, engine="software") as vm,
    ):
        fd = small.memfd_restricted()
        os.ftruncate(fd, MIB)
        vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd)
        vm.convert(GPA, MIB, private=True)
        with vm.create_vcpu() as vcpu:
            assert vcpu.pre_fault_memory(GPA, MIB) == 64 * PAGE
            assert errno_of(vcpu.pre_fault_memory, GPA + 64 * PAGE, PAGE) == 28
        os.close(fd)


def test_a_lost_page_is_a_fault_until_it_is_punched(service: Service, vm: Vm, fd: int) -> None:
    """This follows the memory-failure extension of guest_memfd_test.c.

    Translations go, the page is not given back, and a punch heals the fault.
    """
    start_reader(vm, service, fd)
    vm.set_user_memory_region(
        slot=1, guest_phys_addr=WINDOW, memory_size=MIB, restricted_fd=fd, restricted_offset=2 * MIB
    )
    # The same pages once more.
    vm.set_user_memory_region(
        slot=2,
        guest_phys_addr=WINDOW + MIB,
        memory_size=MIB,
        restricted_fd=fd,
        restricted_offset=2 * MIB,
    )
    vm.convert(WINDOW, 2 * MIB, private=True)
    with vm.create_vcpu() as vcpu:
        vcpu.set_regs(rip=GPA)
        assert vcpu.run() == exits.PortOut(0x42, 4, 0)
        vm.inject_failure(WINDOW + MIB)
        lost = exits.MemoryFault(kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE, WINDOW, PAGE, EHWPOISON)
        assert [vcpu.run(), vcpu.run()] == [lost, lost]
        for gpa in (WINDOW, WINDOW + MIB):
            assert errno_of(vcpu.pre_fault_memory, gpa, PAGE) == EHWPOISON
        # Its neighbours are as they were; the range ends before it.
        assert vcpu.pre_fault_memory(WINDOW + PAGE, PAGE) == PAGE
        memory.fallocate(fd, memory.PUNCH, 2 * MIB, PAGE)
        assert vcpu.run() == exits.PortOut(0x42, 4, 0)
        assert vcpu.pre_fault_memory(WINDOW + MIB, MIB) == MIB


def test_what_cannot_be_lost(vm: Vm, fd: int, window: int) -> None:
    vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd)
    vm.set_user_memory_region(slot=1, guest_phys_addr=WINDOW, memory_size=MIB, shared_fd=window)
    assert errno_of(vm.inject_failure, GPA + 1) == EINVAL
    assert errno_of(vm.inject_failure, WINDOW) == EFAULT
    assert errno_of(vm.inject_failure, GPA + MIB) == EFAULT
    assert errno_of(vm.inject_failure, GPA) == 0


# Stop requests from the owner.


def test_an_interrupt_from_the_owner(service: Service, vm: Vm, fd: int) -> None:
    vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd)
    vm.convert(GPA, MIB, private=True)
    vm.launch_update(GPA, bytes.fromhex("ebfe").ljust(PAGE, b"\0"))
    with vm.create_vcpu() as first, vm.create_vcpu() as second:
        for vcpu in (first, second):
            vcpu.set_regs(rip=GPA)
        found: list[exits.Exit] = []

        def run(vcpu: Vcpu) -> None:
            found.append(vcpu.run())

        threads = [threading.Thread(target=run, args=[vcpu]) for vcpu in (first, second)]
        for thread in threads:
            thread.start()
        for thread, vcpu in zip(threads, (first, second), strict=True):
            vcpu.interrupt()
            thread.join(20)
            assert not thread.is_alive()
        assert found == [exits.Interrupted()] * 2
        second.interrupt()
        assert second.run() == exits.Interrupted()
        assert errno_of(vm._channel.call, vm_wire.INTERRUPT, vm_wire.VCPU.pack(2)) == EINVAL
