"""Several vCPUs of one VM on the software engine: turns, shared memory, stops, exact kicks."""

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, cast

import pytest

from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.abi.memory import PUNCH
from restrictedmem.kvm.engine import VcpuEngine
from restrictedmem.kvm.engine_vcpu import EngineVcpu, EngineVcpus
from restrictedmem.kvm.software.turns import SLICE, Turns
from restrictedmem.protocol.exits import Exit, Hypercall, Interrupted, PortOut, Shutdown
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, gfn_t, pgoff_t
from software_machine import (
    CODE,
    DATA,
    HALTED,
    PRIVATE,
    STACK,
    Machine,
    machine_code,
    make_machine,
    running,
)
from waiting import wait_until, waits

COUNT: Final = 500_000
MANY: Final = 10_000_000
LOOP: Final = machine_code("ebfe")  # jmp to itself


def repeat(*instructions: str, count: int = COUNT) -> bytes:
    """Return a loop over some instructions, ended by hlt; ecx counts it."""
    length = sum(len(instruction) // 2 for instruction in instructions) + 2
    back = (-length - 6).to_bytes(4, "little", signed=True).hex()
    return machine_code(
        "b9", count.to_bytes(4, "little").hex(), *instructions, "ffc9", "0f85", back, "f4"
    )


def start_all(machine: Machine, code: bytes) -> None:
    for number in range(len(machine.engines)):
        machine.start(code, vcpu=number)


def has_changed(machine: Machine, before: int) -> bool:
    return machine.word(DATA) != before


# Kicks.


@pytest.mark.parametrize(
    "instructions",
    [
        ["ff07"],  # inc dword [rdi]
        ["f0ff07"],  # lock inc dword [rdi]
        ["41ffc0", "ff07", "eb00", "4489c0"],  # inc r8d; inc dword [rdi]; jmp on; mov eax, r8d
        ["b801000000", "f00fc107"],  # mov eax, 1; lock xadd [rdi], eax
        ["448b07", "41ffc0", "448707"],  # mov r8d, [rdi]; inc r8d; xchg [rdi], r8d
        ["ff07", "ff07", "ff0f"],  # inc, inc, dec dword [rdi]
    ],
    ids=["inc", "lock inc", "blocks", "xadd", "xchg", "three"],
)
def test_a_kick_executes_no_instruction_twice(instructions: list[str]) -> None:
    """Unicorn's own stop may come after the store of an instruction, with RIP still at it."""
    with make_machine() as machine:
        machine.start(repeat(*instructions, count=MANY))
        kicks = 0
        with running(machine) as found:
            while not found:
                machine.engine.kick()
                kicks += 1
                os.sched_yield()
        assert found == [HALTED]
        assert kicks > 10
        assert machine.word(DATA) & 0xFFFF_FFFF == MANY


# Atomics and messages.


@pytest.mark.parametrize("vcpus", [2, 4])
def test_locked_increments_of_all_vcpus_add_up(vcpus: int) -> None:
    with make_machine(vcpus=vcpus) as machine:
        start_all(machine, repeat("f0ff07"))  # lock inc dword [rdi]
        with running(machine) as found:
            pass
        assert found == [HALTED] * vcpus
        assert machine.word(DATA) == vcpus * COUNT


def test_a_lock_of_cmpxchg_excludes() -> None:
    """Plain increments under a spin lock; each vCPU takes it 2,000 times."""
    code = machine_code(
        "b9d0070000",  # mov ecx, 2000
        "31c0",  # again: xor eax, eax
        "ba01000000",  # mov edx, 1
        "f00fb117",  # lock cmpxchg [rdi], edx
        "75f3",  # jne again
        "488b4708",  # mov rax, [rdi + 8]
        "48ffc0",  # inc rax
        "48894708",  # mov [rdi + 8], rax
        "c70700000000",  # mov dword [rdi], 0
        "ffc9",  # dec ecx
        "75de",  # jne again
        "f4",  # hlt
    )
    with make_machine(vcpus=3) as machine:
        start_all(machine, code)
        with running(machine) as found:
            pass
        assert found == [HALTED] * 3
        assert machine.word(DATA + 8) == 6000


def test_messages_pass_between_vcpus() -> None:
    """Two vCPUs pass a counter back and forth, and each waits for its parity.

    A vCPU writes the payload before the flag.
    """
    code = machine_code(
        "8b07",  # wait: mov eax, [rdi]
        "89c2",  # mov edx, eax
        "83e201",  # and edx, 1
        "39f2",  # cmp edx, esi
        "75f5",  # jne wait
        "3b4704",  # cmp eax, [rdi + 4]
        "750e",  # jne broken
        "ffc0",  # inc eax
        "894704",  # mov [rdi + 4], eax
        "8907",  # mov [rdi], eax
        "83f864",  # cmp eax, 100
        "72e4",  # jb wait
        "f4",  # hlt
        "0f0b",  # broken: ud2
    )
    with make_machine(vcpus=2) as machine:
        start_all(machine, code)
        with running(machine) as found:
            pass
        assert Shutdown(6) not in found
        assert machine.word(DATA) & 0xFFFF_FFFF in (100, 101)


def test_code_that_another_vcpu_wrote_is_executed() -> None:
    """The first vCPU executes a function over and over.

    The second has translated it too, and then writes another in its place.
    """
    function = PRIVATE + 0x20000
    runner = machine_code(
        "bb00000240",  # mov ebx, function
        "ffd3",  # again: call rbx
        "8917",  # mov [rdi], edx
        "ff4710",  # inc dword [rdi + 16]
        "83fa07",  # cmp edx, 7
        "75f4",  # jne again
        "f4",  # hlt
    )
    writer = machine_code(
        "bb00000240",  # mov ebx, function
        "ffd3",  # call rbx
        "8b4f10",  # mov ecx, [rdi + 16]
        "3b4f10",  # wait: cmp ecx, [rdi + 16]
        "74fb",  # je wait              (until vCPU 0 has called it once more)
        "c6430107",  # mov byte [rbx + 1], 7
        "ffd3",  # call rbx
        "895708",  # mov [rdi + 8], edx
        "f4",  # hlt
    )
    with make_machine(vcpus=2) as machine:
        machine.put(function, machine_code("ba05000000", "c3"))  # mov edx, 5; ret
        machine.start(runner, at=CODE, vcpu=0)
        machine.start(writer, at=CODE + 0x1000, vcpu=1)
        with running(machine) as found:
            pass
        assert found == [HALTED, HALTED]
        assert (machine.word(DATA), machine.word(DATA + 8)) == (7, 7)
        assert machine.mmu.slot_of(function >> PAGE_SHIFT) is machine.private


# Turns.


@pytest.mark.alone("measures shares of a CPU")
def test_turns_are_fair() -> None:
    """Of three vCPUs that never leave, each gets its share."""
    with make_machine(vcpus=3) as machine:
        code = machine_code(
            "48ff44f700",  # again: inc qword [rdi + rsi * 8]
            "ebf9",  # jmp again
        )
        start_all(machine, code)
        threads = [threading.Thread(target=vcpu.run, daemon=True) for vcpu in machine.vcpus.all]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 60 * SLICE, "60 slices to be over")
        for vcpu in machine.vcpus.all:
            vcpu.interrupt()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        counts = [machine.word(DATA + 8 * number) for number in range(3)]
        assert min(counts) > max(counts) / 10, counts


