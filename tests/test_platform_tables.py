"""Direct map and reverse map table: each rule of the processor by itself."""

from dataclasses import replace

import pytest

from platform_pages import GPA, PFN, PMD
from restrictedmem.platform.direct_map import DirectMap
from restrictedmem.platform.rmp import HYPERVISOR, Entry, Rmp

#: Results of the instructions.
OK, INPUT, PERMISSION, INUSE, OVERLAP, SIZEMISMATCH, NOUPDATE = 0, 1, 2, 3, 4, 6, 255


def private(order: int = 0, gpa: int = GPA, *, immutable: bool = False) -> Entry:
    return Entry(assigned=True, asid=1, gpa=gpa, order=order, immutable=immutable)


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
