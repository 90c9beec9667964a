"""One contract over both engines: what an owner and a guest may rely on, whichever runs the guest.

Where the engines differ, the difference has a key in ``DIFFERENCES`` and a row in
docs/reference/engines.md.
"""

import contextlib
import mmap
import os
import re
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

import emulation
from hugetlb import reserved
from restrictedmem.abi import memory
from restrictedmem.abi.kvm import KVM_MEMORY_EXIT_FLAG_PRIVATE, ExitReason
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.protocol.exits import (
    Exit,
    Hypercall,
    MemoryFault,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Shutdown,
)
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vcpu, Vm
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse")

ENGINES_MD: Final = Path(__file__).parent.parent / "docs" / "reference" / "engines.md"
PAGE: Final = 4096
MIB: Final = 1 << 20
PRIVATE: Final = guest_abi.PRIVATE_BASE
SHARED: Final = guest_abi.SHARED_BASE
NOWHERE: Final = 0xD000_0000
CODE: Final = PRIVATE
DATA: Final = PRIVATE + 8 * PAGE
STACK: Final = PRIVATE + 8 * PAGE
EPERM, EACCES, EEXIST, EFAULT, EINVAL, ENOMEM, ENOSPC, EOPNOTSUPP = 1, 13, 17, 14, 22, 12, 28, 95
DEADLINE: Final = 20.0


def assembled(*instructions: str) -> bytes:
    return bytes.fromhex("".join(instructions))


#: mov eax, 99; mov ecx, HYPERCALL_PAGE; call rcx: a number of no meaning, so that all four
#: arguments come through.
NUMBER: Final = 99
CALL: Final = "b863000000b900001000ffd1"


#: What differs: by key, the software engine's answers and the kernel engine's.
DIFFERENCES: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "mmio": {
        "software": (MmioRead(NOWHERE + 8, 4), MmioWrite(NOWHERE + 8, 4, 0x1234)),
        "kernel": (MemoryFault(0, NOWHERE, PAGE, EFAULT), MemoryFault(0, NOWHERE, PAGE, EFAULT)),
    },
    "readonly-store": {
        "software": (
            MmioWrite(SHARED + MIB, 4, 0x1234),
            MmioWrite(guest_abi.HYPERCALL_PAGE, 4, 0x1234),
        ),
        "kernel": (
            MemoryFault(0, SHARED + MIB, PAGE, EACCES),
            MemoryFault(0, guest_abi.HYPERCALL_PAGE, PAGE, EACCES),
        ),
    },
    "port-in-private-code": {
        "software": ({PortIn(0x80, 1)}, {PortOut(0x80, 1, 0)}),
        "kernel": ({Shutdown(6), PortIn(0x80, 1)}, {Shutdown(6), PortOut(0x80, 1, 0)}),
    },
    "port-to-private-memory": {
        "software": ({Hypercall(NUMBER, (DATA + 1, DATA, 0x80, 0)), PortOut(0x80, 1, 0)},),
        "kernel": ({exits.Unknown(ExitReason.INTERNAL_ERROR)},),
    },
    "general-protection": {"software": ({13},), "kernel": ({6, 13},)},
    "interrupt-number": {"software": ({0x80},), "kernel": ({6, 0x80},)},
    "shared-code": {"software": (exits.Interrupted(),), "kernel": (Shutdown(6),)},
    "overlap": {"software": (0,), "kernel": (EINVAL,)},
    "huge-shared": {"software": (0,), "kernel": (EINVAL,)},
    "memory-max": {"software": (0,), "kernel": (ENOSPC,)},
    "blocks": {"software": (True,), "kernel": (False,)},
    "fault-counts": {"software": (True,), "kernel": (False,)},
    "page-tables": {"software": (0,), "kernel": (ENOMEM,)},
    "held-until-end": {"software": (True,), "kernel": (False,)},
    "prefault": {"software": (PAGE,), "kernel": (EOPNOTSUPP,)},
    "memory-failure": {"software": (0,), "kernel": (EOPNOTSUPP,)},
}


@dataclass
class Machine:
    """A VM with private memory of both halves and a shared window, and the owner's side of them."""

    service: Service
    engine: str
    vm: Vm
    fd: int
    half: mmap.mmap
    window: mmap.mmap
    vcpu: Vcpu

    def expect(self, key: str) -> tuple[Any, ...]:
        return DIFFERENCES[key][self.engine]

    def start(self, *instructions: str, rsi: int = 0) -> Exit:
        """Run code from private memory, with rdi at DATA, to its first exit."""
        self.vm.launch_update(CODE, assembled(*instructions).ljust(PAGE, b"\xf4"))
        self.vcpu.set_regs(rip=CODE, rsp=STACK, rdi=DATA, rsi=rsi)
        return self.vcpu.run()

    def start_shared(self, *instructions: str) -> Exit:
        """The same from the shared window."""
        code = assembled(*instructions)
        self.window[: len(code)] = code
        self.vcpu.set_regs(rip=SHARED, rsp=STACK, rdi=DATA)
        return self.vcpu.run()

    def punch(self, gpa: int, size: int) -> None:
        memory.fallocate(self.fd, memory.PUNCH, gpa - PRIVATE, size)


