"""get_page as a consumer calls it, beside fallocate(2) on a bare memfd."""

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Final

from benchmarks.common import Figure, Lab, alternate, at_speed, below, within
from restrictedmem import sync
from restrictedmem.abi import memory
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.pages import Pages
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t


@contextmanager
def _pages(count: int) -> Generator[Pages]:
    pages = Pages(MemfdBacking(), PageRange(pgoff_t(0), pgoff_t(count)))
    try:
        yield pages
    finally:
        pages.close()


def _fallocate(lab: Lab, length: int, count: int) -> float:
    """Return the µs that C takes to allocate ``count`` times ``length`` bytes of an empty memfd."""
    with memory.memfd_create("floor") as fd:
        os.ftruncate(fd.fileno(), MAX_FILE_BYTES)
        return (
            sum(lab.run("fallocate", fd.fileno(), 0, length, count, 0, 0, pass_fds=[fd.fileno()]))
            / 1e3
        )


def cold_range(lab: Lab) -> Iterator[Figure]:
    """Get every page of a range with one call."""
    count = lab.amount(512 << 20, 8 << 20) >> PAGE_SHIFT

    def ours() -> float:
        with _pages(count) as pages:
            span = PageRange(pgoff_t(0), pgoff_t(count))
            started = time.perf_counter()
            pages.get_pages(span)
            return (time.perf_counter() - started) * 1e6 / count

    pairs = alternate(lambda: _fallocate(lab, count * PAGE_SIZE, 1) / count, ours, lab.rounds(9))
    yield pairs.figure(
        f"get_page over a range of {count >> 8} MiB, cold; a page", "µs", at_speed(0.9)
    )


def cold_each(lab: Lab) -> Iterator[Figure]:
    """Get page after page."""
    count = lab.amount(64 << 20, 1 << 20) >> PAGE_SHIFT

    def ours() -> float:
        with _pages(count) as pages:
            return _each(pages, count)

    pairs = alternate(lambda: _fallocate(lab, PAGE_SIZE, count) / count, ours, lab.rounds(9))
    yield pairs.figure("get_page one at a time, cold", "µs", within(4))


def warm(lab: Lab) -> Iterator[Figure]:
    """Get allocated pages, beside taking a lock and nothing else."""
    count = 4096
    lock = sync.mutex()

    def floor() -> float:
        started = time.perf_counter()
        for _ in range(count):
            with lock:
                pass
        return (time.perf_counter() - started) * 1e6 / count

    with _pages(count) as pages:
        _each(pages, count)
        pairs = alternate(floor, lambda: _each(pages, count), lab.rounds(101))
    yield pairs.figure(
        "get_page, warm, lock included (floor: the lock alone)", "µs", below(0.4, "under 0.4 µs")
    )


def _each(pages: Pages, count: int) -> float:
    """Return the mean microseconds of one get_page."""
    get_page = pages.get_page
    offsets = [pgoff_t(index) for index in range(count)]
    started = time.perf_counter()
    for offset in offsets:
        get_page(offset)
    return (time.perf_counter() - started) * 1e6 / count


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {
    "get-page-range": cold_range,
    "get-page-each": cold_each,
    "get-page-warm": warm,
}
