"""Memory of the software engine: faults, rights, slots, and punches while the guest runs."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from errno import EACCES, EFAULT, ENOSPC
from pathlib import Path
from typing import Final

import pytest

from restrictedmem.abi.kvm import KVM_MEMORY_EXIT_FLAG_PRIVATE, kvm_regs
from restrictedmem.kvm.memslot import ALL, READ, WRITE, Memslot
from restrictedmem.kvm.software import unicorn
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.protocol.exits import Hypercall, MemoryFault, MmioRead, PortOut, Shutdown
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, gfn_t, pgoff_t
from software_machine import (
    CODE,
    DATA,
    DEVICE,
    HALTED,
    PAGES,
    PRIVATE,
    SHARED,
    STACK,
    Machine,
    machine_code,
    make_machine,
    private_half,
    running,
    shared_half,
)
from waiting import wait_until


@pytest.fixture(name="machine")
def _machine() -> Iterator[Machine]:
    with make_machine() as machine:
        yield machine


# Faults.


def test_fetch_from_nowhere(machine: Machine) -> None:
    code = machine_code(
        "b8100000d0",  # mov eax, DEVICE + 16
        "ffe0",  # jmp rax
    )
    assert machine.run(code) == MemoryFault(0, DEVICE, PAGE_SIZE, EFAULT)


def test_half_that_is_not_there(machine: Machine) -> None:
    code = machine_code("8b07", "f4")  # mov eax, [rdi]; hlt
    data = gfn_t(DATA >> PAGE_SHIFT)
    machine.mmu.set_attributes(machine.private, data, gfn_t(data + 1), private=False)
    assert machine.run(code) == MemoryFault(0, DATA, PAGE_SIZE, EFAULT)
    window = gfn_t(SHARED >> PAGE_SHIFT)
    machine.mmu.set_attributes(machine.shared, window, gfn_t(window + 1), private=True)
    machine.engine.set_regs(kvm_regs(rip=CODE, rsp=STACK, rdi=SHARED + 8))
    assert machine.vcpu.run() == MemoryFault(
        KVM_MEMORY_EXIT_FLAG_PRIVATE, SHARED, PAGE_SIZE, EFAULT
    )
    machine.mmu.set_attributes(machine.shared, window, gfn_t(window + 1), private=False)
    assert machine.go_on() == HALTED


@pytest.mark.parametrize(
    ("rights", "code"),
    [
        (WRITE, "8b06"),  # mov eax, [rsi]
        (READ | WRITE, "ffe6"),  # jmp rsi
    ],
)
def test_right_that_is_not_there(machine: Machine, rights: int, code: str) -> None:
    machine.shared.rights = rights
    assert rights != ALL
    # mov esi, SHARED
    assert machine.run(machine_code("be00000010", code)) == MemoryFault(
        0, SHARED, PAGE_SIZE, EACCES
    )


def test_translation_for_data_is_none_for_fetches(machine: Machine) -> None:
    machine.shared.rights = READ | WRITE
    code = machine_code(
        "be00000010",  # mov esi, SHARED
        "c606f4",  # mov byte [rsi], 0xf4
        "8a06",  # mov al, [rsi]
        "ffe6",  # jmp rsi
    )
    assert machine.run(code) == MemoryFault(0, SHARED, PAGE_SIZE, EACCES)


def test_fault_takes_an_aligned_block_of_like_pages(machine: Machine) -> None:
    """A fault takes 16 pages, as the kernel's fault_around_bytes.

    It takes a page alone if a neighbour differs from it.
    """
    code = machine_code("8807", "f4")  # mov [rdi], al; hlt
    machine.start(code)
    odd = gfn_t((PRIVATE >> PAGE_SHIFT) + 40)
    machine.mmu.set_attributes(machine.private, odd, gfn_t(odd + 1), private=False)
    for page, mapped in ((8, 16), (31, 32), (33, 33)):
        machine.engine.set_regs(kvm_regs(rip=CODE, rsp=STACK, rdi=PRIVATE + page * PAGE_SIZE))
        assert machine.vcpu.run() == HALTED
        assert len(machine.private.entries) - machine.private.entries.count(0) == mapped
        assert machine.file.backing.resident() == mapped * PAGE_SIZE


def test_limit_is_a_memory_fault_that_a_punch_cures() -> None:
    with make_machine(limit=40 * PAGE_SIZE) as machine:
        code = machine_code(
            "ff07",  # inc dword [rdi]
            "4881c700100000",  # add rdi, 4096
            "ebf5",  # jmp the inc
        )
        # Blocks of 16 pages from 0, 16 and 32 on; of the last, pages 32 to 39, one at a time.
        full = MemoryFault(
            KVM_MEMORY_EXIT_FLAG_PRIVATE, PRIVATE + 40 * PAGE_SIZE, PAGE_SIZE, ENOSPC
        )
        assert machine.run(code) == full
        assert machine.go_on() == full
        assert machine.file.backing.resident() == 40 * PAGE_SIZE
        machine.punch(DATA)
        assert machine.go_on() == MemoryFault(
            KVM_MEMORY_EXIT_FLAG_PRIVATE, PRIVATE + 41 * PAGE_SIZE, PAGE_SIZE, ENOSPC
        )


def test_failure_of_the_fault_path_itself_is_raised(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(_slot: Memslot, _gfn: int) -> None:
        raise ZeroDivisionError

    machine.start(machine_code("f4"))
    monkeypatch.setattr(machine.mmu, "fault", fault)
    with pytest.raises(ZeroDivisionError):
        machine.vcpu.run()
    monkeypatch.undo()
    assert machine.vcpu.run() == HALTED


# Invalidations.

#: Counts at [rdi] until the byte at SHARED is set.
LOOP: Final = machine_code(
    "be00000010",  # mov esi, SHARED
    "4889f8",  # mov rax, rdi
    "ff07",  # inc dword [rdi]
    "803e00",  # cmp byte [rsi], 0
    "74f9",  # je the inc
    "f4",  # hlt
)


def set_flag(machine: Machine) -> None:
    assert machine.shared.shared is not None
    machine.shared.shared.write(0, b"\1")


def test_punched_code_is_gone(machine: Machine) -> None:
    """Zeroes are add [rax], al: from the punched page the guest falls onto the next one."""
    machine.put(CODE + PAGE_SIZE, machine_code("0f0b"))  # ud2
    machine.start(LOOP)
    with running(machine) as found:
        wait_until(lambda: machine.word(DATA) > 1000, "the guest to loop")
        machine.punch(CODE)
    assert found == [Shutdown(6)]


def test_punched_and_refilled_code_is_the_new_code(machine: Machine) -> None:
    machine.start(LOOP)
    new = machine_code(
        "48c7471055000000",  # mov qword [rdi + 16], 0x55
        "0f0b",  # ud2
    ).rjust(PAGE_SIZE, b"\x90")
    with running(machine) as found:
        wait_until(lambda: machine.word(DATA) > 1000, "the guest to loop")
        machine.vcpu.hold()
        machine.punch(CODE)
        machine.put(CODE, new)
        machine.vcpu.release()
    assert found == [Shutdown(6)]
    assert machine.word(DATA + 16) == 0x55


def test_code_that_the_guest_wrote_is_dropped_too(machine: Machine) -> None:
    """The page is mapped for data first; the translated code stems from a later fetch."""
    code = machine_code(
        "c70790c3f4f4",  # mov dword [rdi], nop; ret; hlt; hlt
        "ffd7",  # call rdi
        "e680",  # out 0x80, al
        "ffd7",  # call rdi
        "f4",  # hlt
    )
    assert machine.run(code) == PortOut(0x80, 1, 0)
    machine.punch(DATA)
    machine.put(DATA, machine_code("0f0b"))  # ud2
    assert machine.go_on() == Shutdown(6)


@pytest.mark.parametrize(
    ("instruction", "value"),
    [
        ("e480", 0),  # in al, 0x80
        ("e680", 0),  # out 0x80, al
        ("8b1e", 0),  # mov ebx, [rsi]
        ("891e", 0),  # mov [rsi], ebx
        ("ffd1", 0),  # call rcx
        ("0f0b", 0),  # ud2
        ("8b1a", 0),  # mov ebx, [rdx]
    ],
    ids=["in", "out", "mmio read", "mmio write", "hypercall", "shutdown", "memory fault"],
)
def test_punch_from_inside_each_exits_handler(
    machine: Machine, instruction: str, value: int
) -> None:
    machine.mmu.set_attributes(
        machine.shared, machine.shared.base_gfn, machine.shared.end_gfn, private=True
    )
    code = machine_code(
        "be000000d0",  # mov esi, DEVICE
        "b900001000",  # mov ecx, HYPERCALL_PAGE
        "ba00000010",  # mov edx, SHARED
        "48ff07",  # inc qword [rdi]
        instruction,
        "488b07",  # mov rax, [rdi]
        "48898700100000",  # mov [rdi + 4096], rax
        "f4",  # hlt
    )
    machine.run(code)
    assert machine.word(DATA) == 1
    machine.punch(DATA)
    machine.punch(STACK - PAGE_SIZE)
    after = CODE + 18 + len(instruction) // 2
    match instruction:
        case "0f0b":
            machine.engine.set_regs(kvm_regs(rip=after, rsp=STACK, rdi=DATA))
        case "8b1a":
            machine.mmu.set_attributes(
                machine.shared, machine.shared.base_gfn, machine.shared.end_gfn, private=False
            )
        case "ffd1":
            # The return address was in the punched page.
            machine.put(STACK - 8, after.to_bytes(8, "little"))
        case _:
            pass
    assert machine.go_on(value) == HALTED
    assert machine.word(DATA + PAGE_SIZE) == 0
    # It was taken again, not reached by a translation from before.
    assert machine.private.entries[(DATA - PRIVATE) // PAGE_SIZE]


def test_fault_during_an_invalidation_waits_for_its_end(machine: Machine) -> None:
    code = machine_code(
        "ff07",  # inc dword [rdi]
        "f4",  # hlt
    )
    machine.start(code)
    sequence = machine.file.sequence()
    machine.engine.settle()
    sequence.begin(pgoff_t(0), pgoff_t(PAGES))
    assert machine.engine.run() is None
    assert machine.mmu.counters.retries == 1
    with running(machine) as found:
        assert not any(machine.private.entries)
        sequence.end()
        machine.invalidate_end(pgoff_t(0), pgoff_t(PAGES), None)
    assert found == [HALTED]
    assert machine.word(DATA) == 1


def punched_meanwhile(machine: Machine) -> None:
    sequence = machine.file.sequence()
    sequence.begin(pgoff_t(0), pgoff_t(PAGES))
    sequence.end()


def converted_meanwhile(machine: Machine) -> None:
    data = gfn_t(DATA >> PAGE_SHIFT)
    machine.mmu.set_attributes(machine.private, data, gfn_t(data + 1), private=False)


@pytest.mark.parametrize("meanwhile", [punched_meanwhile, converted_meanwhile])
def test_change_between_get_page_and_the_lock(
    machine: Machine, meanwhile: Callable[[Machine], None]
) -> None:
    """The answer of get_page may be stale by then.

    The fault maps nothing of the block, although no invalidation is in progress.
    """
    private = machine.private.memfd_half

    class Interrupted:
        def allocate(self, offset: int, length: int) -> None:
            machine.file.backing.allocate(offset, length)
            meanwhile(machine)

        def order_of(self, pgoff: pgoff_t) -> int:
            return 0

        def release(self, offset: int, length: int) -> None:
            pass

        def close(self) -> None:
            pass

    machine.start(machine_code("f4"))
    undisturbed, private.pages = private.pages, Pages(Interrupted(), private.window)
    assert machine.run_once() is None
    assert (machine.mmu.counters.retries, any(machine.private.entries)) == (1, False)
    private.pages = undisturbed
    assert machine.vcpu.run() == HALTED


@pytest.mark.alone("measures how soon a vCPU stops")
def test_no_kick_is_lost(machine: Machine) -> None:
    machine.start(LOOP)
    slowest = 0.0
    with running(machine) as found:
        for attempt in range(2000):
            begun = time.perf_counter()
            machine.vcpus.drop(gfn_t(0), gfn_t(0))
            slowest = max(slowest, time.perf_counter() - begun)
            if slowest >= 1:
                break
            # Every phase of leaving and entering is met.
            for _ in itertools.repeat(None, attempt % 50):
                os.getppid()
        assert not found
        set_flag(machine)
    assert found == [HALTED]
    assert slowest < 1


def test_kick_outside_run_has_no_effect(machine: Machine) -> None:
    machine.start(machine_code("e680", "f4"))  # out 0x80, al; hlt
    machine.engine.kick()
    assert machine.vcpu.run() == PortOut(0x80, 1, 0)
    machine.engine.kick()
    assert machine.go_on() == HALTED


@pytest.mark.parametrize("pages", [PAGES, 8192])
def test_drop_of_everything(pages: int) -> None:
    """Of a lot of code at once (8192 pages from end to end) all is dropped, of less just that."""
    with make_machine(pages) as machine:
        far = PRIVATE + (pages - 1) * PAGE_SIZE
        code = machine_code(
            "48b8",  # mov rax, far
            far.to_bytes(8, "little").hex(),
            "ffd0",  # call rax
            "ebf2",  # jmp the mov
        )
        machine.put(far, machine_code("e680", "c3"))  # out 0x80, al; ret
        assert machine.run(code) == PortOut(0x80, 1, far & 0xFF)
        machine.put(far, machine_code("e681"))  # out 0x81, al
        fills = machine.engine.fills
        machine.engine.drop(gfn_t(0), gfn_t(1 << 52))
        assert machine.go_on() == PortOut(0x81, 1, far & 0xFF)
        assert machine.engine.fills > fills


# Slots.


def test_slots_come_and_go(machine: Machine) -> None:
    code = machine_code(
        "be00000020",  # mov esi, 0x20000000
        "8b06",  # mov eax, [rsi]
        "e780",  # out 0x80, eax
        "ebfa",  # jmp the load
    )
    machine.start(code)
    assert machine.vcpu.run() == MmioRead(0x2000_0000, 4)
    for value in (7, 8):
        slot = Memslot(2, gfn_t(0x20000), 1, private=None, shared=shared_half(1))
        assert slot.shared is not None
        slot.shared.write(0, bytes([value]))
        machine.mmu.add_slot(slot)
        machine.engine.add_slot(slot)
        assert machine.go_on(0) == PortOut(0x80, 4, value)
        machine.mmu.remove_slot(slot)
        machine.engine.remove_slot(slot)
        slot.close()
        assert machine.go_on() == MmioRead(0x2000_0000, 4)


def test_stack_in_a_slot_that_goes(machine: Machine) -> None:
    slot = Memslot(2, gfn_t(0x20000), 1, private=None, shared=shared_half(1))
    machine.mmu.add_slot(slot)
    machine.engine.add_slot(slot)
    code = machine_code(
        "bc00080020",  # mov esp, 0x20000800
        "b900001000",  # mov ecx, HYPERCALL_PAGE
        "ffd1",  # call rcx
        "f4",  # hlt
    )
    assert machine.run(code) == Hypercall(0, (DATA, 0, 0, 0))
    machine.mmu.remove_slot(slot)
    machine.engine.remove_slot(slot)
    slot.close()
    assert machine.go_on() == MmioRead(0x2000_07F8, 8)
    assert machine.go_on(CODE + 12) == HALTED


def test_attribute_decides_which_half_is_shown(machine: Machine) -> None:
    """Data and code of the two halves of one slot, converted from one to the other and back."""
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    slot = Memslot(2, gfn_t(0x20000), 2, private=private_half(file, 2), shared=shared_half(2))
    assert slot.shared is not None
    assert slot.private is not None
    slot.shared.write(0, machine_code("e680", "c3"))  # out 0x80, al; ret
    slot.memfd_half.half.write(0, machine_code("e681", "c3"))  # out 0x81, al; ret
    slot.memfd_half.half.write(PAGE_SIZE, b"\7")
    machine.mmu.add_slot(slot)
    machine.engine.add_slot(slot)
    code = machine_code(
        "be00000020",  # mov esi, 0x20000000
        "8a8600100000",  # mov al, [rsi + 4096]
        "ffd6",  # call rsi
        "ebf6",  # jmp the load
    )
    machine.start(code)
    for private in (False, True, False, True):
        machine.mmu.set_attributes(slot, slot.base_gfn, slot.end_gfn, private=private)
        machine.vcpus.drop(slot.base_gfn, slot.end_gfn)
        for _ in range(2):
            assert machine.vcpu.run() == (PortOut(0x81, 1, 7) if private else PortOut(0x80, 1, 0))
    machine.engine.remove_slot(slot)
    slot.close()
    file.put()


# Translated code.


def test_a_guest_with_more_code_than_the_buffer_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unicorn, "CODE_BUFFER", 1 << 20)
    increments, rounds = 1 << 18, 3
    body = bytes.fromhex("48ffc0") * increments  # inc rax
    back = machine_code(
        "83ef01",  # sub edi, 1
        "7405",  # je done
        "e9" + (-(len(body) + 10) & 0xFFFF_FFFF).to_bytes(4, "little").hex(),  # jmp body
        "4889c7",  # done: mov rdi, rax
        "b863000000",  # mov eax, 99
        "b900001000ffd1",  # mov ecx, HYPERCALL_PAGE; call rcx
    )
    code = body + back
    pages = (CODE - PRIVATE + len(code) >> PAGE_SHIFT) + 1
    with make_machine(pages) as machine:
        start = machine.private.memfd_half.window.start
        machine.private.memfd_half.pages.get_pages(PageRange(start, pgoff_t(start + pages)))
        machine.private.memfd_half.half.write(CODE - PRIVATE, code)
        machine.engines[0].set_regs(kvm_regs(rip=CODE, rsp=CODE, rdi=rounds))
        assert machine.vcpu.run() == Hypercall(99, (rounds * increments, 0, 0, 0))


def test_an_emulator_s_code_has_no_more_than_its_buffer() -> None:
    def executable() -> int:
        spans = [
            line.split()[0].split("-")
            for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
            if " rwxp " in line
        ]
        return sum(int(end, 16) - int(start, 16) for start, end in spans)

    before = executable()
    with make_machine() as machine:
        assert machine.run(machine_code("f4")) == HALTED
        assert 0 < executable() - before <= unicorn.CODE_BUFFER + PAGE_SIZE
