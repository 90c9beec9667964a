"""x86-64 machine code: encodings, and the flags that instructions read, define or leave undefined.

The sources are Intel SDM volume 2 (instruction reference) and appendix A of volume 1 (EFLAGS cross
reference), and AMD APM volume 3, appendix F. Where the two vendors differ, the flag counts as
undefined.
"""

from dataclasses import dataclass
from typing import Final

CF: Final = 1 << 0
PF: Final = 1 << 2
AF: Final = 1 << 4
ZF: Final = 1 << 6
SF: Final = 1 << 7
DF: Final = 1 << 10
OF: Final = 1 << 11
STATUS: Final = CF | PF | AF | ZF | SF | OF

SIZES: Final = (8, 16, 32, 64)
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
#: AH, CH, DH and BH are 16 to 19: they cannot be named beside a REX prefix.
HIGH_BYTES: Final = range(16, 20)
_LOW: Final = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
_BYTES: Final = ("al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil")
_HIGH: Final = ("ah", "ch", "dh", "bh")
_WORDS: Final = {8: "byte", 16: "word", 32: "dword", 64: "qword", 128: "oword"}
#: ES, CS, SS and DS count for nothing in long mode; FS and GS have the base 0.
SEGMENTS: Final = {"es": 0x26, "cs": 0x2E, "ss": 0x36, "ds": 0x3E, "fs": 0x64, "gs": 0x65}

#: Condition codes in the order of their numbers, by pairs: the flags that they look at.
CONDITIONS: Final = (
    ("o", OF), ("no", OF), ("b", CF), ("ae", CF), ("e", ZF), ("ne", ZF), ("be", CF | ZF),
    ("a", CF | ZF),
    ("s", SF), ("ns", SF), ("p", PF), ("np", PF), ("l", SF | OF), ("ge", SF | OF),
    ("le", ZF | SF | OF), ("g", ZF | SF | OF),
)  # fmt: skip


class UnencodableError(Exception):
    """These operands do not go together: a high byte beside a REX prefix, or more than 15 bytes."""


@dataclass(frozen=True, slots=True)
class Mem:
    """A memory operand whose address ``target`` is known.

    Without base and index it is absolute, or ``rip`` relative.
    """

    target: int
    base: int | None = None
    index: int | None = None
    scale: int = 0
    disp: int = 0
    segment: str = ""
    narrow: bool = False
    """Addressed by 32 bits (prefix 67)."""
    rip: bool = False

    def __str__(self) -> str:
        width = 32 if self.narrow else 64
        parts = [name(self.base, width)] if self.base is not None else []
        if self.index is not None:
            parts.append(f"{name(self.index, width)}*{1 << self.scale}")
        parts.append("rip" if self.rip else f"{self.disp:#x}")
        where = f"{self.segment}:" if self.segment else ""
        # Where that is, as far as it is known.
        return f"{where}[{'+'.join(parts)}]".replace("+-", "-") + (
            f"@{self.target:#x}" if self.target else ""
        )


@dataclass(frozen=True, slots=True)
class Encoded:
    """Machine code; ``disp_at`` is where a RIP-relative displacement has still to be filled in."""

    code: bytes
    disp_at: int | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """An instruction's effect on the six status flags.

    Flags that may stay as they were are in no set.
    """

    reads: int = 0
    defines: int = 0
    undefines: int = 0


def name(register: int, size: int) -> str:
    """Return what an assembler calls a register."""
    if register >= 16:
        return _HIGH[register - 16]
    if register >= 8:
        return f"r{register}" + {8: "b", 16: "w", 32: "d", 64: ""}[size]
    return _BYTES[register] if size == 8 else {16: "", 32: "e", 64: "r"}[size] + _LOW[register]


def shown(operand: "int | Mem", size: int) -> str:
    """Return an operand as text."""
    return name(operand, size) if isinstance(operand, int) else f"{_WORDS[size]} {operand}"


def encode(
    opcode: bytes,
    size: int,
    reg: int,
    rm: int | Mem,
    imm: bytes = b"",
    *,
    digit: bool = False,
    sizes: tuple[int, int] | None = None,
    prefixes: bytes = b"",
    mandatory: bytes = b"",
    wide: bool | None = None,
) -> Encoded:
    """Encode an instruction with a ModRM byte.

    ``reg`` is a register, or with ``digit`` a part of the opcode. ``sizes`` are those of the two
    operands where they differ; ``wide`` says whether REX.W is set where that does not follow from
    the size. Of ``prefixes`` nothing is known here.

    Raises:
        UnencodableError: see there.
    """
    reg_size, rm_size = sizes or (size, size)
    high = (not digit and reg >= 16) or (isinstance(rm, int) and rm >= 16)
    rex = 0x08 if (size == 64 if wide is None else wide) else 0
    if not digit:
        rex |= (reg >> 3 & 1) << 2 if reg < 16 else 0
        rex |= 0x40 if reg_size == 8 and 4 <= reg < 8 else 0
    code = reg & 7 if reg < 16 else reg - 12
    if isinstance(rm, int):
        rex |= (rm >> 3 & 1 if rm < 16 else 0) | (0x40 if rm_size == 8 and 4 <= rm < 8 else 0)
        tail, disp_at = bytes([0xC0 | code << 3 | (rm & 7 if rm < 16 else rm - 12)]), None
    else:
        rex |= _memory_rex(rm)
        prefixes += _memory_prefixes(rm)
        tail, disp_at = _memory_tail(code, rm)
    if rex and high:
        raise UnencodableError
    head = prefixes + (b"\x66" if size == 16 else b"") + mandatory
    head += (bytes([0x40 | rex]) if rex else b"") + opcode
    if len(head) + len(tail) + len(imm) > 15:
        raise UnencodableError
    return Encoded(head + tail + imm, None if disp_at is None else len(head) + disp_at)


