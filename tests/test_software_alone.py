"""Instructions executed one by one: at the end of a page, at a device, for a debugger."""

from collections.abc import Iterator
from errno import EFAULT
from typing import Final

import pytest

from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.kvm.mmu import Fault
from restrictedmem.protocol.exits import (
    DR6_BS,
    SINGLE_STEP,
    Debug,
    Hypercall,
    MemoryFault,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Shutdown,
)
from restrictedmem.protocol.guest_abi import GPA_BITS
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, gfn_t
from software_machine import (
    CODE,
    DATA,
    DEVICE,
    HALTED,
    STACK,
    Machine,
    machine_code,
    make_machine,
    shared_half,
)

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


# The end of a page whose next one cannot be fetched.


@pytest.mark.parametrize(
    ("code", "exits"),
    [
        (("e642",), [PortOut(0x42, 1, 0)]),  # out 0x42, al
        (("e442", "8907"), [PortIn(0x42, 1)]),  # in al, 0x42; mov [rdi], eax
        (("be000000d0", "8936"), [MmioWrite(DEVICE, 4, DEVICE)]),  # mov esi, DEVICE; mov [rsi], esi
        (("be000000d0", "0f9806"), [MmioWrite(DEVICE, 1, 0)]),  # mov esi, DEVICE; sets [rsi]
        (
            ("be000000d0", "8b06", "8907"),
            [MmioRead(DEVICE, 4)],
        ),  # mov esi, DEVICE; mov eax, [rsi]; mov [rdi], eax
        (("e642", "e643"), [PortOut(0x42, 1, 0), PortOut(0x43, 1, 0)]),
    ],
)
def test_what_precedes_the_end_of_a_page_exits_first(
    machine: Machine, code: tuple[str, ...], exits: list[object]
) -> None:
    start_at_the_end(machine, machine_code("ff4708", *code))  # inc dword [rdi + 8]
    assert machine.vcpu.run() == exits[0]
    assert machine.word(DATA + 8) == 1
    for exit_ in exits[1:]:
        assert machine.go_on(7) == exit_
    assert machine.go_on(7) == machine.vcpu.run() == MISSING
    assert machine.engine.get_regs().rip == NEXT
    assert machine.word(DATA) == (7 if len(code) > 1 and code[-1] == "8907" else 0)
    show(machine, NEXT, private=True)
    assert machine.go_on() == HALTED
    assert machine.word(DATA + 8) == 1


@pytest.mark.parametrize("inside", range(1, 7))
def test_an_instruction_across_the_end(machine: Machine, inside: int) -> None:
    """The instructions before it are done, it is not, and RIP is at its beginning."""
    # inc qword [rdi]; mov eax, 5; then one that computes flags before it loads: rcl dword [rdi +
    # 256], 5
    code = machine_code("48ff07", "b805000000", "c1970001000005", "f4")
    machine.put(DATA + 256, b"\x88\0\0\x80")
    before = 8 + inside
    # An access that was refused before, with other flags.
    machine.start(
        machine_code("6801080000", "9d", "c11605")
    )  # push 0x801; popf; rcl dword [rsi], 5
    assert machine.vcpu.run() == MmioRead(0, 4)
    start_at_the_end(machine, code[:before], code[before:])
    for _ in range(2):
        assert machine.vcpu.run() == MISSING
        assert machine.word(DATA) == 1
        registers = machine.engine.get_regs()
        assert (registers.rip, registers.rax, registers.rflags) == (NEXT - inside, 5, 0x202)
    show(machine, NEXT, private=True)
    assert machine.vcpu.run() == HALTED
    assert machine.word(DATA + 256) == 0x1108


