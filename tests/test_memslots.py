"""The slots of a VM, against a plain list of them."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from planting import stub
from restrictedmem.kvm.memslots import Memslots
from restrictedmem.units import PageRange, pgoff_t

RANGES = st.tuples(st.integers(0, 20), st.integers(1, 6))
#: A file, a part of it, and a part of the guest; or the number of a slot that goes.
STEPS = st.lists(
    st.one_of(st.tuples(st.integers(1, 2), RANGES, RANGES), st.integers(0, 12)), max_size=24
)


def slot_of(number: int, ino: int, window: PageRange, base: int) -> Any:
    return stub(
        number=number,
        base_gfn=base,
        end_gfn=base + len(window),
        in_place=True,
        memfd_half=stub(ino=ino, window=window),
    )


@given(STEPS)
def test_pages_that_a_slot_shows_are_found(steps: list[Any]) -> None:
    slots, plain = Memslots(), list[Any]()
    for number, step in enumerate(steps):
        if isinstance(step, int):
            for slot in plain[step : step + 1]:
                slots.remove(slot)
                plain.remove(slot)
            continue
        ino, (first, count), (base, _) = step
        window = PageRange(pgoff_t(first), pgoff_t(first + count))
        shown = any(
            slot.memfd_half.ino == ino and len(slot.memfd_half.window.clip(window))
            for slot in plain
        )
        assert slots.shows(ino, window) is shown
        if not shown and not slots.overlapping(base, base + count):
            plain.append(slot_of(number, ino, window, base))
            slots.add(plain[-1])
    for slot in plain:
        slots.remove(slot)
    assert not slots._by_pgoff
    assert not len(slots)
