"""The callbacks that each design makes at a punch, one by one, and the memory that it frees."""

from collections.abc import Callable, Sequence
from errno import EINVAL, EOPNOTSUPP
from functools import partial

import pytest

from design_files import ALL, KEEP, huge, make_file, pages, punch, register
from model_backing import ModelBacking, Recorder
from outcomes import Errno, outcome
from restrictedmem.abi.memory import FallocMode
from restrictedmem.mm.backing import MemfdBacking, make_backing
from restrictedmem.mm.design import TEARDOWN
from restrictedmem.mm.designs import NAMES, make
from restrictedmem.units import PAGE_SIZE, pgoff_t

#: A folio's first page, its order, and how many there are; where all are huge, they are the
#: backing's, which cannot split them.
Layout = Sequence[tuple[int, int, int]]
Callbacks = Sequence[tuple[int, int, int | None]]


def test_the_names_are_those_of_the_thread() -> None:
    assert NAMES == ("v9", "v10", "bindings", "folio", "folio-poc", "batched", "lazy")
    for name in NAMES:
        assert (str(make(name)), str(make(name + TEARDOWN))) == (name, name + TEARDOWN)
    for wrong in ("", "v8", "folio+", "folio+teardown+teardown", "+teardown"):
        assert outcome(partial(make, wrong)) == Errno(EINVAL), wrong


# The examples of the thread and its followers, and what else can lie under a punch.


THREAD: Layout = [(0, 9, 3)]
SMALL: Layout = [(3, 0, 2), (9, 0, 1)]
GIGANTIC: Layout = [(0, 18, 2)]
EXAMPLES: dict[str, tuple[Layout, tuple[int, int], dict[str, Callbacks]]] = {
    "three folios, from inside the first into the third": (
        THREAD,
        (0x1, 0x402),
        {
            "folio": [(0x1, 0x200, 9), (0x200, 0x400, 9), (0x400, 0x402, 9)],
            "folio-poc": [(0x1, 0x400, 9), (0x400, 0x402, 9)],
            "batched": [(0x200, 0x400, 9)],
            "lazy": [(0x1, 0x402, None), (0x200, 0x400, 9)],
        },
    ),
    "two pages of two folios": (
        THREAD,
        (0x1FF, 0x201),
        {
            "folio": [(0x1FF, 0x200, 9), (0x200, 0x201, 9)],
            "folio-poc": [(0x1FF, 0x201, 9)],
            "batched": [],
            "lazy": [(0x1FF, 0x201, None)],
        },
    ),
    "half a folio and the small pages after it": (
        [(0, 9, 1), (0x200, 0, 4)],
        (0x100, 0x204),
        {
            "folio": [(0x100, 0x200, 9), *((page, page + 1, 0) for page in range(0x200, 0x204))],
            "folio-poc": [(0x100, 0x204, 9)],
            "batched": [],
            "lazy": [(0x100, 0x204, None)],
        },
    ),
    "from a folio's beginning": (
        THREAD,
        (0, 0x402),
        {
            "folio": [(0, 0x200, 9), (0x200, 0x400, 9), (0x400, 0x402, 9)],
            "folio-poc": [(0, 0x200, 9), (0x200, 0x400, 9), (0x400, 0x402, 9)],
            "batched": [(0, 0x200, 9), (0x200, 0x400, 9)],
            "lazy": [(0, 0x402, None), (0, 0x200, 9), (0x200, 0x400, 9)],
        },
    ),
    "whole folios": (
        THREAD,
        (0x200, 0x600),
        {
            "folio": [(0x200, 0x400, 9), (0x400, 0x600, 9)],
            "folio-poc": [(0x200, 0x400, 9), (0x400, 0x600, 9)],
            "batched": [(0x200, 0x400, 9), (0x400, 0x600, 9)],
            "lazy": [(0x200, 0x600, None), (0x200, 0x400, 9), (0x400, 0x600, 9)],
        },
    ),
    "small pages with holes between them": (
        SMALL,
        (0, 16),
        {
            "folio": [(0, 3, None), (3, 4, 0), (4, 5, 0), (5, 9, None), (9, 10, 0), (10, 16, None)],
            "folio-poc": [(3, 4, 0), (4, 5, 0), (9, 10, 0)],
            "batched": [],
            "lazy": [(0, 16, None)],
        },
    ),
    "a folio after small pages and holes": (
        [(0x100, 0, 1), (0x200, 9, 1)],
        (0xFF, 0x500),
        {
            "folio": [
                (0xFF, 0x100, None),
                (0x100, 0x101, 0),
                (0x101, 0x200, None),
                (0x200, 0x400, 9),
                (0x400, 0x500, None),
            ],
            # The distance from 0xff, not from 0x200.
            "folio-poc": [(0x100, 0x101, 0), (0x200, 0x500, 9)],
            "batched": [(0x200, 0x400, 9)],
            "lazy": [(0xFF, 0x500, None)],
        },
    ),
    "nothing there": (
        [],
        (0x200, 0x400),
        {
            "folio": [(0x200, 0x400, None)],
            "folio-poc": [],
            "batched": [(0x200, 0x400, 9)],
            "lazy": [(0x200, 0x400, None)],
        },
    ),
    "a part of each of two folios of 1 GiB": (
        GIGANTIC,
        (0x10, 0x40010),
        {
            "folio": [(0x10, 0x40000, 18), (0x40000, 0x40010, 18)],
            "folio-poc": [(0x10, 0x40010, 18)],
            "batched": [(block, block + 0x200, 9) for block in range(0x200, 0x40000, 0x200)],
            "lazy": [(0x10, 0x40010, None)],
        },
    ),
}