def test_a_long_block_before_the_end(machine: Machine) -> None:
    """Up to what touches another page that is missing; flags, stack and DF are as they would be."""
    code = machine_code(
        "fd",  # std
        *["48ff07"] * 40,  # inc qword [rdi]
        "9c",  # pushf
        "669c",  # pushf, of 16 bits
        "4839ff",  # cmp rdi, rdi
        "9c",  # pushf
        "58",  # pop rax
        "8b0e",  # mov ecx, [rsi]
        "9d",  # popf
    )
    start_at_the_end(machine, code)
    registers = machine.engine.get_regs()
    registers.rsi = DATA + PAGE_SIZE
    machine.engine.change_regs(registers)
    show(machine, DATA + PAGE_SIZE, private=False)
    assert machine.vcpu.run() == MemoryFault(0, DATA + PAGE_SIZE, PAGE_SIZE, EFAULT)
    show(machine, DATA + PAGE_SIZE, private=True)
    registers = machine.engine.get_regs()
    # No trap flag in what was pushed.
    assert (machine.word(DATA), registers.rax, registers.rsp) == (40, 0x646, STACK - 10)
    assert (machine.word(STACK - 8), machine.word(STACK - 10) & 0xFFFF) == (0x606, 0x606)
    assert machine.vcpu.run() == MISSING
    registers = machine.engine.get_regs()
    assert (registers.rip, registers.rsp) == (NEXT, STACK - 2)
    assert registers.rflags & 0xD00 == 0x400


