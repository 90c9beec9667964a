"""Exits of the software engine: each is precise, and goes on with the value it was given."""

from collections.abc import Iterator

import pytest

from restrictedmem.abi.kvm import ExitReason
from restrictedmem.kvm.memslot import EXEC, READ, Memslot
from restrictedmem.protocol import guest_abi
from restrictedmem.protocol.exits import (
    Exit,
    Hypercall,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Shutdown,
    Unknown,
)
from restrictedmem.units import gfn_t
from software_machine import (
    DATA,
    DEVICE,
    HALTED,
    STACK,
    Machine,
    machine_code,
    make_machine,
    shared_half,
)


@pytest.fixture(name="machine")
def _machine() -> Iterator[Machine]:
    with make_machine() as machine:
        yield machine


# Ports.


@pytest.mark.parametrize(
    ("instruction", "size", "result"),
    [
        ("ec", 1, 0x1122_3344_5566_77D4),  # in al, dx
        ("66ed", 2, 0x1122_3344_5566_C3D4),  # in ax, dx
        ("ed", 4, 0xA1B2_C3D4),  # in eax, dx
    ],
)
def test_port_in(machine: Machine, instruction: str, size: int, result: int) -> None:
    code = machine_code(
        "66baf803",  # mov dx, 0x3f8
        "48b88877665544332211",  # mov rax, 0x1122334455667788
        "f9",  # stc
        instruction,
        "488907",  # mov [rdi], rax
        "0f924708",  # setc [rdi + 8]
        "f4",  # hlt
    )
    assert machine.run(code) == PortIn(0x3F8, size)
    assert machine.word(DATA) == 0
    assert machine.go_on(0xF_A1B2_C3D4) == HALTED
    assert machine.word(DATA) == result
    assert machine.word(DATA + 8) == 1


def test_port_in_that_got_no_value_comes_again(machine: Machine) -> None:
    code = machine_code(
        "e480",  # in al, 0x80
        "8807",  # mov [rdi], al
        "ebfa",  # jmp the in
    )
    machine.start(code)
    for value in (1, 2, 3):
        assert machine.vcpu.run() == machine.vcpu.run() == PortIn(0x80, 1)
        machine.engine.complete(value)
        assert machine.vcpu.run() == PortIn(0x80, 1)
        assert machine.word(DATA) == value


@pytest.mark.parametrize(
    ("instruction", "exit_"),
    [
        ("e680", PortOut(0x80, 1, 0xFE)),  # out 0x80, al
        ("66e780", PortOut(0x80, 2, 0xCAFE)),  # out 0x80, ax
        ("e780", PortOut(0x80, 4, 0xBEEF_CAFE)),  # out 0x80, eax
    ],
)
def test_port_out(machine: Machine, instruction: str, exit_: Exit) -> None:
    code = machine_code(
        "b8fecaefbe",  # mov eax, 0xbeefcafe
        instruction,
        "ff07",  # inc dword [rdi]
        instruction,
        "f4",  # hlt
    )
    assert machine.run(code) == exit_
    assert machine.word(DATA) == 0
    assert machine.go_on() == exit_
    assert machine.word(DATA) == 1
    assert machine.go_on() == HALTED


def test_string_io(machine: Machine) -> None:
    code = machine_code(
        "66ba8000",  # mov dx, 0x80
        "b903000000",  # mov ecx, 3
        "f3666d",  # rep insw
        "488d77fc",  # lea rsi, [rdi - 4]
        "b902000000",  # mov ecx, 2
        "f3666f",  # rep outsw
        "48890f",  # mov [rdi], rcx
        "f4",  # hlt
    )
    assert machine.run(code) == PortIn(0x80, 2)
    for value in (0x4141, 0x4242):
        assert machine.go_on(value) == PortIn(0x80, 2)
    assert machine.go_on(0x4343) == PortOut(0x80, 2, 0x4242)
    assert machine.go_on() == PortOut(0x80, 2, 0x4343)
    assert machine.go_on() == HALTED
    assert machine.word(DATA) == 0x4343_4242_4141


