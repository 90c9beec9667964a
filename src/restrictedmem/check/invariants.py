"""What must hold whatever the interleaving: the rules, and what they need to remember of a run.

Rules are checked where two parties meet (an access, an installed translation, a frame on its way
out, a callback) and not only after each step, so that a search which skips equivalent orders loses
none of them. A rule that is broken is noted and raised after the step.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, final

from restrictedmem.check.control import saw, touch
from restrictedmem.check.explorer import RuleBroken
from restrictedmem.check.frames import HUGE_PAGES, MEMORY, Frames
from restrictedmem.kvm.memslot import PRIVATE, Memslot
from restrictedmem.units import PageRange, gfn_t, pgoff_t


class Rule(Enum):
    """What a counterexample is about; the words come first in its text."""

    FREED = "use of a freed page"
    """A translation leads to a frame that the file gave up (semantics 5.5 no. 1)."""
    WINDOW = "mapped between start and end"
    """A page was mapped while its consumer had been told to keep out (no. 3)."""
    BALANCE = "callbacks out of balance"
    """An end without a start, or a start or an invalidation that never ends (no. 4)."""
    ATTRIBUTE = "the wrong half"
    """A guest reaches the half of a page that its attribute does not name, or another page of the file (no. 5)."""
    LEVEL = "mapped larger than it is"
    """A translation is larger than the folio it leads to (no. 6)."""
    RANGE = "told of something else"
    """A consumer heard of pages that nobody asked to invalidate, or did not hear of those (no. 7)."""
    LOST = "content lost"
    """What a guest wrote is gone although nobody punched it since."""
    STALE = "content that should be gone"
    """What a guest wrote before a punch is still there after it."""
    POISON = "use of a lost page"
    """A guest reaches a page that the machine has lost."""
    REFERENCE = "mapped without a reference"
    """A page is mapped that its consumer does not count as taken, so that nobody knows it is in use."""
    DEADLOCK = "deadlock"
    """Nobody can go on; the explorer's to find."""
    PLATFORM = "a rule of the platform"
    """The host's RMP or direct map would have faulted (no. 1, 2 and 6)."""


#: Number of the actor whose code this is; of nobody while a world is made.
acting: Final = ContextVar("acting", default=-1)


@final
@dataclass(frozen=True, slots=True)
class Told:
    """A range that a consumer was told to keep out of, and answered; by whom."""

    span: PageRange
    actor: int


@final
@dataclass(slots=True, eq=False)
class SlotHistory:
    """A slot and what the rules remember of it."""

    slot: Memslot
    window: PageRange
    #: By page of the slot: the number of the frame that its entry leads to, if there is an entry.
    led: bytearray
    #: What was told and not ended yet; of this, what no page may be mapped in, for an invalidation
    #: is in progress.
    told: list[Told] = field(default_factory=list[Told])
    closed: list[Told] = field(default_factory=list[Told])
    #: All that was ever asked for, clipped to the window: nothing else may be zapped.
    asked: list[PageRange] = field(default_factory=list[PageRange])
    #: Whether it is being unregistered, when everything may be told; and whether the guest has it.
    leaving: bool = False
    live: bool = True


_PRIVATE_ENTRIES: Final = bytes(255 if entry & PRIVATE else 0 for entry in range(256))
_ANY_ENTRY: Final = bytes(255 if entry else 0 for entry in range(256))


def _remember() -> None:
    # What the rules remember is as shared as the frames it is about; the actor itself learns
    # nothing.
    touch(MEMORY, write=True)
    saw(None)


def _mask(memory: bytes | bytearray, table: bytes, first: int, last: int) -> int:
    # Through a view: the slot's arrays are under the explorer's control, and looking at them is no
    # step.
    return int.from_bytes(bytes(memoryview(memory)[first:last]).translate(table), "big")


def _told(told: list[Told]) -> tuple[tuple[int, int, int], ...]:
    return tuple(sorted((one.actor, one.span.start, one.span.end) for one in told))