@pytest.fixture(scope="module", params=["v10", "v9"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with Service.start(Options(api=request.param)) as found:
        yield found


ENGINES: Final = ("software", pytest.param("kernel", marks=pytest.mark.requires("kvm")))


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@contextlib.contextmanager
def shared_memory(size: int) -> Generator[tuple[int, mmap.mmap]]:
    with memory.memfd_create("shared") as fd:
        os.ftruncate(fd.fileno(), size)
        with mmap.mmap(fd.fileno(), size) as mapping:
            yield fd.fileno(), mapping


@contextlib.contextmanager
def make_machine(service: Service, engine: str, *, debug: bool = False) -> Generator[Machine]:
    fd, size = service.memfd_restricted(), 4 * MIB
    try:
        os.ftruncate(fd, size)
        with (
            shared_memory(size) as (half_fd, half),
            shared_memory(MIB) as (window_fd, window),
            Vm(service, engine=engine, debug=debug) as vm,
        ):
            vm.set_user_memory_region(
                slot=0,
                guest_phys_addr=PRIVATE,
                memory_size=size,
                restricted_fd=fd,
                shared_fd=half_fd,
            )
            vm.set_user_memory_region(
                slot=1, guest_phys_addr=SHARED, memory_size=MIB, shared_fd=window_fd
            )
            with vm.create_vcpu() as vcpu:
                machine = Machine(service, engine, vm, fd, half, window, vcpu)
                machine.vm.convert(PRIVATE, size, private=True)
                machine.vm.convert(SHARED, MIB, private=False)
                yield machine
    finally:
        os.close(fd)


@pytest.fixture
def machine(service: Service, engine: str) -> Iterator[Machine]:
    with make_machine(service, engine) as found:
        yield found


def errno_of(call: object, *args: object, **kwargs: object) -> int:
    assert callable(call)
    try:
        call(*args, **kwargs)
    except OSError as error:
        return error.errno or EINVAL
    return 0


def test_every_difference_has_its_row() -> None:
    table = ENGINES_MD.read_text(encoding="utf-8").split("## Differences")[1].split("\n## ")[0]
    rows = re.findall(
        r"^\| `([a-z-]+)` \|.*\| `test_engines\.py::(\w+)`(?:, `test_\w+\.py::\w+`)* \|$",
        table,
        re.MULTILINE,
    )
    assert sorted(key for key, _ in rows) == sorted(DIFFERENCES)
    assert [test for _, test in rows if test not in globals()] == []


# Hypercalls and registers.


def test_hypercall(machine: Machine) -> None:
    exit_ = machine.start(
        "b807000000",  # mov eax, 7
        "be02000000",  # mov esi, 2
        "ba03000000",  # mov edx, 3
        "41ba04000000",  # mov r10d, 4
        "b900001000ffd1",  # mov ecx, HYPERCALL_PAGE; call rcx
        "4889c7",  # mov rdi, rax
        "4889e6",  # mov rsi, rsp
        CALL,
    )
    assert exit_ == Hypercall(7, (DATA, 2, 3, 4))
    assert machine.vcpu.run(-38) == Hypercall(NUMBER, ((1 << 64) - 38, STACK, 3, 4))


def test_registers_are_what_they_are_at_reset(machine: Machine) -> None:
    exit_ = machine.start(
        "4c09fb",  # or rbx, r15
        "4809eb",  # or rbx, rbp
        "4809d8",  # or rax, rbx
        "4889c2",  # mov rdx, rax
        "4989f2",  # mov r10, rsi
        CALL,
        rsi=0x55,
    )
    assert exit_ == Hypercall(NUMBER, (DATA, 0x55, 0, 0x55))


def test_ports_in_shared_code(machine: Machine) -> None:
    exit_ = machine.start_shared(
        "e680",  # out 0x80, al
        "66ba8100",  # mov dx, 0x81
        "ed",  # in eax, dx
        "89c7",  # mov edi, eax
        CALL,
    )
    assert exit_ == PortOut(0x80, 1, 0)
    assert machine.vcpu.run() == PortIn(0x81, 4)
    found = machine.vcpu.run(0xCAFE_BABE)
    assert isinstance(found, Hypercall)
    assert found.arguments[0] == 0xCAFE_BABE


def test_the_port_of_hypercalls_is_one_as_others_outside_their_page(machine: Machine) -> None:
    exit_ = machine.start_shared(
        "b807000000",  # mov eax, 7
        "e6f4",  # out 0xf4, al
    )
    assert exit_ == PortOut(0xF4, 1, 7)


def test_string_instructions_on_ports_come_one_by_one(machine: Machine) -> None:
    exit_ = machine.start_shared(
        "bf00020010",  # mov edi, SHARED + 0x200
        "66ba8000",  # mov dx, 0x80
        "b903000000",  # mov ecx, 3
        "f3666d",  # rep insw
        "be00020010",  # mov esi, SHARED + 0x200
        "b902000000",  # mov ecx, 2
        "f3666f",  # rep outsw
        CALL,
    )
    for value in (0x1111, 0x2222, 0x3333):
        assert exit_ == PortIn(0x80, 2)
        exit_ = machine.vcpu.run(value)
    assert exit_ == PortOut(0x80, 2, 0x1111)
    assert machine.vcpu.run() == PortOut(0x80, 2, 0x2222)
    assert isinstance(machine.vcpu.run(), Hypercall)
    assert machine.window[0x200:0x206] == bytes.fromhex("111122223333")


def missing_page(machine: Machine, at: int, content: bytes) -> MemoryFault:
    """Make a slot of one private page, which shows the half that it lacks; returns what comes of a touch."""
    fd = machine.service.memfd_restricted()
    machine.vm.set_user_memory_region(
        slot=2, guest_phys_addr=at, memory_size=PAGE, restricted_fd=fd
    )
    os.close(fd)
    machine.vm.convert(at, PAGE, private=True)
    machine.vm.launch_update(at, content.ljust(PAGE, b"\xf4"))
    machine.vm.convert(at, PAGE, private=False)
    return MemoryFault(0, at, PAGE, EFAULT)


PORT_IN: Final = PortIn(0x80, 2)
INPUT: Final = (
    "66ba8000",  # mov dx, 0x80
    "b904000000",  # mov ecx, 4
    "f3666d",  # rep insw
    CALL,
)


def load_rdi(value: int) -> str:
    """mov rdi, value"""
    return "48bf" + value.to_bytes(8, "little").hex()


@pytest.mark.parametrize("backwards", [False, True])
def test_a_port_is_read_only_for_what_can_be_stored(
    service: Service, engine: str, backwards: bool
) -> None:
    """The fault of a page comes before the values for it are asked for; each value is asked for once."""
    with make_machine(service, engine, debug=True) as machine:
        page, first, before = (
            (SHARED - PAGE, SHARED + 4, 3) if backwards else (SHARED + MIB, SHARED + MIB - 4, 2)
        )
        missing = missing_page(machine, page, b"")
        exit_ = machine.start_shared(load_rdi(first), "fd" if backwards else "fc", *INPUT)
        found: list[Exit] = []
        for value in (0x1111, 0x2222, 0x3333, 0x4444):
            if exit_ == missing:
                found.append(exit_)
                machine.vm.convert(page, PAGE, private=True)
                exit_ = machine.vcpu.run()
            found.append(exit_)
            exit_ = machine.vcpu.run(value)
        assert isinstance(exit_, Hypercall)
        assert found == [PORT_IN] * before + [missing] + [PORT_IN] * (4 - before)
        there = machine.vm.read_memory(page, PAGE)
        there = there[-2:] + machine.window[:6] if backwards else machine.window[-4:] + there[:4]
        assert there.hex() == ("4444333322221111" if backwards else "1111222233334444")


def test_a_value_of_a_port_on_two_pages(service: Service, engine: str) -> None:
    """It is asked for, and stored, when both can be had."""
    with make_machine(service, engine, debug=True) as machine:
        missing = missing_page(machine, SHARED + MIB, b"")
        machine.window[-2:] = b"ab"
        exit_ = machine.start_shared(
            load_rdi(SHARED + MIB - 2), "66ba8000", "6d", CALL
        )  # mov dx, 0x80; insd
        assert (exit_, machine.vcpu.run(), machine.window[-2:]) == (missing, missing, b"ab")
        machine.vm.convert(SHARED + MIB, PAGE, private=True)
        assert machine.vcpu.run() == PortIn(0x80, 4)
        assert isinstance(machine.vcpu.run(0x64636261), Hypercall)
        assert machine.window[-2:] + machine.vm.read_memory(SHARED + MIB, 2) == b"abcd"


def test_a_port_is_read_to_an_address_of_32_bits(machine: Machine) -> None:
    code = load_rdi(SHARED + 0x200 | 1 << 33)
    assert machine.start_shared(code, "66ba8000", "676c", CALL) == PortIn(
        0x80, 1
    )  # mov dx, 0x80; insb to [edi]
    assert isinstance(machine.vcpu.run(0x41), Hypercall)
    assert machine.window[0x200] == 0x41


def test_values_of_a_port_survive_a_page_that_is_taken_away(service: Service, engine: str) -> None:
    """The owner takes it while it is asked; those that were stored before are not stored again."""
    with make_machine(service, engine, debug=True) as machine:
        missing = missing_page(machine, SHARED + MIB, b"")
        machine.vm.convert(SHARED + MIB, PAGE, private=True)
        exit_ = machine.start_shared(load_rdi(SHARED + MIB - 4), *INPUT)
        for value in (0x1111, 0x2222, 0x3333, 0x4444):
            if exit_ == missing:
                machine.vm.convert(SHARED + MIB, PAGE, private=True)
                exit_ = machine.vcpu.run()
            assert exit_ == PORT_IN
            machine.vm.convert(SHARED + MIB, PAGE, private=False)
            exit_ = machine.vcpu.run(value)
        if exit_ == missing:
            machine.vm.convert(SHARED + MIB, PAGE, private=True)
            exit_ = machine.vcpu.run()
        assert isinstance(exit_, Hypercall)
        assert (
            machine.window[-4:] + machine.vm.read_memory(SHARED + MIB, 4)
        ).hex() == "1111222233334444"


def test_a_value_of_a_port_survives_a_page_that_is_taken_away(
    service: Service, engine: str
) -> None:
    """The owner takes it while it is asked; the instruction is executed again, and gets what it was given."""
    with make_machine(service, engine, debug=True) as machine:
        missing = missing_page(machine, SHARED + MIB, b"")
        exit_ = machine.start_shared(
            f"bf{(SHARED + MIB).to_bytes(4, 'little').hex()}",  # mov edi, SHARED + MIB
            "66ba8000",  # mov dx, 0x80
            "6c",  # insb
            "ffcf",  # dec edi
            "6c",  # insb
            CALL,
        )
        assert exit_ == missing
        for value in (0x41, 0x42):
            machine.vm.convert(SHARED + MIB, PAGE, private=True)
            assert machine.vcpu.run() == PortIn(0x80, 1)
            machine.vm.convert(SHARED + MIB, PAGE, private=False)
            assert [machine.vcpu.run(value), machine.vcpu.run(0x99)] == [missing, missing]
        machine.vm.convert(SHARED + MIB, PAGE, private=True)
        assert isinstance(machine.vcpu.run(0x99), Hypercall)
        assert machine.vm.read_memory(SHARED + MIB, 1) == b"\x42"


def test_a_value_of_a_port_is_for_its_instruction_alone(service: Service, engine: str) -> None:
    """The debugger leads the vCPU to another INS before what was read could be stored."""
    with make_machine(service, engine, debug=True) as machine:
        missing = missing_page(machine, SHARED + MIB, b"")
        machine.vm.convert(SHARED + MIB, PAGE, private=True)
        # mov dx, 0x80; insb; insb
        assert machine.start_shared(load_rdi(SHARED + MIB), "66ba8000", "6c", "6c", CALL) == PortIn(
            0x80, 1
        )
        machine.vm.convert(SHARED + MIB, PAGE, private=False)
        assert machine.vcpu.run(0x41) == missing
        regs = machine.vcpu.get_regs()
        regs.rip, regs.rdi = SHARED + 15, SHARED + 0x200
        machine.vcpu.change_regs(regs)
        assert machine.vcpu.run() == PortIn(0x80, 1)
        assert isinstance(machine.vcpu.run(0x42), Hypercall)
        assert machine.window[0x200] == 0x42


def test_a_value_of_a_port_is_not_for_the_next_page(machine: Machine) -> None:
    """The INS behind it faults when it is fetched, after the first one is done."""
    with shared_memory(PAGE) as (fd, page):
        machine.window[-1:] = page[:1] = assembled("6c")  # insb
        jump = (MIB - 1 - 19).to_bytes(4, "little").hex()
        # mov dx, 0x80; jmp to the last byte
        assert machine.start_shared(load_rdi(SHARED + 0x200), "66ba8000", "e9", jump) == PortIn(
            0x80, 1
        )
        assert machine.vcpu.run(0x41) == MemoryFault(0, SHARED + MIB, PAGE, EFAULT)
        machine.vm.set_user_memory_region(
            slot=2, guest_phys_addr=SHARED + MIB, memory_size=PAGE, shared_fd=fd
        )
        machine.vm.convert(SHARED + MIB, PAGE, private=False)
        assert machine.vcpu.run() == PortIn(0x80, 1)
        assert machine.window[0x200] == 0x41


def test_a_value_of_a_port_survives_a_step_that_faults(service: Service, engine: str) -> None:
    with make_machine(service, engine, debug=True) as machine:
        missing = missing_page(machine, SHARED + MIB, b"")
        machine.vm.convert(SHARED + MIB, PAGE, private=True)
        # mov edi, SHARED + MIB; mov dx, 0x80; insb
        assert machine.start_shared(
            f"bf{(SHARED + MIB).to_bytes(4, 'little').hex()}", "66ba8000", "6c", CALL
        ) == PortIn(0x80, 1)
        machine.vm.convert(SHARED + MIB, PAGE, private=False)
        machine.vcpu.set_guest_debug(step=True)
        assert [machine.vcpu.run(0x41), machine.vcpu.run(0x99)] == [missing, missing]
        machine.vm.convert(SHARED + MIB, PAGE, private=True)
        assert machine.vcpu.run(0x99) == exits.Debug(exits.SINGLE_STEP, SHARED + 10, exits.DR6_BS)
        assert machine.vm.read_memory(SHARED + MIB, 1) == b"\x41"


@pytest.mark.parametrize("instruction", ["6c", "6e"])  # insb; outsb
def test_string_instructions_between_ports_and_private_memory(
    machine: Machine, instruction: str
) -> None:
    exit_ = machine.start_shared(
        "89fe", "66ba8000", instruction, CALL
    )  # mov esi, edi; mov dx, 0x80
    if exit_ == PortIn(0x80, 1):
        exit_ = machine.vcpu.run(0x41)
    assert exit_ in machine.expect("port-to-private-memory")[0]
    if isinstance(exit_, exits.Unknown):
        # For good: it would go on with what is not its memory.
        assert machine.vcpu.run() == exit_


@pytest.mark.parametrize(("instruction", "index"), [("e480", 0), ("e680", 1)])
def test_ports_in_private_code(machine: Machine, instruction: str, index: int) -> None:
    assert machine.start(instruction) in machine.expect("port-in-private-code")[index]


# Exceptions.


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        ("31c9f7f1", 0),  # xor ecx, ecx; div ecx
        ("cc", 3),  # int3
        ("0f0b", 6),  # ud2
        ("06", 6),  # push es, which long mode has no more
        ("0f05", 6),  # syscall
        ("0f34", 6),  # sysenter
        ("48b80000000000100000488b00", 14),  # mov rax, 1 << 44; mov rax, [rax]
        ("f4", "general-protection"),  # hlt
        ("0f20c0", "general-protection"),  # mov rax, cr0
        ("0f0117", "general-protection"),  # lgdt [rdi]
        ("66b81b008ed8", "general-protection"),  # mov ax, 0x1b; mov ds, ax
        ("cd80", "interrupt-number"),  # int 0x80
    ],
)
def test_exceptions(machine: Machine, code: str, vector: int | str) -> None:
    exit_ = machine.start(code)
    assert isinstance(exit_, Shutdown)
    assert exit_.vector in (machine.expect(vector)[0] if isinstance(vector, str) else {vector})
    # For good.
    assert machine.vcpu.run() == exit_


