"""The memory under a restricted file."""

import functools
import os
from collections.abc import Callable, Iterator
from errno import EFAULT, EINVAL
from typing import Final, Protocol, TypeAlias, final

from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd
from restrictedmem.mm.folios import Piece, folios_in, make_large, order_of
from restrictedmem.mm.hugetlb import HugetlbBacking
from restrictedmem.mm.memfd import InMemfd, make_memfd, never
from restrictedmem.units import PAGE_SIZE, PageRange, pgoff_t


class Allocator(Protocol):
    """Where a consumer gets pages of a restricted file; offsets and lengths in bytes."""

    def allocate(self, offset: int, length: int) -> None:
        """Make every page that the range touches present; a page that was there keeps its content, a new one is zero.

        Raises:
            OSError: ENOSPC, ENOMEM, EINTR.
        """
        ...

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return the order of the folio that a page lies in now, as far as the kernel tells: 0, 9 or 18. Allocates nothing.

        The truth only while nobody punches; who takes pages checks for that afterwards (``Pages``).

        Raises:
            OSError: ENOENT for a page that is missing; EACCES, ENOSYS, ENOTTY, EPERM where the
                kernel does not tell (docs/understand/folios.md).
        """
        ...

    def release(self, offset: int, length: int) -> None:
        """Let go of the pages of an aligned range, before somebody else frees them: no reference keeps them where they are."""
        ...

    def close(self) -> None:
        """Free everything, as far as no consumer still has it; what is allocated afterwards is out of such a consumer's reach."""
        ...


class Backing(Allocator, Protocol):
    """Where a restricted file's pages lie, for the shim, which frees them too."""

    def allocate(self, offset: int, length: int, abandoned: Callable[[], bool] = never) -> None:
        """Make every page that the range touches present (see ``Allocator``); ``abandoned`` is asked before each large piece.

        Raises:
            OSError: also EINTR when it said yes. The pieces before stay.
        """
        ...

    @property
    def limit(self) -> int | None:
        """The most bytes it may hold; None for no limit."""
        ...

    @property
    def base_order(self) -> int:
        """The order of the smallest folio there can be."""
        ...

    @property
    def hugepage(self) -> bool:
        """Whether blocks of 2 MiB that are taken whole are made one folio."""
        ...

    @property
    def blksize(self) -> int:
        """The bytes that are best taken at once (``st_blksize``)."""
        ...

    def punch(self, offset: int, length: int) -> None:
        """Free the pages of an aligned range; they read as zero when they are allocated again."""
        ...

    def renew(self) -> Callable[[], None]:
        """Begin anew, empty and in a memfd of its own; returns what frees the pages there were, from whoever has kept the other, too.

        That takes as long as the pages are many, and needs no lock.
        """
        ...

    def folios(self, span: PageRange) -> Iterator[Piece]:
        """Yield what a range is made of, in order and without a gap: first page, page after the last, order of each folio.

        Folios are whole even where the range begins or ends inside one. Neighbouring pages that are
        missing come as one run with None, clipped to the range.
        """
        ...

    def resident(self) -> int:
        """Return the bytes held, preallocated pages included."""
        ...

    def fileno(self) -> int:
        """Return the descriptor a consumer maps."""
        ...


