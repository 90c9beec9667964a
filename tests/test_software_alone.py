"""Instructions executed one by one: at a device, for a debugger."""

from collections.abc import Iterator
from errno import EFAULT
from typing import Final

import pytest

from restrictedmem.kvm.exits import DR6_BS, SINGLE_STEP, Debug, MemoryFault, MmioRead, MmioWrite, Shutdown
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, gfn_t
from software_machine import CODE, DATA, DEVICE, HALTED, STACK, Machine, machine_code, make_machine

#: The page behind CODE, which has no half in these tests until they give it one.
NEXT: Final = CODE + PAGE_SIZE
MISSING: Final = MemoryFault(0, NEXT, PAGE_SIZE, EFAULT)


@pytest.fixture(name="machine")
def _machine() -> Iterator[Machine]:
    with make_machine() as machine:
        yield machine


def show(machine: Machine, gpa: int, *, private: bool) -> None:
    page = gfn_t(gpa >> PAGE_SHIFT)
    machine.set_attributes(machine.private, page, gfn_t(page + 1), private=private)


def start_at_the_end(machine: Machine, code: bytes, beyond: bytes = b"") -> None:
    """Put code at the end of a page, what is ``beyond`` on the next one, and take that away."""
    machine.put(NEXT, beyond.ljust(16, b"\xf4"))
    machine.put(CODE, bytes(PAGE_SIZE))
    machine.start(code, at=NEXT - len(code))
    show(machine, NEXT, private=False)


def test_the_trap_flag_of_the_guest_itself(machine: Machine) -> None:
    """What a guest pops into its flags is its own, also where the engine had set the same."""
    code = machine_code("6802010000", "9d", "48ff07", "48ff07")  # push 0x102; popf; inc qword [rdi], twice
    machine.start(code)
    assert machine.vcpu.run() == Shutdown(1)
    assert machine.word(DATA) == 1


# A device.


@pytest.mark.parametrize(("instruction", "size"), [("9c", 8), ("669c", 2)])
def test_flags_pushed_to_a_device(machine: Machine, instruction: str, size: int) -> None:
    code = machine_code("bc100000d0", "f9", instruction, "f4")  # mov esp, DEVICE + 16; stc; pushf
    assert machine.run(code) == MmioWrite(DEVICE + 16 - size, size, 0x3003)
    assert machine.go_on() == HALTED
    assert machine.engine.get_regs().rsp == DEVICE + 16 - size


def test_flags_popped_from_a_device(machine: Machine) -> None:
    code = machine_code("bc100000d0", "9d", "90", "f4")  # mov esp, DEVICE + 16; popf; nop
    assert machine.run(code) == MmioRead(DEVICE + 16, 8)
    assert machine.go_on(0x41) == HALTED
    assert machine.engine.get_regs().rflags & 0xFFF == 0x43
    assert machine.run(code) == MmioRead(DEVICE + 16, 8)
    assert machine.go_on(0x102) == Shutdown(1)


# A debugger.


def test_steps_over_flags_that_are_pushed_and_popped(machine: Machine) -> None:
    """The debugger's trap flag is not the guest's, at any step, in one page and across two."""
    code = machine_code("9c", "9c", "58", "9d", "50", "9d", "f4")  # pushf; pushf; pop rax; popf; push rax; popf
    for at in (CODE, NEXT - 1):
        machine.put(at, code)
        machine.start(code, at=at)
        machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
        for offset in range(1, 7):
            assert machine.vcpu.run() == Debug(SINGLE_STEP, at + offset, DR6_BS)
            assert machine.engine.get_regs().rflags == 0x3002
            assert machine.word(STACK - 8) == 0x3002
        machine.engine.set_guest_debug(step=False, breakpoints=frozenset())
        assert machine.vcpu.run() == HALTED
        assert machine.engine.get_regs().rax == 0x3002


def test_a_step_that_cannot_fetch(machine: Machine) -> None:
    code = machine_code("90", "9c")  # nop; pushf
    start_at_the_end(machine, code)
    machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
    assert machine.vcpu.run() == Debug(SINGLE_STEP, NEXT - 1, DR6_BS)
    assert machine.vcpu.run() == Debug(SINGLE_STEP, NEXT, DR6_BS)
    for _ in range(2):
        assert machine.vcpu.run() == MISSING
    show(machine, NEXT, private=True)
    assert machine.vcpu.run() == HALTED
    assert machine.word(STACK - 8) == 0x3002
