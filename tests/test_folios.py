"""What the pages of a file are made of: what is said here, beside the kernel's own objects and, for root, beside its page flags."""

import fcntl
import os
import random
import struct
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from errno import EACCES, EINVAL, ENOENT, ENOMEM, ENOSPC, ENOSYS
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

import hugetlb
import restrictedmem
from outcomes import Errno, in_child, outcome
from restrictedmem.abi import fuse, memory, pagemap
from restrictedmem.abi.fuse import Opcode
from restrictedmem.abi.memory import PMD_SIZE, PUNCH, Mapping
from restrictedmem.abi.process import PR_SET_DUMPABLE, prctl
from restrictedmem.fd import OwnedFd
from restrictedmem.fs.filesystem import HUGEPAGE_MODE, NAME, FileSystem, Request
from restrictedmem.mm.backing import (
    KINDS,
    MappedBacking,
    Memfd,
    MemfdBacking,
    make_backing,
    take_over,
)
from restrictedmem.mm.folios import BLOCK
from restrictedmem.mm.pages import Pages
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t
from waiting import wait_until

POLICY: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
ORDERS: Final = {"thp": 9, "hugetlb-2m": 9, "hugetlb-1g": 18}
_COMPOUND_HEAD: Final = 1 << 15
_COMPOUND_TAIL: Final = 1 << 16

needs_pool = pytest.mark.requires("hugetlb")
HUGETLB: Final = [pytest.param(kind, marks=needs_pool) for kind in hugetlb.SIZES]
LARGE: Final = ["thp", *HUGETLB]

Piece = tuple[int, int, int | None]


def span(first: int, end: int) -> PageRange:
    return PageRange(pgoff_t(first), pgoff_t(end))


@contextmanager
def backing_of(kind: str, huge_pages: int = 3, limit: int | None = None) -> Generator[Memfd]:
    """Make a backing; of huge pages there are so many in the pool."""
    with ExitStack() as held:
        if kind in hugetlb.SIZES:
            held.enter_context(hugetlb.reserved(hugetlb.SIZES[kind], huge_pages))
        made = make_backing(kind, limit=limit)
        held.callback(made.close)
        yield made


@pytest.fixture
def thp() -> Iterator[MemfdBacking]:
    made = MemfdBacking(hugepage=True)
    yield made
    made.close()


def pieces(backing: Memfd, first: int, end: int) -> list[Piece]:
    return [
        (int(start), int(stop), order) for start, stop, order in backing.folios(span(first, end))
    ]


def allocate(backing: Memfd, first: int, count: int) -> None:
    backing.allocate(first << PAGE_SHIFT, count << PAGE_SHIFT)


def punch(backing: Memfd, first: int, count: int) -> None:
    backing.punch(first << PAGE_SHIFT, count << PAGE_SHIFT)


def orders(backing: Memfd, pages: list[int]) -> list[object]:
    return [outcome(partial(backing.order_of, pgoff_t(page))) for page in pages]


@contextmanager
def mapped(fd: int, first: int, count: int, alignment: int = PMD_SIZE) -> Generator[Mapping]:
    mapping = Mapping(fd, first << PAGE_SHIFT, count << PAGE_SHIFT, alignment)
    try:
        yield mapping
    finally:
        mapping.close()


def order_by_flags(backing: Memfd, page: int) -> int:
    """Return the order of a page's folio by /proc/kpageflags, which shows each page frame to root."""
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
    """Make the kernel's own object, with its first blocks taken: a memfd that is collapsed, or one of huge pages."""
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
    """Say of each page whether it reads as zero; through a mapping, for hugetlbfs has no write and so no common way but this."""
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
        # What tmpfs leaves may be folios of 4 or 8 pages (Linux 6.15 splits no further than it
        # must), which are of no use to a page table.
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


# What a range is made of.


