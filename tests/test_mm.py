"""The shim, its backing and the pages a consumer takes: examples."""

import mmap
import os
from errno import EFAULT, EFBIG, EINTR, EINVAL, ENOSPC, EOPNOTSUPP, EPERM
from functools import partial

import pytest

from outcomes import Errno, outcome
from restrictedmem.abi.memory import PUNCH
from restrictedmem.fd import OwnedFd
from restrictedmem.mm import memfd
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE, PageRange, pgoff_t
from shim_files import KEEP, file, new_file

__all__ = ["file"]


def pages(first: int, end: int) -> PageRange:
    return PageRange(pgoff_t(first), pgoff_t(end))


# Size.


def test_the_size_is_set_once(file: RestrictedFile) -> None:
    assert outcome(lambda: file.ftruncate(1)) == Errno(EINVAL)
    for _ in range(2):
        file.ftruncate(0)
    assert outcome(lambda: file.ftruncate(MAX_FILE_BYTES + PAGE_SIZE)) == Errno(EFBIG)
    file.ftruncate(PAGE_SIZE)
    for length in (0, 1, PAGE_SIZE, 2 * PAGE_SIZE, MAX_FILE_BYTES + PAGE_SIZE):
        assert outcome(partial(file.ftruncate, length)) == Errno(EPERM), length
    assert file.size == PAGE_SIZE


def test_plain_fallocate_grows_a_size_that_was_fixed(file: RestrictedFile) -> None:
    file.ftruncate(PAGE_SIZE)
    file.fallocate(0, PAGE_SIZE, 100)
    assert (file.size, file.backing.resident()) == (PAGE_SIZE + 100, PAGE_SIZE)
    file.fallocate(0, 0, 1)
    assert file.size == PAGE_SIZE + 100
    file.fallocate(KEEP, 8 * PAGE_SIZE, 1)
    assert (file.size, file.backing.resident()) == (PAGE_SIZE + 100, 3 * PAGE_SIZE)


def test_a_fallocate_that_fails_leaves_size_and_pages() -> None:
    file = new_file(limit=2 * PAGE_SIZE)
    assert outcome(lambda: file.fallocate(0, 0, 3 * PAGE_SIZE)) == Errno(ENOSPC)
    assert (file.size, file.backing.resident()) == (0, 0)
    file.put()


def test_an_allocation_that_is_abandoned_keeps_the_pieces_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memfd, "_PIECE", 4 * PAGE_SIZE)
    file, asked = new_file(), iter([False, False, True])
    # Pieces end where the file's do, not where the range begins: no folio lies in two.
    assert outcome(
        lambda: file.fallocate(0, 3 * PAGE_SIZE, 9 * PAGE_SIZE, lambda: next(asked))
    ) == Errno(EINTR)
    assert (file.size, file.backing.resident()) == (0, 5 * PAGE_SIZE)
    file.fallocate(0, 0, 4 * PAGE_SIZE, lambda: True)
    assert (file.size, file.backing.resident()) == (4 * PAGE_SIZE, 8 * PAGE_SIZE)
    file.put()


def test_a_large_allocation_beyond_the_limit_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfd, "_PIECE", PAGE_SIZE)
    file = new_file(limit=2 * PAGE_SIZE)
    assert outcome(lambda: file.fallocate(0, 0, 3 * PAGE_SIZE)) == Errno(ENOSPC)
    assert (file.size, file.backing.resident()) == (0, 0)
    file.put()


@pytest.mark.parametrize("mode", [0x08, 0x10, 0x20, 0x40, 0x02, PUNCH | 0x10])
def test_other_modes_are_not_supported(file: RestrictedFile, mode: int) -> None:
    file.fallocate(KEEP, 0, PAGE_SIZE)
    before = file.inode.mtime
    assert outcome(lambda: file.fallocate(mode, 0, PAGE_SIZE)) == Errno(EOPNOTSUPP)
    assert file.backing.resident() == PAGE_SIZE
    assert file.inode.mtime == before


def test_operations_move_the_times(file: RestrictedFile) -> None:
    file.inode.mtime = file.inode.ctime = 0
    file.fallocate(KEEP, 0, PAGE_SIZE)
    assert file.inode.mtime == file.inode.ctime > 0
    file.inode.mtime = 0
    file.fallocate(PUNCH, 0, PAGE_SIZE)
    assert file.inode.mtime > 0
    file.inode.mtime = 0
    file.ftruncate(PAGE_SIZE)
    assert file.inode.mtime > 0


# The backing.


def test_a_memfd_is_made_with_the_first_page_and_closed_with_the_file() -> None:
    before = set(os.listdir("/proc/self/fd"))
    file = new_file()
    file.fallocate(PUNCH, 0, PAGE_SIZE)
    assert set(os.listdir("/proc/self/fd")) == before
    file.fallocate(KEEP, 0, PAGE_SIZE)
    fd = file.backing.fileno()
    assert file.backing.fileno() == fd
    assert os.fstat(fd).st_size == MAX_FILE_BYTES
    file.put()
    assert set(os.listdir("/proc/self/fd")) == before
    assert file.backing.resident() == 0


