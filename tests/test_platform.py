"""Direct map, reverse map table and what Linux does with both: each rule by itself, then all of them against a model of single pages."""

import json
from dataclasses import replace
from itertools import combinations
from typing import Any, Final, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from restrictedmem.platform import platform
from restrictedmem.platform.direct_map import DirectMap
from restrictedmem.platform.rmp import HYPERVISOR, Entry, Rmp
from restrictedmem.platform.sev import Sev
from restrictedmem.platform.snp import Snp
from restrictedmem.units import PageRange, gfn_t, pgoff_t

EFAULT, EINVAL = 14, 22
#: What the instructions answer.
OK, INPUT, PERMISSION, INUSE, OVERLAP, SIZEMISMATCH, NOUPDATE = 0, 1, 2, 3, 4, 6, 255
PMD: Final = 512
PUD: Final = PMD * PMD
#: A page at the start of a GiB, and a guest's address as aligned.
PFN: Final = 3 * PUD
GPA: Final = 1 << 30
FILE: Final = 7


def private(order: int = 0, gpa: int = GPA, *, immutable: bool = False) -> Entry:
    return Entry(assigned=True, asid=1, gpa=gpa, order=order, immutable=immutable)


def pages(start: int, end: int) -> PageRange:
    return PageRange(pgoff_t(start), pgoff_t(end))


# The direct map.


def gib() -> DirectMap:
    direct_map = DirectMap()
    direct_map.add(PFN)
    return direct_map


def test_a_gib_begins_as_one_entry_and_is_added_once() -> None:
    direct_map = gib()
    direct_map.split(PFN, 9)
    direct_map.add(PFN + 5)
    assert direct_map.lookup(PFN + 5) == (9, True)
    assert direct_map.entries() == {9: 512}


def test_a_split_to_4k_goes_by_2m_and_leaves_the_rest() -> None:
    direct_map = gib()
    direct_map.split(PFN + PMD + 3, 0)
    assert [direct_map.lookup(PFN + page) for page in (0, PMD, PMD + 511, 2 * PMD)] == [
        (9, True),
        (0, True),
        (0, True),
        (9, True),
    ]
    assert direct_map.entries() == {9: 511, 0: 512}
    assert direct_map.splits == {18: 1, 9: 1}
    direct_map.split(PFN + PMD, 0)
    assert direct_map.splits == {18: 1, 9: 1}, "it was split before"


def test_a_page_that_is_removed_alone_splits_and_its_neighbours_stay() -> None:
    direct_map = gib()
    direct_map.remove(PFN + 1, 0)
    assert [direct_map.lookup(PFN + page) for page in (0, 1, 2)] == [
        (0, True),
        (0, False),
        (0, True),
    ]
    assert direct_map.absent() == 1
    direct_map.restore(PFN + 1, 0)
    assert direct_map.absent() == 0
    assert direct_map.lookup(PFN + 1) == (0, True), "rights come back, the large entry does not"


def test_2m_are_removed_as_one_entry_and_a_split_inherits_that() -> None:
    direct_map = gib()
    direct_map.remove(PFN, 9)
    assert direct_map.lookup(PFN) == (9, False)
    assert direct_map.entries() == {9: 512}
    direct_map.restore(PFN + 7, 0)
    assert [direct_map.lookup(PFN + page) for page in (6, 7, 8)] == [
        (0, False),
        (0, True),
        (0, False),
    ]
    assert direct_map.absent() == 511
    direct_map.restore(PFN, 9)
    assert direct_map.absent() == 0
    assert direct_map.entries() == {9: 511, 0: 512}, "2 MiB of 4 KiB entries"


def test_a_merge_needs_all_512_with_equal_rights() -> None:
    direct_map = gib()
    direct_map.remove(PFN + 1, 0)
    assert not direct_map.merge(PFN, 9)
    direct_map.restore(PFN + 1, 0)
    assert direct_map.merge(PFN, 9)
    assert direct_map.lookup(PFN) == (9, True)
    assert direct_map.merges == {9: 1}
    assert direct_map.merge(PFN, 9), "is one already"
    assert direct_map.merges == {9: 1}