@pytest.mark.parametrize("seed", range(6))
def test_folios_are_what_was_allocated_and_looking_allocates_nothing(seed: int) -> None:
    pick = random.Random(seed)
    backing = MemfdBacking(hugepage=True)
    present: dict[int, int] = {}
    for _ in range(12):
        first, count = pick.randrange(4 * BLOCK), pick.choice([1, 2, 3, 100, BLOCK, 2 * BLOCK])
        cut = {page // BLOCK for page in (first, first + count - 1)}
        if pick.random() < 0.6:
            allocate(backing, first, count)
            whole = range(-(-first // BLOCK), (first + count) // BLOCK)
            present |= {page: 0 for page in range(first, first + count) if page not in present}
            present |= {
                page: 9 for block in whole for page in range(block * BLOCK, (block + 1) * BLOCK)
            }
        else:
            punch(backing, first, count)
            present = {
                page: order for page, order in present.items() if not first <= page < first + count
            }
            present |= {
                page: 0
                for page in present
                if page // BLOCK in cut
                and sum(page // BLOCK == p // BLOCK for p in present) < BLOCK
            }
    held = backing.resident()
    first, end = sorted(pick.sample(range(6 * BLOCK), 2))
    found = pieces(backing, first, end)
    assert backing.resident() == held == len(present) * PAGE_SIZE
    assert [start for start, _, _ in found[1:]] == [stop for _, stop, _ in found[:-1]], "a gap"
    for start, stop, order in found:
        assert {present.get(page) for page in range(start, stop)} == {order}
        assert order != 9 or (stop - start == BLOCK and start % BLOCK == 0)
    assert (found[0][0] <= first, found[-1][1] >= end) == (True, True)
    assert all(one[2] is not None or other[2] is not None for one, other in pairwise(found)), (
        "two holes"
    )
    backing.close()


def test_folios_are_whole_where_a_range_begins_inside_one(thp: MemfdBacking) -> None:
    allocate(thp, 0, 2 * BLOCK)
    punch(thp, BLOCK + 3, 1)
    assert pieces(thp, 5, BLOCK + 5) == [
        (0, BLOCK, 9),
        *((page, page + 1, 0) for page in range(BLOCK, BLOCK + 3)),
        (BLOCK + 3, BLOCK + 4, None),
        (BLOCK + 4, BLOCK + 5, 0),
    ]
    assert pieces(thp, 5, 5) == []
    assert pieces(thp, 7 * BLOCK, 7 * BLOCK + 9) == [(7 * BLOCK, 7 * BLOCK + 9, None)]


@pytest.mark.requires("root")
def test_an_undumpable_process_without_root_tells_folios_too(thp: MemfdBacking) -> None:
    """As the service of an ordinary user is."""
    for block in (1, 2, 4):
        allocate(thp, block * BLOCK, BLOCK)
    for page in range(3 * BLOCK, 4 * BLOCK):
        allocate(thp, page, 1)
    # The rest are pages, those of a whole block too, and the last block's mapping is shorter than
    # two.
    assert [
        (start // BLOCK, order)
        for start, _, order in pieces(thp, 0, 5 * BLOCK)
        if not start % BLOCK
    ] == [
        *((0, None), (1, 9), (2, 9), (3, 0), (4, 9)),
    ]

    def look() -> tuple[object, list[Piece]]:
        os.setresuid(65534, 65534, 65534)
        prctl(PR_SET_DUMPABLE, 0)
        return outcome(lambda: thp.order_of(pgoff_t(BLOCK))), pieces(thp, 0, 5 * BLOCK)

    expected = Errno(EACCES), pieces(thp, 0, 5 * BLOCK)
    assert in_child(lambda: look() == expected) == "True"


def test_the_largest_file_is_one_hole_and_its_folios(thp: MemfdBacking) -> None:
    end = MAX_FILE_BYTES >> PAGE_SHIFT
    far = 1 << 40
    allocate(thp, far, BLOCK)
    allocate(thp, end - 2, 2)
    assert pieces(thp, 0, end) == [
        (0, far, None),
        (far, far + BLOCK, 9),
        (far + BLOCK, end - 2, None),
        (end - 2, end - 1, 0),
        (end - 1, end, 0),
    ]
    assert thp.order_of(pgoff_t(end - 1)) == 0
    allocate(thp, end - 511, 511)
    assert {order for *_, order in pieces(thp, end - 511, end)} == {0}


def test_looking_never_allocates_even_against_a_punch(thp: MemfdBacking) -> None:
    """What is punched between the count and the look stays punched."""
    allocate(thp, 0, BLOCK)
    found = thp.folios(span(0, BLOCK))
    real = memory.resident_pages
    counted: list[int] = []

    def count(fd: int, offset: int, length: int) -> int:
        counted.append(real(fd, offset, length))
        punch(thp, 0, BLOCK)
        return counted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "resident_pages", count)
        assert [order for *_, order in found] == [0] * BLOCK
    assert counted == [BLOCK]
    assert thp.resident() == 0


def test_a_page_that_comes_meanwhile_hides_no_other(thp: MemfdBacking) -> None:
    """A consumer's fault allocates one while the service counts."""
    allocate(thp, 300, 1)
    real, counts = memory.resident_pages, 0

    def count(fd: int, offset: int, length: int) -> int:
        nonlocal counts
        counts += 1
        found = real(fd, offset, length)
        if counts == 1:
            allocate(thp, 0, 1)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "resident_pages", count)
        found = [*thp.folios(span(0, BLOCK))]
    assert (300, 301, 0) in found


@needs_pool
def test_a_huge_page_that_comes_meanwhile_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with backing_of("hugetlb-2m") as backing:
        far = 1000 * BLOCK
        allocate(backing, far, BLOCK)
        real, counts = type(backing).resident, 0

        def resident(self: Memfd) -> int:
            nonlocal counts
            counts += 1
            found = real(self)  # pyright: ignore[reportArgumentType]
            if counts == 1:
                allocate(backing, 0, BLOCK)
            return found

        monkeypatch.setattr(type(backing), "resident", resident)
        found = [*backing.folios(span(0, far + BLOCK))]
        monkeypatch.undo()
    assert (far, far + BLOCK, 9) in found


@pytest.mark.parametrize("kind", HUGETLB)
def test_huge_pages_of_a_range(kind: str) -> None:
    order = ORDERS[kind]
    size = 1 << order
    with backing_of(kind, 3) as backing:
        assert pieces(backing, 0, 5) == [(0, 5, None)]
        allocate(backing, 2 * size - 1, 2)
        assert pieces(backing, 5, size + 5) == [(5, size, None), (size, 2 * size, order)]
        assert pieces(backing, 0, 1 << 50) == [
            (0, size, None),
            (size, 2 * size, order),
            (2 * size, 3 * size, order),
            (3 * size, 1 << 50, None),
        ]
        assert pieces(backing, 2 * size + 1, 2 * size + 3) == [(2 * size, 3 * size, order)]
        # Right behind one, and long enough to be looked at from the beginning of the file on.
        assert pieces(backing, 3 * size, 1 << 50) == [(3 * size, 1 << 50, None)]
        assert (backing.resident() >> PAGE_SHIFT, hugetlb.free_pages(size << PAGE_SHIFT)) == (
            2 * size,
            1,
        )
        assert (backing.base_order, backing.blksize) == (order, size << PAGE_SHIFT)


# Limits and empty pools.


@pytest.mark.parametrize("kind", HUGETLB)
def test_huge_pages_are_charged_whole(kind: str) -> None:
    size = hugetlb.SIZES[kind]
    with backing_of(kind, 3, limit=2 * size) as backing:
        backing.allocate(0, 1)
        backing.allocate(size - 1, 1)
        assert backing.resident() == size
        assert outcome(lambda: backing.allocate(size - 1, size + 2)) == Errno(ENOSPC)
        assert backing.resident() == size
        backing.allocate(size - 1, 2)
        backing.allocate(0, 2 * size)
        assert backing.resident() == 2 * size
        assert outcome(lambda: backing.allocate(2 * size, 1)) == Errno(ENOSPC)


@needs_pool
def test_an_empty_pool_is_enospc_for_owner_and_consumer() -> None:
    with backing_of("hugetlb-2m", 1) as backing, mapped(backing.fileno(), 0, 2 * BLOCK) as mapping:
        # Mapping takes nothing from the pool.
        assert hugetlb.free_pages(PMD_SIZE) == 1
        consumer = MappedBacking(_again(backing), mapping, 0)
        consumer.allocate(BLOCK << PAGE_SHIFT, PAGE_SIZE)
        assert outcome(lambda: consumer.allocate(0, PAGE_SIZE)) == Errno(ENOSPC)
        assert outcome(lambda: backing.allocate(0, 1)) == Errno(ENOSPC)
        with memory.memfd_create("twin", memory.MFD_HUGETLB) as twin:
            os.ftruncate(twin.fileno(), PMD_SIZE)
            assert outcome(lambda: os.posix_fallocate(twin.fileno(), 0, PMD_SIZE)) == Errno(ENOSPC)
        window = Pages(consumer, span(0, 2 * BLOCK))
        assert outcome(lambda: window.get_page(pgoff_t(3))) == Errno(ENOSPC)
        assert (window.get_page(pgoff_t(BLOCK + 3)), window.taken) == (9, 1)
        consumer.close()


def _again(backing: Memfd) -> Memfd:
    """Take a backing over as a consumer does, by a descriptor of its own."""
    fd = OwnedFd(os.dup(backing.fileno()))
    return take_over(
        fd, limit=backing.limit, base_order=backing.base_order, hugepage=backing.hugepage
    )


@needs_pool
def test_what_was_taken_before_the_pool_was_empty_stays_as_in_hugetlbfs() -> None:
    with backing_of("hugetlb-2m", 2) as backing:
        assert outcome(lambda: backing.allocate(0, 3 * PMD_SIZE)) == Errno(ENOSPC)
        assert backing.resident() == 2 * PMD_SIZE
        punch(backing, 0, MAX_FILE_BYTES >> PAGE_SHIFT)
        with memory.memfd_create("twin", memory.MFD_HUGETLB) as twin:
            assert outcome(lambda: os.posix_fallocate(twin.fileno(), 0, 3 * PMD_SIZE)) == Errno(
                ENOSPC
            )
            assert os.fstat(twin.fileno()).st_blocks * 512 == 2 * PMD_SIZE


def test_the_limit_holds_before_a_folio_is_made() -> None:
    with backing_of("thp", limit=PMD_SIZE) as backing:
        assert outcome(lambda: allocate(backing, 0, 2 * BLOCK)) == Errno(ENOSPC)
        assert backing.resident() == 0
        allocate(backing, 0, BLOCK)
        assert backing.order_of(pgoff_t(0)) == 9


def test_kinds() -> None:
    assert [make_backing(kind).blksize for kind in KINDS][1:] == [PMD_SIZE, PMD_SIZE, 1 << 30]
    assert outcome(lambda: make_backing("hugetlb-16k")) == Errno(EINVAL)


# A consumer that maps the file.


def test_a_locked_mapping_gets_folios_too() -> None:
    with backing_of("thp") as backing, mapped(backing.fileno(), 0, 2 * BLOCK) as mapping:
        memory.mlock_onfault(mapping.address, 2 * PMD_SIZE)
        consumer = MappedBacking(_again(backing), mapping, 0)
        consumer.allocate(BLOCK << PAGE_SHIFT, 9 * PAGE_SIZE)
        mapping.memory[PMD_SIZE : PMD_SIZE + 4] = b"kept"
        consumer.allocate(0, 2 * PMD_SIZE)
        assert (
            pagemap.bytes_in(pagemap.Category.HUGE, mapping.address, 2 * PMD_SIZE) == 2 * PMD_SIZE
        )
        assert bytes(mapping.memory[PMD_SIZE : PMD_SIZE + 4]) == b"kept"
        assert (consumer.order_of(pgoff_t(0)), consumer.order_of(pgoff_t(BLOCK))) == (9, 9)
        consumer.close()


@needs_pool
def test_a_mapping_shows_huge_pages_of_1_gib_as_one() -> None:
    size = 1 << 30
    with (
        backing_of("hugetlb-1g", 1) as backing,
        mapped(backing.fileno(), 0, size >> PAGE_SHIFT, size) as mapping,
    ):
        consumer = MappedBacking(_again(backing), mapping, 0)
        consumer.allocate(5 << PAGE_SHIFT, PAGE_SIZE)
        assert list(pagemap.runs(pagemap.Category.HUGE, mapping.address, size)) == [
            (mapping.address, mapping.address + size)
        ]
        consumer.close()


# The descriptor.


def test_the_mode_to_create_with_carries_the_hint() -> None:
    def made(backing: str, mode: int) -> tuple[bool, int, int]:
        filesystem = FileSystem("v10", backing=backing, max_files=10)
        body = (
            bytes(
                fuse.fuse_create_in(flags=os.O_RDWR | os.O_CREAT, mode=mode, umask=0, open_flags=0)
            )
            + NAME
            + b"\0"
        )
        assert filesystem.handle(Request(Opcode.CREATE, 1, fuse.ROOT_ID, 0, 0, 0, body)) is not None
        (file,) = filesystem.files().values()
        return file.backing.hugepage, file.backing.base_order, file.inode.mode & 0o7777

    assert made("memfd", 0o600) == (False, 0, 0o777)
    assert made("memfd", 0o600 | HUGEPAGE_MODE) == (True, 0, 0o777)
    assert made("thp", 0) == (True, 0, 0o777)
    assert made("hugetlb-2m", HUGEPAGE_MODE) == (False, 9, 0o777)
    assert outcome(lambda: FileSystem("v10", backing="paper", max_files=10)) == Errno(EINVAL)


def test_the_flag_is_that_of_the_header() -> None:
    assert restrictedmem.RMFD_HUGEPAGE == memory.RMFD_HUGEPAGE


@pytest.mark.requires("fuse")
def test_rmfd_hugepage() -> None:
    with Service.start() as service:
        for flags in (1, 3, 4, 99, -1):
            assert outcome(partial(service.memfd_restricted, flags)) == Errno(EINVAL)
            assert outcome(partial(restrictedmem.memfd_restricted, flags)) == Errno(EINVAL)
        with (
            OwnedFd(service.memfd_restricted(restrictedmem.RMFD_HUGEPAGE)) as fd,
            OwnedFd(service.memfd_restricted()) as plain,
        ):
            assert os.fstat(fd.fileno()).st_blksize == PMD_SIZE
            with memory.memfd_create("twin") as twin:
                assert os.fstat(plain.fileno()).st_blksize == os.fstat(twin.fileno()).st_blksize
            assert os.readlink(f"/proc/self/fd/{fd.fileno()}") == "/restrictedmem (deleted)"
            memory.fallocate(fd.fileno(), 0, 0, 2 * PMD_SIZE)
            memory.fallocate(fd.fileno(), PUNCH, 0, PAGE_SIZE)
            assert os.fstat(fd.fileno()).st_blocks * 512 == 2 * PMD_SIZE - PAGE_SIZE


@pytest.mark.requires("fuse", "hugetlb")
@pytest.mark.parametrize("kind", hugetlb.SIZES)
def test_a_service_of_huge_pages(kind: str) -> None:
    size = hugetlb.SIZES[kind]
    with hugetlb.reserved(size, 1), Service.start(Options(backing=kind)) as service:
        with OwnedFd(service.memfd_restricted()) as fd:
            assert os.fstat(fd.fileno()).st_blksize == size
            memory.fallocate(fd.fileno(), 0, PAGE_SIZE, 1)
            memory.fallocate(fd.fileno(), PUNCH, PAGE_SIZE, PAGE_SIZE)
            found = os.fstat(fd.fileno())
            assert (found.st_size, found.st_blocks * 512) == (PAGE_SIZE + 1, size)
            assert outcome(lambda: memory.fallocate(fd.fileno(), 0, size, 1)) == Errno(ENOSPC)
            memory.fallocate(fd.fileno(), PUNCH, 0, size)
            assert os.fstat(fd.fileno()).st_blocks == 0
            memory.fallocate(fd.fileno(), 0, size, 1)
        wait_until(lambda: hugetlb.free_pages(size) == 1, "the huge page of a file that was closed")
