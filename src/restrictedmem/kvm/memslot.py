"""Memslots: a range of guest pages, its two halves, and the pages that are mapped."""

import os
from collections.abc import Callable
from typing import Final, Protocol, final

from restrictedmem import sync
from restrictedmem.consumer.memfd_file import MemfdFile
from restrictedmem.kvm.half import Half, SharedHalf, alignment_for
from restrictedmem.kvm.lpage import LARGE, Level, LpageInfo
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, gfn_t, pgoff_t

# Bits of an entry of the secondary page table; an entry of 0 is no translation. The rights have the
# numbers of Unicorn's UC_PROT_*.
READ: Final = 1
WRITE: Final = 2
EXEC: Final = 4
ALL: Final = READ | WRITE | EXEC
#: The entry leads to the private half.
PRIVATE: Final = 8
#: A vCPU may have translated code of the page. A page that lacks WRITE for this can be written all
#: the same, with notice (``Mmu.protect_code``).
CODE: Final = 16
#: Bits of an entry below its level, which is ``Level`` less 1. All entries of a 2 MiB or 1 GiB
#: mapping are equal, and none has CODE.
LEVEL_SHIFT: Final = 5

# In variables: to look up a member of an enumeration takes as long as to count a fault's entries.
_PAGE: Final = int(Level.PAGE)
_LEVELS: Final = int(Level.PUD) + 1


class PrivateHalf(Protocol):
    """The half of a slot that is in a restricted file, however an engine keeps it."""

    #: The binding with the service, the file's inode number, and the part of the file that the slot
    #: shows.
    binding: int
    ino: int
    window: PageRange

    @property
    def locked(self) -> int:
        """How many bytes are locked."""
        ...

    @property
    def unlocked_because(self) -> str:
        """Why nothing is locked, if nothing is."""
        ...

    def close(self) -> None:
        """Unbind the half and free it.

        Preconditions: nobody uses it any more.
        """
        ...


@final
class MemfdHalf:
    """A private half in the file's own memfd, mapped whole (``PrivateHalf``).

    It also has what the fault path needs of the file.
    """

    __slots__ = (
        "_unbind",
        "binding",
        "failed",
        "file",
        "half",
        "in_place",
        "ino",
        "may_have_folios",
        "order",
        "pages",
        "sequence",
        "told",
        "window",
    )

    def __init__(
        self, file: MemfdFile, binding: int, window: PageRange, unbind: Callable[[], None]
    ) -> None:
        """Use ``file``; ``window`` is the part of it that the slot shows.

        If the file is pinned, no other half uses it.

        Raises:
            OSError: ENOMEM.
        """
        self.binding = binding
        self.ino = file.ino
        #: Pages of the file that the machine has lost, under the MMU's lock.
        self.failed: set[int] = set()
        #: How many invalidations have been told of and have not ended, under the MMU's lock.
        self.told = 0
        self.window = window
        self._unbind = unbind
        self.file = file
        #: Whether the file is a guest_memfd, whose pages are converted in place.
        self.in_place = file.is_guest_memfd
        self.order = file.order
        #: Whether a page may lie in a folio larger than itself.
        self.may_have_folios = file.blksize > PAGE_SIZE
        self.sequence = file.sequence
        start, size = window.start << PAGE_SHIFT, len(window) << PAGE_SHIFT
        self.half = Half(file.memfd.fileno(), start, size, max(alignment_for(size), file.blksize))
        try:
            self.pages = file.pages(window, self.half.mapping)
        except BaseException:
            self.half.close()
            raise
        file.get()

    def lost(self, span: PageRange) -> bool:
        """Say whether the machine has lost a page of a range of the file."""
        return any(span.start <= pgoff < span.end for pgoff in tuple(self.failed))

    def read(self, start: int, size: int) -> bytes:
        """Return content from a byte offset of the half on.

        This takes no page: a missing page reads as zero.
        """
        return os.pread(self.file.memfd.fileno(), size, (self.window.start << PAGE_SHIFT) + start)

    @property
    def locked(self) -> int:
        """How many bytes are locked."""
        return self.half.locked

    @property
    def unlocked_because(self) -> str:
        """Why nothing is locked, if nothing is."""
        return self.half.unlocked_because

    def close(self) -> None:
        """Unbind, unmap and close the half (``PrivateHalf``)."""
        self._unbind()
        self.half.close()
        if self.file.pinned:
            self.pages.close()
        self.file.put()


