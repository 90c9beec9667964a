"""The general instructions at random.

A form makes one instruction, or a few that belong together, and returns its pieces.
"""

from collections.abc import Callable
from typing import Final

from .forms_arithmetic import arithmetic, product, quotient, test, unary
from .forms_bits import bit_test, bits, deposit, double_shift, scan, shift
from .operands import Dice
from .pieces import (
    Pieces,
    any_size,
    byte_or,
    immediate_operand,
    load,
    may_lock,
    op,
    plain,
    takes_lock,
)
from .program import Piece
from .x86 import CONDITIONS, RAX, RDX, Effect, Mem, name


def move(dice: Dice) -> Pieces:
    size = any_size(dice)
    match dice.random.randrange(5):
        case 0:
            return [
                op(
                    "mov",
                    byte_or(size, 0x88, 0x89),
                    size,
                    dice.source_register(size),
                    dice.target(size),
                    operands="{rm}, {reg}",
                )
            ]
        case 1:
            return [
                op(
                    "mov",
                    byte_or(size, 0x8A, 0x8B),
                    size,
                    dice.target_register(size),
                    dice.source(size),
                    operands="{reg}, {rm}",
                )
            ]
        case 2:
            imm, value = immediate_operand(dice, size)
            opcode = byte_or(size, 0xC6, 0xC7)
            return [
                op(
                    "mov",
                    opcode,
                    size,
                    0,
                    dice.target(size),
                    operands=f"{{rm}}, {value:#x}",
                    imm=imm,
                    digit=True,
                )
            ]
        case 3:
            return [_move_offset(dice, size)]
        case _:
            return [load(dice.target_register(), dice.value(), wide=dice.one_in(2))]


