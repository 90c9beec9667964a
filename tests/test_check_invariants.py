"""Each rule of the checker: what breaks it, and what just does not."""

from collections.abc import Callable
from typing import Any

import pytest

from checked_worlds import BASE, ENTRY, broken, ended, map_pages, span, world_of
from restrictedmem.check import invariants
from restrictedmem.check.frames import HUGE_PAGES
from restrictedmem.check.guest_cpu import load, store
from restrictedmem.check.invariants import Invariants, SlotHistory, acting
from restrictedmem.check.world import World
from restrictedmem.kvm.memslot import ALL
from restrictedmem.units import PageRange, gfn_t, pgoff_t


def test_the_first_violation_counts() -> None:
    _, rules, _ = world_of()
    rules.violate(invariants.Rule.LEVEL, "one")
    rules.violate(invariants.Rule.LOST, "two")
    assert broken(rules) == "mapped larger than it is: one"


# Callbacks.


@pytest.mark.parametrize(
    ("told", "good"),
    [((1, 2), True), ((2, 4), True), ((1, 4), True), ((0, 2), False), ((3, 5), False)],
)
def test_a_consumer_is_told_of_what_was_punched(told: tuple[int, int], good: bool) -> None:
    _, rules, view = world_of()
    with rules.punching(span(1, 4)):
        rules.start(view, span(*told))
        assert (broken(rules) == "") is good
    rules.end(view, span(*told))
    # The punch is over.
    rules.start(view, span(*told))
    words = f"told of something else: a consumer is told of pages {span(*told)}, which nobody"
    assert broken(rules).startswith(words)


def test_a_consumer_is_told_of_one_of_several_punches() -> None:
    _, rules, view = world_of()
    with rules.punching(span(1, 2)), rules.allocating(span(3, 4)):
        for told in (span(1, 2), span(3, 4)):
            rules.start(view, told)
            assert broken(rules) == ""
        rules.start(view, span(1, 4))
        assert broken(rules)
    rules.start(view, span(3, 4))
    assert broken(rules)
    with pytest.raises(OSError, match=r"^$"), rules.punching(span(1, 2)):
        raise OSError
    rules.start(view, span(1, 2))
    assert broken(rules)


def test_a_consumer_that_leaves_may_be_told_of_anything() -> None:
    _, rules, view = world_of()
    view.leaving = True
    rules.start(view, span(0, 6))
    assert broken(rules) == ""


def test_an_inexact_design_tells_of_blocks() -> None:
    _, rules, view = world_of(3 * HUGE_PAGES, shown=HUGE_PAGES, exact=False)
    with rules.punching(span(HUGE_PAGES + 1, HUGE_PAGES + 2)):
        rules.start(view, span(HUGE_PAGES, 2 * HUGE_PAGES))
        assert broken(rules) == ""
        for wrong in (span(HUGE_PAGES - 1, HUGE_PAGES + 1), span(HUGE_PAGES, 2 * HUGE_PAGES + 1)):
            rules.start(view, wrong)
            assert broken(rules)
    with rules.punching(span(HUGE_PAGES, 2 * HUGE_PAGES)):
        rules.start(view, span(HUGE_PAGES, 2 * HUGE_PAGES + 1))
        assert broken(rules)


def test_a_bound_consumer_is_told_of_its_pages() -> None:
    _, rules, view = world_of(design="bindings")
    with rules.punching(span(0, 6)):
        rules.start(view, span(0, 2))
        assert broken(rules) == ""
        rules.start(view, span(0, 1))
        words = f"told of something else: a consumer that has bound {span(1, 5)} is told of pages"
        assert broken(rules).startswith(words)


def test_each_end_has_its_start() -> None:
    _, rules, view = world_of()
    view.leaving = True
    acting.set(3)
    rules.start(view, span(1, 2))
    rules.start(view, span(1, 2))
    rules.end(view, span(1, 2))
    assert broken(rules) == ""
    assert ended(rules) == f"callbacks out of balance: no end came for pages {span(1, 2)}"
    acting.set(4)
    rules.end(view, span(1, 2))
    words = f"callbacks out of balance: an end for pages {span(1, 2)} without a start"
    assert broken(rules) == words
    acting.set(3)
    rules.end(view, span(1, 2))
    assert (broken(rules), ended(rules)) == ("", "")
    rules.end(view, span(1, 2))
    assert broken(rules) == words
    acting.set(-1)


def test_an_invalidation_that_stays_is_out_of_balance() -> None:
    world, rules, _ = world_of()
    world.sequence.begin(pgoff_t(0), pgoff_t(1))
    assert ended(rules) == "callbacks out of balance: an invalidation is in progress for ever"
    world.sequence.end()
    assert ended(rules) == ""


