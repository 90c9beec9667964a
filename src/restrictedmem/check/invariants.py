"""The rules that hold in every interleaving, and the part of an execution that they remember.

Rules are checked where two actors meet, and not only after each step: at an access, when a
translation is installed, before a frame is freed, and at a callback. So a search that skips
equivalent orders misses no violation. A broken rule is recorded, and raised after the step.
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
    """The rule that a counterexample breaks; its text begins with these words."""

    FREED = "use of a freed page"
    """A translation leads to a frame that the file has freed."""
    WINDOW = "mapped between start and end"
    """A page was mapped after its consumer had been told to map nothing there."""
    BALANCE = "callbacks out of balance"
    """An end has no start, or a start or an invalidation never ends."""
    ATTRIBUTE = "the wrong half"
    """A guest reaches the wrong half or page.

    This is the half that the page's attribute does not name, or another page of the file.
    """
    LEVEL = "mapped larger than it is"
    """A translation is larger than the folio it leads to."""
    RANGE = "told of something else"
    """A consumer heard of pages that nobody asked for, or not of those asked for.

    The owner's operations ask to invalidate pages.
    """
    LOST = "content lost"
    """Content that a guest wrote is gone, although nobody has punched it since."""
    STALE = "content that should be gone"
    """Content that a guest wrote before a punch is still there after it."""
    POISON = "use of a lost page"
    """A guest reaches a page that the machine has lost."""
    REFERENCE = "mapped without a reference"
    """A page is mapped, but its consumer does not count it as taken.

    So nobody knows that the page is in use.
    """
    DEADLOCK = "deadlock"
    """No actor can go on; the explorer finds this."""
    PLATFORM = "a rule of the platform"
    """The host's RMP or direct map would have faulted."""


#: Number of the actor whose code runs; -1 while a world is made.
acting: Final = ContextVar("acting", default=-1)


@final
@dataclass(frozen=True, slots=True)
class Told:
    """A range that a consumer was told to map nothing in, and the actor that told it.

    The consumer has answered.
    """

    span: PageRange
    actor: int


@final
@dataclass(slots=True, eq=False)
class SlotHistory:
    """A slot, and the facts that the rules remember of it."""

    slot: Memslot
    window: PageRange
    #: By page of the slot: the number of the frame that its entry leads to, if it has an entry.
    led: bytearray
    #: Ranges that were told and have not ended yet (``told``). Of these, the ranges in which no
    #: page may be mapped, because an invalidation is in progress (``closed``).
    told: list[Told] = field(default_factory=list[Told])
    closed: list[Told] = field(default_factory=list[Told])
    #: All ranges that were ever asked for, clipped to the window: nothing else may be zapped.
    asked: list[PageRange] = field(default_factory=list[PageRange])
    #: Whether the slot is being unregistered, when any range may be told (``leaving``); whether the
    #: guest has the slot (``live``).
    leaving: bool = False
    live: bool = True


_PRIVATE_ENTRIES: Final = bytes(255 if entry & PRIVATE else 0 for entry in range(256))
_ANY_ENTRY: Final = bytes(255 if entry else 0 for entry in range(256))


def _remember() -> None:
    # The facts that the rules remember are shared, as are the frames that they are about. The actor
    # itself learns nothing.
    touch(MEMORY, write=True)
    saw(None)


