"""Code that one vCPU writes and another executes (Intel SDM 9.1.3).

An emulator notices its own stores to what it has translated, but not those of another emulator. So
a page that any vCPU fetches from is write-protected in the TLBs of all (``Mmu.protect_code``). At
the first store by another vCPU, those that have translated the page translate it again.
"""

from typing import final


@final
class CodePages:
    """The vCPUs that may have translated code of each guest page.

    Only the vCPU whose turn it is asks or changes it.
    """

    def __init__(self) -> None:
        #: By guest page: a bit for each vCPU.
        self._holders: dict[int, int] = {}
        self._stale: list[set[int]] = []

    def add_vcpu(self) -> int:
        """Add a vCPU, and return its number."""
        self._stale.append(set())
        return len(self._stale) - 1

    def fetched(self, gfn: int, vcpu: int, *, newly_protected: bool) -> None:
        """Note that a vCPU translates code of a page.

        The others may have the page in their TLBs as writable.
        """
        holders = self._holders.get(gfn, 0)
        if newly_protected or not holders >> vcpu & 1:
            self._holders[gfn] = holders | 1 << vcpu
            for number, stale in enumerate(self._stale):
                if number != vcpu:
                    stale.add(gfn)

    def written(self, gfn: int, vcpu: int) -> None:
        """Note that a vCPU may write to a page from now on.

        The others have to translate the page's code again.
        """
        holders = self._holders.get(gfn, 0)
        self._holders[gfn] = holders & 1 << vcpu
        for number, stale in enumerate(self._stale):
            if number != vcpu and holders >> number & 1:
                stale.add(gfn)

    def take_stale(self, vcpu: int) -> set[int]:
        """Return the pages that a vCPU has to drop before it runs."""
        stale = self._stale[vcpu]
        if stale:
            self._stale[vcpu] = set()
        return stale
