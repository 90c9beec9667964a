"""Memory slots: a range of guest pages, its two halves, and which pages the guest has mapped."""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable
from errno import EINVAL
from typing import TYPE_CHECKING, Final, Protocol, final

from restrictedmem import sync
from restrictedmem.abi import memory
from restrictedmem.kvm.lpage import LpageInfo
from restrictedmem.mm.backing import MappedBacking, MemfdBacking
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import PAGE_SHIFT, PageRange, gfn_t, pgoff_t

if TYPE_CHECKING:
    from restrictedmem.kvm.engine import Bound

# What an entry of the secondary page table says; 0 is no translation. The rights are numbered as Unicorn's UC_PROT_*.
READ: Final = 1
WRITE: Final = 2
EXEC: Final = 4
ALL: Final = READ | WRITE | EXEC
#: The entry leads to the private half.
PRIVATE: Final = 8
#: Some vCPU may have translated code of the page; what lacks WRITE for it can be written all the same, with notice (``Mmu.protect_code``).
CODE: Final = 16

_F_ADD_SEALS: Final = 1033
_F_SEAL_SHRINK: Final = 2


@final
class Half:
    """One half of a slot, mapped whole into this process."""

    __slots__ = ("address", "locked", "mapping", "size", "source", "unlocked_because")

    def __init__(self, fd: int, offset: int, size: int) -> None:
        """Map ``size`` bytes of ``fd`` from byte ``offset`` on; the descriptor stays the caller's.

        Raises:
            OSError: ENOMEM.
        """
        self.size = size
        self.source = source_of(fd, offset)
        self.mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        #: Where the half lies in this process.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        #: Bytes locked; when 0, why.
        self.locked = 0
        self.unlocked_because = ""

    def lock(self) -> None:
        """Lock the half as its pages come, all of it or nothing; where the limit forbids it, remember why."""
        try:
            memory.mlock_onfault(self.address, self.size)
            self.locked = self.size
        except OSError as error:
            self.unlocked_because = os.strerror(error.errno or 0)

    def write(self, start: int, data: bytes) -> None:
        """Write content at a byte offset of the half."""
        self.mapping[start : start + len(data)] = data

    def close(self) -> None:
        """Unmap the half; nobody may use its address any more."""
        self.mapping.close()


class PrivateHalf(Protocol):
    """The half in a restricted file, whatever an engine keeps it in."""

    #: The binding with the service, and the part of the file that the slot shows.
    binding: int
    window: PageRange

    @property
    def locked(self) -> int:
        """Bytes locked."""
        ...

    @property
    def unlocked_because(self) -> str:
        """Why nothing is locked, when nothing is."""
        ...

    def close(self) -> None:
        """Unbind and let go of the half; nobody may use it any more."""
        ...


@final
class MemfdHalf:
    """A private half in the file's own memfd, mapped whole (``PrivateHalf``), and what the fault path needs of it."""

    __slots__ = ("_memfd", "_unbind", "binding", "failed", "half", "ino", "pages", "sequence", "window")

    def __init__(self, bound: "Bound", window: PageRange, unbind: Callable[[], None]) -> None:
        """Own both descriptors of ``bound``; ``window`` is the part of the file that the slot shows."""
        self.binding = bound.number
        self.ino = bound.ino
        #: Pages of the file that the machine has lost, under the MMU's lock.
        self.failed: set[int] = set()
        self.window = window
        self._unbind = unbind
        self._memfd = bound.memfd
        start = window.start << PAGE_SHIFT
        self.half = Half(bound.memfd.fileno(), start, len(window) << PAGE_SHIFT)
        self.pages = Pages(MappedBacking(MemfdBacking(fd=bound.memfd, limit=bound.limit), self.half.mapping, start), window)
        self.sequence = InvalidationSequence(bound.sequence, writable=False)

    def read(self, start: int, size: int) -> bytes:
        """Return content from a byte offset of the half on, taking no page: one that is missing reads as zero."""
        return os.pread(self._memfd.fileno(), size, (self.window.start << PAGE_SHIFT) + start)

    @property
    def locked(self) -> int:
        """Bytes locked."""
        return self.half.locked

    @property
    def unlocked_because(self) -> str:
        """Why nothing is locked."""
        return self.half.unlocked_because

    def close(self) -> None:
        """Unbind, unmap and close (``PrivateHalf``)."""
        self._unbind()
        self.half.close()
        self.sequence.close()
        self.pages.close()


@final
class Memslot:
    """Guest pages ``base_gfn`` to ``end_gfn``; each shows its page of one half at a time, as its attribute says.

    ``attributes`` says which pages are private; ``entries`` is the secondary page table of an engine whose MMU is ours. One byte a page
    each, written only under the MMU's lock.
    """

    __slots__ = ("attributes", "base_gfn", "end_gfn", "entries", "lpage", "number", "private", "rights", "shared")

    def __init__(
        self, number: int, base_gfn: gfn_t, npages: int, *, private: PrivateHalf | None, shared: Half | None, rights: int = ALL
    ) -> None:
        """Make a slot of one or two halves, each of ``npages`` pages, with every page shared."""
        self.number = number
        self.base_gfn = base_gfn
        self.end_gfn = gfn_t(base_gfn + npages)
        self.private = private
        self.shared = shared
        self.rights = rights
        self.entries = sync.shared_bytes(npages)
        self.attributes = sync.shared_bytes(npages)
        starts = [] if private is None else [int(private.window.start)]
        starts += [] if shared is None else [shared.source[2] >> PAGE_SHIFT]
        self.lpage = LpageInfo(self.base_gfn, self.end_gfn, tuple(starts), self.attributes)

    @property
    def memfd_half(self) -> MemfdHalf:
        """The private half, of an engine that keeps it in the file's memfd."""
        assert isinstance(self.private, MemfdHalf)
        return self.private

    def clip(self, start: gfn_t, end: gfn_t) -> tuple[gfn_t, gfn_t]:
        """Return the part of a range of guest pages that lies in this slot, empty (start == end) when there is none."""
        first = max(start, self.base_gfn)
        return first, max(first, min(end, self.end_gfn))

    def gfns_of(self, span: PageRange) -> tuple[gfn_t, gfn_t]:
        """Return the guest pages that show a range of the private half's file.

        The posted arithmetic underflowed for a hole that ends below the slot's window; clipping to the window first cannot.
        """
        assert self.private is not None
        inside = self.private.window.clip(span)
        shift = self.base_gfn - self.private.window.start
        return gfn_t(inside.start + shift), gfn_t(inside.end + shift)

    def pgoff_of(self, gfn: int) -> pgoff_t:
        """Return the page of the private half's file that a guest page shows."""
        assert self.private is not None
        return pgoff_t(gfn - self.base_gfn + self.private.window.start)

    def close(self) -> None:
        """Unmap both halves; no vCPU may know the slot any more."""
        if self.private is not None:
            self.private.close()
        if self.shared is not None:
            self.shared.close()


def source_of(fd: int, offset: int) -> tuple[int, int, int]:
    """Return which bytes of which file a half shows: device, inode number, offset."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, offset


def forbid_shrinking(fd: int) -> None:
    """Seal a memfd of the owner's against shrinking: a mapping past its end would be SIGBUS for whoever touches it.

    Raises:
        OSError: EINVAL when it is no memfd, or is sealed against seals.
    """
    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK)
    except OSError:
        raise OSError(EINVAL, "shared memory must be a memfd that can be sealed against shrinking") from None