def encode_vex(
    space: int,
    mandatory: int,
    wide: bool,
    opcode: int,
    reg: int,
    other: int,
    rm: int | Mem,
    imm: bytes = b"",
) -> Encoded:
    """Encode an instruction of general registers with a VEX prefix.

    ``other`` is VEX.vvvv (SDM volume 2, 2.3.5).
    """
    if isinstance(rm, int):
        extension, prefixes, disp_at = rm >> 3, b"", None
        tail = bytes([0xC0 | (reg & 7) << 3 | rm & 7])
    else:
        extension, prefixes = _memory_rex(rm), _memory_prefixes(rm)
        tail, disp_at = _memory_tail(reg & 7, rm)
    second = (~(reg >> 3) & 1) << 7 | (~extension >> 1 & 1) << 6 | (~extension & 1) << 5 | space
    third = wide << 7 | (~other & 15) << 3 | mandatory
    head = prefixes + bytes([0xC4, second, third, opcode])
    return Encoded(head + tail + imm, None if disp_at is None else len(head) + disp_at)


def _memory_rex(rm: Mem) -> int:
    return (rm.index or 0) >> 3 << 1 | (rm.base or 0) >> 3


def _memory_prefixes(rm: Mem) -> bytes:
    return (bytes([SEGMENTS[rm.segment]]) if rm.segment else b"") + (b"\x67" if rm.narrow else b"")


def _memory_tail(code: int, rm: Mem) -> tuple[bytes, int | None]:
    """Return ModRM, SIB and displacement, and where a RIP-relative displacement is missing."""
    disp32 = (rm.disp & 0xFFFF_FFFF).to_bytes(4, "little")
    if rm.rip:
        return bytes([code << 3 | 5]) + bytes(4), 1
    index = 4 if rm.index is None else rm.index & 7
    if rm.base is None:
        return bytes([code << 3 | 4, rm.scale << 6 | index << 3 | 5]) + disp32, None
    base = rm.base & 7
    if -128 <= rm.disp < 128:
        mod, disp = (0, b"") if not rm.disp and base != 5 else (1, bytes([rm.disp & 0xFF]))
    else:
        mod, disp = 2, disp32
    if rm.index is None and base != 4:
        return bytes([mod << 6 | code << 3 | base]) + disp, None
    return bytes([mod << 6 | code << 3 | 4, rm.scale << 6 | index << 3 | base]) + disp, None


_ALL = Effect(defines=STATUS)
_LOGIC = Effect(defines=STATUS & ~AF, undefines=AF)
_PRODUCT = Effect(defines=CF | OF, undefines=SF | ZF | AF | PF)
_BIT_TEST = Effect(defines=CF, undefines=OF | SF | AF | PF)
_SCAN = Effect(defines=ZF, undefines=STATUS & ~ZF)
_COUNT_ZEROS = Effect(defines=ZF | CF, undefines=OF | SF | PF | AF)
_BMI = Effect(defines=CF | ZF | SF | OF, undefines=AF | PF)
_LOW_FLAGS: Final = CF | PF | AF | ZF | SF

#: Effects by mnemonic; all other instructions touch no status flag. For shifts see
#: ``shift_effect``, for conditions ``CONDITIONS``.
EFFECTS: Final[dict[str, Effect]] = {
    **dict.fromkeys(
        ("add", "sub", "cmp", "neg", "xadd", "cmpxchg", "cmps", "scas", "popcnt", "popf"), _ALL
    ),
    **dict.fromkeys(("adc", "sbb"), Effect(CF, STATUS)),
    **dict.fromkeys(("inc", "dec"), Effect(defines=STATUS & ~CF)),
    **dict.fromkeys(("and", "or", "xor", "test"), _LOGIC),
    **dict.fromkeys(("mul", "imul"), _PRODUCT),
    **dict.fromkeys(("div", "idiv"), Effect(undefines=STATUS)),
    **dict.fromkeys(("bt", "bts", "btr", "btc"), _BIT_TEST),
    **dict.fromkeys(("bsf", "bsr"), _SCAN),
    **dict.fromkeys(("tzcnt", "lzcnt"), _COUNT_ZEROS),
    **dict.fromkeys(("cmpxchg8b", "cmpxchg16b"), Effect(defines=ZF)),
    **dict.fromkeys(("andn", "blsi", "blsr", "blsmsk", "bzhi"), _BMI),
    "bextr": Effect(defines=CF | ZF | OF, undefines=AF | PF | SF),
    **dict.fromkeys(("clc", "stc"), Effect(defines=CF)),
    "cmc": Effect(CF, CF),
    "lahf": Effect(_LOW_FLAGS),
    "sahf": Effect(defines=_LOW_FLAGS),
    "pushf": Effect(STATUS),
}


def shift_effect(mnemonic: str, size: int, count: int | None) -> Effect:
    """Return the effect on the flags of a shift or rotation by ``count``; None: not known (CL)."""
    masked = None if count is None else count & (63 if size == 64 else 31)
    rotates = mnemonic in ("rol", "ror", "rcl", "rcr")
    reads = CF if mnemonic in ("rcl", "rcr") else 0
    if masked == 0:
        return Effect(reads)
    lost = 0 if rotates else AF
    if mnemonic in ("shl", "sal", "shr") and size < 32 and (masked is None or masked >= size):
        lost |= CF
    defined = CF if rotates else CF | SF | ZF | PF
    if masked == 1:
        return Effect(reads, (defined | OF) & ~lost, lost)
    # A count that is 0 after all leaves every flag as it was.
    return Effect(reads, 0 if masked is None else defined & ~lost, lost | OF)