def test_hlt_in_shared_code(machine: Machine) -> None:
    assert machine.start_shared("f4") == Shutdown(13)


# Faults.


@pytest.mark.parametrize(
    ("code", "index"), [("8b08", 0), ("8908", 1)]
)  # mov ecx, [rax]; mov [rax], ecx
def test_mmio(machine: Machine, code: str, index: int) -> None:
    exit_ = machine.start("b8080000d0", "b934120000", code)  # mov eax, NOWHERE + 8; mov ecx, 0x1234
    assert exit_ == machine.expect("mmio")[index]


def test_code_where_no_slot_is(machine: Machine) -> None:
    assert machine.start("b8080000d0", "ffe0") == MemoryFault(
        0, NOWHERE, PAGE, EFAULT
    )  # mov eax, NOWHERE + 8; jmp rax


def test_store_to_read_only_memory(machine: Machine) -> None:
    with shared_memory(PAGE) as (fd, mapping):
        mapping[:4] = b"read"
        machine.vm.set_user_memory_region(
            slot=2, guest_phys_addr=SHARED + MIB, memory_size=PAGE, shared_fd=fd, readonly=True
        )
        machine.vm.convert(SHARED + MIB, PAGE, private=False)
        exit_ = machine.start(
            "bb00001010",  # mov ebx, SHARED + MIB
            "8b3b",  # mov edi, [rbx]
            CALL,
            "b934120000",  # mov ecx, 0x1234
            "890b",  # mov [rbx], ecx
        )
        assert isinstance(exit_, Hypercall)
        assert exit_.arguments[0] == int.from_bytes(b"read", "little")
        assert machine.vcpu.run() == machine.expect("readonly-store")[0]
        assert mapping[:4] == b"read"


