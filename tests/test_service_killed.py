"""Processes of a service killed, stopped or frozen at any moment.

No call hangs, every later call is right, and nothing is left. This runs a few rounds;
``scripts/kill-test`` runs a thousand of the same.
"""

from collections import Counter

import pytest

from killing import KINDS, Act, Outcome, Round, play, stuck_tasks

pytestmark = [
    pytest.mark.requires("fuse", "root"),
    pytest.mark.timeout(300),
    pytest.mark.alone("everything has to be gone within a second"),
]

ROUNDS = 2 * len(KINDS)


AT_THE_START = {"killed at the start", "stopped at the start"}


def _done(outcomes: list[Outcome]) -> Counter[str]:
    return sum((outcome.done for outcome in outcomes), Counter[str]())


@pytest.fixture(scope="module")
def played() -> list[Outcome]:
    outcomes = [play(Round.of(seed)) for seed in range(ROUNDS)]
    # Whether a service still comes up then is chance.
    more = (seed for seed in range(ROUNDS, 100 * ROUNDS) if Round.of(seed).kind.victim == "start")
    while not _done(outcomes).keys() >= AT_THE_START:
        outcomes.append(play(Round.of(next(more))))
    return outcomes


def test_every_round_ends_as_it_should(played: list[Outcome]) -> None:
    assert [outcome for outcome in played if outcome.faults] == []


def test_no_task_is_stuck(played: list[Outcome]) -> None:
    assert len(played) >= ROUNDS
    assert stuck_tasks(played) == []


def test_all_kinds_of_rounds_did_what_they_are_for(played: list[Outcome]) -> None:
    done = _done(played)
    said = {"killed service", "killed spawner", "killed engine", "killed server", *AT_THE_START}
    said |= {"stopped service", "stopped spawner", "stopped engine", "stopped all"}
    said |= {f"ended the owner in {kind.victim}" for kind in KINDS if kind.act is Act.LAUNCH}
    assert said - done.keys() == set()
    # The freezer, or signals where there is none.
    assert done["froze all"] + done["stopped all"] == 4
    assert sum(
        count for what, count in done.items() if what.startswith("foreign descriptor")
    ) >= ROUNDS // len(KINDS)
    used = [outcome for outcome in played if outcome.round.kind.act is not Act.LAUNCH]
    assert sum(outcome.calls > 10 for outcome in used) > len(used) / 2
