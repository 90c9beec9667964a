"""Code that one vCPU writes and another executes (Intel SDM 9.1.3).

An emulator notices its own stores to what it has translated, not those of another. So a page that
any vCPU fetches from is write-protected in the TLBs of all (``Mmu.protect_code``), and the first
store by another makes those who have translated it translate it anew.
"""

from typing import final


@final
class CodePages:
    """Which vCPUs may have translated code of which guest page; asked and told only by the vCPU whose turn it is."""

    def __init__(self) -> None:
        #: By guest page: a bit for each vCPU.
        self._holders: dict[int, int] = {}
        self._stale: list[set[int]] = []

    def add_vcpu(self) -> int:
        """Return the number of one more vCPU."""
        self._stale.append(set())
        return len(self._stale) - 1

    def fetched(self, gfn: int, vcpu: int, *, newly_protected: bool) -> None:
        """Take note that a vCPU translates code of a page; the others may have it in their TLBs to be written."""
        holders = self._holders.get(gfn, 0)
        if newly_protected or not holders >> vcpu & 1:
            self._holders[gfn] = holders | 1 << vcpu
            for number, stale in enumerate(self._stale):
                if number != vcpu:
                    stale.add(gfn)

    def written(self, gfn: int, vcpu: int) -> None:
        """Take note that a vCPU may write to a page from now on; the others have to translate its code anew."""
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
