"""The length of an invalid instruction (Intel SDM volume 2, chapter 2 and appendix A).

A processor fetches an instruction whole before it refuses it. Unicorn fetches only as much as shows
that the instruction is invalid. So if an invalid instruction ends on a page that cannot be had, the
fault of that page has to come first. Lengths are those of AMD's processors, on which UD0 and UD1
have no ModRM.
"""

from typing import Final

from restrictedmem.kvm.decode import LONGEST, PREFIXES

# The opcode maps. VEX has the same numbers, 1 to 3, for the last three.
_ONE_BYTE, _0F, _0F38, _0F3A = range(4)
_SPACES: Final = {0x38: _0F38, 0x3A: _0F3A}
_OPERAND_SIZE: Final = 0x66
_SIB: Final = 4
_DISPLACEMENT: Final = 5

#: Opcodes of one byte that can be invalid and have ModRM; and those with immediate operands, with
#: how many bytes.
_MODRM: Final = frozenset((0x62, 0x82, 0x8C, 0x8D, 0x8E, 0x8F, 0xC6, 0xC7, 0xFE, 0xFF))
_IMMEDIATE: Final = {0x82: 1, 0xC6: 1, 0xD4: 1, 0xD5: 1}
#: Opcodes whose immediate operand has two bytes or four, with how many bytes more.
_OPERAND: Final = {0x9A: 2, 0xC7: 0, 0xEA: 2}
#: Opcodes behind 0F that have no ModRM, undefined ones among them.
_0F_ALONE: Final = frozenset((
    *range(0x04, 0x0D), 0x0E, *range(0x24, 0x28), *range(0x30, 0x40), 0x77, 0x7A, 0x7B,
    *range(0x80, 0x90),
    0xA0, 0xA1, 0xA2, *range(0xA6, 0xAB), 0xB9, *range(0xC8, 0xD0), 0xFF,
))  # fmt: skip
_0F_IMMEDIATE: Final = frozenset(
    (0x0F, *range(0x70, 0x74), 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6)
)


def length(code: bytes) -> int:
    """Return the bytes that an invalid instruction takes; more than given if it is cut off."""
    # The part that is cut off reads as 0. It takes at least its first byte.
    code += bytes(2 * LONGEST)
    at = 0
    while code[at] in PREFIXES:
        at += 1
    short = _OPERAND_SIZE in code[:at]
    space, at = _space(code, at)
    opcode = code[at]
    at += 1
    if opcode in _MODRM if space == _ONE_BYTE else space != _0F or opcode not in _0F_ALONE:
        at += _operand(code[at : at + 2])
    return at + _immediate(space, opcode, short=short)


def _space(code: bytes, at: int) -> tuple[int, int]:
    """Return the opcode's map, and the offset of the opcode's last byte."""
    match code[at]:
        case 0x0F if code[at + 1] in _SPACES:
            return _SPACES[code[at + 1]], at + 2
        case 0x0F:
            return _0F, at + 1
        case 0xC5:
            return _0F, at + 2
        case 0xC4:
            return code[at + 1] & 0x1F, at + 3
        case _:
            return _ONE_BYTE, at


def _operand(code: bytes) -> int:
    """Return how many bytes ModRM takes, with SIB and displacement."""
    mod, rm = code[0] >> 6, code[0] & 7
    if mod == 3:
        return 1
    sib = rm == _SIB
    base = code[1] & 7 if sib else rm
    displacement = (4 if base == _DISPLACEMENT else 0, 1, 4)[mod]
    return 1 + sib + displacement


def _immediate(space: int, opcode: int, *, short: bool) -> int:
    if space == _ONE_BYTE:
        if opcode in _OPERAND:
            return _OPERAND[opcode] + (2 if short else 4)
        return _IMMEDIATE.get(opcode, 0)
    return 1 if space == _0F3A or (space == _0F and opcode in _0F_IMMEDIATE) else 0