def test_a_turn_is_given_up_by_an_exit() -> None:
    with make_machine(vcpus=2) as machine:
        machine.start(machine_code("e680", "f4"), vcpu=0)  # out 0x80, al; hlt
        machine.start(machine_code("f4"), at=CODE + PAGE_SIZE, vcpu=1)
        assert machine.vcpus.all[0].run() == PortOut(0x80, 1, 0)
        assert machine.vcpus.all[1].run() == HALTED
        assert machine.vcpus.all[0].run() == HALTED


def test_a_kick_ends_a_wait_for_the_turn_and_the_line_closes_up() -> None:
    turns = Turns()
    stopped = threading.Event()
    first, second, third = (turns.join(stopped.set) for _ in range(3))
    turns.take(first)
    threads = [
        threading.Thread(target=turns.take, args=[turn], daemon=True) for turn in (second, third)
    ]
    for thread in threads:
        thread.start()
        wait_until(partial(waits, thread), "the vCPU to wait")
    assert stopped.wait(10)
    turns.kick(second)
    threads[0].join(10)
    assert not turns.has(second)
    assert turns.has(first)
    turns.give(first)
    threads[1].join(10)
    assert turns.has(third)
    turns.give(third)
    # A kick that nobody waited for ends the next wait at most, and no turn is lost by it.
    turns.kick(first)
    turns.take(first)
    assert turns.has(first)


