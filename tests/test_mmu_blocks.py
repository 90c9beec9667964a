"""Attributes of pages and the largest block that may be mapped as one.

The models look at every page.
"""

from itertools import pairwise
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.lpage import Level, LpageInfo
from restrictedmem.mm.notifier import Api
from restrictedmem.units import gfn_t

ENOMEM: Final = 12
PAGES: Final = 64


@pytest.mark.parametrize("api", list(Api))
def test_what_pages_are_before_anybody_says(api: Api) -> None:
    attributes = Attributes(api)
    assert attributes.is_private(0) is attributes.is_private(1 << 40) is (api is Api.V9)
    assert list(attributes.private_runs(gfn_t(3), gfn_t(9))) == ([(3, 9)] if api is Api.V9 else [])


def test_an_access_without_a_slot_is_a_fault_where_v10_has_a_private_page() -> None:
    for api in Api:
        attributes = Attributes(api)
        attributes.set(gfn_t(5), gfn_t(6), private=True)
        assert attributes.forbids_mmio(5) is (api is Api.V10)
        assert not attributes.forbids_mmio(4)


class PageAttributes(RuleBasedStateMachine):
    """One attribute a page, beside the pages at which it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes = Attributes(Api.V10)
        self.model = [False] * PAGES

    @rule(start=st.integers(0, PAGES - 1), length=st.integers(1, PAGES), private=st.booleans())
    def change(self, start: int, length: int, *, private: bool) -> None:
        end = min(start + length, PAGES)
        self.attributes.set(gfn_t(start), gfn_t(end), private=private)
        self.model[start:end] = [private] * (end - start)

    @invariant()
    def each_page_is_as_was_said(self) -> None:
        assert [self.attributes.is_private(gfn) for gfn in range(PAGES)] == self.model

    @rule(start=st.integers(0, PAGES), end=st.integers(0, PAGES))
    def runs(self, start: int, end: int) -> None:
        runs = list(self.attributes.private_runs(gfn_t(start), gfn_t(max(start, end))))
        pages = [gfn for first, last in runs for gfn in range(first, last)]
        assert pages == [gfn for gfn in range(start, end) if self.model[gfn]]
        assert all(after[0] > before[1] for before, after in pairwise(runs))


TestPageAttributes = PageAttributes.TestCase
TestPageAttributes.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_attributes_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restrictedmem.mm.page_attributes._MAX_CHANGES", 8)
    attributes = Attributes(Api.V10)
    for gfn in range(0, 8, 2):
        attributes.set(gfn_t(gfn), gfn_t(gfn + 1), private=True)
    with pytest.raises(OSError, match="too many") as caught:
        attributes.set(gfn_t(100), gfn_t(101), private=True)
    assert caught.value.errno == ENOMEM
    assert not attributes.is_private(100)
    attributes.set(gfn_t(0), gfn_t(8), private=True)
    attributes.set(gfn_t(100), gfn_t(101), private=True)
    assert attributes.is_private(100)


# Blocks.

GIB: Final = Level.PUD.pages


def naive_level(base: int, end: int, starts: list[int], attributes: bytearray, gfn: int) -> Level:
    """As kvm_mmu_max_mapping_level would say if it looked at every page."""
    for level in (Level.PUD, Level.PMD):
        first = gfn // level.pages * level.pages
        if (
            first < base
            or first + level.pages > end
            or any((start - base) % level.pages for start in starts)
        ):
            continue
        block = attributes[first - base : first + level.pages - base]
        if block.count(0) in (0, len(block)):
            return level
    return Level.PAGE


def naive_mixed(base: int, end: int, attributes: bytearray, level: Level) -> int:
    count = 0
    for first in range(base // level.pages * level.pages, end, level.pages):
        block = attributes[max(first, base) - base : min(first + level.pages, end) - base]
        count += block.count(0) not in (0, len(block))
    return count


def borders(base: int, end: int) -> st.SearchStrategy[int]:
    """Ends of ranges: on and beside the borders of blocks, and anywhere."""
    near = [
        edge + by
        for step in (512, GIB)
        for edge in range(base // step * step, end + step, step)
        for by in (-1, 0, 1)
    ]
    inside = sorted({base, end, *(gfn for gfn in near if base <= gfn <= end)})
    return st.one_of(st.sampled_from(inside), st.integers(base, end))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_levels_and_mixed_blocks(data: st.DataObject) -> None:
    base = data.draw(st.sampled_from([0, 512, 511, 700, GIB, GIB - 512, GIB + 5]), "base")
    end = base + data.draw(
        st.sampled_from([1, 511, 512, 513, 1024, 5000, GIB, GIB + 512, 2 * GIB]), "pages"
    )
    starts = data.draw(
        st.sampled_from([[], [base], [base + 512], [base % 512], [0, base], [base + 1]]), "starts"
    )
    attributes = bytearray(end - base)
    info = LpageInfo(gfn_t(base), gfn_t(end), tuple(starts), attributes)
    for _ in range(data.draw(st.integers(0, 8), "changes")):
        one, other = data.draw(borders(base, end)), data.draw(borders(base, end))
        first, last = min(one, other), max(one, other)
        if first == last:
            continue
        attributes[first - base : last - base] = bytes([data.draw(st.booleans())]) * (last - first)
        info.update(gfn_t(first), gfn_t(last))
    for level in (Level.PMD, Level.PUD):
        assert info.mixed(level) == naive_mixed(base, end, attributes, level)
    for gfn in {base, end - 1, *(data.draw(borders(base, end - 1)) for _ in range(6))}:
        assert info.max_level(gfn) is naive_level(base, end, starts, attributes, gfn), gfn


@pytest.mark.parametrize(
    ("starts", "level"),
    [
        ((), Level.PUD),
        ((GIB, 0), Level.PUD),
        ((512,), Level.PMD),
        ((0, 512), Level.PMD),
        ((1024, GIB), Level.PMD),
        ((512, 1), Level.PAGE),
    ],
)
def test_a_block_is_as_large_as_all_halves_are_aligned(
    starts: tuple[int, ...], level: Level
) -> None:
    assert (
        LpageInfo(gfn_t(GIB), gfn_t(2 * GIB), starts, bytearray(GIB)).max_level(GIB + 700) is level
    )


def test_a_block_that_becomes_equal_again_can_be_mapped_as_one() -> None:
    attributes = bytearray(GIB)
    info = LpageInfo(gfn_t(0), gfn_t(GIB), (0,), attributes)
    assert info.max_level(700) is Level.PUD
    for private, level in ((1, Level.PAGE), (0, Level.PUD)):
        attributes[700] = private
        info.update(gfn_t(700), gfn_t(701))
        assert info.max_level(700) is level
    attributes[512:1024] = b"\1" * 512
    info.update(gfn_t(512), gfn_t(1024))
    assert (info.max_level(700), info.mixed(Level.PMD), info.mixed(Level.PUD)) == (Level.PMD, 0, 1)
