"""Each design over each backing, driven at random, compared with a model and with a bare memfd.

The model knows what each page holds, and who has taken it. It knows which punched pages a design
has not yet announced (batched) or freed (lazy). So it knows what each operation must announce, free
and keep. The memfd answers errno and content.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from errno import EINVAL, EIO, EOPNOTSUPP
from functools import partial
from itertools import pairwise
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hugetlb import SIZES, reserved
from model_backing import ModelBacking, Recorder
from outcomes import Errno, outcome
from restrictedmem.abi import memory
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.mm.backing import Backing, make_backing
from restrictedmem.mm.design import TEARDOWN
from restrictedmem.mm.designs import NAMES, make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import PAGE_SIZE, pgoff_t

BLOCK = 512
BLOCKS = 3
PAGES = BLOCK * BLOCKS
KEEP = int(FallocMode.KEEP_SIZE)
ZERO = int(FallocMode.ZERO_RANGE)
#: Where ranges begin and end: in every way that matters to a block of 2 MiB.
EDGES = [
    edge
    for block in range(0, PAGES, BLOCK)
    for edge in (block, block + 1, block + 3, block + 0x100, block + 0x1FF)
] + [PAGES]
PROBED = EDGES[:-1]

edges = st.sampled_from(EDGES)
spans = (
    st.tuples(edges, edges)
    .filter(lambda ends: ends[0] != ends[1])
    .map(lambda ends: range(min(ends), max(ends)))
)
some_pages = st.sampled_from(PROBED)

BACKINGS = ("model", "model-thp", "model-huge", "memfd", "thp", "hugetlb-2m")
Callback = tuple[int, int, int | None]


def new_backing(kind: str) -> Backing:
    if kind.startswith("model"):
        return ModelBacking(order=0 if kind == "model" else 9, splits=kind != "model-huge")
    return make_backing(kind)


def blocks(pages: Iterable[int]) -> list[range]:
    return [range(start, start + BLOCK) for start in sorted({page & -BLOCK for page in pages})]


class Designs(RuleBasedStateMachine):
    """One file of a design, its consumers, and what they must hear."""

    design: ClassVar[str]
    kind: ClassVar[str]

    @initialize(teardown=st.booleans())
    def create(self, teardown: bool) -> None:
        self.backing = new_backing(self.kind)
        self.huge = bool(self.backing.base_order)
        self.file = RestrictedFile(
            make(self.design + TEARDOWN * teardown), self.backing, Inode.make(0, 0)
        )
        self.plain = memory.memfd_create("compared")
        self.consumers: list[tuple[Recorder, range]] = []
        # Content that was written and not punched since; the existing pages, huge ones whole; and
        # the pages that remembering designs remember.
        self.content: dict[int, int] = {}
        self.present: set[int] = set()
        self.remembered: set[int] = set()
        self.asked: set[int] = set()
        self.sequence = 0

    def teardown(self) -> None:
        if hasattr(self, "file"):
            self.file.put()
            self.plain.close()

    # The owner.

    @rule(span=spans)
    def punch(self, span: range) -> None:
        expected = self._expected(span)
        self._fallocate(PUNCH, span)
        self._check(span, expected)
        self._punched(span)

    @precondition(lambda self: self.kind.startswith("model"))
    @rule(span=spans)
    def punch_that_fails(self, span: range) -> None:
        assert isinstance(self.backing, ModelBacking)
        expected = self._expected(span)
        self.backing.failures = [True]
        self._fallocate(PUNCH, span, Errno(EIO))
        self._check(span, expected)
        if self.design == "lazy":
            self.remembered -= set(span)

    @rule(span=spans, slip=st.sampled_from([1, PAGE_SIZE - 1]))
    def punch_unaligned(self, span: range, slip: int) -> None:
        for offset, length in (
            (span.start * PAGE_SIZE + slip, PAGE_SIZE),
            (span.start * PAGE_SIZE, len(span) * PAGE_SIZE - slip),
        ):
            punched = outcome(partial(self.file.fallocate, PUNCH, offset, length))
            assert punched == Errno(EINVAL)

    @rule(mode=st.sampled_from((0, KEEP)), page=some_pages)
    def allocate(self, mode: int, page: int) -> None:
        span = range(page, page + 1)
        self._fallocate(mode, span)
        self._told_of(span, [(page, page + 1, None)] if self.design == "v9" else [])
        self._appear(page)
        self.remembered.discard(page)

    @rule(first=st.sampled_from(range(0, PAGES, BLOCK)))
    def allocate_block(self, first: int) -> None:
        """Allocate 2 MiB at once, of which ``thp`` makes a folio."""
        block = range(first, first + BLOCK)
        self._fallocate(KEEP, block)
        self._told_of(block, [(first, first + BLOCK, None)] if self.design == "v9" else [])
        self.present |= set(block)
        self.remembered -= set(block)

    @rule(span=spans, mode=st.sampled_from((ZERO, ZERO | KEEP)))
    def other_mode(self, span: range, mode: int) -> None:
        self._fallocate(mode, span, Errno(EOPNOTSUPP))
        self._told_of(span, [(span.start, span.stop, None)] if self.design == "v9" else [])

    def _fallocate(self, mode: int, span: range, result: Errno | None = None) -> None:
        offset, length = span.start * PAGE_SIZE, len(span) * PAGE_SIZE
        self.sequence += bool(self.consumers) and (mode == PUNCH or self.design == "v9")
        assert outcome(lambda: self.file.fallocate(mode, offset, length)) == result
        if result != Errno(EIO):
            assert (
                outcome(lambda: memory.fallocate(self.plain.fileno(), mode, offset, length))
                == result
            )

    # The callbacks that it must make.

    def _expected(self, span: range) -> list[Callback] | None:
        """Return what a punch must tell, None where its form alone is given."""
        whole = (span.start, span.stop, None)
        match self.design:
            case "v9" | "v10" | "bindings":
                return [whole]
            case "batched":
                return [(block.start, block.stop, 9) for block in self._completed(span)]
            case "lazy":
                free = [
                    block
                    for block in self._completed(span)
                    if block.start in self.present and not self._held(set(block) - set(span))
                ]
                return [whole, *((block.start, block.stop, 9) for block in free if self.huge)]
            case _:
                return None

    def _completed(self, span: range) -> list[range]:
        return [block for block in blocks(span) if set(block) <= self.remembered | set(span)]

    def _held(self, pages: set[int]) -> bool:
        return any(recorder.held & pages for recorder, _ in self.consumers)

    def _check(self, span: range, expected: list[Callback] | None) -> None:
        self.asked |= set(span)
        if expected is not None:
            self._told_of(span, expected)
            return
        for recorder, _ in self.consumers:
            told = recorder.callbacks()
            covered = [page for start, end, _ in told for page in range(start, end)]
            assert covered == sorted(set(covered)), "in order, and nothing twice"
            assert set(covered) <= set(span)
            if self.design == "folio":
                assert covered == list(span)
            there = self.present & set(span)
            assert there <= set(covered)
            for start, end, order in told:
                assert (order is not None) is (start in there)
                if self.design == "folio":
                    assert set(range(start, end)) <= there or not there & set(range(start, end))
                    assert order is None or start >> order == end - 1 >> order
                    assert order != 9 or start == span.start or not start % BLOCK

    def _told_of(self, span: range, expected: list[Callback]) -> None:
        for recorder, bound in self.consumers:
            told = recorder.callbacks()
            assert told == [one for one in expected if one[0] < bound.stop and one[1] > bound.start]
            if self.design != "v9":
                assert {page for start, end, _ in told for page in range(start, end)} <= self.asked
            if self.design != "batched" and expected:
                assert not recorder.held & set(span) & set(bound)

    def _punched(self, span: range) -> None:
        """Work out what is left after a punch."""
        gone = set(span)
        for page in gone:
            self.content.pop(page, None)
        if not self.huge:
            self.present -= gone
        for block in blocks(span):
            rest = set(block) - gone
            complete = rest <= self.remembered
            if self.design == "batched":
                self.remembered = (
                    self.remembered - set(block)
                    if complete
                    else self.remembered | (set(block) & gone)
                )
            if not rest or (
                self.design == "lazy"
                and self.huge
                and complete
                and not self._held(rest)
                and self._free(block)
            ):
                self.remembered -= set(block)
                self.present -= set(block)
            elif self.design == "lazy" and self.huge:
                self.remembered |= set(block) & gone

    def _free(self, block: range) -> bool:
        return block.start in self.present or not self.consumers

    # The consumers.

    @precondition(lambda self: len(self.consumers) < 3)
    @rule()
    def register(self) -> None:
        recorder = Recorder(self.backing)
        bound = range(PAGES)
        if self.file.design.binds:
            taken = {other.start for _, other in self.consumers}
            bound = next(part for part in blocks(range(PAGES)) if part.start not in taken)
            self.file.bind(pgoff_t(bound.start), pgoff_t(bound.stop), recorder, exclusive=True)
        else:
            self.file.register_notifier(recorder)
        self.consumers.append((recorder, bound))

    @precondition(lambda self: self.consumers)
    @rule(data=st.data())
    def unregister(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.consumers))
        recorder, bound = one
        if self.design == "lazy":
            self.remembered -= {page for block in blocks(recorder.held) for page in block}
        self.file.unregister_notifier(recorder)
        told = recorder.callbacks()
        if not self.file.design.teardown:
            assert told == []
        elif self.design != "folio-poc":
            # One after the other, and together all that was bound.
            assert told[0][0] == bound.start
            assert all(before[1] == after[0] for before, after in pairwise(told))
            assert told[-1][1] >= bound.stop
            assert not recorder.held
        self.consumers.remove(one)
        for other, _ in self.consumers:
            others = other.callbacks()
            assert others == (told if self.design == "folio-poc" else [])
        self.sequence += self.file.design.teardown

    @precondition(lambda self: self.consumers)
    @rule(data=st.data(), page=some_pages, byte=st.integers(0, 255))
    def take_and_write(self, data: st.DataObject, page: int, byte: int) -> None:
        """Take a page that is bound, check its last content, and write ``byte`` (0: only take)."""
        choice = [recorder for recorder, bound in self.consumers if page in bound]
        if not choice:
            return
        data.draw(st.sampled_from(choice)).take(page)
        memory.fallocate(self.plain.fileno(), KEEP, page * PAGE_SIZE, PAGE_SIZE)
        self._appear(page)
        assert self._peek(page) == self.content.get(page, 0)
        if byte:
            self._poke(page, byte)
            os.pwrite(self.plain.fileno(), bytes([byte]), page * PAGE_SIZE)
            self.content[page] = byte

    def _appear(self, page: int) -> None:
        if self.huge or (self.kind == "model-thp" and not self.present & set(blocks([page])[0])):
            self.present |= set(blocks([page])[0])
        self.present.add(page)

    def _peek(self, page: int) -> int:
        if isinstance(self.backing, ModelBacking):
            return self.backing.content.get(page, 0)
        return os.pread(self.backing.fileno(), 1, page * PAGE_SIZE)[0]

    def _poke(self, page: int, byte: int) -> None:
        if isinstance(self.backing, ModelBacking):
            self.backing.content[page] = byte
            return
        # hugetlbfs has no write(2), and maps whole huge pages.
        start = page & -BLOCK
        with mmap.mmap(
            self.backing.fileno(), BLOCK * PAGE_SIZE, offset=start * PAGE_SIZE
        ) as mapping:
            mapping[(page - start) * PAGE_SIZE] = byte

    # Invariants.

    @invariant()
    def no_page_is_lost_and_none_comes_back(self) -> None:
        if hasattr(self, "file"):
            for page in PROBED:
                assert self._peek(page) == self.content.get(page, 0), hex(page)
                assert os.pread(self.plain.fileno(), 1, page * PAGE_SIZE) in (
                    b"",
                    bytes([self.content.get(page, 0)]),
                )

    @invariant()
    def what_is_held_is_what_the_design_says(self) -> None:
        if hasattr(self, "file"):
            assert self.backing.resident() == len(self.present) * PAGE_SIZE

    @invariant()
    def nothing_is_in_progress_and_each_operation_counted_once(self) -> None:
        if hasattr(self, "file") and self.consumers:
            assert not self.file.sequence().busy()
            assert self.file.sequence().snapshot() == self.sequence
            assert self.file.notifier_count == len(self.consumers)


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[None]:
    with ExitStack() as stack:
        kind = request.node.callspec.params["kind"]
        if kind in SIZES:
            stack.enter_context(reserved(SIZES[kind], BLOCKS))
        yield


@pytest.mark.no_cover
# To make a failure small takes longer than to find it.
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("design", NAMES)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.requires("hugetlb")] if kind in SIZES else [])
        for kind in BACKINGS
    ],
)
def test_design(design: str, kind: str) -> None:
    machine = type(f"{design} on {kind}", (Designs,), {"design": design, "kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
