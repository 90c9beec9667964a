"""The folios of a file's pages.

The tests compare the answers with the kernel's own objects and, as root, with its page flags.
"""

import fcntl
import os
import struct
from collections.abc import Generator
from contextlib import contextmanager
from errno import EINVAL, ENOENT, ENOMEM, ENOSYS
from functools import partial
from pathlib import Path
from typing import Final

import pytest

import hugetlb
from outcomes import Errno, outcome
from real_folios import (
    HUGETLB,
    ORDERS,
    Piece,
    allocate,
    backing_of,
    mapped,
    needs_pool,
    pieces,
    punch,
    thp,
)
from restrictedmem.abi import memory, pagemap
from restrictedmem.abi.memory import PMD_SIZE, PUNCH, Mapping
from restrictedmem.fd import OwnedFd
from restrictedmem.mm.backing import Memfd, MemfdBacking
from restrictedmem.mm.folios import BLOCK
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PAGE_SIZE, pgoff_t

__all__ = ["thp"]

POLICY: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_COMPOUND_HEAD: Final = 1 << 15
_COMPOUND_TAIL: Final = 1 << 16

LARGE: Final = ["thp", *HUGETLB]


def orders(backing: Memfd, pages: list[int]) -> list[object]:
    return [outcome(partial(backing.order_of, pgoff_t(page))) for page in pages]


def order_by_flags(backing: Memfd, page: int) -> int:
    """Return the order of a page's folio by /proc/kpageflags, which only root can read by frame."""
    with mapped(backing.fileno(), page, 1, max(backing.blksize, PMD_SIZE)) as mapping:
        mapping.madvise(memory.MADV_POPULATE_READ, 0, PAGE_SIZE)
        frame = pagemap.frame_number(mapping.address)
    with open("/proc/kpageflags", "rb", buffering=0) as flags:

        def is_tail(number: int) -> bool:
            return bool(
                struct.unpack("=Q", os.pread(flags.fileno(), 8, number * 8))[0] & _COMPOUND_TAIL
            )

        head = frame
        while is_tail(head):
            head -= 1
        if not struct.unpack("=Q", os.pread(flags.fileno(), 8, head * 8))[0] & _COMPOUND_HEAD:
            return 0
        rest = struct.iter_unpack("=Q", os.pread(flags.fileno(), (1 << 18) * 8, (head + 1) * 8))
        tails = next((at for at, (word,) in enumerate(rest) if not word & _COMPOUND_TAIL), 1 << 18)
        return (tails + 1).bit_length() - 1


@contextmanager
def twin_of(kind: str, blocks: int) -> Generator[OwnedFd]:
    """Make the kernel's own object with its first blocks: a collapsed memfd, or huge pages."""
    flags = (
        0
        if kind == "thp"
        else memory.MFD_HUGETLB | (ORDERS[kind] + PAGE_SHIFT) << memory.MFD_HUGE_SHIFT
    )
    size = blocks * (1 << ORDERS[kind] + PAGE_SHIFT)
    with memory.memfd_create("twin", flags) as fd:
        os.ftruncate(fd.fileno(), size)
        os.posix_fallocate(fd.fileno(), 0, size)
        if kind == "thp":
            with mapped(fd.fileno(), 0, size >> PAGE_SHIFT) as mapping:
                mapping.madvise(memory.MADV_POPULATE_WRITE, 0, size)
                mapping.madvise(memory.MADV_COLLAPSE, 0, size)
        yield fd


def zero_pages(fd: int, first: int, count: int, alignment: int) -> list[bool]:
    """Say of each page whether it reads as zero.

    It uses a mapping, because hugetlbfs has no write, and only this works for all kinds.
    """
    with mapped(fd, first, count, alignment) as mapping:
        return [
            bytes(mapping.memory[at : at + PAGE_SIZE]) == bytes(PAGE_SIZE)
            for at in range(0, count * PAGE_SIZE, PAGE_SIZE)
        ]


# A mapping as aligned as its file.


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 1), (511, 2), (3, 1024), (512, 512), ((MAX_FILE_BYTES >> PAGE_SHIFT) - 2, 2)],
)
def test_a_mapping_is_congruent_and_shows_its_range(first: int, count: int) -> None:
    with memory.memfd_create("plain") as fd:
        os.ftruncate(fd.fileno(), MAX_FILE_BYTES)
        with mapped(fd.fileno(), first, count) as mapping:
            assert mapping.address % PMD_SIZE == (first << PAGE_SHIFT) % PMD_SIZE
            assert mapping.memory.nbytes == count << PAGE_SHIFT
            mapping.memory[-3:] = b"end"
            mapping.madvise(memory.MADV_POPULATE_WRITE, 0, PAGE_SIZE)
        assert os.pread(fd.fileno(), 3, (first + count << PAGE_SHIFT) - 3) == b"end"
        assert memory.resident_pages(fd.fileno(), first << PAGE_SHIFT, PAGE_SIZE) == 1