def test_string_io_between_a_port_and_mmio_is_an_emulation_failure(machine: Machine) -> None:
    code = machine_code(
        "bf000000d0",  # mov edi, DEVICE
        "6c",  # insb
    )
    assert machine.run(code) == Unknown(ExitReason.INTERNAL_ERROR)


# Hypercalls.


def test_hypercall(machine: Machine) -> None:
    code = machine_code(
        "b807000000",  # mov eax, 7
        "be02000000",  # mov esi, 2
        "ba03000000",  # mov edx, 3
        "41ba04000000",  # mov r10d, 4
        "b900001000",  # mov ecx, HYPERCALL_PAGE
        "ffd1",  # call rcx
        "488907",  # mov [rdi], rax
        "48897708",  # mov [rdi + 8], rsi
        "48896710",  # mov [rdi + 16], rsp
        "f4",  # hlt
    )
    assert machine.run(code) == Hypercall(7, (DATA, 2, 3, 4))
    assert machine.word(DATA) == 0
    assert machine.go_on(-38) == HALTED
    assert machine.word(DATA) == (1 << 64) - 38
    assert (machine.word(DATA + 8), machine.word(DATA + 16)) == (2, STACK)


def test_the_hypercall_page_cannot_be_written(machine: Machine) -> None:
    code = machine_code(
        "b900001000",  # mov ecx, HYPERCALL_PAGE
        "c601f4",  # mov byte [rcx], 0xf4
        "ffd1",  # call rcx
    )
    assert machine.run(code) == MmioWrite(guest_abi.HYPERCALL_PAGE, 1, 0xF4)
    assert machine.go_on() == Hypercall(0, (DATA, 0, 0, 0))


# MMIO.


@pytest.mark.parametrize(
    ("instruction", "exits"),
    [
        ("8a18", [MmioRead(DEVICE, 1)]),  # mov bl, [rax]
        ("8b18", [MmioRead(DEVICE, 4)]),  # mov ebx, [rax]
        ("488b18", [MmioRead(DEVICE, 8)]),  # mov rbx, [rax]
        ("488b5803", [MmioRead(DEVICE + 3, 8)]),  # mov rbx, [rax + 3]
        ("488b98fc0f0000", [MmioRead(DEVICE + 0xFFC, 8)]),  # mov rbx, [rax + 0xffc]
    ],
)
def test_mmio_load(machine: Machine, instruction: str, exits: list[Exit]) -> None:
    code = machine_code(
        "b8000000d0",  # mov eax, DEVICE
        "31db",  # xor ebx, ebx
        "f9",  # stc
        instruction,
        "48891f",  # mov [rdi], rbx
        "0f924708",  # setc [rdi + 8]
        "f4",  # hlt
    )
    value = 0x8877_6655_4433_2211
    assert machine.run(code) == exits[0]
    assert machine.word(DATA) == 0
    assert machine.go_on(value) == HALTED
    assert isinstance(exits[0], MmioRead)
    assert machine.word(DATA) == value & (1 << 8 * exits[0].size) - 1
    assert machine.word(DATA + 8) == 1


