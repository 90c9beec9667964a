"""A world of the checker outside a search, and the rules that are broken in it."""

from collections.abc import Callable
from typing import Any, Final

from restrictedmem.check.explorer import RuleBroken
from restrictedmem.check.invariants import Invariants, SlotHistory
from restrictedmem.check.world import World
from restrictedmem.kvm.memslot import ALL, PRIVATE
from restrictedmem.units import PageRange, pgoff_t

BASE: Final = 0x10
#: An entry of a page in the private half.
ENTRY: Final = ALL | PRIVATE


def span(first: int, end: int) -> PageRange:
    return PageRange(pgoff_t(first), pgoff_t(end))


def world_of(
    npages: int = 6, *, start: int = 1, shown: int = 4, **how: Any
) -> tuple[World, Invariants, SlotHistory]:
    """Make a file of which a slot at ``BASE`` shows some pages."""
    world = World(how.pop("design", "v10"), npages=npages, **how)
    view = world.add_slot(BASE, shown, start)
    world.frames.allocate(0, npages << 12)
    world.invariants.take(span(0, npages))
    return world, world.invariants, view


def broken(rules: Invariants) -> str:
    """Return the rule that is broken now, or "", and forget what was recorded."""
    try:
        rules.check()
    except RuleBroken as found:
        return str(found)
    finally:
        rules._violation = None
    return ""


def ended(rules: Invariants) -> str:
    """Return the rule that is broken at the end, or ""."""
    try:
        rules.finish()
    except RuleBroken as found:
        return str(found)
    return ""


def map_pages(view: SlotHistory, first: int, last: int) -> None:
    """Map pages of a slot to the frames of the file."""
    view.slot.entries[first:last] = bytes([ENTRY]) * (last - first)


def touches(heard: list[tuple[object, ...]]) -> Callable[..., None]:
    """Make a ``control.touch`` that adds each access and its kind to a list."""

    def touch(name: object, *, write: bool) -> None:
        heard.append((name, "write" if write else "read"))

    return touch
