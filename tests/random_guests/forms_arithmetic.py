"""Arithmetic at random: instructions on whole operands, products and quotients."""

from typing import Final

from .operands import Dice
from .pieces import Pieces, any_size, byte_or, immediate_operand, load, op, plain, takes_lock
from .program import Piece
from .x86 import EFFECTS, RAX, RCX, RDX, Mem, name

_ARITHMETIC: Final = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")


def arithmetic(dice: Dice) -> Pieces:
    number, size = dice.random.randrange(8), any_size(dice)
    mnemonic, reads_only = _ARITHMETIC[number], number == 7
    match dice.random.randrange(4):
        case 0:
            rm = dice.source(size) if reads_only else dice.target(size)
            lock = not reads_only and takes_lock(dice, rm, size)
            opcode = byte_or(size, number << 3, number << 3 | 1)
            return [
                op(
                    mnemonic,
                    opcode,
                    size,
                    dice.source_register(size),
                    rm,
                    operands="{rm}, {reg}",
                    lock=lock,
                )
            ]
        case 1:
            reg = dice.source_register(size) if reads_only else dice.target_register(size)
            opcode = byte_or(size, number << 3 | 2, number << 3 | 3)
            return [op(mnemonic, opcode, size, reg, dice.source(size), operands="{reg}, {rm}")]
        case 2:
            imm, value = immediate_operand(dice, size)
            head = {8: b"", 16: b"\x66", 32: b"", 64: b"\x48"}[size] + bytes(
                [number << 3 | (4 if size == 8 else 5)]
            )
            return [
                Piece(f"{mnemonic} {name(RAX, size)}, {value:#x}", head + imm, EFFECTS[mnemonic])
            ]
        case _:
            rm = dice.source(size) if reads_only else dice.target(size)
            short = size > 8 and dice.one_in(2)
            imm, value = immediate_operand(dice, 8 if short else size)
            opcode = "83" if short else byte_or(size, 0x80, 0x81)
            lock = not reads_only and takes_lock(dice, rm, size)
            return [
                op(
                    mnemonic,
                    opcode,
                    size,
                    number,
                    rm,
                    operands=f"{{rm}}, {value:#x}",
                    imm=imm,
                    digit=True,
                    lock=lock,
                )
            ]


def test(dice: Dice) -> Pieces:
    size = any_size(dice)
    if dice.one_in(2):
        return [
            op(
                "test",
                byte_or(size, 0x84, 0x85),
                size,
                dice.source_register(size),
                dice.source(size),
                operands="{rm}, {reg}",
            )
        ]
    imm, value = immediate_operand(dice, size)
    # /1 is an alias (APM volume 3, A.2).
    digit, opcode = dice.random.choice((0, 0, 1)), byte_or(size, 0xF6, 0xF7)
    name_ = "test /1" if digit else "test"
    return [
        op(
            name_,
            opcode,
            size,
            digit,
            dice.source(size),
            operands=f"{{rm}}, {value:#x}",
            imm=imm,
            digit=True,
            effect=EFFECTS["test"],
        )
    ]


def unary(dice: Dice) -> Pieces:
    size = any_size(dice)
    mnemonic, byte, digit = dice.random.choice(
        (("inc", 0xFE, 0), ("dec", 0xFE, 1), ("not", 0xF6, 2), ("neg", 0xF6, 3))
    )
    rm = dice.target(size)
    return [
        op(
            mnemonic,
            byte_or(size, byte, byte | 1),
            size,
            digit,
            rm,
            operands="{rm}",
            digit=True,
            lock=takes_lock(dice, rm, size),
        )
    ]


def product(dice: Dice) -> Pieces:
    size = any_size(dice)
    if dice.one_in(2):
        mnemonic, digit = dice.random.choice((("mul", 4), ("imul", 5)))
        return [
            op(
                mnemonic,
                byte_or(size, 0xF6, 0xF7),
                size,
                digit,
                dice.source(size),
                operands="{rm}",
                digit=True,
            )
        ]
    size = any_size(dice, (16, 32, 64))
    reg, rm = dice.target_register(), dice.source(size)
    if dice.one_in(2):
        return [op("imul", "0faf", size, reg, rm, operands="{reg}, {rm}")]
    short = dice.one_in(2)
    imm, value = immediate_operand(dice, 8 if short else size)
    return [
        op(
            "imul",
            "6b" if short else "69",
            size,
            reg,
            rm,
            operands=f"{{reg}}, {{rm}}, {value:#x}",
            imm=imm,
        )
    ]


def quotient(dice: Dice) -> Pieces:
    """Make a division that mostly has a result.

    Its divisor is large, and the dividend's upper half is 0 or a sign.
    """
    size, (mnemonic, digit) = any_size(dice), dice.random.choice((("div", 6), ("idiv", 7)))
    rm: int | Mem = dice.target_register() if dice.one_in(2) else dice.memory(size)
    if rm in (RAX, RDX):
        rm = RCX
    imm = (dice.value(min(size, 32) - 1) | 1).to_bytes(min(size, 32) // 8, "little")
    pieces = [
        op(
            "mov",
            byte_or(size, 0xC6, 0xC7),
            size,
            0,
            rm,
            operands=f"{{rm}}, {imm[::-1].hex()}h",
            imm=imm,
            digit=True,
        )
    ]
    if size == 8:
        pieces.append(
            op(
                "movzx",
                "0fb6",
                32,
                RAX,
                dice.source_register(),
                operands="{reg}, {rm}",
                sizes=(32, 8),
            )
        )
    elif mnemonic == "div":
        pieces.append(load(RDX, 0))
    else:
        pieces.append(
            plain({16: "6699", 32: "99", 64: "4899"}[size], {16: "cwd", 32: "cdq", 64: "cqo"}[size])
        )
    pieces.append(
        op(mnemonic, byte_or(size, 0xF6, 0xF7), size, digit, rm, operands="{rm}", digit=True)
    )
    return pieces[1:] if dice.one_in(20) else pieces
