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
    """The part of a backing that a consumer uses to take pages; offsets and lengths in bytes."""

    def allocate(self, offset: int, length: int) -> None:
        """Allocate every page that the range touches.

        Present pages keep their content; new pages are zero.

        Raises:
            OSError: ENOSPC, ENOMEM, EINTR.
        """
        ...

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return the order of the folio that contains a page: 0, 9 or 18.

        This allocates nothing. The order comes from the kernel, as far as it tells. The order is
        true only until the next punch. The caller (``Pages``) checks afterwards whether a punch
        came between.

        Raises:
            OSError: ENOENT for a missing page; EACCES, ENOSYS, ENOTTY or EPERM where the kernel
                does not tell (docs/understand/folios.md).
        """
        ...

    def release(self, offset: int, length: int) -> None:
        """Drop all references that keep an aligned range of pages in place.

        The caller does this before another process frees the pages.
        """
        ...

    def close(self) -> None:
        """Free all pages, except those that a consumer still has.

        Such a consumer cannot reach pages that are allocated afterwards.
        """
        ...


class Backing(Allocator, Protocol):
    """The memory of a restricted file, as the shim sees it, which also frees pages."""

    def allocate(self, offset: int, length: int, abandoned: Callable[[], bool] = never) -> None:
        """Allocate every page that the range touches (see ``Allocator``).

        The backing asks ``abandoned`` before each large piece.

        Raises:
            OSError: as ``Allocator.allocate``; EINTR also when ``abandoned`` returned true. The
                pieces before stay allocated.
        """
        ...

    @property
    def limit(self) -> int | None:
        """The most bytes that the backing may hold; None for no limit."""
        ...

    @property
    def base_order(self) -> int:
        """The order of the smallest folio that is possible."""
        ...

    @property
    def hugepage(self) -> bool:
        """Whether each 2 MiB block that one allocation covers whole becomes one folio."""
        ...

    @property
    def blksize(self) -> int:
        """The best number of bytes to take at once (``st_blksize``)."""
        ...

    def punch(self, offset: int, length: int) -> None:
        """Free the pages of an aligned range.

        Pages that are allocated there again read as zero.
        """
        ...

    def renew(self) -> Callable[[], None]:
        """Start again, empty and with a new memfd; return a function that frees the old pages.

        That function also frees the pages for a process that has kept the old memfd. It takes time
        in proportion to the number of pages, and needs no lock.
        """
        ...

    def folios(self, span: PageRange) -> Iterator[Piece]:
        """Yield the folios of a range, in order and without a gap.

        Each item is the first page, the page after the last, and the order. A folio comes whole
        even if the range begins or ends inside it. Adjacent missing pages come as one run with
        order None, clipped to the range.
        """
        ...

    def resident(self) -> int:
        """Return the bytes held, preallocated pages included."""
        ...

    def fileno(self) -> int:
        """Return the descriptor that a consumer maps."""
        ...


@final
class MemfdBacking(InMemfd):
    """Pages in a memfd on tmpfs, like the proposal's inner file (``Backing``)."""

    __slots__ = ("hugepage",)

    def __init__(
        self, *, fd: OwnedFd | None = None, limit: int | None = None, hugepage: bool = False
    ) -> None:
        """Make an empty backing, or take over a memfd (``InMemfd``).

        ``hugepage`` asks for folios of 2 MiB, whatever the policy says (``RMFD_HUGEPAGE``). Each 2
        MiB block that one allocation covers whole then becomes one folio, if the kernel can make
        it.
        """
        super().__init__(fd, limit)
        self.hugepage = hugepage

    @property
    def base_order(self) -> int:
        """Return 0.

        Larger folios come by the machine's policy for memfds (transparent_hugepage/shmem_enabled),
        or by ``hugepage``.
        """
        return 0

    @property
    def blksize(self) -> int:
        """Return 2 MiB where hint or policy allow such folios, else a page (see ``Backing``)."""
        if self.hugepage:
            return memory.PMD_SIZE
        with self._mutex:
            return os.fstat((self._fd or _empty_memfd()).fileno()).st_blksize

    def _make(self) -> OwnedFd:
        return make_memfd(PAGE_SIZE)

    def _allocate(self, offset: int, length: int) -> None:
        if self.hugepage:
            make_large(self.fileno(), offset, length)
        # The range is never beyond the memfd's size, so posix_fallocate(3) does what fallocate(2)
        # does with mode 0. It is a third cheaper than a call through ctypes.
        os.posix_fallocate(self.fileno(), offset, length)

    def _held_of(self, start: int, length: int) -> int:
        return memory.resident_pages(self.fileno(), start, length) * PAGE_SIZE

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return 9 or 0 (see ``Allocator``)."""
        return order_of(self.fileno(), pgoff)

    def folios(self, span: PageRange) -> Iterator[Piece]:
        """Yield folios of 2 MiB, single pages and holes (see ``Backing``).

        ``folios_in`` says what this costs.
        """
        return folios_in(self.fileno(), span)


@functools.cache
def _empty_memfd() -> OwnedFd:
    """Return an empty memfd, whose ``st_blksize`` shows the machine's policy."""
    return make_memfd(PAGE_SIZE)