def test_a_merge_to_1g_needs_all_512_whole() -> None:
    direct_map = gib()
    direct_map.split(PFN + 5 * PMD, 0)
    assert not direct_map.merge(PFN, 18)
    assert direct_map.merge(PFN + 5 * PMD, 9)
    assert direct_map.merge(PFN, 18)
    assert direct_map.entries() == {18: 1}
    assert direct_map.merges == {9: 1, 18: 1}


def test_what_is_absent_is_not_merged_into_anything() -> None:
    direct_map = gib()
    direct_map.remove(PFN, 9)
    assert not direct_map.merge(PFN, 9)
    assert not direct_map.merge(PFN, 18)


# The table.


def test_a_page_nobody_touched_is_the_hosts() -> None:
    rmp = Rmp()
    assert (
        rmp.lookup(PFN)
        == HYPERVISOR
        == Entry(assigned=False, asid=0, gpa=0, order=0, immutable=False, validated=False)
    )
    assert not rmp.write_faults(PFN, 0)
    assert not rmp.write_faults(PFN, 18)


def test_rmpupdate_assigns_and_clears_validated() -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(PFN, private()) == OK
    assert rmp.pvalidate(PFN, 0) == OK
    assert rmp.lookup(PFN).validated
    assert rmp.rmpupdate(PFN, replace(private(), validated=True)) == OK
    assert not rmp.lookup(PFN).validated
    assert rmp.rmpupdate(PFN, HYPERVISOR) == OK
    assert rmp.lookup(PFN) == HYPERVISOR


def test_the_level_is_looked_up_at_the_head_of_the_2m() -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(PFN, private(9)) == OK
    assert rmp.lookup(PFN + 77) == private(9)
    assert rmp.lookup(PFN + PMD) == HYPERVISOR
    assert rmp.assigned(PFN + 511) == 512


@pytest.mark.parametrize(("pfn", "gpa"), [(PFN + 1, GPA), (PFN, GPA + 0x1000)])
def test_rmpupdate_1_for_2m_that_are_not_aligned(pfn: int, gpa: int) -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(pfn, private(9, gpa)) == INPUT
    assert rmp.all_assigned() == []


def test_rmpupdate_2_for_an_immutable_page() -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(PFN, private(immutable=True)) == OK
    assert rmp.rmpupdate(PFN, HYPERVISOR) == PERMISSION
    assert rmp.lookup(PFN).immutable


def test_rmpupdate_and_psmash_3_while_another_holds_the_entry() -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(PFN, private(9)) == OK
    rmp.in_use.add(PFN + 4)
    assert rmp.psmash(PFN) == INUSE
    assert rmp.rmpupdate(PFN, Entry(order=9)) == INUSE
    rmp.in_use.clear()
    assert rmp.psmash(PFN) == OK


def test_rmpupdate_4_for_4k_inside_2m_and_2m_over_4k() -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(PFN, private(9)) == OK
    assert rmp.rmpupdate(PFN, HYPERVISOR) == OVERLAP
    assert rmp.rmpupdate(PFN + 1, private(gpa=GPA + 0x1000)) == OVERLAP
    assert rmp.rmpupdate(PFN + PMD + 1, private(gpa=GPA + 0x1000)) == OK
    assert rmp.rmpupdate(PFN + PMD, private(9, GPA + (2 << 20))) == OVERLAP
    assert len(rmp.all_assigned()) == 513


def test_psmash_makes_512_of_one_and_keeps_validated() -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(PFN, private(9)) == OK
    assert rmp.pvalidate(PFN, 9) == OK
    assert rmp.psmash(PFN) == OK
    for page in (0, 1, 511):
        assert rmp.lookup(PFN + page) == Entry(
            assigned=True, asid=1, gpa=GPA + page * 4096, validated=True
        )
    assert rmp.psmash(PFN) == INPUT, "there is no 2 MiB entry any more"
    assert rmp.psmash(PFN + 1) == INPUT


def test_there_is_no_way_back_from_psmash_but_freeing_all() -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(PFN, private(9)) == OK
    assert rmp.psmash(PFN) == OK
    for page in range(PMD):
        assert rmp.rmpupdate(PFN, private(9)) == OVERLAP
        assert rmp.rmpupdate(PFN + page, HYPERVISOR) == OK
    assert rmp.rmpupdate(PFN, private(9)) == OK