def test_content_of_a_read_only_slot(machine: Machine) -> None:
    """The owner's content comes in and is measured; the guest's stores do not, before and after it was read."""
    at, content = PRIVATE + 64 * MIB, bytes(range(1, 129)) * 64
    fd = machine.service.memfd_restricted()
    make = machine.vm.set_user_memory_region
    make(slot=2, guest_phys_addr=at, memory_size=4 * PAGE, restricted_fd=fd, readonly=True)
    os.close(fd)
    machine.vm.convert(at, 4 * PAGE, private=True)
    for start in (2 * PAGE, 0):
        machine.vm.launch_update(at + start, content)
    exit_ = machine.start(
        f"bb{at.to_bytes(4, 'little').hex()}",  # mov ebx, at
        "81c3fc1f0000",  # add ebx, 0x1ffc
        "488b33",  # mov rsi, [rbx]
        CALL,
        "c703ffffffff",  # mov dword [rbx], -1
        "c7430400000000",  # mov dword [rbx + 4], 0
        "488b33",  # mov rsi, [rbx]
        CALL,
    )
    there = int.from_bytes(content[-4:] + content[:4], "little")
    assert word(exit_) == there
    refused = machine.vcpu.run()
    if isinstance(refused, MmioWrite):
        assert (refused, machine.vcpu.run()) == (
            MmioWrite(at + 2 * PAGE - 4, 4, 0xFFFF_FFFF),
            MmioWrite(at + 2 * PAGE, 4, 0),
        )
        assert word(machine.vcpu.run()) == there
    else:
        missing = MemoryFault(KVM_MEMORY_EXIT_FLAG_PRIVATE, at + PAGE, PAGE, EACCES)
        assert [refused, machine.vcpu.run()] == [missing, missing]