@pytest.mark.parametrize("design", NAMES)
@pytest.mark.parametrize("example", EXAMPLES)
def test_what_a_punch_tells(example: str, design: str) -> None:
    layout, (start, end), told = EXAMPLES[example]
    backing = ModelBacking(order=min((order for _, order, _ in layout), default=0), splits=False)
    for folio in layout:
        backing.place(*folio)
    file = make_file(design, backing)
    recorder = register(file)
    punch(file, start, end)
    assert recorder.callbacks() == told.get(design, [(start, end, None)])
    assert file.sequence().snapshot() == 1
    file.put()


@pytest.mark.parametrize("design", NAMES)
def test_faults_are_kept_out_of_all_that_is_told_while_it_is_done(design: str) -> None:
    backing = huge()
    file = make_file(design, backing)
    recorder = register(file)
    sequence = file.sequence()
    seen: list[bool] = []

    def look(start: pgoff_t, end: pgoff_t) -> None:
        seen.append(
            all(
                sequence.retry(sequence.snapshot(), page, pgoff_t(page + 1))
                for page in (start, pgoff_t(end - 1))
            )
        )

    recorder.at_start = look
    backing.on_punch = lambda: seen.append(sequence.busy())
    punch(file, 0x1FF, 0x200)
    punch(file, 0, 0x1FF)
    punch(file, 0x200, 0x402)
    # Only the proof of concept lets faults in again before it punches.
    assert all(seen) is (design != "folio-poc")
    assert not sequence.busy()
    assert sequence.snapshot() == 3
    file.put()


def test_consumers_hear_newest_first_and_folio_by_folio() -> None:
    file = make_file("folio", huge())
    order: list[tuple[str, int]] = []

    def noting(name: str) -> Callable[[pgoff_t, pgoff_t], object]:
        return lambda start, end: order.append((name, start))

    for name in ("old", "new"):
        register(file).at_start = noting(name)
    punch(file, 0x100, 0x300)
    assert order == [("new", 0x100), ("old", 0x100), ("new", 0x200), ("old", 0x200)]
    file.put()


# v9 and v10.


