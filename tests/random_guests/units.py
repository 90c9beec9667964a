"""Parts of a program with several instructions.

These are strings, the stack, jumps, self-modifying code, and calls of the owner.
"""

from collections.abc import Callable
from typing import Final

from . import places
from .operands import Dice
from .pieces import Pieces, load, op, plain
from .program import ACTIONS, Fix, Label, Piece, hypercall
from .x86 import (
    CONDITIONS,
    DF,
    EFFECTS,
    RAX,
    RCX,
    RDI,
    RDX,
    RSI,
    RSP,
    STATUS,
    ZF,
    Effect,
    Mem,
    encode,
    name,
)

_BYTES: Final = {8: 1, 16: 2, 32: 4, 64: 8}
_LETTERS: Final = {8: "b", 16: "w", 32: "d", 64: "q"}
#: The bits stored by PUSHF that this program decides on (docs/reference/engines.md,
#: `flags-register`).
_SEEN: Final = STATUS | DF
#: Hypercalls that the engine itself has no part in (``guest_abi.ARGUMENTS``).
_NUMBERS: Final = (0, 1, 2, 4, 5, 77)


def strings(dice: Dice) -> Pieces:
    """Make a string instruction, with or without REP, forwards or backwards."""
    size = dice.random.choice((8, 16, 32, 64))
    mnemonic, opcode = dice.random.choice(
        (("movs", 0xA4), ("stos", 0xAA), ("lods", 0xAC), ("cmps", 0xA6), ("scas", 0xAE))
    )
    repeat = dice.random.choice(
        (b"", b"\xf3", b"\xf2" if mnemonic in ("cmps", "scas") else b"\xf3")
    )
    narrow = dice.one_in(8)
    backwards = dice.one_in(4)
    forwards = not backwards and dice.one_in(2)
    pieces = [plain("fd", "std")] if backwards else [plain("fc", "cld")] if forwards else Pieces()
    source, target = dice.address(8), dice.address(8)
    if mnemonic == "cmps" and dice.one_in(2):
        # Side by side, or overlapping: in MMIO, two loads of one instruction.
        target = max(places.FIRST_DATA, source + dice.random.randrange(-24, 25))
    pieces += [load(RSI, source), load(RDI, target)]
    count = dice.random.choice((0, 1, 2, 3, 5, 17, dice.random.randrange(64)))
    many = dice.random.randrange(2 * places.PAGE // _BYTES[size])
    # No store or load of many may be an exit of its own.
    if (
        repeat
        and dice.one_in(8)
        and not any(_may_be_mmio(at + many * _BYTES[size]) for at in (source, target))
    ):
        count = many
    if not forwards:
        count = min(count, (min(source, target) - places.FIRST_DATA) // _BYTES[size] + 1)
    if repeat:
        # With 67 only ECX counts.
        pieces.append(
            load(RCX, count | (dice.random.getrandbits(32) << 32 if narrow and count else 0))
        )
    prefixes = (
        (b"\x67" if narrow else b"")
        + repeat
        + (b"\x66" if size == 16 else b"")
        + (b"\x48" if size == 64 else b"")
    )
    compares = mnemonic in ("cmps", "scas")
    effect = EFFECTS.get(mnemonic, Effect())
    if repeat and not count:
        effect = Effect()
    word = {b"": "", b"\xf3": "repe " if compares else "rep ", b"\xf2": "repne "}[repeat]
    code = prefixes + bytes([opcode | (size != 8)])
    text = f"{'addr32 ' if narrow else ''}{word}{mnemonic}{_LETTERS[size]}"
    pieces.append(
        Piece(text, code, effect, partial=STATUS if compares and repeat else 0, narrow=narrow)
    )
    return pieces + ([plain("fc", "cld")] if backwards and dice.one_in(2) else Pieces())


def _may_be_mmio(address: int) -> bool:
    return places.page_of(address + 8) >= places.ROM.start


def stack(dice: Dice) -> Pieces:
    size = dice.random.choice((64, 64, 16))
    head = b"\x66" if size == 16 else b""
    match dice.random.randrange(7):
        case 0:
            source, target = dice.source_register(), dice.target_register()
            return [_push_register(source, size, head), _pop_register(target, size, head)]
        case 1:
            return [
                _stack_memory("push", "ff", 6, dice, size),
                _pop_register(dice.target_register(), size, head),
            ]
        case 2:
            return [
                _push_register(dice.source_register(), size, head),
                _stack_memory("pop", "8f", 0, dice, size),
            ]
        case 3:
            value = dice.value(8 if dice.one_in(2) else min(size, 32))
            short = value < 128
            imm = (
                value.to_bytes(1, "little")
                if short
                else (value & (1 << min(size, 32)) - 1).to_bytes(min(size, 32) // 8, "little")
            )
            push = Piece(
                f"push {_words(size)} {value:#x}", head + (b"\x6a" if short else b"\x68") + imm
            )
            return [push, _pop_register(dice.target_register(), size, head)]
        case 4:
            return _flags(dice)
        case 5:
            # The address counts from what RSP is after the POP (SDM volume 2).
            below = Mem(0, RSP, disp=dice.random.randrange(-64, -8))
            return [
                _push_register(RSP, 64, b""),
                op("pop", "8f", 64, 0, below, operands="{rm}", digit=True, wide=False),
            ]
        case _:
            return _frame(dice)


def _words(size: int) -> str:
    return {16: "word", 64: "qword"}[size]


def _push_register(register: int, size: int, head: bytes) -> Piece:
    return Piece(
        f"push {name(register, size)}",
        head + (b"\x41" if register >= 8 else b"") + bytes([0x50 | register & 7]),
    )


def _pop_register(register: int, size: int, head: bytes) -> Piece:
    return Piece(
        f"pop {name(register, size)}",
        head + (b"\x41" if register >= 8 else b"") + bytes([0x58 | register & 7]),
    )


def _stack_memory(mnemonic: str, opcode: str, digit: int, dice: Dice, size: int) -> Piece:
    # 64 bits without REX.W.
    return op(
        mnemonic, opcode, size, digit, dice.memory(size), operands="{rm}", digit=True, wide=False
    )


def _flags(dice: Dice) -> Pieces:
    if dice.one_in(2):
        value = dice.random.getrandbits(12) & (STATUS | (DF if dice.one_in(4) else 0))
        return [
            Piece(f"push {value:#x}", b"\x68" + value.to_bytes(4, "little")),
            plain("9d", "popf"),
        ]
    seen = _SEEN.to_bytes(4, "little")
    mask = op("and", "81", 64, 4, Mem(0, RSP), operands=f"{{rm}}, {_SEEN:#x}", imm=seen, digit=True)
    return [plain("9c", "pushf"), mask, _pop_register(dice.target_register(), 64, b"")]


def _frame(dice: Dice) -> Pieces:
    """ENTER and LEAVE, where RBP is free."""
    if 5 not in dice.writable:
        return stack(dice)
    size, level = dice.random.randrange(64), dice.random.choice((0, 0, 1, 2, 5))
    # Frames elsewhere, or above the new one: where it overwrote them, a page fault in the middle
    # would show.
    frame = op(
        "lea",
        "8d",
        64,
        5,
        Mem(0, RSP, disp=8 * level + dice.random.randrange(64)),
        operands="{reg}, {rm}",
    )
    if dice.one_in(2):
        frame = load(5, dice.address(8 * level) + 8 * level)
    return [frame, Piece(f"enter {size}, {level}", bytes([0xC8, size, 0, level])),
    op("mov", "8b", 32, RAX, 5, operands="{reg}, {rm}"),
            plain("c9", "leave")]  # fmt: skip


# Jumps. Labels inside an item are made with the number it is going to have.


def conditional_jump(dice: Dice, number: int) -> Pieces:
    """Make a jump over some of the items that follow."""
    code = dice.random.randrange(16)
    suffix, reads = CONDITIONS[code]
    label = Label(number + dice.random.randrange(1, 5))
    return [
        Piece(
            f"j{suffix} item {label.item}",
            bytes([0x0F, 0x80 | code]) + bytes(4),
            Effect(reads),
            Fix(2, 4, label),
            label,
        )
    ]


def over_nothing(dice: Dice, number: int) -> Pieces:
    """A jump of one byte's displacement over one instruction, by any of those that have one."""
    label = Label(number, 2)
    code = dice.random.choice((*range(0x70, 0x80), 0xE0, 0xE1, 0xE2, 0xE3, 0xEB))
    names = {0xE0: "loopne", 0xE1: "loope", 0xE2: "loop", 0xE3: "jrcxz", 0xEB: "jmp"}
    reads = CONDITIONS[code & 15][1] if code < 0x80 else ZF if code < 0xE2 else 0
    narrow = 0xE0 <= code <= 0xE3 and dice.one_in(3)
    text = f"{'addr32 ' if narrow else ''}{names.get(code) or 'j' + CONDITIONS[code & 15][0]} over"
    head = b"\x67" if narrow else b""
    jump = Piece(
        text,
        head + bytes([code, 0]),
        Effect(reads),
        Fix(len(head) + 1, 1, label),
        label,
        goes_on=code != 0xEB,
    )
    return [jump, load(dice.target_register(), dice.value()), plain("90", "nop")]


def short_loop(dice: Dice, number: int) -> Pieces:
    """Make a LOOP, LOOPE or LOOPNE around one instruction."""
    code = dice.random.choice((0xE0, 0xE1, 0xE2))
    body = op(
        "add",
        "01",
        64,
        dice.source_register(),
        dice.random.choice([r for r in dice.writable if r != RCX]),
        operands="{rm}, {reg}",
    )
    text = {0xE0: "loopne", 0xE1: "loope", 0xE2: "loop"}[code]
    jump = Piece(
        f"{text} back",
        bytes([code, 0]),
        Effect(ZF if code < 0xE2 else 0),
        Fix(1, 1, Label(number, 1)),
        Label(number, 1),
    )
    return [load(RCX, dice.random.randrange(1, 6)), body, jump]


def indirect_jump(dice: Dice, number: int) -> Pieces:
    """By a register or by memory, to what follows."""
    register = dice.target_register()
    rex = bytes([0x48 | register >> 3 << 2])
    to = Label(number + dice.random.randrange(1, 3))
    get = Piece(
        f"lea {name(register, 64)}, [item {to.item}]",
        rex + bytes([0x8D, (register & 7) << 3 | 5]) + bytes(4),
        fix=Fix(3, 4, to),
    )
    if dice.one_in(2):
        code = (b"\x41" if register >= 8 else b"") + bytes([0xFF, 0xE0 | register & 7])
        return [get, Piece(f"jmp {name(register, 64)}", code, jump=to, goes_on=False)]
    rm = dice.memory(64)
    store = op("mov", "89", 64, register, rm, operands="{rm}, {reg}")
    encoded = encode(b"\xff", 64, 4, rm, digit=True, wide=False)
    fix = None if encoded.disp_at is None else Fix(encoded.disp_at, 4, rm.target)
    return [get, store, Piece(f"jmp qword {rm}", encoded.code, fix=fix, jump=to, goes_on=False)]


def call(dice: Dice, number: int) -> Pieces:
    """A subroutine: called, and jumped over."""
    back = Label(number, 1)
    body, behind = Label(number, 2), Label(number, 4)
    extra = dice.random.choice((0, 8, 16))
    leave = Piece(f"ret {extra}", b"\xc2" + extra.to_bytes(2, "little"), jump=back, goes_on=False)
    if not extra:
        leave = Piece("ret", dice.random.choice((b"\xc3", b"\xf3\xc3")), jump=back, goes_on=False)
    return [
        Piece(
            "call the next but one",
            b"\xe8" + bytes(4),
            fix=Fix(1, 4, body),
            jump=body,
            goes_on=False,
        ),
        Piece("jmp behind", b"\xe9" + bytes(4), fix=Fix(1, 4, behind), jump=behind, goes_on=False),
        load(dice.target_register(), dice.value()),
        leave,
        op("lea", "8d", 64, RSP, Mem(0, RSP, disp=-extra), operands="{reg}, {rm}"),
    ]


# The program's own code, ports, and its owner.


def port(dice: Dice) -> Pieces:
    """Make an access to a port: by DX, by a number, or with INS or OUTS.

    It is only in shared code (docs/reference/engines.md, `port-in-private-code`).
    """
    size = dice.random.choice((8, 16, 32))
    wide, head = size != 8, b"\x66" if size == 16 else b""
    number = load(RDX, dice.random.choice((0, 0x42, 0xF3, 0xF4, 0xF5, 0x3F8, 0xFFF0)))
    out = dice.one_in(2)
    text = f"{'out' if out else 'in'} of {size} bits"
    match dice.random.randrange(3):
        case 0:
            imm = dice.random.choice((0x42, 0xF4, 0xFC))
            return [Piece(f"{text}, port {imm:#x}", head + bytes([0xE4 | wide | out << 1, imm]))]
        case 1:
            return [number, Piece(f"{text}, port dx", head + bytes([0xEC | wide | out << 1]))]
        case _:
            # Between a port and MMIO there is nothing (KVM_INTERNAL_ERROR_EMULATION).
            at = places.address(
                dice.random.choice((*places.BOTH, *places.LONE))
            ) + dice.random.randrange(places.PAGE - 64)
            repeat = b"\xf3" if dice.one_in(2) else b""
            string = Piece(
                f"{'rep ' if repeat else ''}{'outs' if out else 'ins'} of {size} bits",
                repeat + head + bytes([0x6C | wide | out << 1]),
            )
            return [
                plain("fc", "cld"),
                number,
                load(RSI if out else RDI, at),
                load(RCX, dice.random.randrange(5)),
                string,
            ]


def changes_itself(dice: Dice, number: int) -> Pieces:
    """Make a store into the immediate operand of the next instruction, or of a later one near it.

    See SDM volume 3, 9.1.3.
    """
    far, register = dice.random.randrange(3), dice.target_register()
    changed = load(register, dice.value(32))
    at = Label(number, 1 + far, len(changed.code) - 4)
    value = dice.random.getrandbits(8)
    # mov byte [rip + displacement], value: the displacement counts from behind the immediate
    # operand, as every other.
    store = Piece(
        f"mov byte [item {number} piece {1 + far}], {value:#x}",
        b"\xc6\x05" + bytes(4) + bytes([value]),
        fix=Fix(2, 4, at),
    )
    between = [
        op(
            "lea",
            "8d",
            32,
            dice.target_register(),
            Mem(0, disp=dice.value(31)),
            operands="{reg}, {rm}",
        )
        for _ in range(far)
    ]
    return [store, *between, changed]


def count(dice: Dice) -> Pieces:
    """Count in memory: that shows what is executed once too often."""
    return [op("inc", "ff", 64, 0, dice.memory(64), operands="{rm}", digit=True)]


def hypercalls(dice: Dice) -> Pieces:
    number = dice.random.choice(_NUMBERS)
    return [load(RAX, number), hypercall()]


def act(number: int) -> Pieces:
    """Call the owner to do its action of a number."""
    return [load(RAX, ACTIONS + number), hypercall()]


#: Each with how often it is taken; those that have labels get the number of their item.
UNITS: Final[tuple[tuple[Callable[[Dice], Pieces], int], ...]] = ((strings, 1), (stack, 1))
JUMPS: Final[tuple[tuple[Callable[[Dice, int], Pieces], int], ...]] = (
    (conditional_jump, 4), (over_nothing, 2), (short_loop, 1), (indirect_jump, 1), (call, 2),
    (changes_itself, 2),
)  # fmt: skip
