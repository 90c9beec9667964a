"""One contract over both engines: slots, both halves of memory, conversions and punches."""

import os
from typing import Final

import pytest

from both_engines import (
    CALL,
    DATA,
    DIFFERENCES,
    PRIVATE,
    SHARED,
    Machine,
    engine,
    errno_of,
    machine,
    service,
    shared_memory,
    word,
)
from hugetlb import reserved
from restrictedmem.abi import memory
from restrictedmem.protocol import guest_abi
from restrictedmem.protocol.exits import Hypercall, MemoryFault
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vm

__all__ = ["engine", "machine", "service"]

pytestmark = pytest.mark.requires("fuse")

PAGE: Final = 4096
MIB: Final = 1 << 20

EEXIST, EFAULT, EINVAL = 17, 14, 22

READ_AND_WRITE: Final = (
    "488b37",  # mov rsi, [rdi] (rdi is DATA; a hypercall's answer is written next)
    CALL,
    "488907",  # mov [rdi], rax
    "ebec",  # jmp to the first
)


def test_each_half_keeps_its_content(machine: Machine) -> None:
    offset = DATA - PRIVATE
    machine.half[offset : offset + 8] = (0x51).to_bytes(8, "little")
    assert word(machine.start(*READ_AND_WRITE)) == 0
    assert word(machine.vcpu.run(0x99)) == 0x99
    machine.vm.convert(DATA, PAGE, private=False)
    assert word(machine.vcpu.run(0x52)) == 0x52
    assert int.from_bytes(machine.half[offset : offset + 8], "little") == 0x52
    machine.vm.convert(DATA, PAGE, private=True)
    assert word(machine.vcpu.run(0x53)) == 0x53
    assert int.from_bytes(machine.half[offset : offset + 8], "little") == 0x52
    machine.vm.convert(DATA, PAGE, private=False)
    assert word(machine.vcpu.run(0x54)) == 0x54


def test_a_conversion_changes_what_the_next_load_sees(machine: Machine) -> None:
    offset = DATA - PRIVATE
    machine.half[offset : offset + 8] = (0x51).to_bytes(8, "little")
    assert (
        word(machine.start("488b37", CALL, "ebef")) == 0
    )  # mov rsi, [rdi]; hypercall; jmp to the first
    for private, value in ((False, 0x51), (True, 0), (False, 0x51)):
        machine.vm.convert(DATA, PAGE, private=private)
        assert word(machine.vcpu.run()) == value


@pytest.mark.parametrize("size", [PAGE, 64 << 10, 2 * MIB])
def test_neighbours_of_a_conversion_are_left_alone(machine: Machine, size: int) -> None:
    at = PRIVATE + 2 * MIB
    exit_ = machine.start(
        f"bb{at.to_bytes(4, 'little').hex()}",  # mov ebx, at
        "c783fcffffff07000000",  # mov dword [rbx - 4], 7
        f"c783{size.to_bytes(4, 'little').hex()}07000000"
        if size < 2 * MIB
        else "90",  # mov dword [rbx + size], 7
        "c70307000000",  # mov dword [rbx], 7
        CALL,
        "8bbbfcffffff",  # mov edi, [rbx - 4]
        "8b33",  # mov esi, [rbx]
        f"8b93{size.to_bytes(4, 'little').hex()}"
        if size < 2 * MIB
        else "ba07000000",  # mov edx, [rbx + size]
        CALL,
    )
    assert isinstance(exit_, Hypercall)
    machine.vm.convert(at, size, private=False)
    found = machine.vcpu.run()
    assert isinstance(found, Hypercall)
    assert found.arguments[:3] == (7, 0, 7)


def test_a_punch_leaves_zeroes(machine: Machine) -> None:
    assert (
        word(machine.start("c70799000000", "488b37", CALL, "ebef")) == 0x99
    )  # mov dword [rdi], 0x99; mov rsi, [rdi]; hypercall; jmp
    machine.punch(DATA, PAGE)
    assert word(machine.vcpu.run()) == 0