# Mapping.


def install(rules: Invariants, view: SlotHistory, first: int, end: int, gfn: int = BASE) -> str:
    rules.install(view, span(first, end), gfn_t(gfn))
    return broken(rules)


def test_a_page_is_mapped_to_its_frame() -> None:
    _, rules, view = world_of()
    assert install(rules, view, 2, 4, BASE + 1) == ""
    assert bytes(view.led) == bytes([0, 1, 1, 0])
    words = f"the wrong half: guest page {BASE:#x} is mapped to page 0x2 of the file"
    assert install(rules, view, 2, 3) == words


def test_a_shared_page_is_not_mapped_private() -> None:
    _, rules, view = world_of()
    view.slot.attributes[1:2] = b"\0"
    assert install(rules, view, 1, 2) == install(rules, view, 3, 5, BASE + 2) == ""
    words = "the wrong half: guest pages 0x10 to 0x12 are mapped private, but some of them are"
    assert install(rules, view, 1, 3).startswith(words)
    assert install(rules, view, 2, 3, BASE + 1)


@pytest.mark.parametrize("why", ["freed", "allocated again", "never taken"])
def test_a_freed_page_is_not_mapped(why: str) -> None:
    world, rules, view = world_of()
    if why == "never taken":
        rules.taken[2] = 0
        world.frames.numbers[2] = 0
    else:
        world.frames.punch(2 << 12, 1 << 12)
    if why == "allocated again":
        world.frames.allocate(2 << 12, 1 << 12)
    words = f"use of a freed page: pages {span(1, 3)} are mapped to frames that were freed"
    assert install(rules, view, 1, 3) == words
    assert install(rules, view, 1, 2) == install(rules, view, 3, 4, BASE + 2) == ""
    rules.take(span(2, 3))
    assert (install(rules, view, 2, 3, BASE + 1) == "") is (why == "allocated again")


def test_nothing_is_mapped_between_start_and_end() -> None:
    _, rules, view = world_of()
    view.leaving = True
    acting.set(3)
    rules.start(view, span(2, 3))
    words = f"mapped between start and end: pages {span(1, 3)} are mapped between start and end of"
    assert install(rules, view, 1, 3).startswith(words)
    assert install(rules, view, 2, 3, BASE + 1)
    # Neighbours are no part of it.
    assert install(rules, view, 1, 2) == install(rules, view, 3, 4, BASE + 2) == ""
    # Another actor's end is of another invalidation.
    acting.set(4)
    rules.opened()
    assert install(rules, view, 2, 3, BASE + 1)
    acting.set(3)
    rules.opened()
    assert install(rules, view, 2, 3, BASE + 1) == ""
    rules.end(view, span(2, 3))
    assert (broken(rules), ended(rules)) == ("", "")
    # An end without the close of the sequence lets pages be mapped, too.
    rules.start(view, span(2, 3))
    rules.end(view, span(2, 3))
    assert install(rules, view, 2, 3, BASE + 1) == ""
    acting.set(-1)


# Zaps.


@pytest.mark.parametrize(
    ("first", "end", "good"),
    [(2, 3, True), (3, 4, True), (2, 4, True), (1, 3, False), (3, 5, False)],
)
@pytest.mark.parametrize("how", ["punching", "allocating", "losing"])
def test_a_guest_loses_what_was_asked_for(how: str, first: int, end: int, good: bool) -> None:
    _, rules, _ = world_of()
    with getattr(rules, how)(span(2, 4)):
        pass
    rules.dropped(gfn_t(BASE + first - 1), gfn_t(BASE + end - 1))
    words = f"told of something else: guest pages {BASE + first - 1:#x} to {BASE + end - 1:#x} are"
    assert broken(rules).startswith(words) is not good
    rules.dropped(gfn_t(BASE + 3), gfn_t(BASE + 3))
    assert broken(rules) == ""


def test_a_guest_loses_what_any_operation_asked_for_of_its_slot() -> None:
    world, rules, _ = world_of(npages=9)
    world.add_slot(BASE + 4, 2, start=5)
    for asked in (span(1, 3), span(3, 5)):
        with rules.punching(asked):
            pass
    for first, end, good in ((0, 2, True), (2, 4, True), (1, 3, False), (4, 5, False)):
        rules.dropped(gfn_t(BASE + first), gfn_t(BASE + end))
        assert (broken(rules) == "") is good


