"""What a reduced search knows of the accesses to come, and whom it makes wait for whom."""

from typing import Any, Final

import pytest

from planting import stub
from restrictedmem.check.control import (
    CHANGES,
    COMMUTE,
    NOTIFIES,
    READS,
    RELEASES,
    TAKES,
    TAKES_READ,
    TOUCHES,
    WAITS,
    WRITES,
    Names,
    Operation,
)
from restrictedmem.check.futures import Futures, Past, conflict

#: Objects.
X, Y, Z, MUTEX = range(4)


def operation(verb: str, place: int) -> Operation:
    return verb, place, None


def known(
    *nexts: tuple[str, int] | None, held: tuple[int, ...] = (), names: Names | None = None
) -> tuple[Futures, list[Past]]:
    """Return the futures of actors that are about to do these things, and their pasts."""
    if names is None:
        names = Names()
        # The check looks at nothing that these tests change.
        names.watch(99)
    made = Futures(names)
    for index, pending in enumerate(nexts):
        made.see(actor(index, 1, pending, held), None)
    return made, [(index, 1) for index in range(len(nexts))]


def actor(
    index: int, history: int, pending: tuple[str, int] | None, held: tuple[int, ...] = ()
) -> Any:
    return stub(
        index=index,
        history=history,
        pending=pending and operation(*pending),
        held=frozenset(held),
    )


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (operation(READS, X), operation(WRITES, X), True),
        (operation(WRITES, X), operation(READS, X), True),
        (operation(WRITES, X), operation(WRITES, X), True),
        (operation(READS, X), operation(READS, X), False),
        (operation(READS, X), operation(TOUCHES, X), False),
        (operation(WRITES, X), operation(WRITES, Y), False),
        (None, operation(WRITES, X), False),
        (operation(WRITES, X), None, False),
    ],
)
def test_operations_conflict_over_one_object_unless_they_commute(
    one: Operation | None, other: Operation | None, found: bool
) -> None:
    assert conflict(one, other) is found


# Meeting.


@pytest.mark.parametrize(
    ("mine", "others", "alone"),
    [
        ((WRITES, X), (WRITES, X), False),
        ((WRITES, X), (READS, X), False),
        ((READS, X), (WRITES, X), False),
        ((READS, X), (READS, X), True),
        ((TAKES_READ, X), (TAKES_READ, X), True),
        ((WRITES, X), (WRITES, Y), True),
        ((WRITES, X), None, True),
        (None, (WRITES, X), True),
    ],
)
def test_an_actor_is_alone_if_no_other_meets_its_step(
    mine: tuple[str, int] | None, others: tuple[str, int] | None, alone: bool
) -> None:
    made, pasts = known(mine, others)
    assert made.alone(pasts, 0) is alone
    assert made.alone(pasts, 1) is alone


def test_a_common_lock_keeps_accesses_apart() -> None:
    for mine, others, alone in (
        ((MUTEX,), (MUTEX,), True),
        ((MUTEX,), (Z,), False),
        ((), (), False),
    ):
        made, _ = known()
        made.see(actor(0, 1, (WRITES, X), mine), None)
        made.see(actor(1, 1, (WRITES, X), others), None)
        assert made.alone([(0, 1), (1, 1)], 0) is alone


def test_what_the_check_may_see_meets_whatever_else_it_may_see() -> None:
    for watched, alone in ((set[int](), False), ({X, Y}, False), ({X}, True), ({Z}, True)):
        names = Names()
        for place in watched:
            names.watch(place)
        made, pasts = known((WRITES, X), (CHANGES, Y), (READS, Z), names=names)
        assert made.alone(pasts, 0) is made.alone(pasts, 1) is alone
        assert made.alone(pasts, 2)


@pytest.mark.parametrize("verb", [RELEASES, WAITS, NOTIFIES])
def test_only_the_owner_does_something_to_a_mutex_that_nobody_tries(verb: str) -> None:
    made, _ = known()
    made.see(actor(1, 1, (TAKES, MUTEX)), None)
    made.see(actor(0, 1, (verb, MUTEX), (MUTEX,)), None)
    pasts = [(0, 1), (1, 1)]
    assert made.alone(pasts, 0)
    assert not made.alone(pasts, 1)
    made._names.tried.add(MUTEX)
    assert not made.alone(pasts, 0)


@pytest.mark.parametrize(("verb", "held"), [(TAKES, (MUTEX,)), (RELEASES, (Z,)), (RELEASES, ())])
def test_another_meets_the_mutex(verb: str, held: tuple[int, ...]) -> None:
    made, _ = known()
    made.see(actor(0, 1, (verb, MUTEX), held), None)
    made.see(actor(1, 1, (TAKES, MUTEX)), None)
    assert not made.alone([(0, 1), (1, 1)], 0)


# Futures grow.


