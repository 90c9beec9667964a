"""The corpus of the fuzzing targets, replayed.

A mistake that was found once stays fixed, and each planted mistake is found.
"""

import pytest

from fuzz.planted import MISTAKES, Mistake, planted
from fuzz.targets import CORPUS, TARGETS, Target, inputs


def replay(target: Target, name: str) -> None:
    for path in inputs(name):
        target(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_of_the_corpus_is_found_wrong(name: str) -> None:
    replay(TARGETS[name], name)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [(name, mistake) for name, three in MISTAKES.items() for mistake in three],
    ids=str,
)
def test_the_corpus_finds_a_planted_mistake(name: str, mistake: Mistake) -> None:
    with planted(mistake), pytest.raises(Exception):  # noqa: B017  whatever a target fails with is a finding
        replay(TARGETS[name], name)


def test_each_target_has_a_corpus_and_three_mistakes() -> None:
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys() == MISTAKES.keys()
    assert all(len(three) == 3 for three in MISTAKES.values())
