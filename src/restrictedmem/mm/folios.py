"""What a memfd's pages are made of: asked of the page cache through a mapping for the purpose, without allocating anything.

Nothing tells the folio of an offset but a mapping: a folio of 2 MiB is mapped by one entry where it
can be, and PAGEMAP_SCAN shows that to anybody. Looking must not change what is looked at, and a
read fault on a hole of a memfd allocates; so the mapping is watched by a userfaultfd, which makes
such a fault fail.
"""

import mmap
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN, EFAULT, EINVAL, ENOENT, ENOMEM, ENOSYS, ENOTTY, EPERM
from typing import Final

from restrictedmem.abi import memory, pagemap, smaps, userfaultfd
from restrictedmem.abi.memory import PMD_ORDER, PMD_SIZE, Mapping
from restrictedmem.failure import failed
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

#: What a kernel answers that cannot tell what pages are made of (docs/understand/folios.md).
NOT_TOLD: Final = (EACCES, EINVAL, ENOSYS, ENOTTY, EPERM)
#: Pages of the folio that a 2 MiB entry maps.
BLOCK: Final = 1 << PMD_ORDER
#: First page, page after the last, order; None for pages that are missing.
Piece = tuple[pgoff_t, pgoff_t, int | None]

# Blocks that are mapped at once: 1 GiB.
_AT_ONCE: Final = 512
_ATTEMPTS: Final = 3


@contextmanager
def looking(fd: int, offset: int, length: int, alignment: int) -> Generator[Mapping]:
    """Map a byte range of a file to look at it: what is missing stays missing (``is_present``).

    Raises:
        OSError: EPERM, ENOSYS where userfaultfd(2) is forbidden or missing; ENOMEM.
    """
    mapping = Mapping(fd, offset, length, alignment)
    try:
        with userfaultfd.refuse_missing(mapping.address, length):
            yield mapping
    finally:
        mapping.close()


def is_present(mapping: Mapping, start: int) -> bool:
    """Say whether the page at a byte of such a mapping is there; then it is mapped, and zeroed if it was only preallocated.

    Raises:
        OSError: EINVAL before Linux 5.14 (MADV_POPULATE_READ); ENOMEM.
    """
    try:
        mapping.madvise(memory.MADV_POPULATE_READ, start, PAGE_SIZE)
    except OSError as error:
        if error.errno in (EINVAL, ENOMEM):
            raise
        # What the machine has lost (EHWPOISON) is there all the same, until it is punched.
        return error.errno != EFAULT
    return True


def order_of(fd: int, pgoff: pgoff_t) -> int:
    """Return 9 for a page in a 2 MiB folio of a memfd, 0 for another; folios between the two count as pages.

    Raises:
        OSError: ENOENT for a page that is missing; EACCES where the process may not open its own
            pagemap (undumpable, not root); ENOTTY where there is no PAGEMAP_SCAN (before Linux
            6.7); as ``looking``.
    """
    start = (pgoff & -BLOCK) << PAGE_SHIFT
    length = min(PMD_SIZE, MAX_FILE_BYTES - start)
    with looking(fd, start, length, PMD_SIZE) as mapping:
        if not is_present(mapping, (pgoff << PAGE_SHIFT) - start):
            raise failed("get_page", ENOENT, "no page")
        return PMD_ORDER if pagemap.bytes_in(pagemap.Category.HUGE, mapping.address, length) else 0


