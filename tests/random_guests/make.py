"""Programs from seeds."""

import random
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from typing import Final, TypeVar

from . import endings, places, units
from .avoided import is_avoided
from .forms import FORMS
from .operands import Dice
from .pieces import Pieces, define_flags, load
from .program import Action, Fix, Item, Label, Piece, Program, with_flags_defined
from .x86 import CF, DF, STATUS, Effect, UnencodableError

_T = TypeVar("_T")
#: Items of a program, and how often a loop is gone through.
_ITEMS: Final = (8, 48)
_TURNS: Final = (2, 3, 5)
#: In a storm, long enough for kicks to meet it inside blocks: some 50 ms on the software engine,
#: which executes some instructions alone, or translates them anew each time.
_STORM_TURNS: Final = (4000, 20000)
_SLOW_TURNS: Final = (100, 400)
_SLOW: Final = re.compile(r"mov byte \[item|(lock )?cmpxchg(8|16)b")
_CONTENTS: Final = 64
#: How many of all programs run in a storm, and how many have ports.
_STORMS: Final = 0.06
_PORTS: Final = 0.1


def make(seed: int) -> Program:
    """Make the program of a seed."""
    dice = random.Random(seed)
    storm = dice.random() < _STORMS
    # Ports are only for code that its owner shares: all of it before the border.
    ports = not storm and dice.random() < _PORTS
    pages = tuple(
        sorted(
            set(
                dice.sample(places.DATA, dice.choice((1, 2, 3, 3, 5)), counts=_weights(storm=storm))
            )
        )
    )
    hands = Dice.of(dice, pages)
    actions = _actions(dice, pages, dice.choice((0, 0, 1, 2, 4)))
    items = _items(hands, actions, storm=storm, ports=ports)
    registers = [hands.values.get(number, hands.value()) for number in range(16)]
    registers[4] = places.address(places.STACK.start + 1) + dice.randrange(-64, 65) * dice.choice(
        (8, 8, 1)
    )
    length = sum(len(piece.code) for item in items for piece in item.pieces)
    program = Program(
        seed,
        items,
        tuple(registers),
        dice.getrandbits(12) & (STATUS | DF if dice.random() < 0.1 else STATUS),
        length + 64 if ports else dice.randrange(min(length, places.PAGE) + 1),
        _private(dice) - frozenset(places.CODE[:2] if ports else ()),
        _some(dice, [page for page in places.PRIVATE if page in places.DATA], 4),
        actions,
        _unmended(dice, items),
        storm,
        dice.randrange(_CONTENTS),
        tuple(hands.value() for _ in range(4)),
    )
    return with_flags_defined(program, define_flags(hands))


def content(number: int, page: int) -> bytes:
    """Return a program's page as it is at the start.

    The shared half of a page has its bits inverted.
    """
    return _PAGES[(number + 7 * page) % _CONTENTS]


def _weights(*, storm: bool) -> list[int]:
    """Return how often pages are used. MMIO and read-only memory are rarer: each access exits."""
    rare = {*places.ROM, *places.HOLE}
    return [(0 if storm else 1) if page in rare else 4 for page in places.DATA]


def _private(dice: random.Random) -> frozenset[int]:
    """Choose the halves that pages show at the start.

    If a page has none, the owner converts it first.
    """
    both = (
        [page for page in (*places.CODE[:2], *places.STACK) if dice.random() < 0.8]
        if dice.random() < 0.5
        else []
    )
    if not both and dice.random() < 0.7:
        both = [*places.CODE[:2], *places.STACK]
    data = [page for page in places.BOTH if dice.random() < 0.6]
    lone = [page for page in places.LONE if dice.random() < 0.8]
    window = [page for page in places.WINDOW if dice.random() < 0.2]
    tail = [page for page in places.TAIL_SLOT if dice.random() < 0.8]
    return frozenset((*both, *tail, *data, *lone, *window, places.HOLE[1]))


def _unmended(dice: random.Random, items: Sequence[Item]) -> frozenset[int]:
    """Choose memory faults that end the program; none if it has a PUSHF.

    A fault could come before the flags that PUSHF stored are reduced to those that are compared.
    """
    pushes = any(piece.text == "pushf" for item in items for piece in item.pieces)
    return (
        frozenset(dice.sample(range(8), 2)) if dice.random() < 0.2 and not pushes else frozenset()
    )


def _some(dice: random.Random, pages: Sequence[int], one_in: int) -> frozenset[int]:
    return frozenset(page for page in pages if not dice.randrange(one_in))


def _actions(dice: random.Random, pages: Sequence[int], count: int) -> tuple[Action, ...]:
    return tuple(_action(dice, pages) for _ in range(count))