Memfd: TypeAlias = MemfdBacking | HugetlbBacking
_HUGETLB_ORDERS: Final = {"hugetlb-2m": memory.PMD_ORDER, "hugetlb-1g": memory.PUD_ORDER}
#: Names of the kinds of backing. ``thp`` is a memfd with the hint ``RMFD_HUGEPAGE``.
KINDS: Final = ("memfd", "thp", *_HUGETLB_ORDERS)


def make_backing(kind: str, *, limit: int | None = None) -> Memfd:
    """Make an empty backing of one of ``KINDS``.

    Raises:
        OSError: EINVAL for any other name.
    """
    if kind not in KINDS:
        raise OSError(EINVAL, f"no backing {kind!r}: one of {', '.join(KINDS)}")
    if kind in _HUGETLB_ORDERS:
        return HugetlbBacking(_HUGETLB_ORDERS[kind], limit=limit)
    return MemfdBacking(limit=limit, hugepage=kind == "thp")


def take_over(fd: OwnedFd, *, limit: int | None, base_order: int, hugepage: bool) -> Memfd:
    """Make a consumer's backing of the memfd behind a file's backing.

    The result owns ``fd``. The other arguments are the attributes of the file's backing.
    """
    if base_order:
        return HugetlbBacking(base_order, fd=fd, limit=limit)
    return MemfdBacking(fd=fd, limit=limit, hugepage=hugepage)


class Mapped(Protocol):
    """A mapping of the memfd: ``memory.Mapping``, or the standard library's."""

    def madvise(self, option: int, start: int, length: int, /) -> None:
        """Call madvise(2); ``start`` counts bytes from the mapping's start."""
        ...


@final
class MappedBacking:
    """The backing of a consumer that maps the memfd.

    One call allocates, zeroes and maps pages.
    """

    __slots__ = ("_mapping", "_memfd", "_start")

    def __init__(self, memfd: Memfd, mapping: Mapped, start: int) -> None:
        """Own ``memfd``, but not its mapping, which begins at byte ``start`` of the file."""
        self._memfd = memfd
        self._mapping = mapping
        self._start = start

    def allocate(self, offset: int, length: int) -> None:
        """Allocate an aligned range that lies inside the mapping (see ``Allocator``)."""
        self._memfd.charge(offset, length)
        if self._memfd.hugepage:
            make_large(self._memfd.fileno(), offset, length)
        try:
            self._mapping.madvise(memory.MADV_POPULATE_WRITE, offset - self._start, length)
        except OSError as error:
            # EINVAL: the kernel is older than Linux 5.14 and has no MADV_POPULATE_WRITE. EFAULT:
            # the pool of huge pages is empty.
            if error.errno not in (EINVAL, EFAULT):
                raise
            self._memfd.allocate(offset, length)

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return the order that the memfd returns (see ``Allocator``)."""
        return self._memfd.order_of(pgoff)

    def release(self, offset: int, length: int) -> None:
        """Do nothing: this backing holds no references (see ``Allocator``)."""

    def close(self) -> None:
        """Close the memfd."""
        self._memfd.close()