def _move_offset(dice: Dice, size: int) -> Piece:
    """Make a MOV between the accumulator and an absolute address of 64 bits."""
    address, opcode = dice.address(size // 8), dice.random.choice((0xA0, 0xA2)) | (size != 8)
    head = {8: b"", 16: b"\x66", 32: b"", 64: b"\x48"}[size] + bytes([opcode])
    text = (
        f"{name(RAX, size)}, [{address:#x}]"
        if opcode < 0xA2
        else f"[{address:#x}], {name(RAX, size)}"
    )
    return Piece(f"movabs {text}", head + address.to_bytes(8, "little"))


def extend(dice: Dice) -> Pieces:
    if dice.one_in(4):
        size = any_size(dice, (32, 64))
        return [
            op(
                "movsxd",
                "63",
                size,
                dice.target_register(),
                dice.source(32),
                operands="{reg}, {rm}",
                sizes=(size, 32),
            )
        ]
    size = any_size(dice, (16, 32, 64))
    mnemonic, opcode = dice.random.choice((("movzx", 0xB6), ("movsx", 0xBE)))
    small = any_size(dice, (8, 16))
    code = f"0f{opcode | (small == 16):02x}"
    return [
        op(
            mnemonic,
            code,
            size,
            dice.target_register(),
            dice.source(small),
            operands="{reg}, {rm}",
            sizes=(size, small),
        )
    ]


def address(dice: Dice) -> Pieces:
    size = any_size(dice, (16, 32, 64))
    operand = dice.mem_at(dice.value(31))
    return [op("lea", "8d", size, dice.target_register(), operand, operands="{reg}, {rm}")]


def condition(dice: Dice) -> Pieces:
    number = dice.random.randrange(16)
    suffix, reads = CONDITIONS[number]
    if dice.one_in(2):
        return [
            op(
                f"set{suffix}",
                f"0f{0x90 | number:02x}",
                8,
                0,
                dice.target(8),
                operands="{rm}",
                digit=True,
                effect=Effect(reads),
            ),
        ]
    size = any_size(dice, (16, 32, 64))
    reg, rm = dice.target_register(), dice.source(size)
    return [
        op(
            f"cmov{suffix}",
            f"0f{0x40 | number:02x}",
            size,
            reg,
            rm,
            operands="{reg}, {rm}",
            effect=Effect(reads),
        )
    ]


def exchange(dice: Dice) -> Pieces:
    size = any_size(dice)
    reg, rm = dice.target_register(size), dice.target(size)
    mnemonic, byte, other = dice.random.choice(
        (("xchg", "86", "87"), ("xadd", "0fc0", "0fc1"), ("cmpxchg", "0fb0", "0fb1"))
    )
    if mnemonic == "xchg" and isinstance(rm, Mem) and not may_lock(rm, size):
        rm = dice.target_register()
    lock = takes_lock(dice, rm, size)
    return [
        op(mnemonic, byte if size == 8 else other, size, reg, rm, operands="{rm}, {reg}", lock=lock)
    ]


def compare_wide(dice: Dice) -> Pieces:
    """CMPXCHG8B and CMPXCHG16B; one time in two with what is there."""
    size = dice.random.choice((32, 64))
    at = dice.address(size // 4) & (-16 if size == 64 and not dice.one_in(10) else -1)
    rm, half = dice.mem_at(at), dice.mem_at(at + size // 8)
    pieces = Pieces()
    if dice.one_in(2):
        pieces = [
            op("mov", "8b", size, register, operand, operands="{reg}, {rm}")
            for register, operand in ((RAX, rm), (RDX, half))
        ]
    mnemonic = "cmpxchg8b" if size == 32 else "cmpxchg16b"
    lock = dice.one_in(2) and may_lock(rm, 2 * size)
    last = op(
        mnemonic,
        "0fc7",
        size,
        1,
        rm,
        operands="{rm}",
        digit=True,
        sizes=(size, 2 * size),
        lock=lock,
    )
    return [*pieces, last]


def swap_bytes(dice: Dice) -> Pieces:
    size, register = any_size(dice, (32, 64)), dice.target_register()
    if dice.one_in(2):
        rex = {32: b"\x41" if register >= 8 else b"", 64: bytes([0x48 | register >> 3])}[size]
        return [Piece(f"bswap {name(register, size)}", rex + bytes([0x0F, 0xC8 | register & 7]))]
    size = any_size(dice, (16, 32, 64))
    opcode, operands = dice.random.choice((("0f38f0", "{reg}, {rm}"), ("0f38f1", "{rm}, {reg}")))
    return [op("movbe", opcode, size, register, dice.memory(size), operands=operands)]


def checksum(dice: Dice) -> Pieces:
    small = any_size(dice)
    size = {8: dice.random.choice((32, 64)), 64: 64}.get(small, 32)
    return [
        op("crc32", "0f38f0" if small == 8 else "0f38f1", 16 if small == 16 else 32,
        dice.target_register(), dice.source(small),
           operands="{reg}, {rm}", sizes=(size, small), mandatory=b"\xf2", wide=size == 64)
    ]  # fmt: skip


_CONVERSIONS: Final = (
    ("6698", "cbw"), ("98", "cwde"), ("4898", "cdqe"), ("6699", "cwd"), ("99", "cdq"),
    ("4899", "cqo"),
    ("9f", "lahf"), ("9e", "sahf"), ("f8", "clc"), ("f9", "stc"), ("f5", "cmc"), ("fc", "cld"),
    ("fd", "std"),
    ("90", "nop"), ("f390", "pause"), ("f30f1efa", "endbr64"), ("0faef0", "mfence"),
    ("0faee8", "lfence"), ("0faef8", "sfence"),
)  # fmt: skip


def without_operands(dice: Dice) -> Pieces:
    return [plain(*dice.random.choice(_CONVERSIONS))]


def hint(dice: Dice) -> Pieces:
    size = any_size(dice, (16, 32, 64))
    mnemonic, opcode, digit = dice.random.choice(
        (("nop", "0f1f", 0), ("prefetchw", "0f0d", 1), ("clflush", "0fae", 7))
    )
    rm = dice.source(size) if mnemonic == "nop" else dice.memory(8)
    shows = size if mnemonic == "nop" else 8
    return [
        op(
            mnemonic,
            opcode,
            size if mnemonic == "nop" else 32,
            digit,
            rm,
            operands="{rm}",
            digit=True,
            sizes=(shows, shows),
        )
    ]


def table_look_up(dice: Dice) -> Pieces:
    # It would be needed as a base.
    if 3 not in dice.writable:
        return move(dice)
    return [load(3, dice.address(256)), plain("d7", "xlat")]


def store_past_caches(dice: Dice) -> Pieces:
    size = any_size(dice, (32, 64))
    return [
        op(
            "movnti",
            "0fc3",
            size,
            dice.source_register(),
            dice.memory(size),
            operands="{rm}, {reg}",
        )
    ]


def exchange_accumulator(dice: Dice) -> Pieces:
    size, register = any_size(dice, (16, 32, 64)), dice.target_register()
    head = b"\x66" if size == 16 else b""
    rex = (0x48 if size == 64 else 0x40) | register >> 3
    code = head + (bytes([rex]) if rex != 0x40 else b"") + bytes([0x90 | register & 7])
    return [Piece(f"xchg {name(RAX, size)}, {name(register, size)}", code)]


#: Each with how often it is taken.
FORMS: Final[tuple[tuple[Callable[[Dice], Pieces], int], ...]] = (
    (arithmetic, 12), (test, 3), (move, 10), (extend, 3), (address, 2), (unary, 5), (product, 3),
    (quotient, 2),
    (shift, 8), (double_shift, 2), (bit_test, 4), (scan, 3), (bits, 2), (deposit, 1),
    (condition, 9), (exchange, 5),
    (compare_wide, 1), (swap_bytes, 2), (checksum, 1), (without_operands, 5), (hint, 1),
    (table_look_up, 1),
    (store_past_caches, 1), (exchange_accumulator, 1),
)  # fmt: skip
