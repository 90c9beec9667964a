"""The guest's page tables, in the engine's memory, where no guest or owner reaches them.

A guest sees its slots at the linear addresses where the owner put them. These page tables decide,
page by page, where such an address leads in guest physical memory. So an address that no slot
covers is a #PF with its exact address, and a page changes halves by a change of its entry.

While KVM has an entry shadowed, it does not notice what the host writes here (it tracks the guest's
own writes). So the engine relies on a page's entry only after KVM's translation of the page was
zapped. And an entry that leads to another table never changes again.
"""

import mmap
import struct
from array import array
from errno import ENOMEM
from itertools import islice
from typing import Final, final

from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE

# Bits of an entry (Intel SDM 4.5).
PRESENT: Final = 1 << 0
WRITABLE: Final = 1 << 1
USER: Final = 1 << 2
_ACCESSED: Final = 1 << 5
_DIRTY: Final = 1 << 6
NO_EXECUTE: Final = 1 << 63
_ADDRESS: Final = ((1 << 52) - 1) & ~(PAGE_SIZE - 1)

_ENTRIES: Final = 512
_LEVELS: Final = (39, 30, 21)
_ENTRY: Final = struct.Struct("=Q")


def entries(gpa: int, npages: int, rights: int) -> bytes:
    """Return entries that lead to pages from ``gpa`` on."""
    # Accessed and dirty are set. KVM would set them one by one, and map each page twice to learn of
    # the first store.
    flags = rights | PRESENT | _ACCESSED | _DIRTY
    return array(
        "Q", range(gpa | flags, (gpa | flags) + (npages << PAGE_SHIFT), PAGE_SIZE)
    ).tobytes()


def no_entries(npages: int) -> bytes:
    """Return entries that lead nowhere."""
    return bytes(_ENTRY.size * npages)


@final
class PageTables:
    """A tree of tables in ``memory``, whose guest physical addresses are its offsets.

    The tables come from the bytes ``start`` to ``end``.
    """

    def __init__(self, memory: mmap.mmap, start: int, end: int) -> None:
        """Make a tree without entries; the root is the first table."""
        self._memory = memory
        self._next = start
        self._end = end
        #: Guest physical address of the root, for CR3.
        self.root = self._take()
        #: By level, the table that serves each block of guest addresses.
        self._tables: dict[int, dict[int, int]] = {shift: {} for shift in _LEVELS}
        self._leaves = self._tables[_LEVELS[-1]]

    def _take(self) -> int:
        if self._next == self._end:
            raise OSError(ENOMEM, "no page tables left for more guest addresses")
        self._next += PAGE_SIZE
        return self._next - PAGE_SIZE

    def _leaf(self, linear: int) -> int:
        """Return the table with the entry of a page; make it if there is none."""
        table = self._leaves.get(linear >> _LEVELS[-1])
        if table is None:
            table = self.root
            for shift, tables in self._tables.items():
                table = self._next_table(table + _ENTRY.size * (linear >> shift & _ENTRIES - 1))
                tables[linear >> shift] = table
        return table

    def _next_table(self, at: int) -> int:
        entry: int = _ENTRY.unpack_from(self._memory, at)[0]
        if not entry:
            # The last entry alone decides on rights.
            entry = self._take() | PRESENT | WRITABLE | USER | _ACCESSED
            _ENTRY.pack_into(self._memory, at, entry)
        return entry & _ADDRESS

    def reserve(self, linear: int, npages: int) -> None:
        """Make all tables of a range, or none of them, so that ``map`` cannot fail there.

        Raises:
            OSError: ENOMEM.
        """
        last = linear + (npages << PAGE_SHIFT) - 1
        missing = (
            block
            for shift, tables in self._tables.items()
            for block in range(linear >> shift, (last >> shift) + 1)
            if block not in tables
        )
        left = self._end - self._next >> PAGE_SHIFT
        if next(islice(missing, left, None), None) is not None:
            raise OSError(ENOMEM, "too few page tables left for so many guest addresses")
        for address in range(linear & -(1 << _LEVELS[-1]), last + 1, 1 << _LEVELS[-1]):
            self._leaf(address)

    def map(self, linear: int, gpa: int, npages: int, rights: int) -> None:
        """Let pages from ``linear`` on lead to those from ``gpa`` on."""
        self.write(linear, entries(gpa, npages, rights))

    def unmap(self, linear: int, npages: int) -> None:
        """Let pages lead nowhere."""
        self.write(linear, no_entries(npages))

    def write(self, linear: int, entries: bytes) -> None:
        """Write the entries of pages from ``linear`` on.

        Preconditions: their tables have been made (``reserve``).
        """
        done = 0
        while done < len(entries):
            at = _ENTRY.size * (linear >> PAGE_SHIFT & _ENTRIES - 1)
            count = min(len(entries) - done, _ENTRIES * _ENTRY.size - at)
            table = self._leaf(linear)
            self._memory[table + at : table + at + count] = entries[done : done + count]
            linear += count // _ENTRY.size << PAGE_SHIFT
            done += count

    def entry(self, linear: int) -> int:
        """Return the entry of a page, 0 where there is none."""
        table = self._leaves.get(linear >> _LEVELS[-1])
        if table is None:
            return 0
        return int(
            _ENTRY.unpack_from(
                self._memory, table + _ENTRY.size * (linear >> PAGE_SHIFT & _ENTRIES - 1)
            )[0]
        )