def test_store_to_the_hypercall_page(machine: Machine) -> None:
    exit_ = machine.start(
        "bb00001000", "b934120000", "890b"
    )  # mov ebx, HYPERCALL_PAGE; mov ecx, 0x1234; mov [rbx], ecx
    assert exit_ == machine.expect("readonly-store")[1]


def test_code_that_its_owner_rewrites(machine: Machine) -> None:
    """In shared memory: seen when the vCPU enters the guest, and on the kernel engine while it is there."""
    assert machine.start_shared("e680", "b001", "ebfa") == PortOut(
        0x80, 1, 0
    )  # out 0x80, al; mov al, 1; jmp to the first
    assert machine.vcpu.run() == PortOut(0x80, 1, 1)
    machine.window[3] = 2
    assert [machine.vcpu.run(), machine.vcpu.run()] == [PortOut(0x80, 1, 2)] * 2
    # Behind OUT: inc dword [SHARED + PAGE]; jmp to it
    machine.window[2:11] = assembled("ff0425", (SHARED + PAGE).to_bytes(4, "little").hex(), "ebf7")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(machine.vcpu.run)
        wait_until(lambda: machine.window[PAGE] > 0, "the guest to run")
        machine.window[9:11] = assembled("0f0b")  # ud2
        if machine.engine == "software":
            machine.vcpu.interrupt()
        assert running.result(DEADLINE) == machine.expect("shared-code")[0]
    assert machine.vcpu.run() == Shutdown(6)


