"""The fuzzer of the two engines: what it says is true, and a short run passes.

``scripts/fuzz-engines`` does the long runs.
"""

import random
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from random_guests import places
from random_guests.avoided import AVOIDED, Avoided
from random_guests.campaign import Found, run, start
from random_guests.compare import difference
from random_guests.forms_bits import bit_test
from random_guests.known import ALLOWED
from random_guests.machines import Event, Run, State
from random_guests.make import make
from random_guests.mistakes import MISTAKES, Mistake
from random_guests.operands import Dice
from random_guests.pair import Pair, shrink
from random_guests.program import Item, Label, Piece, Program, reads_undefined
from random_guests.units import strings
from random_guests.x86 import AF, CF, EFFECTS, OF, ZF, Mem, encode, shift_effect
from restrictedmem.protocol.exits import Hypercall, MemoryFault, PortOut, Shutdown
from restrictedmem.service.client import Service

ROOT: Final = Path(__file__).parent.parent
#: The short run's first seed, and the seconds after which it is enough on a busy machine.
SEED: Final = 1
PROGRAMS: Final = 300
SECONDS: Final = 20.0


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with start() as started:
        yield started


# Programs.


def test_a_seed_is_a_program() -> None:
    assert make(7) == make(7)
    assert make(7).lines != make(8).lines


def test_no_program_reads_a_flag_that_the_manual_leaves_undefined() -> None:
    for seed in range(200):
        assert [*reads_undefined(make(seed))] == []


def test_a_flag_is_undefined_until_it_is_defined_on_every_way() -> None:
    jump = Piece("jmp", b"\xeb\x05", jump=Label(0, 3))
    product, sum_ = (
        Piece("imul", b"\x0f\xaf\xc3", EFFECTS["imul"]),
        Piece("add", b"\x01\xd8", EFFECTS["add"]),
    )
    straight = program_of(product, sum_).lines
    assert [line.undefined for line in straight[:3]] == [0, EFFECTS["imul"].undefines, 0]
    around = program_of(product, jump, sum_, sum_).lines
    assert around[3].undefined == EFFECTS["imul"].undefines
    assert around[4].undefined == 0


def numbers_in(pieces: Iterable[Piece]) -> list[int]:
    """Return what the first pieces load into registers."""
    return [int(piece.text.split(", ")[1], 16) for piece in pieces if piece.text.startswith("mov ")]


def test_no_string_goes_back_to_what_a_storm_changes() -> None:
    for seed in range(10_000):
        pieces = strings(Dice.of(random.Random(seed), (places.DATA.start,)))
        source, target, *counts = numbers_in(pieces)
        text = " ".join(piece.text for piece in pieces)
        count = counts[0] & 0xFFFF_FFFF if counts else 1
        size = 1 << "bwdq".index(text.removesuffix(" cld")[-1])
        back = 0 if text.startswith("cld") else max(count - 1, 0) * size
        assert min(source, target) - back >= places.FIRST_DATA, text