def _mask(memory: bytes | bytearray, table: bytes, first: int = 0, last: int | None = None) -> int:
    # The view bypasses the explorer, which controls the slot's arrays: this look at them is no
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
    """The rules of one world; ranges are in pages of the file."""

    def __init__(self, *, exact: bool, large: bool, binds: bool) -> None:
        """Make the rules.

        Callbacks must stay within the range that the owner asked for if ``exact``, else within the
        2 MiB blocks of this range. Zaps may reach these blocks also if ``large``. If ``binds``,
        callbacks must not go to a consumer that has bound no page of the range.
        """
        self._exact = exact
        self._binds = binds
        self._large = large
        self._violation: RuleBroken | None = None
        self.views: list[SlotHistory] = []
        self.frames: Frames
        #: By page: the number of the frame in the consumer's mapping of the file when the consumer
        #: last took the page.
        self.taken = bytearray()
        #: Ranges of the owner's operations under way.
        self._punching: list[PageRange] = []
        self._converting: list[tuple[int, int]] = []
        #: Pages that a guest wrote, and that nobody has punched since.
        self._written: set[int] = set()
        #: By page that the machine has lost: the number of the frame that it had then.
        self.poisoned: dict[int, int] = {}
        self._dead = False

    def state(self) -> tuple[object, ...]:
        """Return the remembered facts, as far as a rule may still ask for them."""
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
        """Return for each entry: 0 if none, 1 if it leads to its page's frame, else 2."""
        entries = bytes(memoryview(view.slot.entries)).translate(_PRIVATE_ENTRIES)
        if not entries.strip(b"\0"):
            return b""
        led = self.frames.against(view.led, view.window.start)
        return bytes(entry and one for entry, one in zip(entries, led, strict=True))

    def _live(self) -> list[SlotHistory]:
        return [view for view in self.views if view.live]

    def violate(self, rule: Rule, story: str) -> None:
        """Record that a rule is broken; the first violation counts."""
        if self._violation is None:
            self._violation = RuleBroken(f"{rule.value}: {story}")

    # The owner's operations.

    @contextmanager
    def punching(self, span: PageRange) -> Generator[None]:
        """Record that the owner punches a hole meanwhile.

        Raises:
            OSError: the error of the operation.
        """
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
            # The request is over, but content may be gone.
            self._punching.remove(span)
            raise
        self._punching.remove(span)
        for pgoff, value in old.items():
            if self.frames.content.get(pgoff) == value:
                self.violate(Rule.STALE, f"page {pgoff:#x} has its old content after the punch")

    @contextmanager
    def allocating(self, span: PageRange) -> Generator[None]:
        """Record that the owner preallocates meanwhile, which v9 tells consumers."""
        self._ask(span)
        self._punching.append(span)
        yield
        self._punching.remove(span)

    @contextmanager
    def converting(self, start: gfn_t, end: gfn_t) -> Generator[None]:
        """Record that the owner changes attributes meanwhile."""
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
        """Record that the machine loses the frames that pages have now.

        When the block ends, consumers have given these frames up.
        """
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

    # The shim's callbacks and frees.

    def start(self, view: SlotHistory, span: PageRange) -> None:
        """Record that a consumer was told of an invalidation's start, and has answered."""
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
        """Record that a consumer is told of an invalidation's end."""
        told = Told(span, acting.get())
        if told not in view.told:
            self.violate(Rule.BALANCE, f"an end for pages {span} without a start")
            return
        view.told.remove(told)
        if told in view.closed:
            view.closed.remove(told)

    def opened(self) -> None:
        """Record that the actor's invalidation is over: faults may map pages again."""
        for view in self.views:
            view.closed = [told for told in view.closed if told.actor != acting.get()]

    def view_of(self, gfn: int) -> SlotHistory:
        """Return the history of the slot that shows a guest page."""
        return next(view for view in self.views if view.slot.base_gfn <= gfn < view.slot.end_gfn)

    def before_free(self, span: PageRange) -> None:
        """Check that nobody uses frames that are about to be freed."""
        for view in self._live():
            inside = view.window.clip(span)
            first, last = inside.start - view.window.start, inside.end - view.window.start
            if first == last:
                continue
            # This look is a step, so that the explorer tells a zap before it from a zap after it.
            view.slot.entries.count(0, first, last)
            mapped = _mask(view.slot.entries, _PRIVATE_ENTRIES, first, last) & _mask(
                self.frames.numbers[inside.start : inside.end], _ANY_ENTRY
            )
            if mapped:
                self.violate(
                    Rule.FREED, f"pages of {inside} are freed while the guest has them mapped"
                )

    def freed(self, span: PageRange) -> None:
        """Check that nobody still wants the content of frames that were freed."""
        self._gone(span)

    def zeroed(self, span: PageRange) -> None:
        """Check that nobody still wants the content of frames that were zeroed."""
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
                        f"page {pgoff:#x} loses its content: the guest wrote to the page, and "
                        "nobody has punched it since",
                    )

    def dying(self) -> None:
        """Record that the last reference to the file is gone."""
        self._dead = True

    # The consumer and its guest.

    def take(self, span: PageRange) -> None:
        """Record the frames that a consumer's mapping shows now."""
        self.taken[span.start : span.end] = self.frames.numbers[span.start : span.end]

    def install(self, view: SlotHistory, span: PageRange, gfn: gfn_t) -> None:
        """Check translations that are about to be installed.

        Preconditions: mmu_lock is held.
        """
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
                f"guest pages {gfn:#x} to {gfn + len(span):#x} are mapped private, but some of "
                "them are shared",
            )
        if span.start - view.window.start != first:
            self.violate(
                Rule.ATTRIBUTE, f"guest page {gfn:#x} is mapped to page {span.start:#x} of the file"
            )
        taken = self.taken[span.start : span.end]
        if taken != self.frames.numbers[span.start : span.end] or taken.count(0):
            self.violate(Rule.FREED, f"pages {span} are mapped to frames that were freed")
        view.led[first:last] = taken

    def dropped(self, start: gfn_t, end: gfn_t) -> None:
        """Check that a guest loses only translations of ranges that were asked for."""
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
                Rule.RANGE,
                f"guest pages {start:#x} to {end:#x} are zapped, but nobody asked for it",
            )

    def access(
        self, view: SlotHistory, gfn: int, entry: int, number: int, value: int | None
    ) -> None:
        """Check an access through a guest's translation; ``value`` is None for a load."""
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
            self.violate(Rule.FREED, f"a guest reaches a former frame of page {pgoff:#x}")
        if self.poisoned.get(pgoff) == number:
            self.violate(Rule.POISON, f"a guest reaches page {pgoff:#x}")
        if value is not None:
            self.frames.content[pgoff] = value
            self._written.add(pgoff)

    # Always, and at the end.

    def check(self) -> None:
        """Raise if a rule was broken in the last step, or is broken now.

        Raises:
            RuleBroken: the rule, and how it is broken.
        """
        if self._violation is not None:
            raise self._violation
        for view in self._live():
            start, end = view.window.start, view.window.end
            mapped = _mask(view.slot.entries, _PRIVATE_ENTRIES)
            if not mapped:
                continue
            wrong = int.from_bytes(view.led, "big") ^ int.from_bytes(
                self.frames.numbers[start:end], "big"
            )
            if mapped & wrong:
                raise RuleBroken(
                    f"{Rule.FREED.value}: an entry of slot {view.slot.number} leads to a freed "
                    "frame"
                )

    def finish(self) -> None:
        """Raise if a rule is broken now that all actors have ended.

        Raises:
            RuleBroken: the rule, and how it is broken.
        """
        self.check()
        for view in self.views:
            if view.told:
                raise RuleBroken(
                    f"{Rule.BALANCE.value}: no end came for pages "
                    f"{', '.join(str(told.span) for told in view.told)}"
                )
        for view in self._live():
            half = view.slot.memfd_half
            size = len(view.window)
            if half.sequence.busy():
                raise RuleBroken(f"{Rule.BALANCE.value}: an invalidation is in progress for ever")
            mapped = _mask(view.slot.entries, _PRIVATE_ENTRIES)
            if mapped & ~_mask(view.slot.attributes, _ANY_ENTRY):
                raise RuleBroken(
                    f"{Rule.ATTRIBUTE.value}: a shared guest page of slot {view.slot.number} is "
                    "mapped private"
                )
            entries = bytes(memoryview(view.slot.entries)).translate(_PRIVATE_ENTRIES)
            for index in (index for index in range(size) if entries[index]):
                pgoff = pgoff_t(view.window.start + index)
                if not half.pages.count(PageRange(pgoff, pgoff_t(pgoff + 1))):
                    raise RuleBroken(
                        f"{Rule.REFERENCE.value}: page {pgoff:#x} is mapped, but not counted as "
                        "taken"
                    )