def test_a_later_step_is_part_of_each_future_before_it() -> None:
    made, _ = known((READS, X), (WRITES, Z))
    made.see(actor(0, 2, (READS, Y)), 1)
    made.see(actor(0, 3, (READS, Z)), 2)
    made.see(actor(0, 4, None), 3)
    found = [made.alone([(0, past), (1, 1)], 1) for past in (1, 2, 3, 4)]
    assert found == [False, False, False, True]
    # A new way to an old past.
    made.see(actor(0, 7, (READS, X)), None)
    assert made.alone([(0, 7), (1, 1)], 1)
    made.see(actor(0, 3, (READS, Z)), 7)
    assert not made.alone([(0, 7), (1, 1)], 1)


def test_a_loop_of_pasts_ends() -> None:
    made, _ = known((READS, X), (WRITES, Z))
    made.see(actor(0, 2, (READS, Y)), 1)
    made.see(actor(0, 1, (READS, X)), 2)
    made.see(actor(0, 3, (READS, Z)), 1)
    assert not made.alone([(0, 2), (1, 1)], 1)


def test_a_reliance_that_was_wrong_is_found_out() -> None:
    made, pasts = known((READS, X), (WRITES, Z), (WRITES, Y))
    made.rely(pasts, {1})
    assert made.wrong == set()
    # Y is no access that was relied upon.
    made.see(actor(0, 2, (READS, Y)), 1)
    assert made.wrong == set()
    made.see(actor(0, 3, (READS, Z)), 2)
    assert made.wrong == {(0, 1)}
    # An actor in the group is not relied upon, and neither is an actor that reads what it reads.
    made.wrong.clear()
    made.see(actor(1, 2, (WRITES, X)), 1)
    made.see(actor(2, 2, (WRITES, X)), 1)
    assert made.wrong == set()


def test_one_wrong_access_of_several_is_enough() -> None:
    made, pasts = known((READS, X), (WRITES, Z))
    made.rely(pasts, {1})
    made.see(actor(0, 8, (READS, Y)), None)
    made.see(actor(0, 9, (READS, Z)), 8)
    made.see(actor(0, 8, (READS, Y)), 1)
    assert made.wrong == {(0, 1)}


def test_an_actor_that_has_ended_is_in_nobodys_way() -> None:
    made, pasts = known((WRITES, X), (WRITES, X), None)
    made.see(actor(0, 2, FREE), None)
    pasts[0] = 0, 2
    assert made.alone(pasts, 1)
    assert made.fewest(pasts, [1]) == {1}


def test_reliances_add_up() -> None:
    made, pasts = known((READS, X), (WRITES, Y), (WRITES, Z))
    made.rely(pasts, {1})
    made.rely(pasts, {2})
    made.see(actor(0, 2, (READS, Y)), 1)
    assert made.wrong == {(0, 1)}
    made.wrong.clear()
    made.see(actor(0, 3, (READS, Z)), 2)
    assert made.wrong == {(0, 1)}


# Persistent sets.

FREE: Final = (WRITES, 50)


@pytest.mark.parametrize(
    ("nexts", "enabled", "found"),
    [
        # The first that is alone.
        (((WRITES, X), (WRITES, X), FREE), [0, 1, 2], {2}),
        ((FREE, (WRITES, X), (WRITES, X)), [0, 1, 2], {0}),
        (((WRITES, X), FREE, (WRITES, X)), [0, 1, 2], {1}),
        # Groups of two; the first of equal ones.
        (((WRITES, X), (WRITES, X), (WRITES, Y), (WRITES, Y)), [0, 1, 2, 3], {0, 1}),
        (((WRITES, X), (WRITES, Y), (WRITES, X), (WRITES, Y)), [1, 2], {1, 3}),
        # The smaller of two groups, whichever comes first.
        (((WRITES, X),) * 3 + ((WRITES, Y),) * 2, [0, 1, 2, 3, 4], {3, 4}),
        (((WRITES, Y),) * 2 + ((WRITES, X),) * 3, [0, 1, 2, 3, 4], {0, 1}),
        # Actors that cannot go on are in the set, and do not count.
        (((WRITES, X), (WRITES, X), (WRITES, Y), (WRITES, Y), (WRITES, Y)), [0, 1, 4], {2, 3, 4}),
    ],
)
def test_the_persistent_set_has_the_fewest_actors(
    nexts: tuple[tuple[str, int], ...], enabled: list[int], found: set[int]
) -> None:
    made, pasts = known(*nexts)
    assert made.fewest(pasts, enabled) == found


def test_a_persistent_set_is_closed() -> None:
    # 0 meets a later step of 1, the next step of 1 meets a later step of 2.
    made, pasts = known((WRITES, X), (WRITES, Y), (WRITES, 50), (WRITES, 51))
    made.see(actor(1, 2, (WRITES, X)), 1)
    made.see(actor(2, 2, (WRITES, Y)), 1)
    assert made.fewest(pasts, [0]) == {0, 1, 2}
    assert made.fewest(pasts, [1]) == {1, 2}
    assert made.fewest(pasts, [2]) == {2}


def test_operations_that_commute_do_so_with_each_other() -> None:
    assert {WRITES, CHANGES, TAKES, RELEASES}.isdisjoint(COMMUTE)
