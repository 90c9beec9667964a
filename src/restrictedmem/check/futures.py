"""Futures: the accesses that actors may still make, as far as they are known.

A search makes some actors wait on the ground of these (``explorer``).
"""

from collections.abc import Iterator, Sequence, Set
from typing import TypeAlias, final

from restrictedmem.check.control import COMMUTE, OWNERS, Actor, Names, Operation

#: An actor and one of its pasts.
Past: TypeAlias = tuple[int, int]
#: An actor, an object, whether the operation commutes with others of its kind, whether
#: ``Program.check`` may see it, and the locks that the actor holds.
_Access: TypeAlias = tuple[int, int, bool, bool, frozenset[int]]


def conflict(one: Operation | None, other: Operation | None) -> bool:
    """Return whether the order of two operations matters.

    It does if they are to the same object, and not both of a kind that commutes.
    """
    return (
        one is not None
        and other is not None
        and one[1] == other[1]
        and not (one[0] in COMMUTE and other[0] in COMMUTE)
    )


def _meet(one: _Access, other: _Access) -> bool:
    """Return whether two actors can be at two accesses at once, and their order matters."""
    if one[0] == other[0] or not one[4].isdisjoint(other[4]):
        return False
    return (one[1] == other[1] and not (one[2] and other[2])) or (one[3] and other[3])


@final
class Futures:
    """The accesses that may follow each past of an actor.

    A set of accesses is an integer with one bit for each access.
    """

    def __init__(self, names: Names) -> None:
        """Know nothing yet."""
        self._names = names
        #: The bit of each known access.
        self._bits: dict[_Access, int] = {}
        #: By this bit: the set of accesses that it may meet. An actor that has ended meets nothing.
        self._meets: dict[int, int] = {0: 0}
        #: By past: the next access, 0 if there is none (``_next``); its mutex, if only the owner
        #: can do this access (``_owned``); the set of all accesses from there on (``_all``); the
        #: pasts before (``_before``).
        self._next: dict[Past, int] = {}
        self._owned: dict[Past, int] = {}
        self._all: dict[Past, int] = {}
        self._before: dict[Past, set[Past]] = {}
        #: By past: accesses that the search relied upon to meet nothing in its future
        #: (``_relied``); pasts for which that was wrong (``wrong``).
        self._relied: dict[Past, int] = {}
        self.wrong: set[Past] = set()

    def see(self, actor: Actor, past: int | None) -> None:
        """Record what an actor is about to do, and the past before its last step, if any."""
        here = actor.index, actor.history
        if here not in self._all:
            self._next[here] = self._all[here] = (
                0 if actor.pending is None else self._bit(actor, actor.pending)
            )
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

    def _bit(self, actor: Actor, pending: Operation) -> int:
        verb, place, _ = pending
        access = actor.index, place, verb in COMMUTE, self._names.visible(pending), actor.held
        bit = self._bits.get(access)
        if bit is None:
            met = [other for known, other in self._bits.items() if _meet(access, known)]
            bit = self._bits[access] = 1 << len(self._bits)
            self._meets[bit] = sum(met)
            for other in met:
                self._meets[other] |= bit
        return bit

    def _grow(self, past: Past, accesses: int) -> None:
        """Add accesses to the future of a past and to the futures of all pasts before it."""
        todo = [past]
        while todo:
            past = todo.pop()
            new = accesses & ~self._all[past]
            if new:
                self._all[past] |= new
                relied = self._relied.get(past, 0)
                if any(self._meets[access] & relied for access in _bits(new)):
                    self.wrong.add(past)
                todo += self._before.get(past, ())

    def fewest(self, pasts: Sequence[Past], enabled: Sequence[int]) -> Set[int]:
        """Return a persistent set (Godefroid, 1996, definition 4.1).

        No step that the other actors may do before one of the set moves meets a next step of the
        set. Of the sets that grow from one enabled actor (``_closure``), this is one with the
        fewest enabled actors.
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
        """Return whether nothing that other actors may do meets an actor's next step."""
        met = self._met_by_next(pasts[index])
        return not any(met & self._all[past] for past in pasts if past[0] != index)

    def _met_by_next(self, past: Past) -> int:
        if past in self._owned and self._owned[past] not in self._names.tried:
            # Only a mutex's owner can do this, and nobody looks at it.
            return 0
        return self._meets[self._next[past]]

    def rely(self, pasts: Sequence[Past], group: Set[int]) -> None:
        """Remember that the search relies on a group's next steps to meet no other future."""
        accesses = 0
        for index in group:
            accesses |= self._next[pasts[index]]
        for past in pasts:
            if past[0] not in group:
                self._relied[past] = self._relied.get(past, 0) | accesses


def _closure(first: int, meets: Sequence[int], coming: Sequence[int]) -> set[int]:
    """Return the least set of actors that has ``first`` and no conflict with the others.

    Nothing in the future of an actor outside the set meets the next step of an actor in it.
    """
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
        yield lowest
        number ^= lowest