def test_pvalidate_6_for_2m_where_the_table_has_4k_and_255_for_no_change() -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(PFN, private()) == OK
    assert rmp.pvalidate(PFN, 9) == SIZEMISMATCH
    assert rmp.pvalidate(PFN + 1, 9) == INPUT
    assert rmp.pvalidate(PFN, 0) == OK
    assert rmp.pvalidate(PFN, 0) == NOUPDATE


@pytest.mark.parametrize("order", [9, 18])
def test_a_write_through_2m_or_1g_faults_for_any_assigned_page_of_the_2m(order: int) -> None:
    rmp = Rmp()
    assert rmp.rmpupdate(PFN + 5, private(gpa=GPA + 0x5000)) == OK
    assert rmp.write_faults(PFN + 6, order), "not assigned itself"
    assert not rmp.write_faults(PFN + PMD, order), "of 1 GiB, the 2 MiB written to counts"
    assert rmp.write_faults(PFN + 5, 0)
    assert not rmp.write_faults(PFN + 6, 0)


# What Linux does with it.


def sev(*, unmap: bool = False) -> Sev:
    made = Sev(unmap=unmap)
    made.direct_map.add(PFN)
    return made


def test_4k_made_private_split_the_direct_map_and_2m_do_not() -> None:
    by = sev()
    by.make_private(PFN, GPA, 9, 1)
    assert by.direct_map.entries() == {18: 1}
    by.make_private(PFN + PMD, GPA + (2 << 20), 0, 1)
    assert by.direct_map.entries() == {9: 511, 0: 512}
    assert by.direct_map.absent() == 0


def test_4k_of_2m_made_shared_smash_the_entry_first() -> None:
    by = sev()
    by.make_private(PFN, GPA, 9, 1)
    by.make_shared(PFN + 3, 0)
    assert by.rmp.operations == {"RMPUPDATE 2M": 1, "PSMASH 2M": 1, "RMPUPDATE 4K": 1}
    assert by.rmp.assigned(PFN) == 511
    assert by.direct_map.lookup(PFN) == (0, True), "or a write to the one page would fault"
    by.make_shared(PFN + 3, 0)
    assert by.rmp.operations["RMPUPDATE 4K"] == 1, "what is shared is left alone"


def test_unmapped_pages_leave_the_direct_map_as_large_as_they_are_and_come_back() -> None:
    by = sev(unmap=True)
    by.make_private(PFN, GPA, 9, 1)
    by.make_private(PFN + PMD, GPA + (2 << 20), 0, 1)
    assert by.direct_map.lookup(PFN) == (9, False)
    assert by.direct_map.absent() == 513
    by.reclaim(PFN, PFN + PUD)
    assert by.direct_map.absent() == 0
    assert by.direct_map.entries() == {9: 511, 0: 512}


def test_reclaim_updates_by_the_size_the_table_has() -> None:
    by = sev()
    by.make_private(PFN, GPA, 9, 1)
    by.make_private(PFN + PMD, GPA + (2 << 20), 9, 1)
    by.rmp.operations.clear()
    by.reclaim(PFN, PFN + PMD + 1)
    assert by.rmp.operations == {"RMPUPDATE 2M": 1, "PSMASH 2M": 1, "RMPUPDATE 4K": 1}
    assert by.rmp.all_assigned() == list(range(PFN + PMD + 1, PFN + 2 * PMD))


@pytest.mark.parametrize(("end", "leaked"), [(PMD, PMD), (1, 1)])
def test_what_cannot_be_reclaimed_is_leaked(end: int, leaked: int) -> None:
    by = sev()
    by.make_private(PFN, GPA, 9, 1)
    by.rmp.in_use.add(PFN)
    by.reclaim(PFN, PFN + end)
    assert by.leaked == set(range(PFN, PFN + leaked))
    assert by.rmp.assigned(PFN) == 512


def test_a_failed_update_is_efault_with_the_number() -> None:
    by = sev()
    by.make_private(PFN, GPA, 9, 1)
    with pytest.raises(OSError, match=r"RMPUPDATE.*OVERLAP \(4\)") as caught:
        by.make_private(PFN + 1, GPA + 0x1000, 0, 1)
    assert caught.value.errno == EFAULT


# What an engine tells.


def entries(snp: Snp) -> dict[str, int]:
    return cast(dict[str, dict[str, int]], snp.report()["direct_map"])["entries"]


