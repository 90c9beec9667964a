"""The general instructions at random, one or a few that belong together at a time; each returns its pieces."""

from collections.abc import Callable, Sequence
from typing import Final

from . import places
from .operands import Dice
from .program import Fix, Piece
from .x86 import (
    CONDITIONS,
    EFFECTS,
    RAX,
    RCX,
    RDX,
    SIZES,
    Effect,
    Encoded,
    Mem,
    encode,
    encode_vex,
    name,
    shift_effect,
    shown,
)

_ARITHMETIC: Final = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
_SHIFTS: Final = ("rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar")
_BIT_TESTS: Final = ("bt", "bts", "btr", "btc")
_LOCK: Final = b"\xf0"
_NONE: Final = Effect()

Pieces = list[Piece]


def piece(
    text: str, encoded: Encoded, effect: Effect = _NONE, target: int | Mem | None = None
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
    found = EFFECTS.get(mnemonic, _NONE) if effect is None else effect
    return piece(
        f"{'lock ' if lock else ''}{mnemonic} {text}",
        encoded,
        found,
        rm if isinstance(rm, Mem) else None,
    )


def plain(code: str, mnemonic: str, effect: Effect | None = None) -> Piece:
    """Make a piece without operands."""
    return Piece(
        mnemonic, bytes.fromhex(code), EFFECTS.get(mnemonic, _NONE) if effect is None else effect
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


def _imm(dice: Dice, size: int) -> tuple[bytes, int]:
    """Return an immediate operand, and its value as an assembler shows it."""
    value = dice.value(min(size, 32))
    return value.to_bytes(min(size, 32) // 8, "little"), value


def _size(dice: Dice, sizes: Sequence[int] = SIZES) -> int:
    return dice.random.choice(sizes)


def _byte_or(size: int, byte: int, other: int) -> str:
    return f"{byte if size == 8 else other:02x}"


def _locks(dice: Dice, rm: int | Mem, size: int) -> bool:
    return isinstance(rm, Mem) and dice.one_in(3) and _may_lock(rm, size)


def _may_lock(rm: Mem, size: int) -> bool:
    """Say whether an access may be atomic: not over two cache lines (docs/reference/engines.md, `split-lock`)."""
    return not rm.target % (size // 8)


def arithmetic(dice: Dice) -> Pieces:
    number, size = dice.random.randrange(8), _size(dice)
    mnemonic, reads_only = _ARITHMETIC[number], number == 7
    match dice.random.randrange(4):
        case 0:
            rm = dice.source(size) if reads_only else dice.target(size)
            lock = not reads_only and _locks(dice, rm, size)
            opcode = _byte_or(size, number << 3, number << 3 | 1)
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
            opcode = _byte_or(size, number << 3 | 2, number << 3 | 3)
            return [op(mnemonic, opcode, size, reg, dice.source(size), operands="{reg}, {rm}")]
        case 2:
            imm, value = _imm(dice, size)
            head = {8: b"", 16: b"\x66", 32: b"", 64: b"\x48"}[size] + bytes(
                [number << 3 | (4 if size == 8 else 5)]
            )
            return [
                Piece(f"{mnemonic} {name(RAX, size)}, {value:#x}", head + imm, EFFECTS[mnemonic])
            ]
        case _:
            rm = dice.source(size) if reads_only else dice.target(size)
            short = size > 8 and dice.one_in(2)
            imm, value = _imm(dice, 8 if short else size)
            opcode = "83" if short else _byte_or(size, 0x80, 0x81)
            lock = not reads_only and _locks(dice, rm, size)
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
    size = _size(dice)
    if dice.one_in(2):
        return [
            op(
                "test",
                _byte_or(size, 0x84, 0x85),
                size,
                dice.source_register(size),
                dice.source(size),
                operands="{rm}, {reg}",
            )
        ]
    imm, value = _imm(dice, size)
    # /1 is an alias (APM volume 3, A.2).
    digit, opcode = dice.random.choice((0, 0, 1)), _byte_or(size, 0xF6, 0xF7)
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


def move(dice: Dice) -> Pieces:
    size = _size(dice)
    match dice.random.randrange(5):
        case 0:
            return [
                op(
                    "mov",
                    _byte_or(size, 0x88, 0x89),
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
                    _byte_or(size, 0x8A, 0x8B),
                    size,
                    dice.target_register(size),
                    dice.source(size),
                    operands="{reg}, {rm}",
                )
            ]
        case 2:
            imm, value = _imm(dice, size)
            opcode = _byte_or(size, 0xC6, 0xC7)
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
    """MOV between the accumulator and an absolute address of 64 bits."""
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
        size = _size(dice, (32, 64))
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
    size = _size(dice, (16, 32, 64))
    mnemonic, opcode = dice.random.choice((("movzx", 0xB6), ("movsx", 0xBE)))
    small = _size(dice, (8, 16))
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
    size = _size(dice, (16, 32, 64))
    operand = dice.mem_at(dice.value(31))
    return [op("lea", "8d", size, dice.target_register(), operand, operands="{reg}, {rm}")]


def unary(dice: Dice) -> Pieces:
    size = _size(dice)
    mnemonic, byte, digit = dice.random.choice(
        (("inc", 0xFE, 0), ("dec", 0xFE, 1), ("not", 0xF6, 2), ("neg", 0xF6, 3))
    )
    rm = dice.target(size)
    return [
        op(
            mnemonic,
            _byte_or(size, byte, byte | 1),
            size,
            digit,
            rm,
            operands="{rm}",
            digit=True,
            lock=_locks(dice, rm, size),
        )
    ]


def product(dice: Dice) -> Pieces:
    size = _size(dice)
    if dice.one_in(2):
        mnemonic, digit = dice.random.choice((("mul", 4), ("imul", 5)))
        return [
            op(
                mnemonic,
                _byte_or(size, 0xF6, 0xF7),
                size,
                digit,
                dice.source(size),
                operands="{rm}",
                digit=True,
            )
        ]
    size = _size(dice, (16, 32, 64))
    reg, rm = dice.target_register(), dice.source(size)
    if dice.one_in(2):
        return [op("imul", "0faf", size, reg, rm, operands="{reg}, {rm}")]
    short = dice.one_in(2)
    imm, value = _imm(dice, 8 if short else size)
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
    """A division that mostly has a result: a large divisor, and a dividend whose upper half is 0 or a sign."""
    size, (mnemonic, digit) = _size(dice), dice.random.choice((("div", 6), ("idiv", 7)))
    rm: int | Mem = dice.target_register() if dice.one_in(2) else dice.memory(size)
    if rm in (RAX, RDX):
        rm = RCX
    imm = (dice.value(min(size, 32) - 1) | 1).to_bytes(min(size, 32) // 8, "little")
    pieces = [
        op(
            "mov",
            _byte_or(size, 0xC6, 0xC7),
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
        op(mnemonic, _byte_or(size, 0xF6, 0xF7), size, digit, rm, operands="{rm}", digit=True)
    )
    return pieces[1:] if dice.one_in(20) else pieces


def shift(dice: Dice) -> Pieces:
    size, digit = _size(dice), dice.random.randrange(8)
    mnemonic, rm, pieces = _SHIFTS[digit], dice.target(size), Pieces()
    match dice.random.randrange(3):
        case 0:
            effect = shift_effect(mnemonic, size, 1)
            return [
                op(
                    mnemonic,
                    _byte_or(size, 0xD0, 0xD1),
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
            effect, opcode = shift_effect(mnemonic, size, count), _byte_or(size, 0xC0, 0xC1)
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
                _byte_or(size, 0xD2, 0xD3),
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
    size = _size(dice, (16, 32, 64))
    mnemonic, opcode = dice.random.choice((("shld", 0xA4), ("shrd", 0xAC)))
    reg, rm, operands = dice.source_register(), dice.target(size), "{rm}, {reg}, "
    # Of 16 bits, more than 16 leave everything undefined.
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
    size, number = _size(dice, (16, 32, 64)), dice.random.randrange(4)
    mnemonic = _BIT_TESTS[number]
    rm = dice.source(size) if number == 0 else dice.target(size)
    lock = number != 0 and _locks(dice, rm, size)
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
    size = _size(dice, (16, 32, 64))
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
    # Of 0 the result is undefined.
    bit = dice.random.randrange(size)
    return [
        op("bts", "0fba", size, 5, rm, operands=f"{{rm}}, {bit}", imm=bytes([bit]), digit=True),
        last,
    ]


def bits(dice: Dice) -> Pieces:
    """BMI1 and BMI2."""
    size, reg, other, third = (
        _size(dice, (32, 64)),
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
            ("bextr", 0, 0xF7), ("bzhi", 0, 0xF5), ("shlx", 1, 0xF7), ("sarx", 2, 0xF7), ("shrx", 3, 0xF7)
        )[choice - 6]  # fmt: skip
        encoded, text = (
            encode_vex(2, mandatory, wide, opcode, reg, other, rm),
            f"{mnemonic} {swapped}",
        )
    return [piece(text, encoded, EFFECTS.get(text.split()[0], _NONE), target)]


def deposit(dice: Dice) -> Pieces:
    size, reg, other = _size(dice, (32, 64)), dice.target_register(), dice.source_register()
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
    size = _size(dice, (16, 32, 64))
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
    size = _size(dice)
    reg, rm = dice.target_register(size), dice.target(size)
    mnemonic, byte, other = dice.random.choice(
        (("xchg", "86", "87"), ("xadd", "0fc0", "0fc1"), ("cmpxchg", "0fb0", "0fb1"))
    )
    if mnemonic == "xchg" and isinstance(rm, Mem) and not _may_lock(rm, size):
        rm = dice.target_register()
    lock = _locks(dice, rm, size)
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
    lock = dice.one_in(2) and _may_lock(rm, 2 * size)
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
    size, register = _size(dice, (32, 64)), dice.target_register()
    if dice.one_in(2):
        rex = {32: b"\x41" if register >= 8 else b"", 64: bytes([0x48 | register >> 3])}[size]
        return [Piece(f"bswap {name(register, size)}", rex + bytes([0x0F, 0xC8 | register & 7]))]
    size = _size(dice, (16, 32, 64))
    opcode, operands = dice.random.choice((("0f38f0", "{reg}, {rm}"), ("0f38f1", "{rm}, {reg}")))
    return [op("movbe", opcode, size, register, dice.memory(size), operands=operands)]


def checksum(dice: Dice) -> Pieces:
    small = _size(dice)
    size = {8: dice.random.choice((32, 64)), 64: 64}.get(small, 32)
    return [
        op("crc32", "0f38f0" if small == 8 else "0f38f1", 16 if small == 16 else 32, dice.target_register(), dice.source(small),
           operands="{reg}, {rm}", sizes=(size, small), mandatory=b"\xf2", wide=size == 64)
    ]  # fmt: skip


_CONVERSIONS: Final = (
    ("6698", "cbw"), ("98", "cwde"), ("4898", "cdqe"), ("6699", "cwd"), ("99", "cdq"), ("4899", "cqo"),
    ("9f", "lahf"), ("9e", "sahf"), ("f8", "clc"), ("f9", "stc"), ("f5", "cmc"), ("fc", "cld"), ("fd", "std"),
    ("90", "nop"), ("f390", "pause"), ("f30f1efa", "endbr64"), ("0faef0", "mfence"), ("0faee8", "lfence"), ("0faef8", "sfence"),
)  # fmt: skip


def without_operands(dice: Dice) -> Pieces:
    return [plain(*dice.random.choice(_CONVERSIONS))]


def hint(dice: Dice) -> Pieces:
    size = _size(dice, (16, 32, 64))
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
    size = _size(dice, (32, 64))
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
    size, register = _size(dice, (16, 32, 64)), dice.target_register()
    head = b"\x66" if size == 16 else b""
    rex = (0x48 if size == 64 else 0x40) | register >> 3
    code = head + (bytes([rex]) if rex != 0x40 else b"") + bytes([0x90 | register & 7])
    return [Piece(f"xchg {name(RAX, size)}, {name(register, size)}", code)]


#: Each with how often it is taken.
FORMS: Final[tuple[tuple[Callable[[Dice], Pieces], int], ...]] = (
    (arithmetic, 12), (test, 3), (move, 10), (extend, 3), (address, 2), (unary, 5), (product, 3), (quotient, 2),
    (shift, 8), (double_shift, 2), (bit_test, 4), (scan, 3), (bits, 2), (deposit, 1), (condition, 9), (exchange, 5),
    (compare_wide, 1), (swap_bytes, 2), (checksum, 1), (without_operands, 5), (hint, 1), (table_look_up, 1),
    (store_past_caches, 1), (exchange_accumulator, 1),
)  # fmt: skip