def test_a_mapping_that_cannot_be_made_leaves_nothing() -> None:
    with memory.memfd_create("plain") as fd, open("/proc/self/maps", encoding="ascii") as maps:
        before = len(maps.readlines())
        assert outcome(lambda: Mapping(fd.detach(), 0, PAGE_SIZE, 3 << 60)) in (
            Errno(ENOMEM),
            Errno(EINVAL),
        )
        maps.seek(0)
        assert abs(len(maps.readlines()) - before) <= 1


# Orders, after each thing that changes them.


def test_a_memfd_has_pages_where_the_policy_is_never() -> None:
    if "[never]" not in POLICY.read_text():
        pytest.skip(f"{POLICY} is not never")
    with backing_of("memfd") as backing:
        allocate(backing, 0, BLOCK)
        assert pieces(backing, 0, BLOCK) == [(page, page + 1, 0) for page in range(BLOCK)]
        assert (
            backing.order_of(pgoff_t(7)),
            backing.base_order,
            backing.hugepage,
            backing.blksize,
        ) == (0, 0, False, PAGE_SIZE)


def test_blocks_that_are_taken_whole_become_folios(thp: MemfdBacking) -> None:
    allocate(thp, 1, 3 * BLOCK)
    assert orders(thp, [1, BLOCK - 1, BLOCK, 3 * BLOCK - 1, 3 * BLOCK]) == [0, 0, 9, 9, 0]
    assert thp.resident() == 3 * BLOCK * PAGE_SIZE
    allocate(thp, 0, 1)
    allocate(thp, 0, BLOCK)
    assert orders(thp, [0, BLOCK - 1]) == [9, 9]


def test_what_was_written_survives_the_making_of_a_folio(thp: MemfdBacking) -> None:
    allocate(thp, 5, 1)
    os.pwrite(thp.fileno(), b"five", 5 << PAGE_SHIFT)
    allocate(thp, 0, BLOCK)
    assert (thp.order_of(pgoff_t(5)), os.pread(thp.fileno(), 4, 5 << PAGE_SHIFT)) == (9, b"five")
    assert zero_pages(thp.fileno(), 0, BLOCK, PMD_SIZE) == [page != 5 for page in range(BLOCK)]


