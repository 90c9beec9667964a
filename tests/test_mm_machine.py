"""The shim, driven at random, compared with a model of pages in a dict and with a bare memfd.

The model knows what each page holds, what each consumer has taken, and what each notifier must have
heard. The memfd answers errno, size and blocks for operations that it has too. The shim's own rules
are excepted: one sizing, aligned punches, the limit.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import EFAULT, EINVAL, EIO, ENOSPC, EOPNOTSUPP, EPERM
from typing import final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outcomes import Errno, outcome
from restrictedmem.abi import memory
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.memfd import never
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import PAGE_MASK, PAGE_SIZE, PageRange, pgoff_t

PAGES = 24
WINDOWS = (PageRange(pgoff_t(0), pgoff_t(16)), PageRange(pgoff_t(8), pgoff_t(PAGES)))
KEEP = int(FallocMode.KEEP_SIZE)
MODES = (
    0,
    KEEP,
    PUNCH,
    PUNCH,
    int(FallocMode.ZERO_RANGE),
    int(FallocMode.COLLAPSE_RANGE),
    PUNCH | int(FallocMode.ZERO_RANGE),
)

some_pages = st.integers(0, PAGES - 1)
lengths = st.integers(1, 8)
#: Bytes by which an offset or a length misses a page's edge; mostly none.
slips = st.sampled_from([0, 0, 0, 1, PAGE_SIZE - 1])


@final
class Fallible:
    """A memfd whose next operation can be made to fail."""

    def __init__(self, limit: int | None) -> None:
        self.inner = MemfdBacking(limit=limit)
        self.limit = limit
        self.base_order, self.hugepage, self.blksize = 0, False, PAGE_SIZE
        self.fails = False

    def _check(self) -> None:
        if self.fails:
            raise OSError(EIO, "made to fail")

    def allocate(self, offset: int, length: int, abandoned: Callable[[], bool] = never) -> None:
        self._check()
        self.inner.allocate(offset, length, abandoned)

    def punch(self, offset: int, length: int) -> None:
        self._check()
        self.inner.punch(offset, length)

    def order_of(self, pgoff: pgoff_t) -> int:
        return self.inner.order_of(pgoff)

    def release(self, offset: int, length: int) -> None:
        self.inner.release(offset, length)

    def folios(self, span: PageRange) -> Iterator[tuple[pgoff_t, pgoff_t, int | None]]:
        return self.inner.folios(span)

    def renew(self) -> Callable[[], None]:
        return self.inner.renew()

    def resident(self) -> int:
        return self.inner.resident()

    def fileno(self) -> int:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()


Callback = tuple[str, int, int]


@final
@dataclass(eq=False)
class Listener:
    """A consumer's notifier.

    It releases pages at start and again at end, and records each callback.
    """

    window: Pages
    heard: list[Callback] = field(default_factory=list[Callback])
    expected: list[Callback] = field(default_factory=list[Callback])

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.heard.append(("start", start, end))
        self.window.invalidate_start(PageRange(start, end))

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.heard.append(("end", start, end))
        self.window.invalidate_end(PageRange(start, end))

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("no page was lost")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0


def touched(offset: int, length: int) -> range:
    return range(offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE))


class Shim(RuleBasedStateMachine):
    """One restricted file, two consumers, and what they must look like."""

    file: RestrictedFile

    @initialize(api=st.sampled_from(list(Api)), limit=st.sampled_from([None, 10]))
    def create(self, api: Api, limit: int | None) -> None:
        self.limit = limit
        self.backing = Fallible(None if limit is None else limit * PAGE_SIZE)
        self.file = RestrictedFile(make(api.value), self.backing, Inode.make(0, 0))
        self.plain = memory.memfd_create("compared")
        self.windows = [Pages(self.backing, window) for window in WINDOWS]
        self.listeners: list[Listener] = []
        # The model: size; page to its first byte; pages each consumer has; callbacks and sequence
        # to be expected.
        self.size = 0
        self.present: dict[int, int] = {}
        self.taken: list[set[int]] = [set(), set()]
        self.sequence = 0

    def teardown(self) -> None:
        if hasattr(self, "file"):
            self.file.put()
            self.plain.close()

    def over_limit(self, pages: set[int]) -> bool:
        return self.limit is not None and len(pages | set(self.present)) > self.limit

    # The owner.

    @rule(pages=st.integers(0, PAGES), slip=slips)
    def ftruncate(self, pages: int, slip: int) -> None:
        length = pages * PAGE_SIZE + slip
        result = outcome(lambda: self.file.ftruncate(length))
        if self.size:
            assert result == Errno(EPERM)
        elif length & PAGE_MASK:
            assert result == Errno(EINVAL)
        else:
            assert result is None
            self.size = length
            # To 0 at size 0, tmpfs frees what lies beyond the end: docs/reference/divergences.md,
            # ftruncate-empty.
            if length:
                os.ftruncate(self.plain.fileno(), length)

    @rule(mode=st.sampled_from(MODES), first=some_pages, count=lengths, slip=slips, short=slips)
    def fallocate(self, mode: int, first: int, count: int, slip: int, short: int) -> None:
        offset, length = first * PAGE_SIZE + slip, max(1, count * PAGE_SIZE - short)
        self._heard(mode, offset, length)
        result = outcome(lambda: self.file.fallocate(mode, offset, length))
        expected = self._expect(mode, offset, length)
        assert result == expected
        if expected is None or expected == Errno(EOPNOTSUPP):
            # A bare memfd's answer to the same; the same file system refuses ZERO_RANGE and the
            # like there.
            assert (
                outcome(lambda: memory.fallocate(self.plain.fileno(), mode, offset, length))
                == result
            )
        if result is None:
            self._apply(mode, offset, length)

    @rule(mode=st.sampled_from((0, KEEP, PUNCH)), first=some_pages, count=lengths)
    def fallocate_that_fails_below(self, mode: int, first: int, count: int) -> None:
        offset, length = first * PAGE_SIZE, count * PAGE_SIZE
        self._heard(mode, offset, length)
        self.backing.fails = True
        result = outcome(lambda: self.file.fallocate(mode, offset, length))
        self.backing.fails = False
        assert result == Errno(EIO)

    def _expect(self, mode: int, offset: int, length: int) -> Errno | None:
        if mode & FallocMode.PUNCH_HOLE and (offset | length) & PAGE_MASK:
            return Errno(EINVAL)
        if mode not in (0, KEEP, PUNCH):
            return Errno(EOPNOTSUPP)
        if mode != PUNCH and self.over_limit(set(touched(offset, length))):
            return Errno(ENOSPC)
        return None

    def _apply(self, mode: int, offset: int, length: int) -> None:
        for page in touched(offset, length):
            if mode == PUNCH:
                self.present.pop(page, None)
            else:
                self.present.setdefault(page, 0)
        if mode == 0:
            self.size = max(self.size, offset + length)

    def _heard(self, mode: int, offset: int, length: int) -> None:
        """Work out what an operation must tell whom, before it runs."""
        refused_early = mode & FallocMode.PUNCH_HOLE and (offset | length) & PAGE_MASK
        notifies = self.file.design.notifies(mode)
        if self.listeners and notifies and not refused_early:
            self.sequence += 1
            span = touched(offset, length)
            for listener in self.listeners:
                listener.expected += [
                    ("start", span.start, span.stop),
                    ("end", span.start, span.stop),
                ]
                self.taken[self.windows.index(listener.window)] -= set(span)

    # The consumers.

    @rule(which=st.sampled_from((0, 1)))
    def register(self, which: int) -> None:
        listener = Listener(self.windows[which])
        self.file.register_notifier(listener)
        self.listeners.append(listener)

    @precondition(lambda self: self.listeners)
    @rule(data=st.data())
    def unregister(self, data: st.DataObject) -> None:
        listener = data.draw(st.sampled_from(self.listeners))
        self.file.unregister_notifier(listener)
        self.listeners.remove(listener)

    @rule(which=st.sampled_from((0, 1)), page=some_pages)
    def get_page(self, which: int, page: int) -> None:
        self._take(
            which, range(page, page + 1), lambda: self.windows[which].get_page(pgoff_t(page)), 0
        )

    @rule(which=st.sampled_from((0, 1)), first=some_pages, count=st.integers(0, 8))
    def get_pages(self, which: int, first: int, count: int) -> None:
        span = PageRange(pgoff_t(first), pgoff_t(first + count))
        self._take(
            which, range(first, first + count), lambda: self.windows[which].get_pages(span), None
        )

    def _take(self, which: int, pages: range, call: Callable[[], object], value: object) -> None:
        window, wanted = WINDOWS[which], set(pages)
        before = self.windows[which].taken
        result = outcome(call)
        if pages.start < window.start or pages.stop > window.end:
            assert result == Errno(EFAULT)
        elif wanted - self.taken[which] and self.over_limit(wanted):
            assert result == Errno(ENOSPC)
        else:
            assert result == value
            assert self.windows[which].taken - before == len(wanted - self.taken[which])
            if wanted - self.taken[which]:
                for page in wanted:
                    self.present.setdefault(page, 0)
                    memory.fallocate(self.plain.fileno(), KEEP, page * PAGE_SIZE, PAGE_SIZE)
            self.taken[which] |= wanted

    @rule(which=st.sampled_from((0, 1)), first=some_pages, count=st.integers(0, 8))
    def forget(self, which: int, first: int, count: int) -> None:
        known = self.windows[which].forget(PageRange(pgoff_t(first), pgoff_t(first + count)))
        gone = self.taken[which] & set(range(first, first + count))
        assert known == len(gone)
        self.taken[which] -= gone

    @precondition(lambda self: self.present)
    @rule(data=st.data(), byte=st.integers(1, 255))
    def write(self, data: st.DataObject, byte: int) -> None:
        page = data.draw(st.sampled_from(sorted(self.present)))
        os.pwrite(self.backing.fileno(), bytes([byte]) * PAGE_SIZE, page * PAGE_SIZE)
        self.present[page] = byte

    # Invariants.

    @invariant()
    def size_and_pages_are_the_models_and_the_memfds(self) -> None:
        if hasattr(self, "file"):
            found = os.fstat(self.plain.fileno())
            assert self.file.size == self.size == found.st_size
            assert (
                self.file.backing.resident()
                == len(self.present) * PAGE_SIZE
                == found.st_blocks * 512
            )

    @invariant()
    def pages_hold_what_was_written_and_fresh_ones_zero(self) -> None:
        if hasattr(self, "file") and self.present:
            for page, byte in self.present.items():
                assert (
                    os.pread(self.backing.fileno(), PAGE_SIZE, page * PAGE_SIZE)
                    == bytes([byte]) * PAGE_SIZE
                ), page

    @invariant()
    def callbacks_are_balanced_and_as_expected(self) -> None:
        if hasattr(self, "file"):
            for listener in self.listeners:
                assert listener.heard == listener.expected

    @invariant()
    def the_sequence_counts_notified_operations(self) -> None:
        if hasattr(self, "file") and self.listeners:
            assert self.file.notifier_count == len(self.listeners)
            assert self.file.sequence().snapshot() == self.sequence
            assert not self.file.sequence().busy()


Shim.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
test_shim = pytest.mark.no_cover(Shim.TestCase)
