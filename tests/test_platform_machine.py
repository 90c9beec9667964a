"""The platform after any operations, against a model of single pages."""

from itertools import combinations
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from platform_pages import FILE, PMD, PUD, pages
from restrictedmem.platform.snp import Snp
from restrictedmem.units import gfn_t


class SnpMachine(RuleBasedStateMachine):
    """Two blocks of 2 MiB of one file, with a few used pages at each edge; GFNs are the file's."""

    BLOCKS: Final = 2
    EDGES: Final = (0, 1, 2, 510, 511, 512, 513, 514, 1022, 1023, 1024)
    spans = st.sampled_from([(0, PMD), (PMD, 2 * PMD), *combinations(EDGES, 2)])

    @initialize(unmap=st.booleans())
    def begin(self, unmap: bool) -> None:
        self.snp = Snp(unmap=unmap)
        self.unmap = unmap
        #: Page by page: the guest's, and the order of its direct-map entry.
        self.guests = [False] * (self.BLOCKS * PMD)
        self.orders = [18] * (self.BLOCKS * PMD)
        #: Whether a block is one entry of the table.
        self.large = [False] * self.BLOCKS
        self.violated = 0
        self.used = False

    def _blocks(self, start: int, end: int) -> list[tuple[int, range]]:
        parts = [
            (block, range(max(start, block * PMD), min(end, (block + 1) * PMD)))
            for block in range(self.BLOCKS)
        ]
        return [(block, part) for block, part in parts if part]

    def _split(self, block: int, order: int) -> None:
        if self.orders[0] == 18:
            self.orders = [9] * (self.BLOCKS * PMD)
        if order == 0:
            self.orders[block * PMD : (block + 1) * PMD] = [0] * PMD

    @rule(span=spans, order=st.sampled_from([0, 9]))
    def map(self, span: tuple[int, int], order: int) -> None:
        self.snp.prepare(FILE, pages(*span), gfn_t(span[0]), order)
        self.used = True
        for block, part in self._blocks(*span):
            if order == 9 and len(part) == PMD and not any(self.guests[page] for page in part):
                self.large[block] = True
                if self.unmap:
                    self._split(block, 9)
            elif not all(self.guests[page] for page in part):
                self._split(block, 0)
            elif len(part) < PMD:
                self.large[block] = False
            for page in part:
                self.guests[page] = True

    @rule(span=spans, order=st.sampled_from([None, 0, 9]))
    def go(self, span: tuple[int, int], order: int | None) -> None:
        self.snp.invalidate(FILE, pages(*span), order)
        for block, part in self._blocks(*span):
            whole = len(part) == PMD
            if any(self.guests[page] for page in part) and not (whole and self.large[block]):
                self._split(block, 0)
            if any(self.guests[page] for page in part):
                self.large[block] = False
            for page in part:
                self.guests[page] = False
            if whole and order == 9 and self.orders[part.start] == 0:
                self.orders[part.start : part.stop] = [9] * PMD
        if self.used:
            self.snp.freed(FILE, pages(*span))

    @rule(span=spans)
    def free_unheard(self, span: tuple[int, int]) -> None:
        self.snp.freed(FILE, pages(*span))
        self.violated += sum(self.guests[page] for page in range(*span))

    @invariant()
    def table_is_the_models(self) -> None:
        if hasattr(self, "snp"):
            assert self.snp.sev.rmp.all_assigned() == [
                PUD + page for page, guests in enumerate(self.guests) if guests
            ]
            for block in range(self.BLOCKS):
                head = PUD + block * PMD
                assert (self.snp.sev.rmp.lookup(head).order == 9) == self.large[block]
            assert all(
                self.snp.sev.rmp.lookup(PUD + page).gpa == page << 12
                for page in (1, 511, 700)
                if self._small(page)
            )

    def _small(self, page: int) -> bool:
        return self.guests[page] and not self.large[page // PMD]

    @invariant()
    def direct_map_is_the_models(self) -> None:
        if hasattr(self, "snp") and self.used:
            looked_up = [
                self.snp.sev.direct_map.lookup(PUD + page) for page in range(self.BLOCKS * PMD)
            ]
            assert [order for order, _ in looked_up] == self.orders
            assert [not present for _, present in looked_up] == [
                self.unmap and guests for guests in self.guests
            ]

    @invariant()
    def entries_of_2m_cover_nothing_or_512_pages_of_the_guests(self) -> None:
        if hasattr(self, "snp") and self.used:
            for block in range(self.BLOCKS):
                order, present = self.snp.sev.direct_map.lookup(PUD + block * PMD)
                assert order == 0 or self.snp.sev.rmp.assigned(PUD + block * PMD) in (
                    (0, PMD) if present else (PMD,)
                )

    @invariant()
    def only_what_nobody_was_told_of_is_violated(self) -> None:
        if hasattr(self, "snp"):
            assert self.snp.report()["violated_pages"] == self.violated


TestSnpMachine = pytest.mark.no_cover(SnpMachine.TestCase)
TestSnpMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
