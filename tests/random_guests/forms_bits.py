"""Instructions on bits at random: shifts, tests, scans and the like."""

from typing import Final

from . import places
from .operands import Dice
from .pieces import NO_EFFECT, Pieces, any_size, byte_or, load, op, piece, takes_lock
from .program import Piece
from .x86 import EFFECTS, RCX, Mem, encode_vex, name, shift_effect, shown

_SHIFTS: Final = ("rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar")
_BIT_TESTS: Final = ("bt", "bts", "btr", "btc")


def shift(dice: Dice) -> Pieces:
    size, digit = any_size(dice), dice.random.randrange(8)
    mnemonic, rm, pieces = _SHIFTS[digit], dice.target(size), Pieces()
    match dice.random.randrange(3):
        case 0:
            effect = shift_effect(mnemonic, size, 1)
            return [
                op(
                    mnemonic,
                    byte_or(size, 0xD0, 0xD1),
                    size,
                    digit,
                    rm,
                    operands="{rm}, 1",
                    digit=True,
                    effect=effect,
                )
            ]
        case 1:
            count = _count(dice)
            effect, opcode = shift_effect(mnemonic, size, count), byte_or(size, 0xC0, 0xC1)
            return [
                op(
                    mnemonic,
                    opcode,
                    size,
                    digit,
                    rm,
                    operands=f"{{rm}}, {count}",
                    imm=bytes([count]),
                    digit=True,
                    effect=effect,
                )
            ]
        case _:
            known = _count(dice) if dice.one_in(2) else None
            if known is not None:
                pieces = [Piece(f"mov cl, {known}", bytes([0xB1, known]))]
            effect, opcode = (
                shift_effect(mnemonic, size, None if rm == RCX else known),
                byte_or(size, 0xD2, 0xD3),
            )
            return [
                *pieces,
                op(
                    mnemonic,
                    opcode,
                    size,
                    digit,
                    rm,
                    operands="{rm}, cl",
                    digit=True,
                    effect=effect,
                ),
            ]


def _count(dice: Dice) -> int:
    return dice.random.choice(
        (0, 1, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, dice.random.randrange(256))
    )


def double_shift(dice: Dice) -> Pieces:
    size = any_size(dice, (16, 32, 64))
    mnemonic, opcode = dice.random.choice((("shld", 0xA4), ("shrd", 0xAC)))
    reg, rm, operands = dice.source_register(), dice.target(size), "{rm}, {reg}, "
    # With 16 bits, a count above 16 leaves everything undefined.
    count = dice.random.randrange(17) if size == 16 else _count(dice)
    effect = shift_effect(mnemonic, size, count)
    if dice.one_in(2):
        return [
            op(
                mnemonic,
                f"0f{opcode:02x}",
                size,
                reg,
                rm,
                operands=f"{operands}{count}",
                imm=bytes([count]),
                effect=effect,
            )
        ]
    last = op(
        mnemonic, f"0f{opcode | 1:02x}", size, reg, rm, operands=f"{operands}cl", effect=effect
    )
    return [Piece(f"mov cl, {count}", bytes([0xB1, count])), last]


def bit_test(dice: Dice) -> Pieces:
    size, number = any_size(dice, (16, 32, 64)), dice.random.randrange(4)
    mnemonic = _BIT_TESTS[number]
    rm = dice.source(size) if number == 0 else dice.target(size)
    lock = number != 0 and takes_lock(dice, rm, size)
    if dice.one_in(2):
        bit = dice.random.randrange(256)
        return [
            op(
                mnemonic,
                "0fba",
                size,
                number + 4,
                rm,
                operands=f"{{rm}}, {bit}",
                imm=bytes([bit]),
                digit=True,
                lock=lock,
            )
        ]
    register = dice.random.choice(dice.writable)
    # In memory it counts from the operand on, either way, and it has the operand's size.
    before = (rm.target - places.FIRST_DATA) // (size // 8) * size if isinstance(rm, Mem) else 512
    bit = dice.random.randrange(-min(before, 512), 512) & (1 << 64) - 1
    opcode = f"0f{0xA3 | number << 3:02x}"
    return [
        load(register, bit),
        op(mnemonic, opcode, size, register, rm, operands="{rm}, {reg}", lock=lock),
    ]


