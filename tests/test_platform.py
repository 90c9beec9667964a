"""Linux's use of direct map and reverse map table, and what an engine tells it.

The tests try each rule by itself.
"""

import json
from typing import Any, cast

import pytest

from platform_pages import FILE, GPA, PFN, PMD, PUD, pages
from restrictedmem.platform import platform
from restrictedmem.platform.sev import Sev
from restrictedmem.platform.snp import Snp
from restrictedmem.units import gfn_t

EFAULT, EINVAL = 14, 22


# Linux's use of it.


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


# An engine's calls.


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
        violation["rule"] == "the host writes to a page that is the guest's (gpa 0x44000), "
        "and nobody was told that it goes"
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
