"""A guest program of the fuzzer: pieces of machine code in items, and its owner's actions.

The items can be left out one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from restrictedmem.protocol import guest_abi

from . import places
from .x86 import STATUS, Effect

#: Hypercalls: that the program is at its end, and from which number on its owner does something
#: (``Program.actions``).
DONE: Final = 999
ACTIONS: Final = 1000
_NO_EFFECT: Final = Effect()
#: Where pieces and items end in a ``Label`` that means "the next item that is still there".
_CALL: Final = 5


@dataclass(frozen=True, slots=True)
class Label:
    """A place in the code: ``piece`` of an item by number, and an offset in bytes.

    If that item is gone, the next one counts.
    """

    item: int
    piece: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Fix:
    """A relative displacement of ``size`` bytes in a piece, to an address or a label."""

    at: int
    size: int
    target: int | Label


@dataclass(frozen=True, slots=True)
class Piece:
    """One instruction."""

    text: str
    code: bytes
    effect: Effect = _NO_EFFECT
    fix: Fix | None = None
    jump: Label | None = None
    """Where it may go instead of the next instruction."""
    goes_on: bool = True
    """Whether it may go to the next instruction."""
    partial: int = 0
    """Flags that are undefined after a fault half way (REPE CMPS and others; SDM volume 2, REP)."""
    narrow: bool = False
    """Whether this is a string instruction with prefix 67.

    When it stops half way, the upper halves of RCX, RSI and RDI may be their old values or 0.
    """


@dataclass(frozen=True, slots=True)
class Item:
    """Pieces that make sense only together."""

    number: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Action:
    """The owner's action at a hypercall: ``convert``, ``punch`` or ``write``, for some pages.

    The pages are given by their numbers.
    """

    kind: str
    pages: tuple[int, ...]
    private: bool = False
    content: int = 0

    def __str__(self) -> str:
        detail = {
            "convert": " private" if self.private else " shared",
            "write": f" content {self.content}",
        }
        return f"{self.kind} {', '.join(map(str, self.pages))}{detail.get(self.kind, '')}"


@dataclass(frozen=True)
class Program:
    """A program and all that its run depends on."""

    seed: int
    items: tuple[Item, ...]
    #: In the order of their numbers, but for rsp; and the status flags and DF.
    registers: tuple[int, ...]
    flags: int
    #: Bytes between the first instruction and the border of two pages.
    before_border: int
    #: Pages whose attribute is private, and private pages that hold nothing yet.
    private: frozenset[int]
    punched: frozenset[int]
    #: By number of the hypercall, from ``ACTIONS`` on.
    actions: tuple[Action, ...] = ()
    #: Memory faults that are not mended, by their number.
    unmended: frozenset[int] = frozenset()
    #: Whether spare pages are punched and converted, and the vCPU is interrupted, all the while.
    storm: bool = False
    content: int = 0
    answers: tuple[int, ...] = field(default=(0,))

    @property
    def start(self) -> int:
        """Return the first instruction's address."""
        return places.address(places.TAIL_SLOT.start) - self.before_border

    @cached_property
    def lines(self) -> list["Line"]:
        """Return the instructions with their addresses."""
        return lay_out(self)


@dataclass(frozen=True, slots=True)
class Line:
    """A piece where it lies."""

    address: int
    piece: Piece
    code: bytes
    #: Status flags that are not defined before it.
    undefined: int


def end_pieces() -> tuple[Piece, ...]:
    """Return what tells the owner that the program is at its end."""
    return (
        # Where it can be compared.
        Piece("push rax", b"\x50"),
        Piece(f"mov eax, {DONE}", b"\xb8" + DONE.to_bytes(4, "little")),
        hypercall(),
        Piece("hlt", b"\xf4", goes_on=False),
    )


def hypercall() -> Piece:
    """Return a call of the hypercall page."""
    return Piece("call HYPERCALL_PAGE", b"\xe8" + bytes(4), fix=Fix(1, 4, guest_abi.HYPERCALL_PAGE))


def lay_out(program: Program) -> list[Line]:
    """Return the program's instructions where they lie, with every displacement filled in."""
    pieces, places_of = _flatten(program.items)
    addresses = [program.start]
    for piece in pieces:
        addresses.append(addresses[-1] + len(piece.code))
    undefined = _undefined(pieces, places_of)
    lines: list[Line] = []
    for index, piece in enumerate(pieces):
        code = piece.code
        if piece.fix is not None:
            target = piece.fix.target
            if isinstance(target, Label):
                target = addresses[_index(places_of, target)] + target.offset
            value = target - addresses[index + 1]
            code = _filled(code, piece.fix, value)
        lines.append(Line(addresses[index], piece, code, undefined[index]))
    return lines


def _filled(code: bytes, fix: Fix, value: int) -> bytes:
    filled = value.to_bytes(fix.size, "little", signed=True)
    return code[: fix.at] + filled + code[fix.at + fix.size :]


def _flatten(items: Sequence[Item]) -> tuple[list[Piece], dict[int, int]]:
    """Return all pieces, the end's too, and where each item begins; behind the last is the end."""
    pieces: list[Piece] = []
    begins: dict[int, int] = {}
    for item in items:
        begins[item.number] = len(pieces)
        pieces += item.pieces
    begins[1 << 32] = len(pieces)
    return [*pieces, *end_pieces()], begins


def _index(begins: dict[int, int], label: Label) -> int:
    if label.item in begins:
        return begins[label.item] + label.piece
    return begins[min(number for number in begins if number > label.item)]


def _undefined(pieces: Sequence[Piece], begins: dict[int, int]) -> list[int]:
    """Return the flags that may be undefined before each piece, however it was reached."""
    found = [0] * (len(pieces) + 1)
    changed = True
    while changed:
        changed = False
        for index, piece in enumerate(pieces):
            after = found[index] & ~piece.effect.defines | piece.effect.undefines
            successors = [index + 1] * piece.goes_on
            if piece.jump is not None:
                successors.append(_index(begins, piece.jump))
            for successor in successors:
                if after & ~found[successor]:
                    found[successor] |= after
                    changed = changed or successor <= index
    return found


def reads_undefined(program: Program) -> Iterator[tuple[int, int]]:
    """Yield item and piece of each instruction that reads a flag which may be undefined."""
    pieces, begins = _flatten(program.items)
    undefined = _undefined(pieces, begins)
    for item in program.items:
        for place, piece in enumerate(item.pieces):
            if piece.effect.reads & undefined[begins[item.number] + place]:
                yield item.number, place


def with_flags_defined(program: Program, define: Piece) -> Program:
    """Return the program with ``define`` before each item that reads a flag which may be undefined.

    The code ``define`` is to define all flags. Inside an item, no instruction may read an undefined
    flag, except one that was undefined before the item.
    """
    assert define.effect.defines == STATUS
    while True:
        numbers = {number for number, _ in reads_undefined(program)}
        if not numbers:
            return program
        items = tuple(
            replace(item, pieces=(define, *_moved(item))) if item.number in numbers else item
            for item in program.items
        )
        program = replace(program, items=items)


def _moved(item: Item) -> Iterator[Piece]:
    """Yield an item's pieces with the labels in itself one further."""
    for piece in item.pieces:
        jump, fix = piece.jump, piece.fix
        if jump is not None and jump.item == item.number:
            jump = replace(jump, piece=jump.piece + 1)
        if fix is not None and isinstance(fix.target, Label) and fix.target.item == item.number:
            fix = replace(fix, target=replace(fix.target, piece=fix.target.piece + 1))
        yield replace(piece, jump=jump, fix=fix)
