"""Operands at random: registers, values, and addresses that are known when the program is made."""

from dataclasses import dataclass, field
from random import Random
from typing import Final

from . import places
from .x86 import HIGH_BYTES, RAX, RBX, RCX, RDX, RSP, SEGMENTS, Mem

_MASK: Final = (1 << 64) - 1
_BORDERS: Final = tuple(
    value & _MASK
    for bits in (8, 16, 32, 64)
    for value in ((1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1, 1 << bits)
)
_VALUES: Final = (0, 1, 2, _MASK, _MASK - 1, 0x55AA, 0x1010_1010_1010_1010, *_BORDERS)
#: Registers that no instruction needs by its nature.
_RESERVABLE: Final = (RBX, 5, 8, 9, 10, 11, 12, 13, 14, 15)
_HIGH_OF: Final = dict(zip(HIGH_BYTES, (RAX, RCX, RDX, RBX), strict=True))


@dataclass
class Dice:
    """One program's source of chance, its registers, and the pages that it uses.

    Four registers keep their values, so that addresses made of them are known. ``near`` is an
    address in the data. ``far`` is any address, perhaps with 32 random upper bits. ``index`` is
    small, and ``counter`` is a loop's counter.
    """

    random: Random
    pages: tuple[int, ...]
    near: int = 0
    far: int = 0
    index: int = 0
    counter: int = 0
    values: dict[int, int] = field(default_factory=dict[int, int])
    writable: tuple[int, ...] = ()

    @classmethod
    def of(cls, dice: Random, pages: tuple[int, ...]) -> "Dice":
        made = cls(dice, pages)
        made.near, made.far, made.index, made.counter = reserved = dice.sample(_RESERVABLE, 4)
        data = places.address(places.DATA.start)
        made.values = {
            made.near: data + dice.randrange(len(places.DATA) * places.PAGE),
            made.far: data
            + dice.choice((dice.randrange(-(1 << 30), 1 << 30), dice.getrandbits(32) << 32)),
            made.index: dice.choice((0, 1, 2, 8, -1 & _MASK, -8 & _MASK, dice.randrange(4096))),
            # Where a jump leads past the loop's beginning, it ends.
            made.counter: 1,
        }
        made.writable = tuple(
            number for number in range(16) if number not in reserved and number != RSP
        )
        return made

    def one_in(self, count: int) -> bool:
        return not self.random.randrange(count)

    def value(self, size: int = 64) -> int:
        """Return a number of some bits, one time in two one of those where arithmetic changes."""
        dice = self.random
        found = (
            dice.choice(_VALUES) + dice.randrange(-1, 2)
            if dice.random() < 0.5
            else dice.getrandbits(64)
        )
        return found & (1 << size) - 1

    def target_register(self, size: int = 64) -> int:
        """Return a register that may be written."""
        if size == 8 and self.one_in(4):
            return self.random.choice(
                [high for high, low in _HIGH_OF.items() if low in self.writable]
            )
        return self.random.choice(self.writable)

    def source_register(self, size: int = 64) -> int:
        """Return any register."""
        return (
            self.random.choice(HIGH_BYTES)
            if size == 8 and self.one_in(5)
            else self.random.randrange(16)
        )

    def target(self, size: int) -> int | Mem:
        return self.target_register(size) if self.random.random() < 0.5 else self.memory(size)

    def source(self, size: int) -> int | Mem:
        return self.source_register(size) if self.random.random() < 0.5 else self.memory(size)

    def memory(self, size: int) -> Mem:
        """Return an operand in one of the program's pages.

        Half of them are at or across a page border.
        """
        return self.mem_at(self.address(size // 8))

    def address(self, length: int) -> int:
        dice = self.random
        page = dice.choice(self.pages)
        start = places.address(page)
        if dice.random() < 0.4 and page > places.DATA.start:
            return start - dice.randrange(length + 1)
        offset = dice.randrange(places.PAGE - length + 1)
        return start + (offset & -length if dice.random() < 0.5 else offset)

    def mem_at(self, address: int) -> Mem:
        """Return some way to write an address."""
        dice = self.random
        segment = dice.choice(tuple(SEGMENTS)) if self.one_in(8) else ""
        base = dice.choice((self.near, self.near, self.far, None))
        index = self.index if dice.random() < 0.4 else None
        scale = dice.randrange(4) if index is not None else 0
        narrow = self.one_in(8) or (base == self.far and self.values[self.far] >> 32 != 0)
        value = (0 if base is None else self.values[base]) + (
            0 if index is None else self.values[index] << scale
        )
        bits = 32 if narrow else 64
        disp = (address - value) & (1 << bits) - 1
        disp -= disp >> bits - 1 << bits
        if -(1 << 31) <= disp < 1 << 31 and not self.one_in(8):
            return Mem(address, base, index, scale, disp, segment, narrow)
        return Mem(address, disp=address, segment=segment, narrow=narrow, rip=self.one_in(2))