@final
class MemfdBacking(InMemfd):
    """Pages in a memfd (tmpfs), as the proposal's inner file (``Backing``)."""

    __slots__ = ("hugepage",)

    def __init__(
        self, *, fd: OwnedFd | None = None, limit: int | None = None, hugepage: bool = False
    ) -> None:
        """Make an empty backing, or take over a memfd (``InMemfd``).

        ``hugepage`` asks for folios of 2 MiB whatever the policy (``RMFD_HUGEPAGE``): the blocks
        that one allocation covers whole are made such, if the kernel can.
        """
        super().__init__(fd, limit)
        self.hugepage = hugepage

    @property
    def base_order(self) -> int:
        """Return 0; larger folios come by the machine's policy for memfds (transparent_hugepage/shmem_enabled), or by ``hugepage``."""
        return 0

    @property
    def blksize(self) -> int:
        """Return 2 MiB where there may be folios of that size, by hint or by policy; else a page (see ``Backing``)."""
        if self.hugepage:
            return memory.PMD_SIZE
        with self._mutex:
            return os.fstat((self._fd or _empty_memfd()).fileno()).st_blksize

    def _make(self) -> OwnedFd:
        return make_memfd(PAGE_SIZE)

    def _allocate(self, offset: int, length: int) -> None:
        if self.hugepage:
            make_large(self.fileno(), offset, length)
        # Never past the memfd's size, so posix_fallocate(3) is fallocate(2) with mode 0, a third
        # cheaper than through ctypes.
        os.posix_fallocate(self.fileno(), offset, length)

    def _held_of(self, start: int, length: int) -> int:
        return memory.resident_pages(self.fileno(), start, length) * PAGE_SIZE

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return 9 or 0 (see ``Allocator``)."""
        return order_of(self.fileno(), pgoff)

    def folios(self, span: PageRange) -> Iterator[Piece]:
        """Yield folios of 2 MiB, pages and holes (see ``Backing``); what it costs: ``folios_in``."""
        return folios_in(self.fileno(), span)


@functools.cache
def _empty_memfd() -> OwnedFd:
    """Return a memfd to ask for the policy of all."""
    return make_memfd(PAGE_SIZE)


Memfd: TypeAlias = MemfdBacking | HugetlbBacking
_HUGETLB_ORDERS: Final = {"hugetlb-2m": memory.PMD_ORDER, "hugetlb-1g": memory.PUD_ORDER}
#: The kinds of backing by name; ``thp`` is a memfd with the hint ``RMFD_HUGEPAGE``.
KINDS: Final = ("memfd", "thp", *_HUGETLB_ORDERS)


def make_backing(kind: str, *, limit: int | None = None) -> Memfd:
    """Make an empty backing of one of ``KINDS``.

    Raises:
        OSError: EINVAL for another name.
    """
    if kind not in KINDS:
        raise OSError(EINVAL, f"no backing {kind!r}: one of {', '.join(KINDS)}")
    if kind in _HUGETLB_ORDERS:
        return HugetlbBacking(_HUGETLB_ORDERS[kind], limit=limit)
    return MemfdBacking(limit=limit, hugepage=kind == "thp")


def take_over(fd: OwnedFd, *, limit: int | None, base_order: int, hugepage: bool) -> Memfd:
    """Make a consumer's backing of the memfd behind a file's, which it owns from now on, and of what the file's says of itself."""
    if base_order:
        return HugetlbBacking(base_order, fd=fd, limit=limit)
    return MemfdBacking(fd=fd, limit=limit, hugepage=hugepage)


class Mapped(Protocol):
    """A mapping of the memfd: ``memory.Mapping``, or the standard library's."""

    def madvise(self, option: int, start: int, length: int, /) -> None:
        """madvise(2), bytes from the mapping's start on."""
        ...


@final
class MappedBacking:
    """A memfd as a consumer has it that maps it: pages come allocated, zeroed and mapped, by one call for all three."""

    __slots__ = ("_mapping", "_memfd", "_start")

    def __init__(self, memfd: Memfd, mapping: Mapped, start: int) -> None:
        """Own ``memfd``, but not the mapping of it, which begins at byte ``start`` of the file."""
        self._memfd = memfd
        self._mapping = mapping
        self._start = start

    def allocate(self, offset: int, length: int) -> None:
        """Make every page of an aligned range inside the mapping present (see ``Allocator``)."""
        self._memfd.charge(offset, length)
        if self._memfd.hugepage:
            make_large(self._memfd.fileno(), offset, length)
        try:
            self._mapping.madvise(memory.MADV_POPULATE_WRITE, offset - self._start, length)
        except OSError as error:
            # MADV_POPULATE_WRITE came with Linux 5.14; of an empty pool of huge pages it says
            # EFAULT.
            if error.errno not in (EINVAL, EFAULT):
                raise
            self._memfd.allocate(offset, length)

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return what the memfd's pages are made of (see ``Allocator``)."""
        return self._memfd.order_of(pgoff)

    def release(self, offset: int, length: int) -> None:
        """Do nothing: pages are not held (see ``Allocator``)."""

    def close(self) -> None:
        """Close the memfd."""
        self._memfd.close()
