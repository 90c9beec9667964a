"""Tokens and files (``service.tokens``).

Files are looked at in the thread that serves all owners.
"""

from errno import EACCES

import pytest

from outcomes import Errno, outcome
from restrictedmem.fs.filesystem import FileSystem
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.service import status
from restrictedmem.service.tokens import Tokens
from restrictedmem.units import PAGE_SIZE as PAGE


@pytest.fixture
def file() -> RestrictedFile:
    found = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    found.fallocate(0, 0, PAGE)
    return found


def test_an_unused_token_holds_no_file(file: RestrictedFile) -> None:
    tokens = Tokens()
    first, second = (tokens.issue([]) for _ in range(2))
    for token in (first, second):
        tokens.prove(token, 1, file)
    assert tokens.take(first) == (1, file)
    file.put()
    # The consumer that took the page still has it.
    assert file.backing.resident() == PAGE
    file.put()
    assert file.backing.resident() == 0
    assert outcome(lambda: tokens.take(second)) == Errno(EACCES)


def test_a_look_at_files_holds_none(file: RestrictedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may be closed meanwhile."""
    filesystem = FileSystem("v10", max_files=1)

    def close(_: MemfdBacking) -> int:
        file.put()
        assert file._references == 0
        return 0

    monkeypatch.setattr(filesystem, "files", lambda: {7: file})
    monkeypatch.setattr(MemfdBacking, "resident", close)
    assert status.of_files(filesystem, None)["descriptors"] == [
        {"ino": 7, "size": PAGE, "resident": 0, "notifiers": 0}
    ]