def test_content_outlives_its_slot(machine: Machine) -> None:
    assert word(machine.start("488b37", CALL, "488907", "ebec")) == 0
    assert word(machine.vcpu.run(0x77)) == 0x77
    machine.vm.set_user_memory_region(slot=0, guest_phys_addr=PRIVATE, memory_size=0)
    machine.vm.set_user_memory_region(
        slot=0, guest_phys_addr=PRIVATE, memory_size=4 * MIB, restricted_fd=machine.fd
    )
    assert word(machine.vcpu.run(0x78)) == 0x78


def test_a_slot_that_was_deleted_is_gone_for_the_guest(machine: Machine) -> None:
    assert isinstance(
        machine.start("bb00000010", "8b3b", CALL, "ffe3"), Hypercall
    )  # mov ebx, SHARED; mov edi, [rbx]; hc; jmp rbx
    machine.vm.set_user_memory_region(slot=1, guest_phys_addr=SHARED, memory_size=0)
    assert machine.vcpu.run() == MemoryFault(0, SHARED, PAGE, EFAULT)


def test_initial_content_comes_in_any_amount(machine: Machine) -> None:
    content = bytes(range(256)) * (2 * MIB // 256)
    machine.vm.launch_update(PRIVATE + 2 * MIB, content)
    exit_ = machine.start(
        "be00002040",  # mov esi, PRIVATE + 2 MIB
        "bf00000010",  # mov edi, SHARED
        "b900000400",  # mov ecx, 1 MIB / 4
        "f3a5",  # rep movsd
        CALL,
    )
    assert isinstance(exit_, Hypercall)
    assert machine.window[:MIB] == content[:MIB]


def test_overlapping_slots_are_refused(machine: Machine) -> None:
    for at in (PRIVATE + MIB, guest_abi.HYPERCALL_PAGE, guest_abi.REPORT_PAGE):
        with shared_memory(PAGE) as (fd, _):
            assert (
                errno_of(
                    machine.vm.set_user_memory_region,
                    slot=5,
                    guest_phys_addr=at,
                    memory_size=PAGE,
                    shared_fd=fd,
                )
                == EEXIST
            )


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        ((1 << 62) - PAGE, 2 * PAGE, 0),
        (1 << 62, 1 << 30, 0),
        ((1 << 63) - 2 * PAGE, PAGE, 0),
        ((1 << 63) - PAGE, PAGE, EINVAL),
        ((1 << 63) - 2 * PAGE, 2 * PAGE, EINVAL),
        (1 << 63, PAGE, EINVAL),
        ((1 << 64) - PAGE, PAGE, EINVAL),
    ],
)
def test_a_file_is_as_large_as_the_kernel_lets_it_be(
    machine: Machine, offset: int, size: int, expected: int
) -> None:
    fd, at = machine.service.memfd_restricted(), 1 << 32
    make = machine.vm.set_user_memory_region
    try:
        found = errno_of(
            make,
            slot=3,
            guest_phys_addr=at,
            memory_size=size,
            restricted_fd=fd,
            restricted_offset=offset,
        )
        assert found == expected
        if not expected:
            machine.vm.convert(at, size, private=True)
            machine.vm.launch_update(at + size - PAGE, (0x77).to_bytes(PAGE, "little"))
            load = f"48b8{(at + size - PAGE).to_bytes(8, 'little').hex()}"  # mov rax, the last page
            assert (
                word(machine.start(load, "488b30", CALL, "ebef")) == 0x77
            )  # mov rsi, [rax]; hypercall; jmp to the load
            memory.fallocate(fd, memory.PUNCH, offset, size)
            assert word(machine.vcpu.run(at + size - PAGE)) == 0
    finally:
        os.close(fd)


