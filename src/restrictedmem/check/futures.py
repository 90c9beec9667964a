"""What actors may still do, as far as is known: the ground on which a search leaves some of them waiting (``explorer``)."""

from collections.abc import Iterator, Sequence, Set
from typing import Final, TypeAlias, final

from restrictedmem.check.control import COMMUTE, OWNERS, Actor, Names, Operation

#: An actor and a past of its own.
Past: TypeAlias = tuple[int, int]
#: An actor, an object, whether what it does to it commutes with its like, whether ``Program.check``
#: may see it, and the locks it holds.
_Access: TypeAlias = tuple[int, int, bool, bool, frozenset[int]]
_NONE: Final = -1


def conflict(one: Operation | None, other: Operation | None) -> bool:
    """Say whether the order of two operations matters: same object, and not both of a kind that commutes."""
    return (
        one is not None
        and other is not None
        and one[1] == other[1]
        and not (one[0] in COMMUTE and other[0] in COMMUTE)
    )


def _meet(one: _Access, other: _Access) -> bool:
    """Say whether two actors may come to two accesses at the same moment, and their order matters."""
    if one[0] == other[0] or not one[4].isdisjoint(other[4]):
        return False
    return (one[1] == other[1] and not (one[2] and other[2])) or (one[3] and other[3])


@final
class Futures:
    """For each past of an actor, which accesses may follow; sets of accesses are the bits of an integer."""

    def __init__(self, names: Names) -> None:
        """Know nothing yet."""
        self._names = names
        self._numbers: dict[_Access, int] = {}
        self._accesses: list[_Access] = []
        #: By access: those that it may meet.
        self._meets: list[int] = []
        #: By past: the next access; the mutex it is done to if the owner alone can do it; all
        #: accesses from there on; the pasts before.
        self._next: dict[Past, int] = {}
        self._owned: dict[Past, int] = {}
        self._all: dict[Past, int] = {}
        self._before: dict[Past, set[Past]] = {}
        #: By past: accesses that were relied upon to meet nothing in its future; and pasts for
        #: which that was wrong.
        self._relied: dict[Past, int] = {}
        self.wrong: set[Past] = set()

    @property
    def known(self) -> int:
        """How many steps from one past to another are known."""
        return sum(map(len, self._before.values()))

    def see(self, actor: Actor, past: int | None) -> None:
        """Take note of what an actor is about to do, after a past of its own if there is one."""
        here = actor.index, actor.history
        if here not in self._all:
            number = self._next[here] = (
                _NONE if actor.pending is None else self._number(actor, actor.pending)
            )
            self._all[here] = 0 if number == _NONE else 1 << number
            if (
                actor.pending is not None
                and actor.pending[0] in OWNERS
                and actor.pending[1] in actor.held
            ):
                self._owned[here] = actor.pending[1]
        if past is not None:
            before = actor.index, past
            found = self._before.setdefault(here, set())
            if before not in found:
                found.add(before)
                self._grow(before, self._all[here])

    def _number(self, actor: Actor, pending: Operation) -> int:
        verb, place, _ = pending
        access = actor.index, place, verb in COMMUTE, self._names.visible(pending), actor.held
        number = self._numbers.setdefault(access, len(self._numbers))
        if number == len(self._accesses):
            met = [other for other, known in enumerate(self._accesses) if _meet(access, known)]
            self._accesses.append(access)
            self._meets.append(sum(1 << other for other in met))
            for other in met:
                self._meets[other] |= 1 << number
        return number

    def _grow(self, past: Past, accesses: int) -> None:
        """Add accesses to a past's future and to those of all before it."""
        todo = [past]
        while todo:
            past = todo.pop()
            new = accesses & ~self._all[past]
            if new:
                self._all[past] |= new
                relied = self._relied.get(past, 0)
                if any(self._meets[number] & relied for number in _bits(new)):
                    self.wrong.add(past)
                todo += self._before.get(past, ())

    def fewest(self, pasts: Sequence[Past], enabled: Sequence[int]) -> Set[int]:
        """Return a persistent set (Godefroid, 1996, definition 4.1) with as few of the enabled actors as there are in one.

        Whatever the others do before one of the set moves meets no next step of the set.
        """
        meets = [self._met_by_next(past) for past in pasts]
        coming = [self._all[past] for past in pasts]
        best = _closure(enabled[0], meets, coming)
        for first in enabled[1:]:
            if len(best) == 1:
                break
            best = min(
                best,
                _closure(first, meets, coming),
                key=lambda group: len(group.intersection(enabled)),
            )
        return best

    def alone(self, pasts: Sequence[Past], index: int) -> bool:
        """Say whether nothing that others may do meets an actor's next step."""
        met = self._met_by_next(pasts[index])
        return not any(met & self._all[past] for past in pasts if past[0] != index)

    def _met_by_next(self, past: Past) -> int:
        number = self._next[past]
        if number == _NONE or (past in self._owned and self._owned[past] not in self._names.tried):
            # Nothing, or what an owner alone does to its mutex, and nobody looks at.
            return 0
        return self._meets[number]

    def rely(self, pasts: Sequence[Past], group: Set[int]) -> None:
        """Remember that what a group does next is said to meet nothing in the others' futures."""
        accesses = 0
        for index in group:
            accesses |= 1 << max(0, self._next[pasts[index]])
        for past in pasts:
            if past[0] not in group and self._relied.get(past, 0) | accesses != self._relied.get(
                past
            ):
                self._relied[past] = self._relied.get(past, 0) | accesses


def _closure(first: int, meets: Sequence[int], coming: Sequence[int]) -> set[int]:
    """Return the least set of actors with ``first`` such that nothing in another's future meets what one in it does next."""
    found, todo = {first}, [first]
    while todo:
        met = meets[todo.pop()]
        for index, future in enumerate(coming):
            if index not in found and met & future:
                found.add(index)
                todo.append(index)
    return found


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