def test_a_conversion_asks_for_its_guest_pages() -> None:
    _, rules, _ = world_of()
    with rules.converting(gfn_t(BASE + 1), gfn_t(BASE + 3)):
        for first, end, good in ((1, 3, True), (0, 2, False), (2, 4, False)):
            rules.dropped(gfn_t(BASE + first), gfn_t(BASE + end))
            assert (broken(rules) == "") is good


@pytest.mark.parametrize(
    ("large", "exact", "good"), [(True, True, True), (False, False, True), (False, True, False)]
)
def test_zaps_of_large_pages_reach_their_block(large: bool, exact: bool, good: bool) -> None:
    kind = "thp" if large else "memfd"
    world = World("v10", npages=3 * HUGE_PAGES, kind=kind, exact=exact)
    world.add_slot(0, 3 * HUGE_PAGES)
    rules, block = world.invariants, gfn_t(HUGE_PAGES)
    with rules.punching(span(HUGE_PAGES + 1, HUGE_PAGES + 2)):
        pass
    rules.dropped(block, gfn_t(2 * block))
    assert (broken(rules) == "") is good
    for first, end in ((block - 1, block + 1), (block + 1, 2 * block + 1)):
        rules.dropped(gfn_t(first), gfn_t(end))
        assert broken(rules)


# Freeing.


def test_a_frame_is_freed_after_it_was_zapped() -> None:
    world, rules, view = world_of()
    map_pages(view, 1, 3)
    view.led[:] = world.frames.numbers[1:5]
    for first, end in ((0, 2), (4, 6)):
        rules.before_free(span(first, end))
        assert broken(rules) == ""
    words = "use of a freed page: pages of {} are freed while the guest has them mapped"
    for first, end in ((2, 3), (3, 4), (0, 6)):
        rules.before_free(span(first, end))
        inside = view.window.clip(span(first, end))
        assert broken(rules) == words.format(inside)
    # A hole has no frame, an entry may lead to the shared half, and a deleted slot to nothing.
    world.frames.numbers[2:4] = b"\0\0"
    rules.before_free(span(0, 6))
    world.frames.numbers[2:4] = b"\1\1"
    view.slot.entries[1:3] = bytes([ALL]) * 2
    rules.before_free(span(0, 6))
    map_pages(view, 1, 3)
    view.live = False
    rules.before_free(span(0, 6))
    assert broken(rules) == ""


def test_a_slot_that_shows_nothing_of_a_range_is_not_looked_at() -> None:
    class Entries(bytearray):
        def count(self, *of: Any) -> int:
            counted.append(of)
            return super().count(*of)

    counted: list[tuple[int, ...]] = []
    _, rules, view = world_of()
    view.slot.entries = Entries(4)
    for first, end in ((0, 1), (5, 6), (2, 2)):
        rules.before_free(span(first, end))
    assert counted == []
    rules.before_free(span(2, 6))
    assert counted == [(0, 1, 4)]


@pytest.mark.parametrize("gone", [Invariants.freed, Invariants.zeroed])
def test_what_a_guest_wrote_goes_with_a_punch_alone(
    gone: Callable[[Invariants, PageRange], None],
) -> None:
    _, rules, view = world_of()
    for gfn in (BASE, BASE + 1, BASE + 2):
        rules.access(view, gfn, ENTRY, 1, 7)
    gone(rules, span(0, 1))
    gone(rules, span(4, 6))
    assert broken(rules) == ""
    gone(rules, span(1, 2))
    assert broken(rules).startswith("content lost: page 0x1 loses its content: the guest wrote")
    # It is told once, and not of pages that are being punched.
    gone(rules, span(1, 2))
    assert broken(rules) == ""
    with rules.punching(span(2, 3)):
        gone(rules, span(2, 4))
        assert broken(rules).startswith("content lost: page 0x3 ")
    rules.access(view, BASE, ENTRY, 1, 7)
    rules.dying()
    gone(rules, span(0, 6))
    assert "content lost" not in broken(rules)


def test_what_was_written_meanwhile_may_go_with_a_punch() -> None:
    _, rules, view = world_of()
    with rules.punching(span(2, 3)):
        rules.access(view, BASE + 1, ENTRY, 1, 7)
        rules.freed(span(2, 3))
        rules.access(view, BASE, ENTRY, 1, 7)
        rules.freed(span(1, 2))
        assert broken(rules).startswith("content lost: page 0x1 ")