def test_a_fault_can_be_mended(machine: Machine) -> None:
    """The attribute names a half that the slot lacks, until the owner changes it: the instruction is tried again."""
    page = PRIVATE + 64 * MIB
    fd = machine.service.memfd_restricted()
    machine.vm.set_user_memory_region(
        slot=2, guest_phys_addr=page, memory_size=PAGE, restricted_fd=fd
    )
    os.close(fd)
    machine.vm.convert(page, PAGE, private=False)
    exit_ = machine.start(
        f"bb{page.to_bytes(4, 'little').hex()}", "c7032a000000", "8b3b", CALL
    )  # mov dword [page], 42; mov edi, [page]
    assert exit_ == machine.vcpu.run() == MemoryFault(0, page, PAGE, EFAULT)
    machine.vm.convert(page, PAGE, private=True)
    found = machine.vcpu.run()
    assert isinstance(found, Hypercall)
    assert found.arguments[0] == 42


def test_what_precedes_the_end_of_a_page_is_executed(machine: Machine) -> None:
    """The store and OUT come first, then the fault of the next page."""
    missing = missing_page(machine, SHARED + MIB, assembled("8b37", CALL))  # mov esi, [rdi]
    code = assembled("c7072a000000", "e642")  # mov dword [rdi], 42; out 0x42, al
    machine.window[MIB - len(code) : MIB] = code
    machine.vcpu.set_regs(rip=SHARED + MIB - len(code), rsp=STACK, rdi=DATA)
    assert machine.vcpu.run() == PortOut(0x42, 1, 0)
    assert [machine.vcpu.run(), machine.vcpu.run()] == [missing, missing]
    machine.vm.convert(SHARED + MIB, PAGE, private=True)
    assert word(machine.vcpu.run()) == 42


@pytest.mark.parametrize(
    ("instruction", "result"),
    [
        ("0f9003", 1),  # seto [rbx]
        ("0f9403", 0),  # sete [rbx]
        ("0f9803", 1),  # sets [rbx]
        ("0f9c03", 0),  # setl [rbx]
        ("d113", 21),  # rcl dword [rbx], 1
        ("d11b", 0x8000_0005),  # rcr dword [rbx], 1
    ],
)
def test_an_instruction_that_faulted_has_its_flags(
    machine: Machine, instruction: str, result: int
) -> None:
    """Behind a comparison that overflows and borrows; the page has no half at first."""
    if machine.engine == "kernel" and emulation.hypervisor() == emulation.TCG:
        pytest.skip("QEMU's TCG executes what faulted again, with flags of the first time")
    page = PRIVATE + 64 * MIB
    missing = missing_page(machine, page, (10).to_bytes(4, "little"))
    exit_ = machine.start(
        f"bb{page.to_bytes(4, 'little').hex()}",  # mov ebx, page
        "b801000000",  # mov eax, 1
        "b900000080",  # mov ecx, 1 << 31
        "39c8",  # cmp eax, ecx
        instruction,
        "8b33",  # mov esi, [rbx]
        CALL,
    )
    assert exit_ == missing
    machine.vm.convert(page, PAGE, private=True)
    assert word(machine.vcpu.run()) == result


@pytest.mark.parametrize(
    "instruction", ["f00fc70f", "f0480fc70f"]
)  # lock cmpxchg8b [rdi], cmpxchg16b [rdi]
@pytest.mark.parametrize("equal", [False, True])
def test_cmpxchg8b_and_16b_keep_other_flags(
    machine: Machine, instruction: str, equal: bool
) -> None:
    exit_ = machine.start(
        "31d2",  # xor edx, edx
        f"b8{'00' if equal else '01'}000000",  # mov eax, 0 or 1
        "bb01000000",  # mov ebx, 1
        "31c9",  # xor ecx, ecx
        "4885ff",  # test rdi, rdi
        instruction,
        "9c",  # pushf
        "5e",  # pop rsi
        "81e6c5080000",  # and esi, 0x8c5
        CALL,
    )
    # The lowest byte of DATA is 0: PF.
    assert word(exit_) == 4 | equal * 0x40


# Memory.


READ_AND_WRITE: Final = (
    "488b37",  # mov rsi, [rdi]          (rdi is DATA; the answer to a hypercall is what to write next)
    CALL,
    "488907",  # mov [rdi], rax
    "ebec",  # jmp to the first
)


def word(exit_: Exit) -> int:
    assert isinstance(exit_, Hypercall)
    return exit_.arguments[1]


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
        # Of this VM: an earlier one may take its time to end.
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


# Several vCPUs, and stopping them.