def test_a_hint_never_fails(thp: MemfdBacking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MADV_COLLAPSE", 9999)
    allocate(thp, 0, BLOCK)
    assert thp.resident() == PMD_SIZE
    assert pieces(thp, 0, BLOCK) == [(page, page + 1, 0) for page in range(BLOCK)]


#: First page and count of a punch; what is left of the first two folios of 2 MiB on tmpfs.
PUNCHES: Final = {
    "inside": (7, 1),
    "first page": (0, 1),
    "last page": (BLOCK - 1, 1),
    "half": (0, 256),
    "over the edge": (BLOCK - 2, 4),
    "whole": (0, BLOCK),
    "both": (0, 2 * BLOCK),
    "nothing": (5 * BLOCK, 3),
}


def model(first: int, count: int) -> list[Piece]:
    """Say what tmpfs leaves of two folios after a punch: one that is cut becomes pages."""
    left: list[Piece] = []
    for start in (0, BLOCK):
        kept = [page for page in range(start, start + BLOCK) if not first <= page < first + count]
        if len(kept) == BLOCK:
            left.append((start, start + BLOCK, 9))
            continue
        for page in range(start, start + BLOCK):
            if page in kept:
                left.append((page, page + 1, 0))
            elif left and left[-1][2] is None:
                left[-1] = (left[-1][0], page + 1, None)
            else:
                left.append((page, page + 1, None))
    return left


@pytest.mark.parametrize("name", PUNCHES)
def test_a_punch_splits_what_it_cuts(thp: MemfdBacking, name: str) -> None:
    first, count = PUNCHES[name]
    allocate(thp, 0, 2 * BLOCK)
    with twin_of("thp", 2) as twin:
        for fd in (thp.fileno(), twin.fileno()):
            with mapped(fd, 0, 2 * BLOCK) as mapping:
                mapping.memory[:] = b"\xaa" * mapping.memory.nbytes
            memory.fallocate(fd, PUNCH, first << PAGE_SHIFT, count << PAGE_SHIFT)
        assert pieces(thp, 0, 2 * BLOCK) == model(first, count)
        assert thp.resident() == os.fstat(twin.fileno()).st_blocks * 512
        for block in (0, BLOCK):
            with mapped(twin.fileno(), block, BLOCK) as mapping:
                if thp.resident() == 2 * PMD_SIZE:
                    mapping.madvise(memory.MADV_POPULATE_READ, 0, PMD_SIZE)
                    assert (
                        pagemap.bytes_in(pagemap.Category.HUGE, mapping.address, PMD_SIZE)
                        == PMD_SIZE
                    )
        wanted = [first <= page < first + count for page in range(2 * BLOCK)]
        assert (
            zero_pages(thp.fileno(), 0, 2 * BLOCK, PMD_SIZE)
            == zero_pages(twin.fileno(), 0, 2 * BLOCK, PMD_SIZE)
            == wanted
        )


@needs_pool
def test_huge_pages_that_lie_far_apart_are_not_looked_for() -> None:
    """One page at 2^62: an owner that punches all before it would keep the service for hours."""
    far = 1 << 62 - PAGE_SHIFT
    with backing_of("hugetlb-2m", 1) as backing:
        backing.allocate(far << PAGE_SHIFT, PAGE_SIZE)
        assert outcome(lambda: pieces(backing, 0, far + 1)) == Errno(ENOSYS)
        assert [order for _, _, order in pieces(backing, far - BLOCK, far + BLOCK)] == [None, 9]


@needs_pool
@pytest.mark.parametrize(
    ("kind", "first"),
    [("hugetlb-2m", 0), ("hugetlb-2m", 7), ("hugetlb-2m", BLOCK - 2), ("hugetlb-1g", 7)],
)
def test_a_punch_inside_a_huge_page_frees_nothing_and_zeroes_it(kind: str, first: int) -> None:
    size = hugetlb.SIZES[kind]
    with backing_of(kind, 2) as backing, twin_of(kind, 1) as twin:
        allocate(backing, 0, 1)
        for fd in (backing.fileno(), twin.fileno()):
            with mapped(fd, 0, BLOCK, size) as mapping:
                mapping.memory[:] = b"\xaa" * mapping.memory.nbytes
            memory.fallocate(fd, PUNCH, first << PAGE_SHIFT, 2 << PAGE_SHIFT)
        assert backing.resident() == os.fstat(twin.fileno()).st_blocks * 512 == size
        wanted = [page in (first, first + 1) for page in range(BLOCK)]
        assert (
            zero_pages(backing.fileno(), 0, BLOCK, size)
            == zero_pages(twin.fileno(), 0, BLOCK, size)
            == wanted
        )
        assert orders(backing, [first, BLOCK]) == [
            ORDERS[kind],
            ORDERS[kind] if kind == "hugetlb-1g" else Errno(ENOENT),
        ]
        punch(backing, 0, size >> PAGE_SHIFT)
        assert (backing.resident(), hugetlb.free_pages(size)) == (0, 1)
        assert outcome(lambda: backing.order_of(pgoff_t(first))) == Errno(ENOENT)


@pytest.mark.requires("root")
@pytest.mark.parametrize("kind", ["memfd", *LARGE])
def test_the_kernels_page_flags_say_the_same(kind: str) -> None:
    with backing_of(kind, 1) as backing:
        allocate(backing, 0, BLOCK)
        assert order_by_flags(backing, 3) == backing.order_of(pgoff_t(3)) == ORDERS.get(kind, 0)
        punch(backing, 5, 1)
        # tmpfs may leave folios of 4 or 8 pages (Linux 6.15 splits no further than it must), which
        # are of no use to a page table.
        left = order_by_flags(backing, 3)
        assert left == ORDERS[kind] if kind in hugetlb.SIZES else left < 9
        assert backing.order_of(pgoff_t(3)) == (left if left >= 9 else 0)


@contextmanager
def policy(word: str) -> Generator[None]:
    """Set the machine's policy for memfds; tests that do take turns."""
    with POLICY.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.read().partition("[")[2].partition("]")[0]
        try:
            POLICY.write_text(word)
            yield
        finally:
            POLICY.write_text(before)


@pytest.mark.requires("root")
def test_a_memfd_follows_the_policy() -> None:
    empty, backing = MemfdBacking(), MemfdBacking()
    with policy("always"):
        assert empty.blksize == PMD_SIZE
        allocate(backing, 0, BLOCK)
    # The page cache is asked, not the policy of now.
    assert (backing.order_of(pgoff_t(7)), empty.blksize) == (9, PAGE_SIZE)
    backing.close()


@pytest.mark.requires("root")
def test_folios_of_sizes_in_between_count_as_pages() -> None:
    setting = POLICY.parent / "hugepages-64kB" / "shmem_enabled"
    if not setting.exists():
        pytest.skip("no folios of 64 KiB before Linux 6.14")
    before = setting.read_text().partition("[")[2].partition("]")[0]
    with backing_of("memfd") as backing:
        try:
            setting.write_text("always")
            with mapped(backing.fileno(), 0, BLOCK) as mapping:
                mapping.memory[0] = 1
        finally:
            setting.write_text(before)
        assert order_by_flags(backing, 0) == 4
        assert backing.order_of(pgoff_t(0)) == 0