def test_a_page_is_not_asked_for_at_each_instruction(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once ahead, once when it is needed; and once where an access is refused."""
    asked: list[int] = []
    fault = machine.mmu.fault

    def count(slot: Memslot, gfn: int) -> Fault:
        asked.append(gfn << PAGE_SHIFT)
        return fault(slot, gfn)

    monkeypatch.setattr(machine.mmu, "fault", count)
    start_at_the_end(machine, machine_code(*["48ff07"] * 40))
    assert machine.vcpu.run() == MISSING
    assert asked.count(NEXT) == 2
    machine.start(machine_code("8b8100200040", "f4"))  # mov eax, [rcx + NEXT]
    assert machine.vcpu.run() == MISSING
    assert asked.count(NEXT) == 3


def test_other_reasons_at_the_end(machine: Machine) -> None:
    """An exception, a hypercall, a branch and an interrupt come first, as they do elsewhere."""
    start_at_the_end(machine, machine_code("31c9f7f1"))  # xor ecx, ecx; div ecx
    assert machine.vcpu.run() == Shutdown(0)
    start_at_the_end(
        machine, machine_code("b900001000", "ffd1")
    )  # mov ecx, HYPERCALL_PAGE; call rcx
    assert machine.vcpu.run() == Hypercall(0, (DATA, 0, 0, 0))
    assert machine.vcpu.run() == Hypercall(0, (DATA, 0, 0, 0))
    assert machine.go_on() == MISSING
    start_at_the_end(machine, machine_code("eb02", "e642"))  # jmp to NEXT
    assert machine.vcpu.run() == MISSING
    assert machine.engine.get_regs().rip == NEXT


def test_the_end_of_the_last_page(machine: Machine) -> None:
    """Behind it is no memory fault but a page fault, for good."""
    last = (1 << GPA_BITS) - PAGE_SIZE
    slot = Memslot(2, gfn_t(last >> PAGE_SHIFT), 1, private=None, shared=shared_half(1))
    assert slot.shared is not None
    slot.shared.write(PAGE_SIZE - 4, machine_code("ff07", "e642"))  # inc dword [rdi]; out 0x42, al
    machine.mmu.add_slot(slot)
    machine.engine.add_slot(slot)
    machine.engine.set_regs(kvm_regs(rip=last + PAGE_SIZE - 4, rdi=DATA))
    assert machine.vcpu.run() == PortOut(0x42, 1, 0)
    assert machine.word(DATA) == 1
    assert machine.go_on() == machine.go_on() == Shutdown(14)
    slot.shared.write(
        PAGE_SIZE - 4, machine_code("ff07", "4883")
    )  # inc dword [rdi]; sub, without its end
    machine.engine.drop(slot.base_gfn, slot.end_gfn)
    machine.engine.set_regs(kvm_regs(rip=last + PAGE_SIZE - 4, rdi=DATA))
    assert machine.vcpu.run() == Shutdown(14)
    assert machine.word(DATA) == 2
    slot.close()


def test_the_trap_flag_of_the_guest_itself(machine: Machine) -> None:
    """The flags that a guest pops are its own, even if the engine had set the same flag."""
    code = machine_code(
        "6802010000", "9d", "48ff07", "48ff07"
    )  # push 0x102; popf; inc qword [rdi], twice
    for ending in (False, True):
        machine.put(DATA, bytes(8))
        if ending:
            start_at_the_end(machine, code)
        else:
            machine.start(code)
        assert machine.vcpu.run() == Shutdown(1)
        assert machine.word(DATA) == 1


# A device.


@pytest.mark.parametrize(("instruction", "size"), [("9c", 8), ("669c", 2)])
def test_flags_pushed_to_a_device(machine: Machine, instruction: str, size: int) -> None:
    code = machine_code("bc100000d0", "f9", instruction, "f4")  # mov esp, DEVICE + 16; stc; pushf
    assert machine.run(code) == MmioWrite(DEVICE + 16 - size, size, 0x203)
    assert machine.go_on() == HALTED
    assert machine.engine.get_regs().rsp == DEVICE + 16 - size


def test_flags_popped_from_a_device(machine: Machine) -> None:
    code = machine_code("bc100000d0", "9d", "90", "f4")  # mov esp, DEVICE + 16; popf; nop
    assert machine.run(code) == MmioRead(DEVICE + 16, 8)
    assert machine.go_on(0x41) == HALTED
    assert machine.engine.get_regs().rflags & 0xFFF == 0x243
    assert machine.run(code) == MmioRead(DEVICE + 16, 8)
    assert machine.go_on(0x102) == Shutdown(1)


# A debugger.


def test_steps_over_flags_that_are_pushed_and_popped(machine: Machine) -> None:
    """The debugger's trap flag is not the guest's, at any step, in one page and across two."""
    code = machine_code(
        "9c", "9c", "58", "9d", "50", "9d", "f4"
    )  # pushf; pushf; pop rax; popf; push rax; popf
    for at in (CODE, NEXT - 1):
        machine.put(at, code)
        machine.start(code, at=at)
        machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
        for offset in range(1, 7):
            assert machine.vcpu.run() == Debug(SINGLE_STEP, at + offset, DR6_BS)
            assert machine.engine.get_regs().rflags == 0x202
            assert machine.word(STACK - 8) == 0x202
        machine.engine.set_guest_debug(step=False, breakpoints=frozenset())
        assert machine.vcpu.run() == HALTED
        assert machine.engine.get_regs().rax == 0x202


def test_a_step_is_one_instruction_where_more_were_translated(machine: Machine) -> None:
    machine.start(machine_code("9c", "48ff07", "cd01"))  # pushf; inc qword [rdi]; int 1
    assert machine.vcpu.run() == Shutdown(1)
    machine.engine.set_regs(kvm_regs(rip=CODE, rsp=STACK, rdi=DATA))
    machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
    assert machine.vcpu.run() == Debug(SINGLE_STEP, CODE + 1, DR6_BS)
    assert machine.word(DATA) == 1
    assert machine.vcpu.run() == Debug(SINGLE_STEP, CODE + 4, DR6_BS)
    # The guest's own exception is no step.
    assert machine.vcpu.run() == Shutdown(1)


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
    assert machine.word(STACK - 8) == 0x202


@pytest.mark.parametrize("inside", range(1, 4))
def test_a_step_over_what_the_next_page_says(machine: Machine, inside: int) -> None:
    """An opcode's meaning depends on a byte on a missing page.

    CMPXCHG16B and INT 1 do not get the meaning that a byte of 0 would give.
    """
    code = machine_code("f0480fc70f", "f4")  # lock cmpxchg16b [rdi]
    at = NEXT - 1 - inside
    machine.put(at, code)
    machine.start(code, at=at)
    machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
    assert machine.vcpu.run() == Debug(SINGLE_STEP, at + 5, DR6_BS)
    assert machine.vcpu.run() == HALTED


def test_int_1_across_the_end_is_no_step(machine: Machine) -> None:
    code = machine_code("cd01", "ff07", "f4")  # int 1; inc dword [rdi]
    machine.put(NEXT - 1, code)
    machine.start(code, at=NEXT - 1)
    machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
    assert machine.vcpu.run() == Shutdown(1)
    assert machine.word(DATA) == 0


def test_int1_is_a_trap(machine: Machine) -> None:
    """RIP is behind it, prefixes included."""
    machine.start(machine_code("f1"))
    assert machine.vcpu.run() == Shutdown(1)
    assert machine.engine.get_regs().rip == CODE + 1
