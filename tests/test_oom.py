"""A service's oom_score_adj (``service.oom``), by the memory of its files."""

import os
from errno import ENOSPC
from pathlib import Path
from typing import final

import pytest

from outcomes import Errno, outcome
from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.service.oom import OomScore
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.units import pgoff_t


@final
class Consumer:
    """A notifier that nothing happens to."""

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        raise AssertionError

    invalidate_end = invalidate_start

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        raise AssertionError


@pytest.mark.parametrize("least", [0, -500, 300])
def test_it_follows_what_is_held(tmp_path: Path, least: int) -> None:
    path = tmp_path / "oom_score_adj"
    path.write_text(f"{least:5}", encoding="ascii")

    def after(pages: int) -> int:
        path.write_bytes(b"     ")
        score.account(pages * PAGE)
        return int(path.read_text(encoding="ascii"))

    with OwnedFd(os.open(path, os.O_RDWR)) as file:
        score = OomScore(file, 1000 * PAGE)
        assert after(100) == least + 100
        assert after(50) == least + 150
        assert after(-149) == least + 1
        # It is not above 1000, and what was above it is not forgotten.
        assert after(10**9) == 1000
        assert after(-(10**9)) == least + 1


def test_what_cannot_be_written_is_no_owners_trouble(tmp_path: Path) -> None:
    path = tmp_path / "oom_score_adj"
    path.write_text("0", encoding="ascii")
    with OwnedFd(os.open(path, os.O_RDONLY)) as file:
        OomScore(file, PAGE).account(PAGE)


def test_a_file_tells_what_it_holds() -> None:
    held: list[int] = []
    file = RestrictedFile(make("v10"), MemfdBacking(limit=16 * PAGE), Inode.make(0, 0), held.append)

    def told() -> list[int]:
        found = [change // PAGE for change in held if change]
        held.clear()
        return found

    file.fallocate(0, 0, 4 * PAGE)
    # Before it is allocated.
    assert told() == [4]
    file.fallocate(0, 0, 6 * PAGE)
    assert told() == [6, -4]
    file.fallocate(memory.PUNCH, 0, PAGE)
    assert told() == [-1]
    assert outcome(lambda: file.fallocate(0, 0, 99 * PAGE)) == Errno(ENOSPC)
    assert told() == [99, -99]
    # A consumer allocates, and goes.
    consumer = Consumer()
    file.register_notifier(consumer)
    os.posix_fallocate(file.backing.fileno(), 8 * PAGE, 2 * PAGE)
    assert told() == []
    file.unregister_notifier(consumer)
    assert told() == [2]
    file.put()
    assert told() == [-7]