def scan(dice: Dice) -> Pieces:
    size = any_size(dice, (16, 32, 64))
    reg, rm = dice.target_register(), dice.target(size)
    mnemonic, opcode, mandatory = dice.random.choice(
        (
            ("bsf", "0fbc", b""),
            ("bsr", "0fbd", b""),
            ("tzcnt", "0fbc", b"\xf3"),
            ("lzcnt", "0fbd", b"\xf3"),
            ("popcnt", "0fb8", b"\xf3"),
        )
    )
    last = op(mnemonic, opcode, size, reg, rm, operands="{reg}, {rm}", mandatory=mandatory)
    if mandatory:
        return [last]
    # For an operand of 0 the result is undefined.
    bit = dice.random.randrange(size)
    return [
        op("bts", "0fba", size, 5, rm, operands=f"{{rm}}, {bit}", imm=bytes([bit]), digit=True),
        last,
    ]


def bits(dice: Dice) -> Pieces:
    """Make an instruction of BMI1 or BMI2."""
    size, reg, other, third = (
        any_size(dice, (32, 64)),
        dice.target_register(),
        dice.source_register(),
        dice.target_register(),
    )
    rm = dice.source(size)
    wide, shows = size == 64, shown(rm, size)
    regs = f"{name(reg, size)}, {name(other, size)}, {shows}"
    swapped = f"{name(reg, size)}, {shows}, {name(other, size)}"
    count = dice.random.randrange(256)
    target = rm if isinstance(rm, Mem) else None
    choice = dice.random.randrange(11)
    if choice == 0:
        encoded, text = encode_vex(2, 0, wide, 0xF2, reg, other, rm), f"andn {regs}"
    elif choice in (1, 2, 3):
        mnemonic = ("blsr", "blsmsk", "blsi")[choice - 1]
        encoded, text = (
            encode_vex(2, 0, wide, 0xF3, choice, reg, rm),
            f"{mnemonic} {name(reg, size)}, {shows}",
        )
    elif choice == 4:
        encoded, text = (
            encode_vex(3, 3, wide, 0xF0, reg, 0, rm, bytes([count])),
            f"rorx {name(reg, size)}, {shows}, {count}",
        )
    elif choice == 5:
        encoded, text = (
            encode_vex(2, 3, wide, 0xF6, reg, third, rm),
            f"mulx {name(reg, size)}, {name(third, size)}, {shows}",
        )
    else:
        mnemonic, mandatory, opcode = (
            ("bextr", 0, 0xF7), ("bzhi", 0, 0xF5), ("shlx", 1, 0xF7), ("sarx", 2, 0xF7),
            ("shrx", 3, 0xF7)
        )[choice - 6]  # fmt: skip
        encoded, text = (
            encode_vex(2, mandatory, wide, opcode, reg, other, rm),
            f"{mnemonic} {swapped}",
        )
    return [piece(text, encoded, EFFECTS.get(text.split()[0], NO_EFFECT), target)]


def deposit(dice: Dice) -> Pieces:
    size, reg, other = any_size(dice, (32, 64)), dice.target_register(), dice.source_register()
    rm = dice.source(size)
    mnemonic, mandatory = dice.random.choice((("pdep", 3), ("pext", 2)))
    encoded = encode_vex(2, mandatory, size == 64, 0xF5, reg, other, rm)
    return [
        piece(
            f"{mnemonic} {name(reg, size)}, {name(other, size)}, {shown(rm, size)}",
            encoded,
            target=rm,
        )
    ]
