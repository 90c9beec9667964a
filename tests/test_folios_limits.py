"""Folios at their limits and with empty pools, and a consumer that maps the file."""

import os
from errno import EAGAIN, EINVAL, ENOSPC
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest

import hugetlb
import restrictedmem
from outcomes import Errno, outcome
from real_folios import HUGETLB, allocate, backing_of, mapped, needs_pool, punch, span
from restrictedmem.abi import fuse, memory, pagemap
from restrictedmem.abi.fuse import Opcode
from restrictedmem.abi.memory import PMD_SIZE, PUNCH, Mapping
from restrictedmem.fd import OwnedFd
from restrictedmem.fs.filesystem import FileSystem, Request
from restrictedmem.fs.owner_abi import HUGEPAGE_MODE, NAME
from restrictedmem.mm import folios
from restrictedmem.mm.backing import KINDS, MappedBacking, Memfd, make_backing, take_over
from restrictedmem.mm.folios import BLOCK
from restrictedmem.mm.pages import Pages
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PAGE_SIZE, pgoff_t
from waiting import wait_until

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


@pytest.mark.parametrize(
    ("errors", "calls", "answer"),
    [
        ([], 1, None),
        ([EAGAIN], 2, None),
        ([EAGAIN] * 2, 3, None),
        ([EAGAIN] * 3, 3, Errno(EAGAIN)),
        ([EINVAL], 1, Errno(EINVAL)),
    ],
)
def test_a_collapse_that_meets_somebody_is_tried_three_times(
    errors: list[int], calls: int, answer: object
) -> None:
    asked: list[tuple[int, int, int]] = []

    def madvise(*call: int) -> None:
        asked.append(cast("tuple[int, int, int]", call))
        if len(asked) <= len(errors):
            raise OSError(errors[len(asked) - 1], "refused")

    mapping = cast("Mapping", SimpleNamespace(madvise=madvise))
    assert outcome(lambda: folios._collapse(mapping, PMD_SIZE)) == answer
    assert asked == [(memory.MADV_COLLAPSE, 0, PMD_SIZE)] * calls
