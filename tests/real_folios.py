"""Memory of real folios, and what the kernel's own objects and page flags say of it."""

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import pytest

import hugetlb
from restrictedmem.abi.memory import PMD_SIZE, Mapping
from restrictedmem.mm.backing import Memfd, MemfdBacking, make_backing
from restrictedmem.units import PAGE_SHIFT, PageRange, pgoff_t

ORDERS: Final = {"thp": 9, "hugetlb-2m": 9, "hugetlb-1g": 18}

needs_pool = pytest.mark.requires("hugetlb")
HUGETLB: Final = [pytest.param(kind, marks=needs_pool) for kind in hugetlb.SIZES]

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


@contextmanager
def mapped(fd: int, first: int, count: int, alignment: int = PMD_SIZE) -> Generator[Mapping]:
    mapping = Mapping(fd, first << PAGE_SHIFT, count << PAGE_SHIFT, alignment)
    try:
        yield mapping
    finally:
        mapping.close()
