"""Which client's uid has which uid for its services (``service.uids``)."""

import os
import subprocess

import pytest

from restrictedmem.service.uids import Uids
from waiting import PATIENCE

#: Uids that nobody else has, other copies of the tests included.
FIRST = 3_500_000_000 + 4 * os.getpid()


def test_another_client_gets_one_that_nobody_had() -> None:
    uids = Uids(range(FIRST, FIRST + 3))
    assert uids.give(3, ()) == FIRST
    uids.rest(3)
    # It would begin to look there, too.
    assert uids.give(6, ()) == FIRST + 1
    assert uids.give(3, {6}) == FIRST
    assert uids.give(9, {3, 6}) == FIRST + 2
    assert uids.give(12, {3, 6, 9}) is None


def test_what_was_unused_the_longest_is_given_away_first() -> None:
    uids = Uids(range(FIRST, FIRST + 3))
    given = [uids.give(client, ()) for client in (0, 1, 2)]
    assert given == [FIRST, FIRST + 1, FIRST + 2]
    for client in (1, 0):
        uids.rest(client)
    assert uids.give(3, {2}) == FIRST + 1
    assert uids.give(4, {2, 3}) == FIRST
    # These clients have lost their uids.
    assert uids.give(1, {2, 3, 4}) is None


@pytest.mark.requires("root")
def test_one_that_has_processes_is_not_given() -> None:
    sleeping = subprocess.Popen(["sleep", "1000"], user=FIRST)
    try:
        assert os.stat(f"/proc/{sleeping.pid}").st_uid == FIRST
        uids = Uids(range(FIRST, FIRST + 2))
        assert uids.give(0, ()) == FIRST + 1
        assert uids.give(1, {0}) is None
    finally:
        sleeping.kill()
        sleeping.wait(PATIENCE)
    assert uids.give(1, {0}) == FIRST