def make_large(fd: int, offset: int, length: int) -> None:
    """Make each aligned 2 MiB that lies whole in a byte range one folio, pages and holes alike (MADV_COLLAPSE, Linux 6.1).

    A hint: what the kernel cannot make large stays as it is, page or hole.
    """
    start, end = -(-offset // PMD_SIZE) * PMD_SIZE, (offset + length) & -PMD_SIZE
    if start >= end:
        return
    with suppress(OSError):
        mapping = Mapping(fd, start, end - start)
        try:
            for block in range(0, end - start, PMD_SIZE):
                # Where all is missing there is nothing to collapse.
                mapping.madvise(memory.MADV_POPULATE_WRITE, block, PAGE_SIZE)
            _collapse(mapping, end - start)
        finally:
            mapping.close()


def _collapse(mapping: Mapping, length: int) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            mapping.madvise(memory.MADV_COLLAPSE, 0, length)
        except OSError as error:
            # A page that somebody just looks at, or that has not reached its list yet; the call may
            # be made again (madvise(2)).
            if error.errno != EAGAIN or attempt == _ATTEMPTS:
                raise
        else:
            return


def folios_in(fd: int, span: PageRange) -> Iterator[Piece]:
    """Yield what a range of a memfd is made of (``Backing.folios``).

    Costs a cachestat(2) for each time that a part has to be halved until it is all there or all
    missing (at worst one for each page), a fault for each 2 MiB that is all there, and a mapping
    and a scan for each GiB of those.

    Raises:
        OSError: ENOSYS where there is no cachestat(2) (before Linux 6.5); as ``order_of``, save
            ENOENT and EACCES.
    """
    if not span:
        return
    start, end = (
        span.start & -BLOCK,
        min(span.end + BLOCK - 1 & -BLOCK, MAX_FILE_BYTES >> PAGE_SHIFT),
    )
    told = span.start
    for first, last, order in _pieces(fd, start, end):
        run = PageRange(pgoff_t(first), pgoff_t(last))
        if not order:
            run = span.clip(run)
        if not run:
            continue
        if told < run.start:
            yield told, run.start, None
        step = 1 << order
        yield from (
            (pgoff_t(pgoff), pgoff_t(pgoff + step), order)
            for pgoff in range(run.start, run.end, step)
        )
        told = run.end
    if told < span.end:
        yield told, span.end, None


def _pieces(fd: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the runs of folios of one order, 0 or 9, in a range that begins at a block, or lies inside one."""
    # Of each part by itself: what a count of both leaves for the other is of two moments, and pages
    # come and go.
    count = memory.resident_pages(fd, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
    if not count:
        return
    if count < end - start:
        middle = start + (1 << (end - start - 1).bit_length() - 1)
        yield from _pieces(fd, start, middle)
        yield from _pieces(fd, middle, end)
    elif end - start < BLOCK:
        yield start, end, 0
    else:
        for first in range(start, end, _AT_ONCE * BLOCK):
            last = min(first + _AT_ONCE * BLOCK, end)
            large = _large(fd, first, last)
            yield from (
                (block, min(block + BLOCK, last), PMD_ORDER * (block in large))
                for block in range(first, last, BLOCK)
            )


def _large(fd: int, start: int, end: int) -> set[int]:
    """Return the first pages of the 2 MiB folios in a range that begins at a block and is all there."""
    with looking(fd, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT, PMD_SIZE) as mapping:
        for block in range(0, mapping.memory.nbytes, PMD_SIZE):
            is_present(mapping, block)
        try:
            found = pagemap.runs(pagemap.Category.HUGE, mapping.address, mapping.memory.nbytes)
            large = [at for first, last in found for at in range(first, last, PMD_SIZE)]
        except OSError as error:
            # A process that has little else mapped, as the service, can look in another place.
            if error.errno != EACCES:
                raise
            large = _large_by_smaps(mapping)
        return {start + (at - mapping.address >> PAGE_SHIFT) for at in large}


def _large_by_smaps(mapping: Mapping) -> list[int]:
    """Return where 2 MiB of a mapping are mapped by one entry; smaps counts those of a mapping, so each block is made one of its own."""
    length = mapping.memory.nbytes
    for block in range(0, length, 2 * PMD_SIZE):
        mapping.madvise(mmap.MADV_DONTFORK, block, min(PMD_SIZE, length - block))
    return list(smaps.large_mappings(mapping.address, mapping.address + length))