@pytest.mark.requires("cachestat")
def test_the_limit_counts_pages_held_and_not_pages_asked_for() -> None:
    backing = MemfdBacking(limit=4 * PAGE_SIZE)
    backing.allocate(0, 3 * PAGE_SIZE)
    # Two of them are there already.
    backing.allocate(PAGE_SIZE, 3 * PAGE_SIZE)
    assert backing.resident() == 4 * PAGE_SIZE
    backing.allocate(0, 4 * PAGE_SIZE)
    assert outcome(lambda: backing.allocate(4 * PAGE_SIZE, 1)) == Errno(ENOSPC)
    assert outcome(lambda: backing.allocate(4 * PAGE_SIZE - 1, 2)) == Errno(ENOSPC)
    assert backing.resident() == 4 * PAGE_SIZE
    backing.punch(0, PAGE_SIZE)
    backing.allocate(1 << 40, 1)
    assert backing.resident() == 4 * PAGE_SIZE
    backing.close()


def test_fresh_and_reallocated_pages_are_zero(file: RestrictedFile) -> None:
    window = Pages(file.backing, pages(0, 4))
    assert window.get_page(pgoff_t(2)) == 0
    with mmap.mmap(file.backing.fileno(), 4 * PAGE_SIZE) as memory_of:
        at = slice(2 * PAGE_SIZE, 3 * PAGE_SIZE)
        assert memory_of[at] == bytes(PAGE_SIZE)
        memory_of[at] = b"\xa5" * PAGE_SIZE
        # A page that is there keeps its content, whoever allocates it again.
        file.fallocate(KEEP, 2 * PAGE_SIZE, PAGE_SIZE)
        assert memory_of[at] == b"\xa5" * PAGE_SIZE
        file.fallocate(PUNCH, 2 * PAGE_SIZE, PAGE_SIZE)
        window.forget(pages(2, 3))
        assert file.backing.resident() == 0
        window.get_page(pgoff_t(2))
        assert memory_of[at] == bytes(PAGE_SIZE)
        assert file.backing.resident() == PAGE_SIZE


# Pages that a consumer takes.


def test_get_page_ignores_the_size(file: RestrictedFile) -> None:
    far = (1 << 40) // PAGE_SIZE
    window = Pages(file.backing, pages(far, far + 2))
    window.get_page(pgoff_t(far + 1))
    assert (file.size, file.backing.resident(), window.taken) == (0, PAGE_SIZE, 1)


def test_get_page_takes_each_page_once(file: RestrictedFile) -> None:
    window = Pages(file.backing, pages(4, 8))
    for _ in range(3):
        window.get_page(pgoff_t(5))
    window.get_pages(pages(4, 7))
    window.get_pages(pages(4, 7))
    window.get_pages(pages(6, 6))
    assert (window.taken, file.backing.resident()) == (3, 3 * PAGE_SIZE)


@pytest.mark.parametrize("page", [0, 3, 8, 1 << 40])
def test_get_page_outside_the_window(file: RestrictedFile, page: int) -> None:
    window = Pages(file.backing, pages(4, 8))
    assert outcome(lambda: window.get_page(pgoff_t(page))) == Errno(EFAULT)
    assert outcome(lambda: window.get_pages(pages(min(page, 4), max(page + 1, 8)))) == Errno(EFAULT)
    assert (window.taken, file.backing.resident()) == (0, 0)


def test_forget_clips_to_the_window(file: RestrictedFile) -> None:
    window = Pages(file.backing, pages(4, 8))
    window.get_pages(pages(4, 8))
    assert (
        window.forget(pages(0, 4))
        == window.forget(pages(8, 1 << 40))
        == window.forget(pages(5, 5))
        == 0
    )
    assert window.forget(pages(0, 6)) == 2
    assert window.forget(pages(0, 6)) == 0
    assert window.forget(pages(0, 1 << 40)) == 2


def test_a_page_over_the_limit_is_not_taken() -> None:
    file = new_file(limit=2 * PAGE_SIZE)
    window = Pages(file.backing, pages(0, 8))
    window.get_pages(pages(0, 2))
    for call in (lambda: window.get_page(pgoff_t(2)), lambda: window.get_pages(pages(1, 3))):
        assert outcome(call) == Errno(ENOSPC)
    assert window.taken == 2
    # A refusal is not remembered: with a page freed there is room for another.
    file.fallocate(PUNCH, 0, PAGE_SIZE)
    window.forget(pages(0, 1))
    window.get_page(pgoff_t(2))
    assert (window.taken, file.backing.resident()) == (3, 2 * PAGE_SIZE)
    file.put()


def test_two_consumers_with_one_memfd_share_pages_and_limit() -> None:
    file = new_file(limit=2 * PAGE_SIZE)
    other = MemfdBacking(fd=OwnedFd(os.dup(file.backing.fileno())), limit=2 * PAGE_SIZE)
    first, second = Pages(file.backing, pages(0, 4)), Pages(other, pages(0, 4))
    first.get_page(pgoff_t(0))
    second.get_page(pgoff_t(0))
    second.get_page(pgoff_t(1))
    assert outcome(lambda: first.get_page(pgoff_t(2))) == Errno(ENOSPC)
    assert file.backing.resident() == 2 * PAGE_SIZE
    other.close()
    file.put()