@final
class Memslot:
    """Guest pages ``base_gfn`` to ``end_gfn``. Each shows its page of one half at a time.

    ``attributes`` says which pages are private, and so which half they show. ``entries`` is the
    secondary page table, if the engine's MMU is ours. Both have one byte a page. Such an engine
    writes them only under the MMU's lock.
    """

    __slots__ = (
        "attributes",
        "base_gfn",
        "end_gfn",
        "entries",
        "lpage",
        "mapped",
        "number",
        "private",
        "rights",
        "shared",
    )

    def __init__(
        self,
        number: int,
        base_gfn: gfn_t,
        npages: int,
        *,
        private: PrivateHalf | None,
        shared: SharedHalf | None,
        rights: int = ALL,
    ) -> None:
        """Make a slot of one or two halves of ``npages`` pages, with every page shared."""
        self.number = number
        self.base_gfn = base_gfn
        self.end_gfn = gfn_t(base_gfn + npages)
        self.private = private
        self.shared = shared
        self.rights = rights
        self.entries = sync.shared_bytes(npages)
        self.attributes = sync.shared_bytes(npages)
        #: How many translations ``entries`` holds, by level (KVM's statistics pages_4k, pages_2m
        #: and pages_1g).
        self.mapped = [0] * _LEVELS
        starts: tuple[int, ...] = () if private is None else (int(private.window.start),)
        starts += () if shared is None else (shared.offset >> PAGE_SHIFT,)
        self.lpage = LpageInfo(base_gfn, self.end_gfn, starts, self.attributes)

    @property
    def memfd_half(self) -> MemfdHalf:
        """The private half, if the engine keeps it in the file's memfd."""
        assert isinstance(self.private, MemfdHalf)
        return self.private

    @property
    def in_place(self) -> bool:
        """Whether both halves are one guest_memfd, whose pages are converted in place."""
        return isinstance(self.private, MemfdHalf) and self.private.in_place

    def clip(self, start: gfn_t, end: gfn_t) -> tuple[gfn_t, gfn_t]:
        """Return the part of a range of guest pages that lies in this slot.

        It is empty (start == end) when there is none.
        """
        first = max(start, self.base_gfn)
        return first, max(first, min(end, self.end_gfn))

    def gfns_of(self, span: PageRange) -> tuple[gfn_t, gfn_t]:
        """Return the guest pages that show a range of the private half's file.

        The arithmetic of the postings underflowed for a hole that ends below the slot's window.
        This method clips to the window first, and so cannot.
        """
        assert self.private is not None
        inside = self.private.window.clip(span)
        shift = self.base_gfn - self.private.window.start
        return gfn_t(inside.start + shift), gfn_t(inside.end + shift)

    def span_of(self, first: int, last: int) -> PageRange:
        """Return the range of the private half's file that pages of the slot show.

        ``first`` and ``last`` are numbers of pages in the slot.
        """
        assert self.private is not None
        start = self.private.window.start
        return PageRange(pgoff_t(start + first), pgoff_t(start + last))

    def pgoff_of(self, gfn: int) -> pgoff_t:
        """Return the page of the private half's file that a guest page shows."""
        assert self.private is not None
        return pgoff_t(gfn - self.base_gfn + self.private.window.start)

    # Translations, by the numbers of the pages in the slot. Changes need the MMU's lock.

    def _private_entry(self, level: Level) -> int:
        return self.rights | PRIVATE | level - 1 << LEVEL_SHIFT

    def block(self, index: int, level: Level) -> tuple[int, int]:
        """Return the first page of the aligned block around a page, and its end.

        Either may lie outside the slot.
        """
        first = (self.base_gfn + index & -level.pages) - self.base_gfn
        return first, first + level.pages

    def leaf(self, index: int) -> tuple[int, int]:
        """Return the pages that are translated as one with a page.

        That is the page alone, unless its translation is a large one.
        """
        return self.block(index, Level((self.entries[index] >> LEVEL_SHIFT) + 1))

    def has_code(self, first: int, last: int) -> bool:
        """Say whether any private page of a range is write-protected for the code on it."""
        return self.entries.find(self.rights & ~WRITE | PRIVATE | CODE, first, last) >= 0

    def install(self, first: int, last: int, entry: int) -> None:
        """Translate the pages of a range that have no translation, each by itself."""
        missing = self.entries.count(0, first, last)
        new = bytes((entry,))
        self.entries[first:last] = (
            new * missing
            if missing == last - first
            else self.entries[first:last].replace(b"\0", new)
        )
        self.mapped[_PAGE] += missing

    def install_large(self, first: int, level: Level) -> None:
        """Translate a private block as one, in place of the smaller translations in it."""
        last = first + level.pages
        self.remove(first, last)
        self.entries[first:last] = bytes((self._private_entry(level),)) * level.pages
        self.mapped[level] += 1

    def split(self, index: int) -> int:
        """Make the translation of a page one of that page alone (demote).

        Return how many large translations this split.
        """
        splits = 0
        while (level := Level((self.entries[index] >> LEVEL_SHIFT) + 1)) in LARGE:
            first, last = self.block(index, level)
            smaller = Level(level - 1)
            self.entries[first:last] = bytes((self._private_entry(smaller),)) * level.pages
            self.mapped[level] -= 1
            self.mapped[smaller] += level.pages // smaller.pages
            splits += 1
        return splits

    def remove(self, first: int, last: int) -> int:
        """Remove the translations of a range, and return of how many pages.

        Preconditions: the range cuts no large translation.
        """
        nothing = bytes(last - first)
        removed = small = last - first - self.entries.count(0, first, last)
        for level in LARGE:
            if self.mapped[level]:
                large = self.entries.count(self._private_entry(level), first, last)
                self.mapped[level] -= large // level.pages
                small -= large
        self.mapped[Level.PAGE] -= small
        self.entries[first:last] = nothing
        return removed

    def close(self) -> None:
        """Unmap both halves.

        Preconditions: no vCPU knows the slot any more.
        """
        if self.private is not None:
            self.private.close()
        if self.shared is not None:
            self.shared.close()
