"""As much of an instruction as tells what it is (Intel SDM volume 2, chapter 2)."""

from dataclasses import dataclass
from typing import Final, final

#: The longest instruction; bytes.
LONGEST: Final = 15
_LEGACY: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_REX: Final = frozenset(range(0x40, 0x50))
#: What may stand before an opcode.
PREFIXES: Final = _LEGACY | _REX
_ESCAPE: Final = 0x0F
_REGISTER: Final = 0xC0


@final
@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its prefixes, its opcode, and the byte behind that.

    An opcode of two bytes is a number of both, 0x0F first. The byte is ModRM where the opcode has
    one, and 0 where code ends.
    """

    prefixes: bytes
    opcode: int
    modrm: int

    @property
    def group(self) -> int:
        """What ModRM adds to the opcode, as the ``/digit`` of a manual."""
        return self.modrm >> 3 & 7

    @property
    def in_memory(self) -> bool:
        """Whether the operand that ModRM names is in memory."""
        return self.modrm < _REGISTER


def decode(code: bytes) -> Instruction | None:
    """Return the instruction that some bytes begin with; None where they end too early."""
    at = 0
    while at < len(code) and code[at] in PREFIXES:
        at += 1
    opcode = code[at : at + 1]
    if opcode == bytes([_ESCAPE]):
        opcode = code[at : at + 2]
        if len(opcode) == 1:
            return None
    if not opcode:
        return None
    modrm = code[at + len(opcode) : at + len(opcode) + 1]
    return Instruction(code[:at], int.from_bytes(opcode, "big"), modrm[0] if modrm else 0)
