"""A service, spawner or engine killed at any moment: no call hangs, every later one is refused, and nothing is left.

A few rounds here; ``scripts/kill-test`` plays a thousand of the same.
"""

from dataclasses import dataclass

import pytest

from killing import GUEST_SIZE, VICTIMS, Outcome, Round, play, shared_memory, stuck_tasks

pytestmark = [pytest.mark.requires("fuse", "root"), pytest.mark.timeout(300)]

ROUNDS = 40


@dataclass(frozen=True)
class _Played:
    outcomes: list[Outcome]
    shared_memory_growth: int


@pytest.fixture(scope="module")
def played() -> _Played:
    before = shared_memory()
    outcomes = [play(Round.of(seed)) for seed in range(ROUNDS)]
    return _Played(outcomes, shared_memory() - before)


def test_every_round_ends_as_it_should(played: _Played) -> None:
    assert [outcome for outcome in played.outcomes if outcome.faults] == []


def test_no_task_is_stuck(played: _Played) -> None:
    assert len(played.outcomes) == ROUNDS
    assert stuck_tasks() == []


def test_all_kinds_of_victims_were_hit_while_in_use(played: _Played) -> None:
    assert {(outcome.round.victim, outcome.round.guest) for outcome in played.outcomes} == {
        (victim, guest) for guest, victims in VICTIMS.items() for victim in victims
    }
    assert sum(outcome.calls > 10 for outcome in played.outcomes) > ROUNDS / 2


def test_memory_comes_back(played: _Played) -> None:
    # A guest touches all of its memory: kept, so many of them would show beside what else happens on the machine.
    bound = sum(outcome.round.guest for outcome in played.outcomes)
    assert played.shared_memory_growth < bound * GUEST_SIZE / 2
