"""Restricted files without a file system, and a notifier that counts."""

from collections.abc import Iterator
from typing import final

import pytest

from restrictedmem.abi.memory import FallocMode
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import pgoff_t

KEEP = int(FallocMode.KEEP_SIZE)


def new_file(api: Api = Api.V10, limit: int | None = None) -> RestrictedFile:
    return RestrictedFile(make(api.value), MemfdBacking(limit=limit), Inode.make(0, 0))


@pytest.fixture
def file() -> Iterator[RestrictedFile]:
    made = new_file()
    yield made
    made.put()


@final
class Counting:
    """Counts what a notifier hears."""

    def __init__(self) -> None:
        self.started = 0
        self.ended = 0

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.started += 1

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.ended += 1

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("no page was lost")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0