@pytest.mark.parametrize("design", NAMES)
def test_only_v9_tells_of_what_is_no_punch(design: str) -> None:
    file = make_file(design)
    recorder = register(file)
    file.fallocate(KEEP, 100, PAGE_SIZE)
    assert outcome(lambda: file.fallocate(int(FallocMode.ZERO_RANGE), 0, PAGE_SIZE)) == Errno(
        EOPNOTSUPP
    )
    assert recorder.callbacks() == ([(0, 2, None), (0, 1, None)] if design == "v9" else [])
    file.put()


@pytest.mark.parametrize("design", NAMES)
def test_lost_pages_are_told_of_since_v10(design: str) -> None:
    file = make_file(design)
    recorder = register(file, pages(0, 8))
    file.error_page(pgoff_t(7), pgoff_t(9))
    assert recorder.heard == ([] if design in ("v9", "folio-poc") else [("error", 7, 9, None)])
    file.error_page(pgoff_t(8), pgoff_t(9))
    assert len(recorder.heard) == {"v9": 0, "folio-poc": 0, "bindings": 1}.get(design, 2)
    file.put()


# Bindings.


def test_a_binding_hears_of_the_punches_that_touch_it_in_their_own_range() -> None:
    file = make_file("bindings")
    low, high = register(file, pages(0, 8)), register(file, pages(8, 16))
    # Neighbours: the series bound one page too many, and refused this.
    for start, end in ((0, 8), (7, 9), (8, 9), (15, 100), (16, 100), (0, 1 << 40)):
        punch(file, start, end)
        for recorder, first, last in ((low, 0, 8), (high, 8, 16)):
            assert recorder.callbacks() == (
                [(start, end, None)] if start < last and end > first else []
            )
    assert file.sequence().snapshot() == 6
    file.put()


def test_exclusive_bindings_share_no_page_and_others_share_all() -> None:
    file = make_file("bindings")
    mine, other = Recorder(file.backing), Recorder(file.backing)

    def bind(start: int, end: int, notifier: Recorder, *, exclusive: bool) -> object:
        return outcome(
            lambda: file.bind(pgoff_t(start), pgoff_t(end), notifier, exclusive=exclusive)
        )

    assert bind(4, 8, mine, exclusive=True) is None
    for start, end in ((4, 8), (0, 5), (7, 9), (0, 100)):
        assert bind(start, end, other, exclusive=True) == Errno(EINVAL), (start, end)
    # All of one kind, wherever they are.
    assert bind(20, 24, other, exclusive=False) == Errno(EINVAL)
    for start, end in (
        (8, 8),
        (9, 8),
        (-1, 8),
        (0, ALL.end + 1),
        (ALL.end, ALL.end + 1),
        (1 << 63, 1 << 64),
    ):
        assert bind(start, end, other, exclusive=True) == Errno(EINVAL), (
            "empty, or beyond the largest file"
        )
    assert outcome(lambda: file.register_notifier(other)) == Errno(EINVAL)
    assert file.notifier_count == 1
    file.unregister_notifier(mine)
    for _ in range(2):
        assert bind(0, 8, other, exclusive=False) is None
    assert bind(20, 24, mine, exclusive=True) == Errno(EINVAL)
    assert bind(4, 12, mine, exclusive=False) is None
    punch(file, 7, 8)
    assert (len(mine.callbacks()), len(other.callbacks())) == (1, 2)
    file.put()


def test_unbind_takes_a_range_out_of_what_one_consumer_has_bound() -> None:
    file = make_file("bindings+teardown")
    mine, other = Recorder(file.backing), Recorder(file.backing)
    for notifier in (mine, other):
        file.bind(pgoff_t(0), pgoff_t(16), notifier, exclusive=False)
    file.unbind(pgoff_t(4), pgoff_t(8), mine)
    assert mine.callbacks() == [(4, 8, None)]
    assert outcome(lambda: file.unbind(pgoff_t(4), pgoff_t(8), mine)) == Errno(EINVAL)
    assert outcome(lambda: file.unbind(pgoff_t(6), pgoff_t(6), mine)) == Errno(EINVAL)
    assert file.notifier_count == 3
    for start, told in ((3, 1), (4, 0), (7, 0), (8, 1)):
        punch(file, start, start + 1)
        assert (len(mine.callbacks()), len(other.callbacks())) == (told, 1), start
    # Over both of the rests, each told of for itself.
    file.unbind(pgoff_t(2), pgoff_t(100), mine)
    assert sorted(mine.callbacks()) == [(2, 4, None), (8, 16, None)]
    file.unregister_notifier(mine)
    assert mine.callbacks() == [(0, 2, None)]
    assert (file.notifier_count, other.callbacks()) == (1, [])
    file.put()


