"""What a file tells of the bytes that it holds (``RestrictedFile``)."""

import pytest

from restrictedmem.abi.memory import PUNCH
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import PAGE_SIZE


def test_changes_add_up_to_what_the_file_holds() -> None:
    told: list[int] = []
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0), told.append)
    for mode, first, count, held in (
        (0, 0, 3, 3),
        (0, 2, 4, 6),
        (0, 0, 2, 6),
        (PUNCH, 1, 3, 3),
        (PUNCH, 0, 9, 0),
        (0, 0, 1, 1),
    ):
        file.fallocate(mode, first * PAGE_SIZE, count * PAGE_SIZE)
        assert sum(told) == held * PAGE_SIZE
    file.put()
    assert sum(told) == 0


def test_an_allocation_counts_before_it_is_made() -> None:
    """The service has to be the OOM killer's choice while it takes the memory."""
    told: list[int] = []
    file = RestrictedFile(make("v10"), MemfdBacking(limit=0), Inode.make(0, 0), told.append)
    with pytest.raises(OSError, match="fallocate"):
        file.fallocate(0, 0, 5 * PAGE_SIZE)
    assert told == [5 * PAGE_SIZE, -5 * PAGE_SIZE]
    file.put()