def _blocks(span: PageRange) -> PageRange:
    return PageRange(
        pgoff_t(span.start & -HUGE_PAGES), pgoff_t(-(-span.end // HUGE_PAGES) * HUGE_PAGES)
    )


@final
class Invariants:
    """The rules over one world; ranges in pages of the file."""

    def __init__(self, *, exact: bool, large: bool, binds: bool) -> None:
        """``exact``: callbacks are to stay within what the owner asked for; else, and so zaps if ``large``, within its 2 MiB blocks.

        ``binds``: nor may they go to who has bound no page of it.
        """
        self._exact = exact
        self._binds = binds
        self._large = large
        self._violation: RuleBroken | None = None
        self.views: list[SlotHistory] = []
        self.frames: Frames
        #: By page: the frame that the consumer's mapping of the file showed when it took the page
        #: last.
        self.taken = bytearray()
        #: Operations of the owner under way.
        self._punching: list[PageRange] = []
        self._converting: list[tuple[int, int]] = []
        #: Pages a guest wrote, and nobody punched since.
        self._written: set[int] = set()
        #: By page that the machine has lost: the number of its frame then.
        self.poisoned: dict[int, int] = {}
        self._dead = False

    def state(self) -> tuple[object, ...]:
        """Return what is remembered, as far as a rule may still ask for it."""
        against = self.frames.against
        views = tuple(
            (self._led(view), _told(view.told), _told(view.closed), view.leaving, view.live)
            for view in self.views
        )
        owner = tuple(self._punching), tuple(self._converting)
        poisoned = tuple(
            (pgoff, against(bytes([number]), pgoff))
            for pgoff, number in sorted(self.poisoned.items())
        )
        return against(self.taken), views, owner, tuple(sorted(self._written)), poisoned, self._dead

    def _led(self, view: SlotHistory) -> bytes:
        """Return which entries lead to the frames that their pages have."""
        entries = bytes(memoryview(view.slot.entries)).translate(_PRIVATE_ENTRIES)
        if not entries.strip(b"\0"):
            return b""
        led = self.frames.against(view.led, view.window.start)
        return bytes(entry and one for entry, one in zip(entries, led, strict=True))

    def _live(self) -> list[SlotHistory]:
        return [view for view in self.views if view.live]

    def violate(self, rule: Rule, story: str) -> None:
        """Note that a rule is broken; the first counts."""
        if self._violation is None:
            self._violation = RuleBroken(f"{rule.value}: {story}")

    # What the owner does.

    @contextmanager
    def punching(self, span: PageRange) -> Generator[None]:
        """Note that the owner asks for a hole meanwhile; raises what the operation does."""
        self._ask(span)
        old = {
            pgoff: value
            for pgoff, value in self.frames.content.items()
            if span.start <= pgoff < span.end
        }
        self._written -= old.keys()
        self._punching.append(span)
        try:
            yield
        except OSError:
            # Nothing is asked for any more, but content may be gone.
            self._punching.remove(span)
            raise
        self._punching.remove(span)
        for pgoff, value in old.items():
            if self.frames.content.get(pgoff) == value:
                self.violate(Rule.STALE, f"page {pgoff:#x} shows what it did before it was punched")

    @contextmanager
    def allocating(self, span: PageRange) -> Generator[None]:
        """Note that the owner preallocates meanwhile, of which v9 tells."""
        self._ask(span)
        self._punching.append(span)
        yield
        self._punching.remove(span)

    @contextmanager
    def converting(self, start: gfn_t, end: gfn_t) -> Generator[None]:
        """Note that the owner changes attributes meanwhile."""
        for view in self.views:
            first, last = view.slot.clip(start, end)
            shift = view.window.start - view.slot.base_gfn
            self._may_zap(view, PageRange(pgoff_t(first + shift), pgoff_t(last + shift)))
        self._converting.append((start, end))
        yield
        _remember()
        self._converting.remove((start, end))

    @contextmanager
    def losing(self, span: PageRange) -> Generator[None]:
        """Note that the machine loses what lies in pages now, and that consumers have given it up afterwards."""
        self._ask(span)
        lost = {pgoff: self.frames.numbers[pgoff] for pgoff in range(span.start, span.end)}
        yield
        _remember()
        self.poisoned.update(lost)

    def _ask(self, span: PageRange) -> None:
        for view in self.views:
            self._may_zap(view, span)

    def _may_zap(self, view: SlotHistory, span: PageRange) -> None:
        view.asked.append(
            view.window.clip(_blocks(span) if self._large or not self._exact else span)
        )

    # What the shim does.

    def start(self, view: SlotHistory, span: PageRange) -> None:
        """Note that a consumer was told to keep out, and has answered."""
        told = Told(span, acting.get())
        view.told.append(told)
        view.closed.append(told)
        self._check_range(view, span)

    def _check_range(self, view: SlotHistory, span: PageRange) -> None:
        if view.leaving:
            return
        if self._binds and not len(view.window.clip(span)):
            self.violate(
                Rule.RANGE, f"a consumer that has bound {view.window} is told of pages {span}"
            )
        for asked in self._punching:
            whole = asked if self._exact else _blocks(asked)
            if whole.start <= span.start and span.end <= whole.end:
                return
        self.violate(
            Rule.RANGE, f"a consumer is told of pages {span}, which nobody asked to invalidate"
        )

    def end(self, view: SlotHistory, span: PageRange) -> None:
        """Note that a consumer is told to go on."""
        told = Told(span, acting.get())
        if told not in view.told:
            self.violate(Rule.BALANCE, f"an end for pages {span} without a start")
            return
        view.told.remove(told)
        if told in view.closed:
            view.closed.remove(told)

    def opened(self) -> None:
        """Note that the invalidation that the actor began is not in progress any more: whoever saw it may map again."""
        for view in self.views:
            view.closed = [told for told in view.closed if told.actor != acting.get()]

    def view_of(self, gfn: int) -> SlotHistory:
        """Return the history of the slot that shows a guest page."""
        return next(view for view in self.views if view.slot.base_gfn <= gfn < view.slot.end_gfn)

    def before_free(self, span: PageRange) -> None:
        """Check that nobody uses frames that are about to go."""
        for view in self._live():
            inside = view.window.clip(span)
            first, last = inside.start - view.window.start, inside.end - view.window.start
            # Through the explorer, so that a zap before and one after are not the same to it.
            if first < last and view.slot.entries.count(0, first, last) < last - first:
                numbers = self.frames.numbers[inside.start : inside.end]
                mapped = _mask(view.slot.entries, _PRIVATE_ENTRIES, first, last) & _mask(
                    numbers, _ANY_ENTRY, 0, len(numbers)
                )
                if mapped:
                    self.violate(
                        Rule.FREED, f"pages of {inside} are freed while the guest has them mapped"
                    )

    def freed(self, span: PageRange) -> None:
        """Check that nobody still wants what was in frames that are gone."""
        self._gone(span)

    def zeroed(self, span: PageRange) -> None:
        """Check that nobody still wants what was in frames that are zero now."""
        self._gone(span)

    def _gone(self, span: PageRange) -> None:
        for pgoff in sorted(self._written):
            if span.start <= pgoff < span.end:
                self._written.discard(pgoff)
                if not self._dead and not any(
                    asked.start <= pgoff < asked.end for asked in self._punching
                ):
                    self.violate(
                        Rule.LOST,
                        f"page {pgoff:#x} is emptied, which the guest wrote to and nobody has punched since",
                    )

    def dying(self) -> None:
        """Note that the last reference to the file is gone."""
        self._dead = True

    # What the consumer and its guest do.

    def take(self, span: PageRange) -> None:
        """Note which frames a consumer's mapping shows now."""
        self.taken[span.start : span.end] = self.frames.numbers[span.start : span.end]

    def install(self, view: SlotHistory, span: PageRange, gfn: gfn_t) -> None:
        """Check translations that are about to be installed, under the MMU's lock."""
        for told in view.closed:
            if span.start < told.span.end and told.span.start < span.end:
                self.violate(
                    Rule.WINDOW, f"pages {span} are mapped between start and end of {told.span}"
                )
        first = gfn - view.slot.base_gfn
        last = first + len(span)
        if memoryview(view.slot.attributes)[first:last].tobytes().count(0):
            self.violate(
                Rule.ATTRIBUTE,
                f"guest pages {gfn:#x} to {gfn + len(span):#x} are mapped private, and not all of them are",
            )
        if span.start - view.window.start != first:
            self.violate(
                Rule.ATTRIBUTE, f"guest page {gfn:#x} is mapped to page {span.start:#x} of the file"
            )
        taken = self.taken[span.start : span.end]
        if taken != self.frames.numbers[span.start : span.end] or taken.count(0):
            self.violate(Rule.FREED, f"pages {span} are mapped to frames that are gone")
        view.led[first:last] = taken

    def dropped(self, start: gfn_t, end: gfn_t) -> None:
        """Check that a guest loses only translations that somebody asked it to."""
        for view in self.views:
            first, last = view.slot.clip(start, end)
            if first < last:
                shift = view.window.start - view.slot.base_gfn
                if any(
                    asked.start <= first + shift and last + shift <= asked.end
                    for asked in view.asked
                ):
                    return
        if start < end:
            self.violate(
                Rule.RANGE, f"guest pages {start:#x} to {end:#x} are zapped, which nobody asked for"
            )

    def access(
        self, view: SlotHistory, gfn: int, entry: int, number: int, value: int | None
    ) -> None:
        """Check a guest's access through a translation it has; ``value`` is what it stores, None for a load."""
        index = gfn - view.slot.base_gfn
        private = bool(entry & PRIVATE)
        converting = any(start <= gfn < end for start, end in self._converting)
        if not converting and private is not bool(memoryview(view.slot.attributes)[index]):
            self.violate(
                Rule.ATTRIBUTE,
                f"guest page {gfn:#x} is reached in its {'private' if private else 'shared'} half",
            )
        if not private:
            return
        pgoff = index + view.window.start
        if self.frames.numbers[pgoff] != number:
            self.violate(Rule.FREED, f"a guest reaches the frame that page {pgoff:#x} had once")
        if self.poisoned.get(pgoff) == number:
            self.violate(Rule.POISON, f"a guest reaches page {pgoff:#x}")
        if value is not None:
            self.frames.content[pgoff] = value
            self._written.add(pgoff)

    # Always, and at the end.

    def check(self) -> None:
        """Raise what was broken in the last step, or is broken now.

        Raises:
            RuleBroken: with the rule and the story.
        """
        if self._violation is not None:
            raise self._violation
        for view in self._live():
            start, end = view.window.start, view.window.end
            mapped = _mask(view.slot.entries, _PRIVATE_ENTRIES, 0, end - start)
            if not mapped:
                continue
            wrong = int.from_bytes(view.led, "big") ^ int.from_bytes(
                self.frames.numbers[start:end], "big"
            )
            if mapped & wrong:
                raise RuleBroken(
                    f"{Rule.FREED.value}: an entry of slot {view.slot.number} leads to a frame that is gone"
                )

    def finish(self) -> None:
        """Raise what must hold once everybody is done and does not.

        Raises:
            RuleBroken: with the rule and the story.
        """
        self.check()
        for view in self.views:
            if view.told:
                raise RuleBroken(
                    f"{Rule.BALANCE.value}: no end came for pages {', '.join(str(told.span) for told in view.told)}"
                )
        for view in self._live():
            half = view.slot.memfd_half
            size = len(view.window)
            if half.sequence.busy():
                raise RuleBroken(f"{Rule.BALANCE.value}: an invalidation is in progress for ever")
            mapped = _mask(view.slot.entries, _PRIVATE_ENTRIES, 0, size)
            if mapped & ~_mask(view.slot.attributes, _ANY_ENTRY, 0, size):
                raise RuleBroken(
                    f"{Rule.ATTRIBUTE.value}: a shared guest page of slot {view.slot.number} is mapped private"
                )
            entries = bytes(memoryview(view.slot.entries)).translate(_PRIVATE_ENTRIES)
            for index in (index for index in range(size) if entries[index]):
                pgoff = pgoff_t(view.window.start + index)
                if not half.pages.count(PageRange(pgoff, pgoff_t(pgoff + 1))):
                    raise RuleBroken(
                        f"{Rule.REFERENCE.value}: page {pgoff:#x} is mapped and not counted as taken"
                    )