def test_punches_and_conversions_while_all_vcpus_fault() -> None:
    """Each vCPU walks all pages, while memory comes and goes. None of them stops before the end."""
    code = machine_code(
        "b9e8030000",  # mov ecx, 1000
        "bf00000140",  # outer: mov edi, PRIVATE + 0x10000
        "f0ff07",  # inner: lock inc dword [rdi]
        "81c700100000",  # add edi, 4096
        "81ff00000440",  # cmp edi, PRIVATE + 64 pages
        "72ef",  # jb inner
        "ffc9",  # dec ecx
        "75e6",  # jne outer
        "f4",  # hlt
    )
    with make_machine(vcpus=3) as machine:
        start_all(machine, code)
        start = gfn_t((PRIVATE >> PAGE_SHIFT) + 16)
        with running(machine) as found:
            for _ in range(300):
                machine.file.fallocate(PUNCH, 16 * PAGE_SIZE, 32 * PAGE_SIZE)
                machine.set_attributes(machine.private, start, gfn_t(start + 8), private=True)
        assert found == [HALTED] * 3
        assert machine.mmu.counters.invalidations == 300


# Stop requests.


def test_an_interrupt_ends_the_run_under_way_and_the_guest_goes_on() -> None:
    with make_machine() as machine:
        code = machine_code(
            "ff07",  # again: inc dword [rdi]
            "803f00",  # cmp byte [rdi], 0
            "ebf9",  # jmp again
        )
        machine.start(code)
        for _ in range(3):
            before = machine.word(DATA)
            changed = partial(has_changed, machine, before)
            with running(machine) as found:
                wait_until(changed, "the guest to run")
                machine.vcpu.interrupt()
            assert found == [Interrupted()]


def test_an_interrupt_before_the_run_ends_that_one_alone() -> None:
    with make_machine() as machine:
        machine.start(machine_code("e680", "f4"))  # out 0x80, al; hlt
        machine.vcpu.interrupt()
        machine.vcpu.interrupt()
        assert machine.vcpu.run() == Interrupted()
        assert machine.vcpu.run() == PortOut(0x80, 1, 0)


def test_an_interrupt_loses_no_value() -> None:
    with make_machine() as machine:
        code = machine_code(
            "b907000000",  # mov ecx, 7
            "89c8",  # mov eax, ecx
            "b900001000",  # mov ecx, HYPERCALL_PAGE
            "ffd1",  # call rcx
            "8907",  # mov [rdi], eax
            "f4",  # hlt
        )
        assert machine.run(code) == Hypercall(7, (DATA, 0, 0, 0))
        machine.vcpu.complete(5)
        machine.vcpu.interrupt()
        assert machine.vcpu.run() == Interrupted()
        machine.vcpu.complete(9)
        assert machine.vcpu.run() == HALTED
        assert machine.word(DATA) == 5