def test_what_was_punched_has_no_old_content() -> None:
    world, rules, view = world_of()
    for page in range(4):
        rules.access(view, BASE + page, ENTRY, 1, 7 + page)
    with rules.punching(span(2, 4)):
        del world.frames.content[2]
        world.frames.content[3] = 1
    assert broken(rules) == ""
    world.frames.content |= {2: 5, 3: 6}
    with rules.punching(span(2, 3)):
        pass
    assert (
        broken(rules) == "content that should be gone: page 0x2 has its old content after the punch"
    )
    with rules.punching(span(2, 4)):
        del world.frames.content[2]
    assert broken(rules).startswith("content that should be gone: page 0x3 ")
    with pytest.raises(OSError, match=r"^$"), rules.punching(span(1, 5)):
        raise OSError
    assert broken(rules) == ""


# Accesses.


def test_a_guest_reaches_the_half_that_the_attribute_names() -> None:
    _, rules, view = world_of()
    view.slot.attributes[1:2] = b"\0"
    words = "the wrong half: guest page 0x{:x} is reached in its {} half"
    for page, entry, found in (
        (0, ENTRY, ""),
        (0, ALL, words.format(BASE, "shared")),
        (1, ALL, ""),
        (1, ENTRY, words.format(BASE + 1, "private")),
    ):
        rules.access(view, BASE + page, entry, 1, None)
        assert broken(rules) == found
    with rules.converting(gfn_t(BASE + 1), gfn_t(BASE + 2)):
        rules.access(view, BASE + 1, ENTRY, 1, None)
        assert broken(rules) == ""
        for page, entry in ((0, ALL), (2, ALL)):
            rules.access(view, BASE + page, entry, 1, None)
            assert broken(rules)
    rules.access(view, BASE + 1, ENTRY, 1, None)
    assert broken(rules)


def test_a_store_is_content_and_a_load_is_none() -> None:
    world, rules, view = world_of()
    view.slot.attributes[1:2] = b"\0"
    rules.access(view, BASE + 2, ENTRY, 1, None)
    rules.access(view, BASE + 1, ALL, 1, 5)
    assert world.frames.content == {}
    rules.access(view, BASE + 2, ENTRY, 1, 0)
    assert world.frames.content == {3: 0}
    assert rules._written == {3}


def test_a_former_frame_is_not_reached() -> None:
    world, rules, view = world_of()
    words = "use of a freed page: a guest reaches a former frame of page 0x3"
    rules.access(view, BASE + 2, ENTRY, 2, None)
    assert broken(rules) == words
    world.frames.punch(3 << 12, 1 << 12)
    rules.access(view, BASE + 2, ENTRY, 1, None)
    assert broken(rules) == words


def test_a_lost_page_is_not_reached_once_that_is_told() -> None:
    world, rules, view = world_of()
    with rules.losing(span(2, 4)):
        rules.access(view, BASE + 1, ENTRY, 1, None)
        assert broken(rules) == ""
    for page, found in ((0, ""), (1, "0x2"), (2, "0x3"), (3, "")):
        rules.access(view, BASE + page, ENTRY, 1, None)
        assert broken(rules) == (found and f"use of a lost page: a guest reaches page {found}")
    # The frame was lost, not the page.
    world.frames.punch(2 << 12, 1 << 12)
    world.frames.allocate(2 << 12, 1 << 12)
    rules.access(view, BASE + 1, ENTRY, 2, None)
    assert broken(rules) == ""


# Always, and at the end.


def test_no_entry_leads_to_a_former_frame() -> None:
    world, rules, view = world_of()
    view.led[:] = world.frames.numbers[1:5]
    map_pages(view, 1, 3)
    assert broken(rules) == ""
    world.frames.numbers[1] = world.frames.numbers[4] = 9
    assert broken(rules) == ""
    words = f"use of a freed page: an entry of slot {view.slot.number} leads to a freed frame"
    for page in (2, 3):
        world.frames.numbers[page] = 9
        assert broken(rules) == words
        world.frames.numbers[page] = 1
    world.frames.numbers[3] = 9
    view.live = False
    assert broken(rules) == ""
    view.live = True
    view.slot.entries[2:3] = bytes([ALL])
    assert broken(rules) == ""


def test_at_the_end_mapped_pages_are_private_and_taken() -> None:
    world, rules, view = world_of()
    world.touched(load(BASE + 1), store(BASE + 2, 1))
    assert ended(rules) == ""
    view.slot.memfd_half.pages.forget(span(3, 4))
    words = "mapped without a reference: page 0x3 is mapped, but not counted as taken"
    assert ended(rules) == words
    view.slot.attributes[2:3] = b"\0"
    words = f"the wrong half: a shared guest page of slot {view.slot.number} is mapped private"
    assert ended(rules) == words
    view.live = False
    assert ended(rules) == ""


def test_a_violation_comes_before_the_end() -> None:
    _, rules, _ = world_of()
    rules.violate(invariants.Rule.LEVEL, "one")
    assert ended(rules) == "mapped larger than it is: one"