def test_atomic_increments_of_all_vcpus_add_up(machine: Machine) -> None:
    count = 200_000
    code = assembled(
        f"b9{count.to_bytes(4, 'little').hex()}",  # mov ecx, count
        "f048ff07",  # lock inc qword [rdi]
        "e2fa",  # loop
        "488b37",  # mov rsi, [rdi]
        CALL,
    )
    machine.vm.launch_update(CODE, code.ljust(PAGE, b"\xf4"))
    with contextlib.ExitStack() as stack:
        vcpus = [machine.vcpu, *(stack.enter_context(machine.vm.create_vcpu()) for _ in range(2))]
        for index, vcpu in enumerate(vcpus):
            vcpu.set_regs(rip=CODE, rsp=STACK - index * PAGE // 2, rdi=DATA)
        with ThreadPoolExecutor(len(vcpus)) as pool:
            runs = [pool.submit(vcpu.run) for vcpu in vcpus]
            seen = [word(run.result(DEADLINE)) for run in runs]
    assert max(seen) == count * len(vcpus)


def test_a_stop_request_ends_an_endless_loop(machine: Machine) -> None:
    machine.vm.launch_update(
        CODE, assembled("488b07", "4885c0", "74f8", "4889c6", CALL).ljust(PAGE, b"\xf4")
    )  # until [rdi] is not 0
    machine.vcpu.set_regs(rip=CODE, rsp=STACK, rdi=SHARED)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(machine.vcpu.run)
        machine.vcpu.interrupt()
        assert running.result(DEADLINE) == exits.Interrupted()
        # Before the run it is not lost, and one is enough for one.
        machine.vcpu.interrupt()
        assert machine.vcpu.run() == exits.Interrupted()
        machine.window[0] = 7
        assert word(pool.submit(machine.vcpu.run).result(DEADLINE)) == 7


def test_conversions_and_punches_under_a_running_guest(machine: Machine) -> None:
    """A guest that stores all over 2 MiB goes on while pages change halves and vanish under it."""
    code = assembled(
        "89fb",  # mov ebx, edi
        "b900020000",  # mov ecx, 512
        "c60301",  # mov byte [rbx], 1
        "81c300100000",  # add ebx, 4096
        "e2f5",  # loop
        "a00000001000000000",  # mov al, [SHARED]
        "84c0",  # test al, al
        "74e1",  # jz the first
        "89c6",  # mov esi, eax
        CALL,
    )
    machine.vm.launch_update(CODE, code.ljust(PAGE, b"\xf4"))
    at = PRIVATE + 2 * MIB
    machine.vcpu.set_regs(rip=CODE, rsp=STACK, rdi=at)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(machine.vcpu.run)
        for turn in range(20):
            machine.vm.convert(at + turn * 16 * PAGE, 64 * PAGE, private=bool(turn % 2))
            machine.punch(at + MIB, 16 * PAGE)
        machine.vm.convert(at, 2 * MIB, private=False)
        wait_until(
            lambda: all(machine.half[2 * MIB : 4 * MIB : PAGE]),
            "the guest's stores to the shared half",
        )
        machine.window[0] = 1
        assert isinstance(running.result(DEADLINE), Hypercall)


# What only some engines can.


def test_prefault(machine: Machine) -> None:
    assert isinstance(machine.start(CALL), Hypercall)
    try:
        found = machine.vcpu.pre_fault_memory(DATA, PAGE)
    except OSError as error:
        found = error.errno or 0
    assert (found,) == machine.expect("prefault")


def test_memory_failure(machine: Machine) -> None:
    assert (errno_of(machine.vm.inject_failure, DATA),) == machine.expect("memory-failure")


# Launch, report and policy.


def test_the_measurement_does_not_depend_on_the_engine(service: Service) -> None:
    pytest.importorskip("unicorn")
    found: set[bytes] = set()
    for engine in ("software", *(["kernel"] if os.access("/dev/kvm", os.W_OK) else [])):
        with make_machine(service, engine) as machine:
            machine.vm.launch_update(CODE, assembled(CALL).ljust(PAGE, b"\xf4"))
            fd = service.memfd_restricted()
            machine.vm.set_user_memory_region(
                slot=2,
                guest_phys_addr=PRIVATE + 64 * MIB,
                memory_size=PAGE,
                restricted_fd=fd,
                readonly=True,
            )
            os.close(fd)
            machine.vm.convert(PRIVATE + 64 * MIB, PAGE, private=True)
            machine.vm.launch_update(PRIVATE + 64 * MIB, b"a" * PAGE)
            machine.vcpu.set_regs(rip=CODE, rsp=STACK)
            found.add(machine.vm.launch_finish())
            assert errno_of(machine.vm.launch_update, CODE, bytes(PAGE)) == EPERM
    assert len(found) == 1


def test_the_report_page_is_the_guest_s_and_not_the_owner_s(machine: Machine) -> None:
    exit_ = machine.start(
        "bb00101000",  # mov ebx, REPORT_PAGE
        "8b33",  # mov esi, [rbx]
        "c7032a000000",  # mov dword [rbx], 42
        "8b13",  # mov edx, [rbx]
        CALL,
    )
    assert exit_ == Hypercall(NUMBER, (DATA, 0, 42, 0))
    assert errno_of(machine.vm.read_memory, guest_abi.REPORT_PAGE, 4) == EPERM


def test_registers_and_memory_are_open_under_a_debug_policy_alone(
    service: Service, engine: str
) -> None:
    for debug in (False, True):
        with make_machine(service, engine, debug=debug) as machine:
            assert isinstance(machine.start("c7072a000000", CALL), Hypercall)  # mov dword [rdi], 42
            if not debug:
                assert (
                    errno_of(machine.vm.read_memory, DATA, 4)
                    == errno_of(machine.vcpu.get_regs)
                    == EPERM
                )
                continue
            assert machine.vm.read_memory(DATA, 4) == (42).to_bytes(4, "little")
            machine.vm.write_memory(DATA + 1, b"\1")
            assert machine.vm.read_memory(DATA, 2) == b"\x2a\1"
            assert machine.vcpu.get_regs().rdi == DATA


def test_steps_and_breakpoints(service: Service, engine: str) -> None:
    with make_machine(service, engine, debug=True) as machine:
        machine.vm.launch_update(CODE, assembled("90", "ffc7", "ffc7", CALL).ljust(PAGE, b"\xf4"))
        machine.vcpu.set_regs(rip=CODE, rsp=STACK)
        machine.vcpu.set_guest_debug(step=True)
        assert machine.vcpu.run() == exits.Debug(exits.SINGLE_STEP, CODE + 1, exits.DR6_BS)
        machine.vcpu.set_guest_debug(breakpoints=[CODE + 5])
        assert machine.vcpu.run() == exits.Debug(exits.BREAKPOINT, CODE + 5)
        machine.vcpu.set_guest_debug()
        assert machine.vcpu.run() == Hypercall(NUMBER, (2, 0, 0, 0))


def test_steps_over_ports(service: Service, engine: str) -> None:
    with make_machine(service, engine, debug=True) as machine:
        code = assembled("e680", "e481", "90", CALL)  # out 0x80, al; in al, 0x81; nop
        machine.window[: len(code)] = code
        machine.vcpu.set_regs(rip=SHARED, rsp=STACK)
        machine.vcpu.set_guest_debug(step=True)
        assert machine.vcpu.run() == PortOut(0x80, 1, 0)
        assert machine.vcpu.get_regs().rip == SHARED + 2
        assert machine.vcpu.run() == exits.Debug(exits.SINGLE_STEP, SHARED + 2, exits.DR6_BS)
        assert machine.vcpu.run() == PortIn(0x81, 1)
        assert machine.vcpu.run(5) == exits.Debug(exits.SINGLE_STEP, SHARED + 4, exits.DR6_BS)
        assert machine.vcpu.get_regs().rax == 5
        assert machine.vcpu.run() == exits.Debug(exits.SINGLE_STEP, SHARED + 5, exits.DR6_BS)


def test_registers_changed_and_steps_begun_while_a_port_is_read(
    service: Service, engine: str
) -> None:
    with make_machine(service, engine, debug=True) as machine:
        code = assembled("e481", "90", CALL)  # in al, 0x81; nop
        machine.window[: len(code)] = code
        machine.vcpu.set_regs(rip=SHARED, rsp=STACK)
        assert machine.vcpu.run() == PortIn(0x81, 1)
        regs = machine.vcpu.get_regs()
        regs.rbx = 7
        machine.vcpu.change_regs(regs)
        machine.vcpu.set_guest_debug(step=True)
        assert machine.vcpu.run(5) == exits.Debug(exits.SINGLE_STEP, SHARED + 2, exits.DR6_BS)
        regs = machine.vcpu.get_regs()
        assert (regs.rax, regs.rbx, regs.rip) == (5, 7, SHARED + 2)
        assert machine.vcpu.run() == exits.Debug(exits.SINGLE_STEP, SHARED + 3, exits.DR6_BS)


def test_a_breakpoint_on_a_port_stops_once(service: Service, engine: str) -> None:
    with make_machine(service, engine, debug=True) as machine:
        code = assembled("e680", "e680", CALL)  # out 0x80, al; out 0x80, al
        machine.window[: len(code)] = code
        machine.vcpu.set_regs(rip=SHARED, rsp=STACK)
        machine.vcpu.set_guest_debug(breakpoints=[SHARED])
        assert machine.vcpu.run() == exits.Debug(exits.BREAKPOINT, SHARED)
        machine.vcpu.set_guest_debug()
        assert machine.vcpu.run() == PortOut(0x80, 1, 0)
        machine.vcpu.set_guest_debug(breakpoints=[SHARED, SHARED + 2])
        assert machine.vcpu.run() == exits.Debug(exits.BREAKPOINT, SHARED + 2)


def test_statistics(machine: Machine) -> None:
    assert isinstance(machine.start("c647012a", CALL), Hypercall)  # mov byte [rdi + 1], 42
    before = machine.vm.statistics()
    machine.punch(PRIVATE, 4 * MIB)
    after = machine.vm.statistics()
    assert after["engine"] == machine.engine
    assert after["invalidations"] - before["invalidations"] == 1
    assert after["pages_freed"] - before["pages_freed"] >= 2
    assert 2 <= after["pages_taken"] <= 64
    assert ("faults_private" in after,) == machine.expect("fault-counts")


def test_an_unknown_exit_has_a_value_of_its_own() -> None:
    assert exits.unpack(exits.LAYOUT.pack(77, 0, 0, 0, 0, 0, 0, 0)) == exits.Unknown(77)
