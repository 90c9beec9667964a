"""Pieces of general instructions: how the forms make them, and what the forms choose alike."""

from collections.abc import Sequence
from typing import Final

from .operands import Dice
from .program import Fix, Piece
from .x86 import EFFECTS, SIZES, Effect, Encoded, Mem, encode, name, shown

_LOCK: Final = b"\xf0"
NO_EFFECT: Final = Effect()

Pieces = list[Piece]


def piece(
    text: str, encoded: Encoded, effect: Effect = NO_EFFECT, target: int | Mem | None = None
) -> Piece:
    """Make a piece; the operand ``target`` fills a RIP-relative displacement."""
    fix = None
    if encoded.disp_at is not None:
        assert isinstance(target, Mem)
        fix = Fix(encoded.disp_at, 4, target.target)
    return Piece(text, encoded.code, effect, fix)


def op(
    mnemonic: str,
    opcode: str,
    size: int,
    reg: int,
    rm: int | Mem,
    *,
    operands: str,
    imm: bytes = b"",
    effect: Effect | None = None,
    digit: bool = False,
    sizes: tuple[int, int] | None = None,
    mandatory: bytes = b"",
    lock: bool = False,
    wide: bool | None = None,
) -> Piece:
    """Make a piece of an instruction with ModRM; ``operands`` is a format of ``reg`` and ``rm``."""
    reg_size, rm_size = sizes or (size, size)
    encoded = encode(
        bytes.fromhex(opcode), size, reg, rm, imm,
        digit=digit, sizes=sizes, prefixes=_LOCK if lock else b"", mandatory=mandatory, wide=wide,
    )  # fmt: skip
    text = operands.format(reg="" if digit else name(reg, reg_size), rm=shown(rm, rm_size))
    found = EFFECTS.get(mnemonic, NO_EFFECT) if effect is None else effect
    return piece(
        f"{'lock ' if lock else ''}{mnemonic} {text}",
        encoded,
        found,
        rm if isinstance(rm, Mem) else None,
    )


def plain(code: str, mnemonic: str, effect: Effect | None = None) -> Piece:
    """Make a piece without operands."""
    return Piece(
        mnemonic,
        bytes.fromhex(code),
        EFFECTS.get(mnemonic, NO_EFFECT) if effect is None else effect,
    )


def load(register: int, value: int, *, wide: bool = False) -> Piece:
    """Make a piece that sets a register and no flag."""
    if value < 1 << 32 and not wide:
        rex = b"\x41" if register >= 8 else b""
        return Piece(
            f"mov {name(register, 32)}, {value:#x}",
            rex + bytes([0xB8 | register & 7]) + value.to_bytes(4, "little"),
        )
    rex = bytes([0x48 | register >> 3])
    return Piece(
        f"mov {name(register, 64)}, {value:#x}",
        rex + bytes([0xB8 | register & 7]) + value.to_bytes(8, "little"),
    )


def define_flags(dice: Dice) -> Piece:
    """Make a piece that defines all status flags."""
    return op(
        "cmp", "3b", 32, dice.source_register(), dice.source_register(), operands="{reg}, {rm}"
    )


def immediate_operand(dice: Dice, size: int) -> tuple[bytes, int]:
    """Return an immediate operand, and its value as an assembler shows it."""
    value = dice.value(min(size, 32))
    return value.to_bytes(min(size, 32) // 8, "little"), value


def any_size(dice: Dice, sizes: Sequence[int] = SIZES) -> int:
    return dice.random.choice(sizes)


def byte_or(size: int, byte: int, other: int) -> str:
    return f"{byte if size == 8 else other:02x}"


def takes_lock(dice: Dice, rm: int | Mem, size: int) -> bool:
    return isinstance(rm, Mem) and dice.one_in(3) and may_lock(rm, size)


def may_lock(rm: Mem, size: int) -> bool:
    """Say whether an access may be atomic: not across cache lines (engines.md, `split-lock`)."""
    return not rm.target % (size // 8)
