"""A model of what Linux does with the RMP and its direct map.

The sources are arch/x86/virt/svm/sev.c and arch/x86/kvm/svm/sev.c.
"""

from errno import EFAULT
from typing import final

from restrictedmem.platform.direct_map import PMD_ORDER, PTE_ORDER, DirectMap
from restrictedmem.platform.rmp import HYPERVISOR, Entry, Fail, Rmp

_PAGES = 1 << PMD_ORDER


@final
class Sev:
    """The host's calls, under Linux's names. Pages are pfns.

    With ``unmap``, pages that a guest gets leave the direct map, as in the first posting of SNP for
    guest_memfd (December 2023). Without it they stay, as in the version that was merged. They then
    have entries of 4 KiB where the table has 4 KiB.
    """

    __slots__ = ("_unmap", "direct_map", "leaked", "rmp")

    def __init__(self, *, unmap: bool) -> None:
        self._unmap = unmap
        self.rmp = Rmp()
        self.direct_map = DirectMap()
        #: Pages that are never used again (``snp_leaked_pages_list``).
        self.leaked = set[int]()

    def make_private(self, pfn: int, gpa: int, order: int, asid: int) -> None:
        """Give pages to a guest, as one entry of ``order`` (``rmp_make_private``).

        Raises:
            OSError: EFAULT for every failure of RMPUPDATE.
        """
        if self._unmap:
            self.direct_map.remove(pfn, order)
        self._rmpupdate(pfn, Entry(assigned=True, asid=asid, gpa=gpa, order=order))

    def make_shared(self, pfn: int, order: int) -> None:
        """Take pages back from a guest (``rmp_make_shared``).

        If they are 4 KiB of an entry of 2 MiB, the entry is split first (PSMASH).

        Raises:
            OSError: EFAULT for every failure of PSMASH or RMPUPDATE.
        """
        entry = self.rmp.lookup(pfn)
        if not entry.assigned:
            return
        if entry.order > order:
            self.psmash(pfn & -_PAGES)
        self._rmpupdate(pfn, Entry(order=order))
        if self._unmap:
            self.direct_map.restore(pfn, order)

    def psmash(self, pfn: int) -> None:
        """Split an entry of 2 MiB.

        Raises:
            OSError: EFAULT. Linux tries again while the entry is in use; in this model that would
                never end.
        """
        _check("PSMASH", pfn, self.rmp.psmash(pfn))

    def _rmpupdate(self, pfn: int, new: Entry) -> None:
        # As adjust_direct_map does: a write through a larger mapping would fault. An entry of 2 MiB
        # needs no split, because a mapping of 1 GiB is checked as 2 MiB.
        if new.order == PTE_ORDER:
            self.direct_map.split(pfn, PTE_ORDER)
        _check("RMPUPDATE", pfn, self.rmp.rmpupdate(pfn, new))

    def is_shared(self, pfn: int) -> bool:
        """Say whether no page of a page's 2 MiB is assigned (``is_pfn_range_shared``)."""
        return not self.rmp.assigned(pfn)

    def reclaim(self, start: int, end: int) -> None:
        """Take pages back in the sizes that the table has (``sev_gmem_invalidate``).

        Pages that cannot be taken back are leaked.
        """
        pfn = start
        while pfn < end:
            entry = self.rmp.lookup(pfn)
            order = (
                PMD_ORDER
                if entry.order == PMD_ORDER and not pfn & _PAGES - 1 and pfn + _PAGES <= end
                else PTE_ORDER
            )
            try:
                if entry != HYPERVISOR:
                    self.make_shared(pfn, order)
            except OSError:
                # As snp_leak_pages does.
                self.leaked.update(range(pfn, pfn + (1 << order)))
            pfn += 1 << order


def _check(instruction: str, pfn: int, result: Fail) -> None:
    if result is not Fail.NONE:
        raise OSError(EFAULT, f"{instruction} of pfn {pfn:#x}: {result.name} ({int(result)})")