@pytest.mark.parametrize("design", [name for name in NAMES if name != "bindings"])
def test_only_bindings_bind(design: str) -> None:
    file = make_file(design)
    recorder = register(file)
    assert outcome(lambda: file.bind(pgoff_t(0), pgoff_t(8), recorder, exclusive=False)) == Errno(
        EINVAL
    )
    assert outcome(lambda: file.unbind(pgoff_t(0), pgoff_t(8), recorder)) == Errno(EINVAL)
    assert (file.notifier_count, recorder.callbacks()) == (1, [])
    file.put()


# Real memory.


@pytest.mark.parametrize("design", NAMES)
def test_pages_of_a_memfd_are_told_of_as_the_models(design: str) -> None:
    told: list[Callbacks] = []
    for backing in (MemfdBacking(), ModelBacking()):
        file = make_file(design, backing)
        recorder = register(file)
        for page in (3, 4, 9, 0x1FF, 0x200):
            recorder.take(page)
        recorder.heard.clear()
        for start, end in ((0, 16), (16, 0x200), (0x200, 0x201), (0, 0x400)):
            punch(file, start, end)
        assert backing.resident() == 0
        told.append(recorder.callbacks())
        file.put()
    assert told[0] == told[1]


def test_the_example_of_the_thread_on_real_folios() -> None:
    told: dict[str, Callbacks] = {}
    for design in NAMES:
        file = make_file(design, make_backing("thp"))
        file.fallocate(KEEP, 0, 0x600 * PAGE_SIZE)
        if [order for _, _, order in file.backing.folios(pages(0, 0x600))] != [9] * 3:
            pytest.skip("this kernel makes no folios of 2 MiB")
        recorder = register(file)
        punch(file, 0x1, 0x402)
        told[design] = recorder.callbacks()
        # tmpfs has split what it had to.
        assert file.backing.resident() == (0x600 - 0x401) * PAGE_SIZE
        file.put()
    expected = EXAMPLES["three folios, from inside the first into the third"][2]
    whole = [(0x1, 0x402, None)]
    assert told == {
        design: expected[design] if design in ("folio", "folio-poc", "batched") else whole
        for design in NAMES
    }


def test_the_newest_registration_hears_first() -> None:
    """The order holds whichever notifiers came and went, and whichever bindings were cut."""
    file, order = make_file("bindings"), list[str]()
    of = {name: Recorder(file.backing) for name in "abc"}

    def note(name: str, *_: pgoff_t) -> None:
        order.append(name)

    for name, recorder in of.items():
        recorder.at_start = partial(note, name)

    def heard() -> str:
        order.clear()
        punch(file, 0, 100)
        return "".join(order)

    for name, start in (("a", 0), ("b", 20), ("a", 40), ("c", 60)):
        file.bind(pgoff_t(start), pgoff_t(start + 10), of[name], exclusive=True)
    assert heard() == "caba"
    # Two pieces are left of the older one, where it was.
    file.unbind(pgoff_t(4), pgoff_t(6), of["a"])
    assert heard() == "cabaa"
    assert file.notifier_count == 5
    file.unregister_notifier(of["b"])
    assert heard() == "caaa"
    file.bind(pgoff_t(20), pgoff_t(30), of["b"], exclusive=True)
    assert heard() == "bcaaa"
    for recorder in of.values():
        file.unregister_notifier(recorder)
    assert (heard(), file.notifier_count) == ("", 0)
    file.put()
