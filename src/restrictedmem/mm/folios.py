"""The folios of a memfd: what orders they have, looked up without allocating anything.

Only a mapping shows the folio at an offset. The kernel maps a folio of 2 MiB by one entry where it
can, and PAGEMAP_SCAN shows this to any process. So this module maps the memfd for a short time.

Looking must not change the file, but a read fault on a hole of a memfd allocates. So a userfaultfd
watches the mapping and makes such a fault fail.
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

#: Errnos of a kernel that cannot tell what the orders are (docs/understand/folios.md).
NOT_TOLD: Final = (EACCES, EINVAL, ENOSYS, ENOTTY, EPERM)
#: Pages of the folio that a 2 MiB entry maps.
BLOCK: Final = 1 << PMD_ORDER
#: First page, page after the last, order; the order of missing pages is None.
Piece = tuple[pgoff_t, pgoff_t, int | None]

# Blocks that one mapping shows: 1 GiB.
_AT_ONCE: Final = 512
_ATTEMPTS: Final = 3


@contextmanager
def looking(fd: int, offset: int, length: int, alignment: int) -> Generator[Mapping]:
    """Map a byte range of a file to look at it; missing pages stay missing (``is_present``).

    Raises:
        OSError: EPERM or ENOSYS where userfaultfd(2) is forbidden or missing; ENOMEM.
    """
    mapping = Mapping(fd, offset, length, alignment)
    try:
        with userfaultfd.refuse_missing(mapping.address, length):
            yield mapping
    finally:
        mapping.close()


def is_present(mapping: Mapping, start: int) -> bool:
    """Say whether the page at byte ``start`` of a mapping by ``looking`` is present.

    A present page is mapped afterwards. If it was only preallocated, it is zeroed.

    Raises:
        OSError: EINVAL before Linux 5.14 (no MADV_POPULATE_READ); ENOMEM.
    """
    try:
        mapping.madvise(memory.MADV_POPULATE_READ, start, PAGE_SIZE)
    except OSError as error:
        if error.errno in (EINVAL, ENOMEM):
            raise
        # A page that the machine has lost (EHWPOISON) is present until it is punched.
        return error.errno != EFAULT
    return True


def order_of(fd: int, pgoff: pgoff_t) -> int:
    """Return 9 for a page in a 2 MiB folio of a memfd, else 0.

    Folios of a size between the two count as pages.

    Raises:
        OSError: ENOENT for a missing page; EACCES where the process may not open its own pagemap
            (undumpable, not root); ENOTTY where there is no PAGEMAP_SCAN (before Linux 6.7); as
            ``looking``.
    """
    start = (pgoff & -BLOCK) << PAGE_SHIFT
    length = min(PMD_SIZE, MAX_FILE_BYTES - start)
    with looking(fd, start, length, PMD_SIZE) as mapping:
        if not is_present(mapping, (pgoff << PAGE_SHIFT) - start):
            raise failed("get_page", ENOENT, "the page is not allocated")
        return PMD_ORDER if pagemap.bytes_in(pagemap.Category.HUGE, mapping.address, length) else 0


def make_large(fd: int, offset: int, length: int) -> None:
    """Make each aligned 2 MiB block that lies whole in a byte range one folio.

    The block may have pages and holes. This uses MADV_COLLAPSE (Linux 6.1). It is a hint: pages and
    holes that the kernel cannot make large stay as they are.
    """
    start, end = -(-offset // PMD_SIZE) * PMD_SIZE, (offset + length) & -PMD_SIZE
    if start >= end:
        return
    with suppress(OSError):
        mapping = Mapping(fd, start, end - start)
        try:
            for block in range(0, end - start, PMD_SIZE):
                # A block without any page cannot be collapsed.
                mapping.madvise(memory.MADV_POPULATE_WRITE, block, PAGE_SIZE)
            _collapse(mapping, end - start)
        finally:
            mapping.close()


def _collapse(mapping: Mapping, length: int) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            mapping.madvise(memory.MADV_COLLAPSE, 0, length)
        except OSError as error:
            # EAGAIN: another process just looks at a page, or a page has not reached its LRU list
            # yet. The call may be made again (madvise(2)).
            if error.errno != EAGAIN or attempt == _ATTEMPTS:
                raise
        else:
            return


def folios_in(fd: int, span: PageRange) -> Iterator[Piece]:
    """Yield the folios of a range of a memfd (``Backing.folios``).

    The lookup halves a part until all of it is present or all of it is missing. It costs a
    cachestat(2) for each halving, at worst one for each page. It costs a fault for each 2 MiB that
    is all present, and a mapping and a scan for each GiB of those.

    Raises:
        OSError: ENOSYS where there is no cachestat(2) (before Linux 6.5); as ``order_of``, but not
            ENOENT or EACCES.
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
    """Yield the runs of folios of one order, 0 or 9, in a range.

    The range begins at a block, or lies inside one.
    """
    # Count each part by itself. Pages come and go, so a difference of two counts would mix two
    # moments.
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
    """Return the first pages of the 2 MiB folios in a range.

    The range begins at a block, and all of its pages are present.
    """
    with looking(fd, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT, PMD_SIZE) as mapping:
        for block in range(0, mapping.memory.nbytes, PMD_SIZE):
            is_present(mapping, block)
        try:
            found = pagemap.runs(pagemap.Category.HUGE, mapping.address, mapping.memory.nbytes)
            large = [at for first, last in found for at in range(first, last, PMD_SIZE)]
        except OSError as error:
            # The process may not open its pagemap. smaps is slower, but not for a process that has
            # little else mapped, such as the service.
            if error.errno != EACCES:
                raise
            large = _large_by_smaps(mapping)
        return {start + (at - mapping.address >> PAGE_SHIFT) for at in large}


def _large_by_smaps(mapping: Mapping) -> list[int]:
    """Return the addresses where one entry maps 2 MiB of a mapping.

    smaps counts such entries for each mapping as a whole. So this first makes each block a mapping
    of its own.
    """
    length = mapping.memory.nbytes
    for block in range(0, length, 2 * PMD_SIZE):
        mapping.madvise(mmap.MADV_DONTFORK, block, min(PMD_SIZE, length - block))
    return list(smaps.large_mappings(mapping.address, mapping.address + length))