def test_names() -> None:
    assert platform.make("").report() == {}
    assert [platform.make(name).report()["platform"] for name in platform.NAMES] == [
        "snp",
        "snp-unmapped",
    ]
    with pytest.raises(OSError) as caught:
        platform.make("tdx")
    assert caught.value.errno == EINVAL


def test_2m_mapped_whole_out_of_a_folio_are_one_entry() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(PMD, 2 * PMD), gfn_t(3 * PMD), 9)
    snp.prepare(FILE, pages(PMD, 2 * PMD), gfn_t(3 * PMD), 9)
    assert snp.report()["rmp_operations"] == {"RMPUPDATE 2M": 1, "PVALIDATE 2M": 1}
    assert snp.report()["assigned_pages"] == 512


@pytest.mark.parametrize(
    ("span", "gfn", "order"),
    [
        ((0, 512), 0, 0),  # of no folio
        ((0, 512), 1, 9),  # guest pages that are not aligned
        ((0, 16), 0, 9),  # part of the folio
        ((16, 528), 0, 9),  # of two
    ],
)
def test_all_else_are_entries_of_4k(span: tuple[int, int], gfn: int, order: int) -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(*span), gfn_t(gfn), order)
    count = span[1] - span[0]
    assert snp.report()["rmp_operations"] == {"RMPUPDATE 4K": count, "PVALIDATE 4K": count}


def test_a_folio_of_which_a_page_is_assigned_gets_the_rest_by_4k() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(3, 4), gfn_t(3), 0)
    snp.prepare(FILE, pages(0, 512), gfn_t(0), 9)
    assert snp.report()["rmp_operations"] == {"RMPUPDATE 4K": 512, "PVALIDATE 4K": 512}


def test_1g_is_assigned_by_2m() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(0, PUD), gfn_t(0), 18)
    assert snp.report()["rmp_operations"] == {"RMPUPDATE 2M": 512, "PVALIDATE 2M": 512}
    assert entries(snp) == {"1G": 1, "2M": 0, "4K": 0}


def test_4k_mapped_of_an_entry_of_2m_smash_it() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(0, 512), gfn_t(0), 9)
    snp.prepare(FILE, pages(16, 32), gfn_t(16), 0)
    assert snp.report()["rmp_operations"] == {"RMPUPDATE 2M": 1, "PVALIDATE 2M": 1, "PSMASH 2M": 1}
    assert entries(snp) == {"1G": 1, "2M": 0, "4K": 0}, "all 512 are the guest's still"


def test_each_gib_of_each_file_has_its_own() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(PUD - 1, PUD + 1), gfn_t(PUD - 1), 0)
    snp.prepare(FILE + 1, pages(0, 1), gfn_t(2 * PUD), 0)
    assert snp.report()["assigned_pages"] == 3
    assert entries(snp) == {"1G": 0, "2M": 3 * 511, "4K": 3 * 512}


def test_a_page_assigned_at_another_address_is_efault() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(0, 16), gfn_t(16), 0)
    with pytest.raises(OSError) as caught:
        snp.prepare(FILE, pages(8, 9), gfn_t(99), 0)
    assert caught.value.errno == EFAULT
    (violation,) = cast(list[dict[str, Any]], snp.report()["violations"])
    assert (violation["ino"], violation["start"], violation["npages"]) == (FILE, 8, 1)
    assert violation["story"] == [
        "1. [0x0, 0x10) mapped into the guest from gfn 0x10 on, order 0",
        "2. [0x8, 0x9) mapped into the guest from gfn 0x63 on, order 0",
    ]


@pytest.mark.parametrize(
    ("span", "order", "left"),
    [
        ((0, 512), 9, {"1G": 0, "2M": 512, "4K": 0}),
        ((0, 512), None, {"1G": 0, "2M": 511, "4K": 512}),  # nobody said that they are one folio
        ((0, 512), 0, {"1G": 0, "2M": 511, "4K": 512}),
        ((1, 512), 9, {"1G": 0, "2M": 511, "4K": 512}),  # a page stays
        ((0, PUD), 18, {"1G": 1, "2M": 0, "4K": 0}),
    ],
)
def test_what_was_split_comes_back_for_a_folio_that_goes_whole(
    span: tuple[int, int], order: int | None, left: dict[str, int]
) -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(0, 512), gfn_t(0), 0)
    snp.invalidate(FILE, pages(*span), order)
    snp.freed(FILE, pages(*span))
    assert entries(snp) == left
    assert snp.report()["violated_pages"] == 0


