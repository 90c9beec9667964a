"""One contract over both engines: ports, and string instructions on ports."""

from typing import Final

import pytest

from both_engines import (
    CALL,
    SHARED,
    STACK,
    Machine,
    assembled,
    engine,
    machine,
    make_machine,
    missing_page,
    service,
    shared_memory,
)
from restrictedmem.protocol import exits
from restrictedmem.protocol.exits import Exit, Hypercall, MemoryFault, PortIn, PortOut
from restrictedmem.service.client import Service

__all__ = ["engine", "machine", "service"]

pytestmark = pytest.mark.requires("fuse")

PAGE: Final = 4096
MIB: Final = 1 << 20

EFAULT = 14


# Hypercalls and registers.


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


PORT_IN: Final = PortIn(0x80, 2)
INPUT: Final = (
    "66ba8000",  # mov dx, 0x80
    "b904000000",  # mov ecx, 4
    "f3666d",  # rep insw
    CALL,
)


def load_rdi(value: int) -> str:
    """Return the code of ``mov rdi, value``."""
    return "48bf" + value.to_bytes(8, "little").hex()


@pytest.mark.parametrize("backwards", [False, True])
def test_a_port_is_read_only_for_what_can_be_stored(
    service: Service, engine: str, backwards: bool
) -> None:
    """A page's fault comes before the owner is asked for the values that go there.

    The owner is asked for each value once.
    """
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
    """The owner takes the page away while it is asked for the value.

    The guest executes the instruction again, and gets the value that the owner gave.
    """
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
        # The exit is permanent: the guest would go on in memory that is not its own.
        assert machine.vcpu.run() == exit_


@pytest.mark.parametrize(("instruction", "index"), [("e480", 0), ("e680", 1)])
def test_ports_in_private_code(machine: Machine, instruction: str, index: int) -> None:
    assert machine.start(instruction) in machine.expect("port-in-private-code")[index]


# Launch, report and policy.


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