@pytest.mark.parametrize(
    ("instruction", "exits"),
    [
        ("8818", [MmioWrite(DEVICE, 1, 0x44)]),  # mov [rax], bl
        ("8918", [MmioWrite(DEVICE, 4, 0x1122_3344)]),  # mov [rax], ebx
        ("488918", [MmioWrite(DEVICE, 8, 0xAABB_CCDD_1122_3344)]),  # mov [rax], rbx
        ("48895803", [MmioWrite(DEVICE + 3, 8, 0xAABB_CCDD_1122_3344)]),  # mov [rax + 3], rbx
        (
            "488998fc0f0000",
            [MmioWrite(DEVICE + 0xFFC, 8, 0xAABB_CCDD_1122_3344)],
        ),  # mov [rax + 0xffc], rbx
        ("0f1100", [MmioWrite(DEVICE, 8, 0), MmioWrite(DEVICE + 8, 8, 0)]),  # movups [rax], xmm0
        ("0118", [MmioRead(DEVICE, 4), MmioWrite(DEVICE, 4, 0x1122_3347)]),  # add [rax], ebx
        ("f00118", [MmioRead(DEVICE, 4), MmioWrite(DEVICE, 4, 0x1122_3347)]),  # lock add [rax], ebx
        ("8718", [MmioRead(DEVICE, 4), MmioWrite(DEVICE, 4, 0x1122_3344)]),  # xchg [rax], ebx
        (
            "488d7010488bf8a5",
            [MmioRead(DEVICE + 16, 4), MmioWrite(DEVICE, 4, 3)],
        ),  # lea rsi, [rax+16]; mov rdi, rax; movsd
        (
            "488bf8b902000000f3ab",
            [MmioWrite(DEVICE, 4, DEVICE), MmioWrite(DEVICE + 4, 4, DEVICE)],
        ),  # mov rdi, rax; mov ecx, 2; rep stosd
        ("ff30", [MmioRead(DEVICE, 8)]),  # push qword [rax]
    ],
)
def test_mmio_store_and_both(machine: Machine, instruction: str, exits: list[Exit]) -> None:
    code = machine_code(
        "b8000000d0",  # mov eax, DEVICE
        "48bb44332211ddccbbaa",  # mov rbx, 0xaabbccdd11223344
        instruction,
        "bf00800040",  # mov edi, DATA
        "ff07",  # inc dword [rdi]
        "f4",  # hlt
    )
    machine.start(code)
    for exit_ in exits:
        assert machine.go_on(3) == exit_
        assert machine.word(DATA) == 0
    assert machine.go_on(3) == HALTED
    assert machine.word(DATA) == 1


def test_mmio_with_memory_in_one_instruction(machine: Machine) -> None:
    code = machine_code(
        "be000000d0",  # mov esi, DEVICE
        "48a5",  # movsq                (device to memory)
        "488d77f8",  # lea rsi, [rdi - 8]
        "bf080000d0",  # mov edi, DEVICE + 8
        "48a5",  # movsq                (memory to device)
        "f4",  # hlt
    )
    value = 0x1234_5678_9ABC_DEF0
    assert machine.run(code) == MmioRead(DEVICE, 8)
    assert machine.go_on(value) == MmioWrite(DEVICE + 8, 8, value)
    assert machine.word(DATA) == value
    assert machine.go_on() == HALTED


def test_each_mmio_load_asks_anew(machine: Machine) -> None:
    code = machine_code(
        "be000000d0",  # mov esi, DEVICE
        "8b06",  # mov eax, [rsi]
        "8b1e",  # mov ebx, [rsi]
        "8907",  # mov [rdi], eax
        "895f04",  # mov [rdi + 4], ebx
        "f4",  # hlt
    )
    assert machine.run(code) == MmioRead(DEVICE, 4)
    # No value was given.
    assert machine.vcpu.run() == MmioRead(DEVICE, 4)
    assert machine.go_on(5) == MmioRead(DEVICE, 4)
    assert machine.go_on(6) == HALTED
    assert machine.word(DATA) == 0x6_0000_0005


def test_two_mmio_loads_of_one_instruction(machine: Machine) -> None:
    code = machine_code(
        "be000000d0",  # mov esi, DEVICE
        "bf000001d0",  # mov edi, DEVICE + 0x10000
        "a7",  # cmpsd
        "83ee04",  # sub esi, 4
        "83ef04",  # sub edi, 4
        "a7",  # cmpsd
        "9c",  # pushf
        "58",  # pop rax
        "0f94c0",  # sete al
        "bb00800040",  # mov ebx, DATA
        "488903",  # mov [rbx], rax
        "48897308",  # mov [rbx + 8], rsi
        "f4",  # hlt
    )
    assert machine.run(code) == MmioRead(DEVICE + 0x10000, 4)
    for value in (8, 9):
        assert machine.go_on(value) == MmioRead(DEVICE, 4)
        assert machine.go_on(value) == (MmioRead(DEVICE + 0x10000, 4) if value == 8 else HALTED)
    # The two were equal, and of the flags above the lowest byte only IF is left: the trap flag that
    # stepped it (0x100) is gone.
    assert machine.word(DATA) == 0x201
    assert machine.word(DATA + 8) == DEVICE + 4


