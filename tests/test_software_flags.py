"""Flags on the software engine, where an instruction is executed again; and CMPXCHG16B."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Final, cast

import pytest

from planting import always
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.abi.memory import PUNCH
from restrictedmem.kvm.half import Half
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.kvm.mmu import Fault
from restrictedmem.kvm.software.fetched import FetchedCode
from restrictedmem.kvm.software.flags import RFLAGS, find_source
from restrictedmem.kvm.software.uc import Context, Uc
from restrictedmem.protocol.exits import (
    BREAKPOINT,
    Debug,
    MemoryFault,
    MmioRead,
    MmioWrite,
    Shutdown,
)
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, gfn_t
from software_machine import (
    CODE,
    DATA,
    DEVICE,
    HALTED,
    PRIVATE,
    Machine,
    machine_code,
    make_machine,
)

STATUS: Final = 0x8D5
#: Instructions that set flags; Unicorn computes each one's flags late in another way.
SETTERS: Final = {
    "nothing": "",
    "cmp": "4839d8",  # cmp rax, rbx
    "cmp byte": "38d8",  # cmp al, bl
    "add": "4801d8",  # add rax, rbx
    "test": "4885d8",  # test rax, rbx
    "xor zero": "31c0",  # xor eax, eax
    "inc": "48ffc0",  # inc rax
    "neg": "48f7d8",  # neg rax
    "shl": "48d3e0",  # shl rax, cl
    "rol": "48c1c003",  # rol rax, 3
    "popcnt": "f3480fb8c3",  # popcnt rax, rbx
    "imul": "480fafc3",  # imul rax, rbx
    "sbb": "4819d8",  # sbb rax, rbx
    "bt": "480fa3d8",  # bt rax, rbx
    "stc": "f9",  # stc
}
VALUES: Final = (
    (1 << 31, 1),
    (0x7FFF_FFFF_FFFF_FFFF, 1),
    (5, 5),
    (0, 0x40),
    ((1 << 64) - 1, 3),
    (2, 1 << 63),
)


@pytest.fixture(name="machine", scope="module")
def _machine() -> Iterator[Machine]:
    with make_machine() as machine:
        yield machine


def start(machine: Machine, code: bytes, at: int = CODE, **registers: int) -> None:
    """Start code with registers, in memory that is all there."""
    machine.start(code, at=at)
    regs = machine.engine.get_regs()
    for name, value in registers.items():
        setattr(regs, name, value)
    machine.engine.change_regs(regs)


def show(machine: Machine, gpa: int, *, private: bool) -> None:
    page = gfn_t(gpa >> PAGE_SHIFT)
    machine.set_attributes(machine.private, page, gfn_t(page + 1), private=private)


# Three ways of refusing, each of which ends with the guest halted; returns how often something
# was refused.


def by_fault(machine: Machine, pages: tuple[int, ...]) -> int:
    """A page has no half until the guest asked for it, and none when it asks for another."""
    found = 0
    for page in pages:
        show(machine, page, private=False)
    while isinstance(exit_ := machine.vcpu.run(), MemoryFault):
        found += 1
        assert found < 100
        for page in pages:
            # An access may need two.
            show(machine, page, private=abs(page - exit_.gpa) <= PAGE_SIZE)
    assert exit_ == HALTED
    return found


def by_retry(machine: Machine, pages: tuple[int, ...]) -> int:
    """An invalidation is in progress when a page is first asked for, as of another page."""
    tried: set[int] = set()
    fault = machine.mmu.fault

    def refuse_first(slot: Memslot, gfn: int) -> Fault:
        if gfn << PAGE_SHIFT in pages and gfn not in tried:
            tried.add(gfn)
            return Fault.RETRY
        return fault(slot, gfn)

    for page in pages:
        gfn = gfn_t(page >> PAGE_SHIFT)
        machine.vcpus.drop(*machine.mmu._zap(machine.private, gfn, gfn_t(gfn + 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.mmu, "fault", refuse_first)
        assert machine.vcpu.run() == HALTED
    return len(tried)


REFUSALS: Final = [by_fault, by_retry]
Refusal = Callable[[Machine, tuple[int, ...]], int]


def outcome(machine: Machine) -> tuple[dict[str, int], bytes]:
    regs = machine.engine.get_regs()
    names = [name for name, *_ in kvm_regs._fields_]
    memory = machine.private.memfd_half.half.mapping.memory
    return {name: getattr(regs, name) for name in names}, bytes(
        memory[DATA - PRIVATE : DATA - PRIVATE + 3 * PAGE_SIZE]
    )


# SETcc, RCL and RCR: those that compute flags first.


@pytest.mark.parametrize("setter", SETTERS.values(), ids=SETTERS)
def test_setcc_to_a_device(machine: Machine, setter: str) -> None:
    """Each condition, to a register and then to a page without memory: both say the same."""
    for condition in range(16):
        code = machine_code(
            setter,
            f"0f{0x90 + condition:02x}c2",  # setcc dl
            f"0f{0x90 + condition:02x}06",  # setcc [rsi]
            "f4",  # hlt
        )
        for rax, rbx in VALUES:
            start(machine, code, rax=rax, rbx=rbx, rcx=rbx, rsi=DEVICE, rdx=0)
            exit_ = machine.vcpu.run()
            assert exit_ == MmioWrite(DEVICE, 1, machine.engine.get_regs().rdx), (
                condition,
                rax,
                rbx,
            )
            flags = machine.engine.get_regs().rflags
            start(machine, machine_code(setter, "f4"), rax=rax, rbx=rbx, rcx=rbx)
            assert machine.vcpu.run() == HALTED
            assert flags == machine.engine.get_regs().rflags


#: Instructions that touch memory at [rdi + 0xffc] or across the end of its page: each loads,
#: stores, or both.
INSTRUCTIONS: Final = {
    **{f"set{condition:x}": f"0f{0x90 + condition:02x}87ff0f0000" for condition in range(16)},
    "setl across a prefix": "3e400f9c87ff0f0000",
    "rcl 1": "48d197fc0f0000",
    "rcl cl": "48d397fc0f0000",
    "rcl 3": "c197fe0f000003",
    "rcl byte": "d097ff0f0000",
    "rcr cl": "d39ffc0f0000",
    "rcr 5": "66c19fff0f000005",
    "rol": "d187fc0f0000",
    "shl": "48d3a7fc0f0000",
    "sar": "d1bffe0f0000",
    "shld": "0fa487fc0f000003",
    "add": "4801 87fc0f0000".replace(" ", ""),
    "lock add": "f0480187fc0f0000",
    "adc": "481187fc0f0000",
    "sbb": "481987fc0f0000",
    "and": "482187fc0f0000",
    "cmp": "483987fc0f0000",
    "inc": "48ff87fc0f0000",
    "lock dec": "f048ff8ffc0f0000",
    "not": "48f797fc0f0000",
    "neg": "48f79ffc0f0000",
    "mul": "48f7a7fc0f0000",
    "bts": "480fbaaffc0f000005",
    "lock btc": "f0480fbabffc0f000005",
    "xadd": "480fc187fc0f0000",
    "xchg": "488787fc0f0000",
    "cmpxchg": "480fb19ffc0f0000",
    "lock cmpxchg": "f0480fb19ffc0f0000",
    "cmpxchg8b": "0fc78ffc0f0000",
    "cmpxchg16b": "f0480fc78ff00f0000",
    "cmov": "480f4f87fc0f0000",
    "push": "ffb7fc0f0000",
    "pop": "8f87fc0f0000",
    "movups": "0f1187f80f0000",
    "pushf to there": "488da7fc0f00009c",  # lea rsp, [rdi + 0xffc]; pushf
    "popf from there": "c787fc0f000041000000488da7fc0f00009d",
    # mov dword [rdi + 0xffc], 0x41; lea rsp, …; popf
    "call": "488da7fc0f0000e800000000",  # lea rsp, …; call the next
    "enter": "488da7fc0f0000c8100001",  # lea rsp, …; enter 16, 1
    "leave": "488daffc0f0000c9",  # lea rbp, …; leave
    "cmpsb": "488db7000f000048 81c7ff0f0000a6".replace(
        " ", ""
    ),  # lea rsi, …; add rdi, 0xfff; cmpsb
    "repe cmpsq": "488db7f00f0000b904000000f348a7",  # lea rsi, …; mov ecx, 4; repe cmpsq
    "repne scasb": "b900200000f2ae",  # mov ecx, 0x2000; repne scasb
    "rep movsq": "488db7c00f0000b940000000f348a5",  # lea rsi, …; mov ecx, 64; rep movsq
    "rep stosd": "b900080000f3ab",  # mov ecx, 0x800; rep stosd
    "lodsq": "488db7fc0f000048ad",  # lea rsi, …; lodsq
}


#: Values that the manual leaves undefined, and that depend on where a block begins.
UNDEFINED: Final = {
    "bts": 0x894,
    "lock btc": 0x894,
    "shl": 0x810,
    "sar": 0x810,
    "shld": 0x810,
    "mul": 0xD4,
    "and": 0x10,
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_instruction_that_was_refused_does_what_it_would_have_done(
    machine: Machine, refusal: Refusal, name: str
) -> None:
    """Behind setters of flags, with all it reads of them; beside the same without a refusal."""
    pages = DATA, DATA + PAGE_SIZE, DATA + 2 * PAGE_SIZE
    content = bytes(range(251)) * (3 * PAGE_SIZE // 251 + 1)
    for setter in ("nothing", "cmp", "rol", "xor zero", "popcnt"):
        code = machine_code(SETTERS[setter], INSTRUCTIONS[name], "f4")
        found: list[tuple[dict[str, int], bytes]] = []
        for refused in (False, True):
            machine.put(DATA, content[: 3 * PAGE_SIZE])
            start(machine, code, rax=0x7FFF_FFFF_FFFF_FF00, rbx=0x1_0000_0100, rcx=3, rdx=9)
            if refused:
                assert refusal(machine, pages) > 0
            else:
                assert machine.vcpu.run() == HALTED
            registers, memory = outcome(machine)
            registers["rflags"] &= ~UNDEFINED.get(name, 0)
            found.append((registers, memory))
        assert found[0] == found[1], setter


# Where code lies, and where it comes from.

#: SETL behind a comparison does not compute flags by itself.
COMPARE: Final = "4839d8"  # cmp rax, rbx
OVERFLOW: Final = {"rax": 1 << 63, "rbx": 1, "rsi": DEVICE}
FLAGS: Final = 0x814


def setl_is_right(machine: Machine) -> None:
    assert machine.vcpu.run() == MmioWrite(DEVICE, 1, 1)
    assert machine.engine.get_regs().rflags & STATUS == FLAGS
    assert machine.vcpu.run() == HALTED


@pytest.mark.parametrize("setl", ["0f9c06", "3e0f9c06", "66400f9c06"])  # setl [rsi], with prefixes
@pytest.mark.parametrize("compare", [COMPARE, "90" * 40 + COMPARE])
def test_setcc_across_the_border_of_a_page(machine: Machine, setl: str, compare: str) -> None:
    """Wherever the page ends, and whichever page was fetched from first."""
    code = machine_code(compare, setl, "f4")
    pages = gfn_t(CODE >> PAGE_SHIFT), gfn_t((CODE >> PAGE_SHIFT) + 2)
    for before in range(len(code) + 1):
        for first in (0, CODE, CODE + PAGE_SIZE):
            machine.put(CODE, b"\xf4" * 2 * PAGE_SIZE)
            machine.put(CODE + PAGE_SIZE - before, code)
            machine.engine.drop(*pages)
            if first:
                machine.engine.set_regs(kvm_regs(rip=first + 0x800))
                assert machine.vcpu.run() == HALTED
            start(machine, code, at=CODE + PAGE_SIZE - before, **OVERFLOW)
            setl_is_right(machine)


def test_code_that_the_guest_has_written_itself(machine: Machine) -> None:
    """Behind a comparison is now a store, now SETL; the guest itself puts it there."""
    # mov [rsi], sil; setl [rsi]; and the first byte of the load
    store, setl = machine_code("4088368b"), machine_code("0f9c068b")
    code = machine_code(
        COMPARE,
        store[:3].hex(),
        "8b0f",  # mov ecx, [rdi]
        "890df5ffffff",  # mov [rip - 11], ecx: behind the comparison
        "ebf0",  # jmp to the comparison
    )
    machine.put(DATA, setl)
    start(machine, code, **OVERFLOW)
    for _ in range(4):
        assert machine.vcpu.run() == MmioWrite(DEVICE, 1, 0)
        machine.put(DATA, setl)
        assert machine.vcpu.run() == MmioWrite(DEVICE, 1, 1)
        machine.put(DATA, store)


@pytest.mark.parametrize("count", [16, 17, 600])
def test_many_setcc_on_one_page(machine: Machine, count: int) -> None:
    code = machine_code(COMPARE, "0f9c06") * count + b"\xf4"
    start(machine, code, **OVERFLOW)
    for _ in range(count):
        assert machine.vcpu.run() == MmioWrite(DEVICE, 1, 1)
    assert machine.vcpu.run() == HALTED


def test_shared_code_is_rewritten_when_a_byte_of_it_is_another() -> None:
    """Or every run would begin with all shared code translated anew."""
    memory = bytearray(3 * PAGE_SIZE)
    half = cast(Half, SimpleNamespace(mapping=SimpleNamespace(memory=memory)))
    code = FetchedCode(cast(Uc, SimpleNamespace()))
    for address, shared in ((0x1000, True), (0x5000, False)):
        code.fetched(address, half, PAGE_SIZE, shared=shared)
    for outside in (PAGE_SIZE - 1, 2 * PAGE_SIZE):
        memory[outside] = 0x90
        assert code.rewritten() == []
    for inside in (PAGE_SIZE, 2 * PAGE_SIZE - 1):
        memory[inside] = 0x90
        assert code.rewritten() == [0x1000]
        code.fetched(0x1000, half, PAGE_SIZE, shared=True)
        assert code.rewritten() == []


def test_setcc_on_many_pages() -> None:
    """Hooks are taken away when they are too many, and put back where code is executed."""
    with make_machine() as machine:
        for page in range(CODE, CODE + 40 * PAGE_SIZE, PAGE_SIZE):
            start(machine, machine_code(COMPARE, "0f9c06") * 16 + b"\xf4", at=page, **OVERFLOW)
            for _ in range(16):
                assert machine.vcpu.run() == MmioWrite(DEVICE, 1, 1)
            assert machine.vcpu.run() == HALTED
            assert not machine.engine._fetched.crowded
        # The first page was translated before.
        machine.engine.set_regs(kvm_regs(rip=CODE, rsi=DEVICE))
        assert machine.vcpu.run() == MmioWrite(DEVICE, 1, 0)
        assert machine.engine.get_regs().rflags & STATUS == 0x44


def test_the_direction_flag_survives(machine: Machine) -> None:
    start(machine, machine_code("fd", COMPARE, "0f9c06", "f4"), **OVERFLOW)  # std; cmp; setl [rsi]
    assert machine.vcpu.run() == MmioWrite(DEVICE, 1, 1)
    assert machine.engine.get_regs().rflags & 0xFFFF == 0x602 | FLAGS


def test_an_instruction_with_a_breakpoint(machine: Machine) -> None:
    """An instruction that was ever debugged has a hook, and its flags are computed early, too."""
    code = machine_code(COMPARE, "408836", "f4")  # mov [rsi], sil
    for breakpoints in ({CODE + 3}, {CODE + 6}, set[int]()):
        machine.engine.set_guest_debug(step=False, breakpoints=frozenset(breakpoints))
        if CODE + 3 in breakpoints:
            continue
        for again in (False, True):
            if not again and breakpoints:
                start(machine, code, **OVERFLOW)
            else:
                # The code that was translated with the hook has to go with it.
                machine.engine.set_regs(kvm_regs(rip=CODE))
                registers = machine.engine.get_regs()
                registers.rax, registers.rbx, registers.rsi = OVERFLOW.values()
                machine.engine.change_regs(registers)
            assert machine.vcpu.run() == MmioWrite(DEVICE, 1, 0)
            assert machine.engine.get_regs().rflags & STATUS == FLAGS
            assert machine.vcpu.run() == (Debug(BREAKPOINT, CODE + 6) if breakpoints else HALTED)


def test_hooks_take_no_page(machine: Machine) -> None:
    """To remove one, Unicorn asks where its page is; one that was punched stays away."""
    start(machine, machine_code(COMPARE, "0f9c06", "f4"), at=CODE + 16 * PAGE_SIZE, **OVERFLOW)
    assert machine.vcpu.run() == MmioWrite(DEVICE, 1, 1)
    machine.file.fallocate(PUNCH, 0, 64 * PAGE_SIZE)
    machine.engine.set_guest_debug(step=False, breakpoints=frozenset({CODE}))
    machine.engine.set_guest_debug(step=False, breakpoints=frozenset())
    machine.start(b"\xf4")
    resident = machine.file.backing.resident()
    assert machine.vcpu.run() == HALTED
    assert machine.file.backing.resident() <= max(resident, 16 * PAGE_SIZE)


# CMPXCHG8B and CMPXCHG16B.


@pytest.mark.parametrize(
    ("instruction", "size"),
    [
        ("0fc70f", 4),
        ("f00fc70f", 4),
        ("480fc70f", 8),
        ("f0480fc70f", 8),
    ],  # cmpxchg8b [rdi], cmpxchg16b [rdi], with lock
)
@pytest.mark.parametrize("equal", [False, True])
def test_cmpxchg8b_and_16b_change_zf_alone(
    machine: Machine, instruction: str, size: int, equal: bool
) -> None:
    """Behind an instruction of the same block that sets flags."""
    for value, flags in ((0, 0x44), (1 << 63, 0x84), (0xFF, 0x4), (3, 0x4)):
        code = machine_code("f8", "4d85c0", instruction, "f4")  # clc; test r8, r8
        machine.put(DATA, (7).to_bytes(size, "little") + (9).to_bytes(size, "little"))
        start(machine, code, rax=7 + (not equal), rdx=9, rbx=0x55, rcx=0x66, r8=value)
        assert machine.vcpu.run() == HALTED
        registers, memory = outcome(machine)
        assert registers["rflags"] & STATUS & ~0x10 == flags & ~0x40 | 0x40 * equal
        assert (registers["rax"], registers["rdx"], registers["rbx"], registers["rcx"]) == (
            7,
            9,
            0x55,
            0x66,
        )
        new = (0x55, 0x66) if equal else (7, 9)
        assert memory[: 2 * size] == b"".join(word.to_bytes(size, "little") for word in new)


def test_cmpxchg16b_elsewhere(machine: Machine) -> None:
    """Unaligned, to a device, with the guest's trap flag; and CPUID says that both are there."""
    start(machine, machine_code("480fc74f08", "f4"))  # cmpxchg16b [rdi + 8]
    assert machine.vcpu.run() == Shutdown(13)
    start(
        machine, machine_code("f9", "480fc70e", "f4"), rsi=DEVICE, rax=1, rdx=2, rbx=3, rcx=4
    )  # stc; cmpxchg16b [rsi]
    assert machine.vcpu.run() == MmioRead(DEVICE, 8)
    # Unicorn takes later loads of one instruction apart.
    assert machine.go_on(1) == MmioRead(DEVICE + 8, 4)
    assert machine.go_on(2) == MmioRead(DEVICE + 12, 4)
    assert machine.go_on(0) == MmioWrite(DEVICE, 8, 3)
    assert machine.go_on() == MmioWrite(DEVICE + 8, 8, 4)
    assert machine.go_on() == HALTED
    assert machine.engine.get_regs().rflags & STATUS == 0x41
    for step in (False, True):
        machine.put(DATA, bytes(16))
        start(machine, machine_code("480fc70f", "f4"), rbx=5, rflags=0x3102)
        machine.engine.set_guest_debug(step=step, breakpoints=frozenset())
        assert machine.vcpu.run() == Shutdown(1)
        assert machine.word(DATA) == 5
    machine.engine.set_guest_debug(step=False, breakpoints=frozenset())
    start(machine, machine_code("b801000000", "0fa2", "f4"))  # mov eax, 1; cpuid
    assert machine.vcpu.run() == HALTED
    registers = machine.engine.get_regs()
    assert (registers.rdx >> 8 & 1, registers.rcx >> 13 & 1) == (1, 1)
    start(machine, machine_code("31c0", "0fa2", "f4"))  # xor eax, eax; cpuid
    assert machine.vcpu.run() == HALTED
    assert machine.engine.get_regs().rax > 1
    for code in ("0fc7c8", "0fc737"):  # cmpxchg8b eax; what only a hypervisor has
        start(machine, machine_code(code, "f4"))
        assert machine.vcpu.run() == Shutdown(6)


@pytest.mark.parametrize(
    ("source", "flags", "direction"), [(7, RFLAGS, 1), (8, 0, 1), (8, RFLAGS, 0xFFFF_FFFF)]
)
def test_flags_that_unicorn_keeps_elsewhere_are_not_believed(
    source: int, flags: int, direction: int
) -> None:
    words = {source - 16: flags, source + 20: direction}
    context = SimpleNamespace(find=always(source - 8), word=words.__getitem__)
    with pytest.raises(RuntimeError, match="keeps flags otherwise"):
        find_source(cast("Context", context))


def test_flags_are_found_where_they_are() -> None:
    context = SimpleNamespace(find=always(16), word={8: RFLAGS | 0x8D5, 44: 1}.__getitem__)
    assert find_source(cast("Context", context)) == 24