@pytest.mark.requires("hugetlb")
def test_a_file_of_huge_pages_ends_with_a_whole_one(engine: str) -> None:
    with (
        reserved(2 * MIB, 1),
        Service.start(Options(backing="hugetlb-2m")) as service,
        Vm(service, engine=engine) as vm,
    ):
        fd = service.memfd_restricted()
        for slot, before_end, expected in (
            (0, 2 * MIB, EINVAL),
            (0, 4 * MIB, 0),
            (1, 2 * MIB, EINVAL),
        ):
            gpa, offset = PRIVATE + slot * MIB, (1 << 63) - before_end
            make = vm.set_user_memory_region
            found = errno_of(
                make,
                slot=slot,
                guest_phys_addr=gpa,
                memory_size=MIB,
                restricted_fd=fd,
                restricted_offset=offset,
            )
            assert found == expected
        os.close(fd)


def test_two_slots_on_the_same_pages(machine: Machine) -> None:
    make = machine.vm.set_user_memory_region
    found = errno_of(
        make,
        slot=3,
        guest_phys_addr=PRIVATE + 64 * MIB,
        memory_size=MIB,
        restricted_fd=machine.fd,
        restricted_offset=MIB,
    )
    assert (found,) == machine.expect("overlap")


def test_the_service_s_limit(engine: str) -> None:
    with Service.start(Options(memory_max=MIB)) as limited, Vm(limited, engine=engine) as vm:
        fd = limited.memfd_restricted()
        os.ftruncate(fd, 2 * MIB)
        found = errno_of(
            vm.set_user_memory_region,
            slot=0,
            guest_phys_addr=PRIVATE,
            memory_size=2 * MIB,
            restricted_fd=fd,
        )
        os.close(fd)
    assert (found,) == DIFFERENCES["memory-max"][engine]


def test_blocks_of_the_descriptor(machine: Machine) -> None:
    assert isinstance(machine.start(CALL), Hypercall)
    assert (os.fstat(machine.fd).st_blocks > 0,) == machine.expect("blocks")


def test_room_for_page_tables(service: Service, engine: str) -> None:
    with Vm(service, engine=engine) as vm:
        found = 0
        for number in range(40):
            fd = service.memfd_restricted()
            try:
                at = (number + 4) << 30
                found = errno_of(
                    vm.set_user_memory_region,
                    slot=number,
                    guest_phys_addr=at,
                    memory_size=1 << 30,
                    restricted_fd=fd,
                )
            finally:
                os.close(fd)
            if found:
                break
    assert (found,) == DIFFERENCES["page-tables"][engine]


def test_a_slot_holds_its_file(machine: Machine) -> None:
    def consumers() -> int:
        # This is for this VM: an earlier one may take its time to end.
        own = machine.vm.statistics()["pid"]
        return sum(
            vm["files"] != [] and vm["report"].get("pid") == own
            for vm in machine.service.status()["consumers"]
        )

    machine.vm.launch_update(PRIVATE, bytes(PAGE))
    assert consumers() == 1
    machine.vm.set_user_memory_region(slot=0, guest_phys_addr=PRIVATE, memory_size=0)
    assert (consumers() == 0,) == machine.expect("held-until-end")


@pytest.mark.requires("hugetlb")
def test_a_shared_half_of_huge_pages(machine: Machine) -> None:
    """Part of one cannot be taken from KVM: a page made private would stay what its owner reads."""
    size = 2 << 20
    with (
        reserved(size, 1),
        memory.memfd_create("huge", memory.MFD_HUGETLB | 21 << memory.MFD_HUGE_SHIFT) as fd,
    ):
        os.ftruncate(fd.fileno(), size)
        make = machine.vm.set_user_memory_region
        found = errno_of(
            make, slot=7, guest_phys_addr=1 << 32, memory_size=size, shared_fd=fd.fileno()
        )
    assert (found,) == machine.expect("huge-shared")