@pytest.mark.parametrize(
    ("instruction", "result"),
    [
        ("488d7e02a7bf008000400f9407", 1),  # lea rdi, [rsi + 2]; cmpsd; mov edi, DATA; sete [rdi]
        # movups xmm0, [rsi]; psrldq xmm0, 8; movq [rdi], xmm0
        ("0f1006660f73d808660fd607", 0x5A5A_5A5A_5A5A_5A5A),
        # lea rbp, [rsi + 32]; enter 0, 3; pop rax; pop rax; mov [rdi], rax
        ("488d6e20c80000035858488907", 0x5A5A_5A5A_5A5A_5A5A),
    ],
    ids=["cmpsd", "movups", "enter"],
)
def test_mmio_loads_beside_each_other(machine: Machine, instruction: str, result: int) -> None:
    """Unicorn loads bytes beside the first one, to throw them away; the next needs them."""
    machine.start(machine_code("be010000d0", instruction, "f4"))  # mov esi, DEVICE + 1; ...; hlt
    exits = [machine.vcpu.run()]
    while isinstance(exits[-1], MmioRead):
        exits.append(machine.go_on(0x5A5A_5A5A_5A5A_5A5A))
    assert exits[-1] == HALTED
    assert machine.word(DATA) == result


def test_an_exception_of_an_mmio_instruction(machine: Machine) -> None:
    code = machine_code(
        "be000000d0",  # mov esi, DEVICE
        "f736",  # div dword [rsi]
    )
    assert machine.run(code) == MmioRead(DEVICE, 4)
    assert machine.go_on(0) == Shutdown(0)


def test_read_only_memory(machine: Machine) -> None:
    slot = Memslot(2, gfn_t(0x20000), 1, private=None, shared=shared_half(1), rights=READ | EXEC)
    assert slot.shared is not None
    slot.shared.write(0, machine_code("05000000", "c3"))  # 5, and at 4: ret
    machine.mmu.add_slot(slot)
    machine.engine.add_slot(slot)
    code = machine_code(
        "be00000020",  # mov esi, 0x20000000
        "488b06",  # mov rax, [rsi]
        "488907",  # mov [rdi], rax
        "830602",  # add dword [rsi], 2
        "488b06",  # mov rax, [rsi]
        "48894708",  # mov [rdi + 8], rax
        "488d4604",  # lea rax, [rsi + 4]
        "ffd0",  # call rax
        "f4",  # hlt
    )
    assert machine.run(code) == MmioWrite(0x2000_0000, 4, 7)
    assert machine.word(DATA) == 0xC3_0000_0005
    assert machine.go_on() == HALTED
    assert machine.word(DATA + 8) == 0xC3_0000_0005
    slot.close()


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
        ("f4", 13),  # hlt
        ("0f20c0", 13),  # mov rax, cr0
        ("0f0117", 13),  # lgdt [rdi]
        ("66b81b008ed8", 13),  # mov ax, 0x1b; mov ds, ax
        ("48b80000000000100000488b00", 14),  # mov rax, 1 << 44; mov rax, [rax]
        ("cd80", 0x80),  # int 0x80
    ],
)
def test_exceptions_keep_their_vector(machine: Machine, code: str, vector: int) -> None:
    for _ in range(3):
        assert machine.run(machine_code(code, "f4")) == Shutdown(vector)


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        ("31c9f7f1", 0),  # xor ecx, ecx; div ecx
        ("cc", 3),  # int3
        ("0f05", 6),  # syscall
    ],
)
def test_shut_down_for_good(machine: Machine, code: str, vector: int) -> None:
    code += "ff07"  # inc dword [rdi]
    assert machine.run(machine_code(code)) == Shutdown(vector)
    assert [machine.go_on() for _ in range(3)] == [Shutdown(vector)] * 3
    assert machine.word(DATA) == 0


def test_set_regs_resets_all_other_registers(machine: Machine) -> None:
    spoil = machine_code(
        "48ffc8",  # dec rax
        "4989c7",  # mov r15, rax
        "fd",  # std
        "f4",  # hlt
    )
    show = machine_code(
        "ab",  # stosd
        "4c8938",  # mov [rax], r15          (rax is 0: MMIO)
    )
    assert machine.run(spoil) == HALTED
    assert machine.run(show) == MmioWrite(0, 8, 0)