def test_page_by_page_nothing_comes_back_until_the_folio_is_told() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(0, 512), gfn_t(0), 9)
    for page in range(PMD):
        snp.invalidate(FILE, pages(page, page + 1), 9)
        snp.freed(FILE, pages(page, page + 1))
    assert entries(snp) == {"1G": 0, "2M": 511, "4K": 512}
    snp.invalidate(FILE, pages(0, 512), 9)
    assert entries(snp) == {"1G": 0, "2M": 512, "4K": 0}
    assert snp.report()["violated_pages"] == 0


def test_unmapped_2m_come_back_as_the_table_has_them_with_no_word_of_a_folio() -> None:
    snp = Snp(unmap=True)
    snp.prepare(FILE, pages(0, 512), gfn_t(0), 9)
    assert snp.report()["absent_pages"] == 512
    snp.invalidate(FILE, pages(0, 1024), None)
    assert snp.report()["absent_pages"] == 0
    assert entries(snp) == {"1G": 0, "2M": 512, "4K": 0}


def test_a_page_freed_without_a_word_is_a_violation_with_its_story() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(0, 16), gfn_t(64), 0)
    snp.invalidate(FILE, pages(0, 4), None)
    snp.freed(FILE, pages(0, 8))
    report = snp.report()
    assert report["violated_pages"] == 4
    (violation,) = cast(list[dict[str, Any]], report["violations"])
    assert (violation["start"], violation["npages"]) == (4, 4)
    assert (
        violation["rule"]
        == "the host writes to a page that is the guest's (gpa 0x44000), and nobody was told that it goes"
    )
    assert violation["story"] == [
        "1. [0x0, 0x10) mapped into the guest from gfn 0x40 on, order 0",
        "3. [0x0, 0x8) freed, and written by the host",
    ]


def test_a_page_mapped_again_before_it_was_freed_says_so() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(0, 1), gfn_t(0), 0)
    snp.invalidate(FILE, pages(0, 1), None)
    snp.prepare(FILE, pages(0, 1), gfn_t(0), 0)
    snp.freed(FILE, pages(0, 1))
    (violation,) = cast(list[dict[str, Any]], snp.report()["violations"])
    assert [line.split()[3] for line in violation["story"]] == [
        "mapped",
        "told",
        "mapped",
        "freed,",
    ]


def test_a_write_through_2m_with_a_neighbour_of_the_guests_is_a_violation() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(0, 1), gfn_t(0), 0)
    # A kernel that puts its direct map together while a page of it is a guest's.
    start = PUD
    assert snp.sev.direct_map.merge(start, 9)
    snp.freed(FILE, pages(1, 2))
    (violation,) = cast(list[dict[str, Any]], snp.report()["violations"])
    assert (
        violation["rule"]
        == "the host writes to a page that lies in 2 MiB with a page of the guest's"
    )


def test_leaked_pages_are_not_given_to_anybody() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(0, 1), gfn_t(0), 0)
    snp.sev.rmp.in_use.add(PUD)
    snp.invalidate(FILE, pages(0, 1), None)
    snp.freed(FILE, pages(0, 1))
    report = snp.report()
    assert (report["leaked_pages"], report["assigned_pages"], report["violated_pages"]) == (1, 1, 0)


def test_a_report_fits_a_message_however_much_went_wrong() -> None:
    snp = Snp(unmap=False)
    for page in range(0, 4096, 2):
        snp.prepare(FILE, pages(page, page + 1), gfn_t(page), 0)
    for _ in range(20):
        snp.freed(FILE, pages(0, 4096))
    assert snp.report()["violated_pages"] == 20 * 2048
    assert len(json.dumps(snp.report())) < 64 << 10


def test_what_was_never_used_is_not_looked_at() -> None:
    snp = Snp(unmap=False)
    snp.prepare(FILE, pages(5, 6), gfn_t(5), 0)
    snp.invalidate(FILE + 1, pages(0, 1 << 18), None)
    snp.invalidate(FILE, pages(0, 1 << 24), None)
    assert snp.report()["assigned_pages"] == 0


# All of it against single pages.


class SnpMachine(RuleBasedStateMachine):
    """Two blocks of 2 MiB of one file, of which a few pages at each edge are used; guest pages are the file's."""

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