def test_an_interrupt_reaches_a_vcpu_that_waits_for_its_turn_or_an_invalidation() -> None:
    with make_machine(vcpus=2) as machine:
        start_all(machine, LOOP)
        with running(machine) as found:
            for vcpu in machine.vcpus.all:
                vcpu.interrupt()
        assert found == [Interrupted()] * 2
        sequence = machine.file.sequence()
        sequence.begin(pgoff_t(0), pgoff_t(1 << 20))
        with running(machine) as found:
            for vcpu in machine.vcpus.all:
                vcpu.interrupt()
        sequence.end()
        assert found == [Interrupted()] * 2


def test_no_interrupt_is_lost() -> None:
    with make_machine(vcpus=2) as machine:
        start_all(machine, LOOP)
        for _ in range(300):
            with running(machine) as found:
                for vcpu in machine.vcpus.all:
                    vcpu.interrupt()
            assert found == [Interrupted()] * 2


def test_each_vcpu_has_registers_of_its_own() -> None:
    with make_machine(vcpus=4) as machine:
        code = machine_code(
            "488934f7",  # mov [rdi + rsi * 8], rsi
            "4889a4f700010000",  # mov [rdi + rsi * 8 + 256], rsp
            "f4",  # hlt
        )
        start_all(machine, code)
        machine.engines[3].set_regs(kvm_regs(rip=CODE, rsp=STACK - 99, rdi=DATA, rsi=3))
        with running(machine):
            pass
        assert [machine.word(DATA + 8 * number) for number in range(4)] == [0, 1, 2, 3]
        assert machine.word(DATA + 256 + 24) == STACK - 99


# Dropping translations.


class OneStay:
    """A guest (``VcpuEngine``, as far as a run needs it) that stays until kicked or told to go."""

    def __init__(self, on_kick: Callable[[], None] = lambda: None) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.kicks = 0
        self.dropped: list[tuple[int, int]] = []
        self._on_kick = on_kick

    def settle(self) -> None:
        pass

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        self.dropped.append((start, end))

    def run(self) -> Exit:
        self.entered.set()
        assert self.go.wait(10), "waited 10 s for a kick, or to be told to go"
        return HALTED

    def kick(self) -> None:
        self.kicks += 1
        self._on_kick()
        self.go.set()


def test_a_vcpu_that_enters_after_it_was_told_is_not_sent_out() -> None:
    """When vCPUs take turns, each kicked vCPU lets the next one in.

    One kick has to be enough for all.
    """

    def let_the_other_in() -> None:
        if not second.entered.is_set():
            threads[1].start()
            assert second.entered.wait(10), "waited 10 s for the second vCPU to enter"

    first, second = OneStay(let_the_other_in), OneStay()
    vcpus = EngineVcpus()
    vcpus.all = tuple(EngineVcpu(cast("VcpuEngine", engine)) for engine in (first, second))
    threads = [threading.Thread(target=vcpu.run, daemon=True) for vcpu in vcpus.all]
    threads[0].start()
    assert first.entered.wait(10), "waited 10 s for the first vCPU to enter"
    vcpus.drop(gfn_t(3), gfn_t(5))
    assert (second.kicks, second.dropped) == (0, [(3, 5)])
    assert first.kicks >= 1
    second.go.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "waited 10 s for a vCPU to leave"


def test_words_for_a_vcpu_that_is_not_run_do_not_pile_up() -> None:
    engine = OneStay()
    engine.go.set()
    vcpus = EngineVcpus()
    vcpus.all = (EngineVcpu(cast("VcpuEngine", engine)),)
    told = [number * 7919 % 10_000 for number in range(10_000)]
    for gfn in told:
        vcpus.drop(gfn_t(gfn), gfn_t(gfn + 1))
    vcpus.all[0].run()
    assert len(engine.dropped) <= 64
    assert all(any(start <= gfn < end for start, end in engine.dropped) for gfn in told)
    vcpus.drop(gfn_t(3), gfn_t(5))
    vcpus.drop(gfn_t(8), gfn_t(9))
    engine.dropped.clear()
    vcpus.all[0].run()
    assert engine.dropped == [(3, 5), (8, 9)]