def test_no_bit_string_goes_back_to_what_a_storm_changes() -> None:
    for seed in range(2000):
        pieces = bit_test(Dice.of(random.Random(seed), (places.DATA.start,)))
        operand = re.search(r"(word|dword|qword) .*@0x([0-9a-f]+)", pieces[-1].text)
        if operand and len(pieces) == 2:
            (bit,), width = numbers_in(pieces), {"word": 2, "dword": 4, "qword": 8}[operand[1]]
            back = (1 << 64) - bit if bit >> 63 else 0
            lowest = int(operand[2], 16) - -(-back // (8 * width)) * width
            assert lowest >= places.FIRST_DATA, pieces[-1].text


@pytest.mark.parametrize(
    ("mnemonic", "size", "count", "defines", "undefines"),
    [
        ("shl", 32, 1, OF, AF),
        ("shl", 32, 2, CF, AF | OF),
        ("shr", 8, 8, ZF, AF | OF | CF),
        ("sar", 8, 8, CF, AF | OF),
        ("rol", 8, 9, CF, OF),
        ("shl", 32, 32, 0, 0),
        ("shl", 64, 32, CF, AF | OF),
        ("shl", 32, None, 0, AF | OF),
    ],
)
def test_what_a_shift_does_to_flags(
    mnemonic: str, size: int, count: int | None, defines: int, undefines: int
) -> None:
    effect = shift_effect(mnemonic, size, count)
    assert effect.undefines == undefines
    assert effect.defines & defines == defines
    assert not effect.defines & undefines


@pytest.mark.parametrize(
    ("code", "operand"),
    [
        ("4189442410", Mem(0, base=12, disp=0x10)),  # mov [r12 + 0x10], eax
        ("41894500", Mem(0, base=13)),  # mov [r13], eax
        (
            "4289446b80",
            Mem(0, base=3, index=13, scale=1, disp=-128),
        ),  # mov [rbx + r13 * 2 - 0x80], eax
        ("89042500000040", Mem(0x4000_0000, disp=0x4000_0000)),  # mov [0x40000000], eax
        ("64678903", Mem(0, base=3, segment="fs", narrow=True)),  # mov fs:[ebx], eax
    ],
)
def test_operands_are_encoded_as_an_assembler_does(code: str, operand: Mem) -> None:
    assert encode(b"\x89", 32, 0, operand).code.hex() == code


# The comparison.


def program_of(*pieces: Piece) -> Program:
    registers = tuple(
        places.address(places.STACK.stop) - 64 if number == 4 else 0 for number in range(16)
    )
    at_rest = frozenset(page for page, private in places.AT_REST.items() if private)
    length = sum(len(piece.code) for piece in pieces)
    return Program(0, (Item(0, pieces),), registers, 0, length + 64, at_rest, frozenset())


def run_of(*events: Event, memory: bytes = b"") -> Run:
    return Run(events, {places.BOTH.start: (memory,)}, frozenset())


def test_flags_count_where_they_are_defined() -> None:
    program = program_of(Piece("imul", b"\x0f\xaf\xc3", EFFECTS["imul"]), Piece("nop", b"\x90"))
    behind = program.lines[1].address
    exit_ = Hypercall(1, (0, 0, 0, 0))

    def states(one: int, other: int) -> str:
        return difference(
            program,
            *(run_of(Event(exit_, State((0,) * 16, behind, flags))) for flags in (one, other)),
        )

    assert states(ZF, 0) == ""
    assert states(CF, 0) == "event 1, Hypercall(number=1, arguments=(0, 0, 0, 0)): flags 0x1, 0x0"


@pytest.mark.parametrize(
    ("software", "kernel"),
    [
        (run_of(Event(Shutdown(6))), run_of(Event(Shutdown(13)))),
        (run_of(Event(Shutdown(6)), Event("hangs")), run_of(Event(Shutdown(6)))),
        (run_of(memory=b"\1"), run_of(memory=b"\2")),
        (run_of(Event("x", State((1,) * 16, 0, 0))), run_of(Event("x", State((2,) * 16, 0, 0)))),
        (run_of(Event("x", State((1,) * 16, 0, 0))), run_of(Event("x", State((1,) * 16, 4, 0)))),
        (Run((Event("x"),), {}, frozenset({1})), Run((Event("x"),), {}, frozenset())),
        (run_of(Event(MemoryFault(0, 0, 4096, 14))), run_of(Event(MemoryFault(8, 0, 4096, 14)))),
    ],
)
def test_whatever_is_another_is_a_difference(software: Run, kernel: Run) -> None:
    assert difference(program_of(), software, kernel)
    assert difference(program_of(), kernel, kernel) == ""


def test_what_a_row_allows_is_none() -> None:
    assert difference(program_of(), run_of(Event(Shutdown(13))), run_of(Event(Shutdown(6)))) == ""
    assert (
        difference(
            program_of(), run_of(Event(PortOut(1, 1, 0)), memory=b"\1"), run_of(Event(Shutdown(6)))
        )
        == ""
    )


def test_every_row_is_there() -> None:
    text = (ROOT / "docs" / "reference" / "engines.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE))
    avoided = {each.row for each in AVOIDED}
    assert {allowed.row for allowed in ALLOWED} | avoided <= rows
    instructions = text.split("## Instructions")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", instructions, re.MULTILINE)) <= avoided


# Making differences small.


def test_a_program_becomes_as_small_as_its_difference_lets_it() -> None:
    program = make(3)
    wanted = program.items[len(program.items) // 2]
    smallest, found = shrink(
        program, lambda candidate: "differs" if wanted in candidate.items else ""
    )
    assert found == "differs"
    assert wanted in smallest.items
    assert len(smallest.items) <= 2
    assert not any(value for number, value in enumerate(smallest.registers) if number != 4)


def test_a_difference_is_shown_with_its_seed() -> None:
    program = make(3)
    text = "\n".join(Found(3, "seen", (program,), "small").lines())
    assert "scripts/fuzz-engines --seed 3 --programs 1" in text
    assert all(line.code.hex() in text for line in program.lines)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: str(mistake.name))
def test_the_mistakes_to_be_planted_fit_the_code(mistake: Mistake) -> None:
    text = (ROOT / "src" / "restrictedmem" / "kvm" / mistake.file).read_text(encoding="utf-8")
    assert text.count(mistake.right) == 1


# On the engines.


@pytest.mark.requires("fuse", "processor")
@pytest.mark.parametrize("avoided", AVOIDED, ids=lambda avoided: str(avoided.row))
def test_what_is_avoided_differs(service: Service, avoided: Avoided) -> None:
    program = program_of(Piece("example", bytes.fromhex(avoided.example)))
    hidden = {places.LONE.start, *(places.CODE[:2] if avoided.shared else ())}
    with Pair(service, vcpus=1) as pair:
        assert pair.run(replace(program, private=program.private - hidden)), (
            f"{avoided.row}: mended; programs may have it"
        )


@pytest.mark.requires("fuse", "processor")
def test_a_store_that_ends_where_nothing_is_stores_nothing(service: Service) -> None:
    program = program_of(
        Piece("mov [the last page's last byte], ecx", bytes.fromhex("b9ffffffff890c25ffef0140"))
    )
    with Pair(service, vcpus=1) as pair:
        assert pair.run(program) == ""


@pytest.mark.requires("fuse", "processor")
def test_programs_do_the_same_on_both_engines(service: Service) -> None:
    began = time.monotonic()
    outcome = run(
        service,
        SEED,
        more=lambda count: count < PROGRAMS and time.monotonic() < began + SECONDS,
        told=lambda _: None,
    )
    assert [line for found in outcome.found for line in found.lines()] == []
    assert outcome.programs >= 10
    assert outcome.exits > outcome.programs
