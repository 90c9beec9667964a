"""A model of SEV-SNP's reverse map table (RMP), which has an owner for each physical page.

Instructions return the errors that Linux relies on (arch/x86/virt/svm/sev.c). The fields of an
entry and the effects of each instruction are in docs/understand/platform.md, with sources. ``sev``
models how Linux uses the table.
"""

from collections import Counter
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, final

from restrictedmem.platform.direct_map import PMD_ORDER, PTE_ORDER

_PAGES: Final = 1 << PMD_ORDER


class Fail(IntEnum):
    """Results of RMPUPDATE, PSMASH and PVALIDATE."""

    NONE = 0
    INPUT = 1
    """The address is not aligned for the size, or PSMASH found an entry of the wrong size."""
    PERMISSION = 2
    """The page is immutable."""
    INUSE = 3
    """Another processor or firmware holds the entry; this is transient."""
    OVERLAP = 4
    """A 4 KiB page inside an entry of 2 MiB, or 2 MiB over an entry of 4 KiB."""
    SIZEMISMATCH = 6
    """PVALIDATE of 2 MiB where the table has 4 KiB."""


#: Linux's name for PVALIDATE with carry set: the page was in that state before.
PVALIDATE_FAIL_NOUPDATE: Final = 255


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the table (``struct rmpentry``), with the fields that Linux uses.

    ``order`` is its page size, 0 or 9.
    """

    assigned: bool = False
    asid: int = 0
    gpa: int = 0
    order: int = PTE_ORDER
    immutable: bool = False
    validated: bool = False


#: The entry of a page that belongs to the host: all zero.
HYPERVISOR: Final = Entry()


@final
class Rmp:
    """The table, for all of physical memory. Pages are pfns."""

    __slots__ = ("_blocks", "in_use", "operations")

    def __init__(self) -> None:
        # By block of 2 MiB, then by pfn: entries that are not the host's. An entry of 2 MiB is the
        # only one of its block, under the block's first pfn.
        self._blocks: dict[int, dict[int, Entry]] = {}
        #: Pages whose entries another processor or firmware holds.
        self.in_use = set[int]()
        #: How often each instruction succeeded, by its name and size.
        self.operations = Counter[str]()

    def lookup(self, pfn: int) -> Entry:
        """Return the entry that applies to a page (``snp_lookup_rmpentry``).

        If the first entry of the page's 2 MiB block is of 2 MiB, it applies to all of the block.
        """
        block = self._blocks.get(pfn >> PMD_ORDER, {})
        head = block.get(pfn & -_PAGES, HYPERVISOR)
        return head if head.order == PMD_ORDER else block.get(pfn, HYPERVISOR)

    def assigned(self, pfn: int) -> int:
        """Return how many of the 512 pages of a page's 2 MiB are assigned."""
        return sum(1 << entry.order for entry in self._blocks.get(pfn >> PMD_ORDER, {}).values())

    def all_assigned(self) -> list[int]:
        """Return every page that is assigned, in order."""
        entries = ((pfn, entry) for block in self._blocks.values() for pfn, entry in block.items())
        return sorted(
            page for pfn, entry in entries for page in range(pfn, pfn + (1 << entry.order))
        )

    def rmpupdate(self, pfn: int, new: Entry) -> Fail:
        """Write an entry (RMPUPDATE, by the host); the guest has to validate it again."""
        size = 1 << new.order
        if pfn & size - 1 or new.gpa >> 12 & size - 1:
            return Fail.INPUT
        block = self._blocks.get(pfn >> PMD_ORDER, {})
        old = self.lookup(pfn)
        if not self.in_use.isdisjoint(range(pfn, pfn + size)):
            return Fail.INUSE
        if block and old.order != new.order:
            return Fail.OVERLAP
        if old.immutable:
            return Fail.PERMISSION
        if new.assigned:
            self._blocks.setdefault(pfn >> PMD_ORDER, {})[pfn] = (
                replace(new, validated=False) if new.validated else new
            )
        elif block.pop(pfn, None) is not None and not block:
            del self._blocks[pfn >> PMD_ORDER]
        self._count("RMPUPDATE", new.order)
        return Fail.NONE

    def psmash(self, pfn: int) -> Fail:
        """Split an entry into 512, each as validated as the old one (PSMASH, by the host).

        Only freeing all of them makes one entry possible again.
        """
        entry = self.lookup(pfn)
        if pfn & _PAGES - 1 or entry.order != PMD_ORDER:
            return Fail.INPUT
        if not self.in_use.isdisjoint(range(pfn, pfn + _PAGES)):
            return Fail.INUSE
        small = {
            pfn + index: replace(entry, gpa=entry.gpa + (index << 12), order=PTE_ORDER)
            for index in range(_PAGES)
        }
        self._blocks[pfn >> PMD_ORDER] = small
        self._count("PSMASH", PMD_ORDER)
        return Fail.NONE

    def pvalidate(self, pfn: int, order: int) -> int:
        """Validate a page (PVALIDATE, by the guest that the page is assigned to).

        Return ``Fail`` or ``PVALIDATE_FAIL_NOUPDATE``.
        """
        entry = self.lookup(pfn)
        if pfn & (1 << order) - 1:
            return Fail.INPUT
        if entry.order != order:
            return Fail.SIZEMISMATCH
        if entry.validated:
            return PVALIDATE_FAIL_NOUPDATE
        self._blocks[pfn >> PMD_ORDER][pfn] = replace(entry, validated=True)
        self._count("PVALIDATE", order)
        return Fail.NONE

    def write_faults(self, pfn: int, order: int) -> bool:
        """Say whether the host's write to a page, through a mapping of ``order``, faults.

        The fault is #PF with the RMP bit. Through a mapping of 2 MiB or more, the processor checks
        all of the page's 2 MiB; a mapping of 1 GiB counts as 2 MiB.
        """
        return bool(self.assigned(pfn)) if order >= PMD_ORDER else self.lookup(pfn).assigned

    def _count(self, instruction: str, order: int) -> None:
        self.operations[f"{instruction} {'2M' if order else '4K'}"] += 1