def _action(dice: random.Random, pages: Sequence[int]) -> Action:
    used = [page for page in (*pages, *places.BOTH) if page not in (*places.ROM, *places.HOLE)]
    first = dice.choice(used)
    run = tuple(
        page for page in range(first, first + dice.choice((1, 1, 2, 4))) if page in places.DATA[:8]
    )
    match dice.randrange(5):
        case 0:
            return Action(
                "punch",
                tuple(page for page in run if page in places.PRIVATE) or (places.BOTH.start,),
            )
        case 1:
            return Action("write", run, content=dice.randrange(_CONTENTS))
        case 2:
            # The program itself is the same in both halves, or missing until its owner has been
            # asked.
            return Action("convert", (dice.choice(places.CODE),), bool(dice.randrange(2)))
        case _:
            return Action("convert", run, bool(dice.randrange(2)))


def _items(dice: Dice, actions: Sequence[Action], *, storm: bool, ports: bool) -> tuple[Item, ...]:
    """Return a program's items. In a storm they are one loop; else some have a loop inside."""
    items: list[Item] = []

    def add(make: Callable[[], Pieces]) -> None:
        items.append(Item(len(items), tuple(_pieces(make))))

    total = dice.random.randrange(*_ITEMS)
    acting = (
        {}
        if storm
        else dict(
            zip(
                sorted(dice.random.sample(range(total), len(actions))),
                range(len(actions)),
                strict=True,
            )
        )
    )
    loop = (
        (0, total)
        if storm
        else sorted(dice.random.sample(range(total), 2))
        if dice.one_in(3)
        else (total, total)
    )
    turns, head = dice.random.choice(_TURNS), 0
    for index in range(total):
        if index == loop[0]:
            add(lambda: [load(dice.counter, turns)])
            head = len(items)
            if storm:
                add(partial(units.count, dice))
        if index in acting:
            add(partial(units.act, acting[index]))
        if ports and dice.one_in(4):
            add(partial(units.port, dice))
        add(partial(_any_pieces, dice, len(items), storm=storm))
        if index == loop[1] - 1:
            add(partial(_loop_end, dice, head))
    if storm:
        items[0] = Item(0, (load(dice.counter, _storm_turns(dice, items)),))
    elif dice.one_in(4):
        add(partial(endings.ending, dice))
    return tuple(items)


def _storm_turns(dice: Dice, items: Sequence[Item]) -> int:
    """Return how often a storm's loop is gone through: about as long, whatever it has."""
    slow = any(_SLOW.match(piece.text) for item in items for piece in item.pieces)
    return dice.random.randrange(*(_SLOW_TURNS if slow else _STORM_TURNS))


def _loop_end(dice: Dice, head: int) -> Pieces:
    register = dice.counter
    rex = bytes([0x48 | register >> 3])
    count = Piece(
        "dec the loop's counter",
        rex + bytes([0xFF, 0xC8 | register & 7]),
        Effect(defines=STATUS & ~CF),
    )
    label = Label(head)
    return [
        count,
        Piece(f"jnz item {head}", b"\x0f\x85" + bytes(4), fix=Fix(2, 4, label), jump=label),
    ]


def _pieces(make: Callable[[], Pieces]) -> Pieces:
    """Make pieces that can be encoded, and that no engine is known to get wrong."""
    while True:
        with suppress(UnencodableError):
            pieces = make()
            if not any(is_avoided(piece.text) for piece in pieces):
                return pieces


def _any_pieces(dice: Dice, number: int, *, storm: bool) -> Pieces:
    """Return one item's pieces; without an exit of its own in a storm."""
    chance = dice.random.random()
    if chance < 0.1:
        return _weighted(dice.random, _UNITS)(dice)
    if chance < 0.2:
        return _weighted(dice.random, _JUMPS)(dice, number)
    if chance < 0.21 and not storm:
        return units.hypercalls(dice)
    return _weighted(dice.random, _FORMS)(dice)


def _table(pairs: Sequence[tuple[_T, int]]) -> tuple[list[_T], list[int]]:
    return [what for what, _ in pairs], [*accumulate(weight for _, weight in pairs)]


def _weighted(dice: random.Random, table: tuple[list[_T], list[int]]) -> _T:
    return dice.choices(table[0], cum_weights=table[1])[0]


_FORMS: Final[tuple[list[Callable[[Dice], Pieces]], list[int]]] = _table(FORMS)
_UNITS: Final = _table(units.UNITS)
_JUMPS: Final = _table(units.JUMPS)
_PAGES: Final = tuple(
    random.Random(number).randbytes(places.PAGE)
    if number % 4
    else bytes(random.Random(number).choices((0, 255, 1, 128), k=places.PAGE))
    for number in range(_CONTENTS)
)
