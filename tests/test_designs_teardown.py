"""Failures, consumers that leave, and calls that meet, in each design."""

import threading
from collections.abc import Callable, Sequence
from errno import EIO
from functools import partial
from itertools import pairwise
from typing import final

import pytest

from design_files import ALL, KEEP, huge, make_file, pages, punch, register
from model_backing import ModelBacking
from outcomes import Errno, outcome
from restrictedmem.abi.memory import PUNCH
from restrictedmem.mm.backing import Backing, make_backing
from restrictedmem.mm.design import TEARDOWN
from restrictedmem.mm.designs import NAMES
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE, pgoff_t
from waiting import wait_until, waits

Callbacks = Sequence[tuple[int, int, int | None]]


# Balance.


@pytest.mark.parametrize("design", NAMES)
@pytest.mark.parametrize("failing", ["look", "operation"])
def test_whatever_fails_each_start_has_its_end(design: str, failing: str) -> None:
    backing = huge()
    file = make_file(design, backing)
    recorders = [register(file, pages(0, 0x300)), register(file, pages(0x300, 0x1000))]
    if failing == "look":
        backing.looks = 2
    else:
        backing.failures = [True]
    result = outcome(lambda: punch(file, 1, 0x402))
    looks = design in ("folio", "folio-poc", "lazy")
    assert result == (Errno(EIO) if failing == "operation" or looks else None)
    backing.looks = None
    for recorder in recorders:
        starts, ends = (
            sorted(one[1:3] for one in recorder.heard if one[0] == what)
            for what in ("start", "end")
        )
        assert starts == ends
    if result is not None:
        assert backing.freed == []
    assert not file.sequence().busy()
    # Nothing is locked, and nothing stuck.
    punch(file, 0, 0x600)
    assert backing.resident() == 0
    file.put()


# Teardown.


def folio_and_pages() -> ModelBacking:
    backing = ModelBacking()
    backing.place(0, 9)
    backing.place(0x300, 0, 2)
    return backing


_BY_FOLIO: Callbacks = [
    (0, 0x200, 9),
    (0x200, 0x300, None),
    (0x300, 0x301, 0),
    (0x301, 0x302, 0),
    (0x302, ALL.end, None),
]
EVERYTHING: dict[str, Callbacks] = {
    "folio": _BY_FOLIO,
    "lazy": _BY_FOLIO,
    # It announces ranges below the file's size, and to all notifiers, not only to the one that
    # leaves.
    "folio-poc": [(0, 0x200, 9), (0x300, 0x301, 0)],
}


@pytest.mark.parametrize("design", NAMES)
@pytest.mark.parametrize("teardown", [False, True])
def test_who_hears_what_when_a_consumer_unregisters(design: str, teardown: bool) -> None:
    file = make_file(design + TEARDOWN * teardown, folio_and_pages())
    file.ftruncate(0x301 * PAGE_SIZE)
    bound = (pages(0, 0x300), pages(0x300, 0x400)) if file.design.binds else (ALL, ALL)
    leaving, staying = (register(file, span) for span in bound)
    file.unregister_notifier(leaving)
    told: Callbacks = (
        EVERYTHING.get(design, [(bound[0].start, bound[0].end, None)]) if teardown else []
    )
    assert leaving.callbacks() == told
    assert staying.callbacks() == (told if design == "folio-poc" else [])
    assert (file.notifier_count, file.sequence().snapshot(), file.sequence().busy()) == (
        1,
        int(teardown),
        False,
    )
    # Nobody hears of anything twice, and never again.
    file.unregister_notifier(leaving)
    punch(file, 0, 0x400)
    assert leaving.callbacks() == []
    file.put()


@pytest.mark.parametrize("looks", range(6))
@pytest.mark.parametrize("design", NAMES)
def test_a_consumer_goes_whatever_looking_comes_to(design: str, looks: int) -> None:
    backing = folio_and_pages()
    file = make_file(design + TEARDOWN, backing)
    file.ftruncate(0x301 * PAGE_SIZE)
    recorder = register(file)
    backing.looks = looks
    file.unregister_notifier(recorder)
    told = recorder.callbacks()
    # Everything is announced once, in order; only the proof of concept skips missing pages.
    end = 0x301 if design == "folio-poc" else ALL.end
    assert (told[0][0], told[-1][1]) == (0, end)
    if design != "folio-poc":
        assert all(before[1] == after[0] for before, after in pairwise(told))
    full = EVERYTHING.get(design, told)
    assert told in [
        full,
        *(
            [*full[:count], (full[count - 1][1] if count else 0, end, None)]
            for count in range(len(full))
        ),
    ]
    assert (file.notifier_count, file.sequence().busy()) == (0, False)
    backing.looks = None
    assert register(file).heard == []
    file.put()


@pytest.mark.parametrize("design", NAMES)
def test_a_consumer_that_raises_at_its_last_words_goes_all_the_same(design: str) -> None:
    """Callbacks must not raise. One that does costs nobody else the file."""
    file = make_file(design + TEARDOWN, folio_and_pages())
    file.ftruncate(0x301 * PAGE_SIZE)
    recorder = register(file)

    def fail(start: pgoff_t, end: pgoff_t) -> None:
        raise OSError(EIO, f"{start} to {end}")

    recorder.at_start = fail
    assert outcome(lambda: file.unregister_notifier(recorder)) == Errno(EIO)
    assert (file.notifier_count, file.sequence().busy()) == (0, False)
    register(file)
    punch(file, 0, 0x400)
    file.put()


@pytest.mark.parametrize("design", ["batched", "lazy"])
def test_a_punch_that_nobody_hears_of_looks_at_nothing(design: str) -> None:
    backing = folio_and_pages()
    file = make_file(design, backing)
    backing.looks = 0
    punch(file, 0, 0x180)
    file.fallocate(PUNCH, 0, MAX_FILE_BYTES)
    assert backing.resident() == 0
    # It does not remember freed pages: the other half of a block does not complete it.
    backing.looks = None
    recorder = register(file)
    punch(file, 0x180, 0x200)
    assert recorder.callbacks() == ([] if design == "batched" else [(0x180, 0x200, None)])
    file.put()


def test_the_proof_of_concept_tells_nothing_at_the_end_of_a_file_that_has_no_size() -> None:
    file = make_file("folio-poc+teardown", folio_and_pages())
    recorder = register(file)
    file.unregister_notifier(recorder)
    assert recorder.callbacks() == []
    file.put()


@pytest.mark.parametrize(
    "design", [name + teardown for name in NAMES for teardown in ("", TEARDOWN)]
)
def test_the_last_put_is_silent_and_frees_all(design: str) -> None:
    backing = folio_and_pages()
    file = make_file(design, backing)
    recorder = register(file)
    file.put()
    assert (recorder.heard, backing.resident()) == ([], 0)


# Locks.


@pytest.mark.parametrize("design", NAMES)
def test_a_callback_may_take_the_files_mutex(design: str) -> None:
    """As fstat and get_file do on another thread while a consumer is slow."""
    file = make_file(design, huge())
    recorder = register(file)

    def look(start: pgoff_t, end: pgoff_t) -> None:
        assert file.get_unless_zero()
        file.put()

    recorder.at_start = look
    punch(file, 0, 0x100)
    punch(file, 0x100, 0x200)
    assert recorder.heard
    file.put()


@final
class Meeting:
    """Two threads of which one meets the other in a start, or gives up waiting for it."""

    def __init__(self, seconds: float) -> None:
        self._barrier = threading.Barrier(2, timeout=seconds)
        self.met: list[bool] = []

    def meet(self, start: pgoff_t, end: pgoff_t) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            self.met.append(False)
        else:
            self.met.append(True)


@pytest.mark.parametrize("design", NAMES)
def test_punches_meet_in_their_callbacks_unless_the_design_remembers(design: str) -> None:
    file = make_file(design, huge())
    remembers = design in ("batched", "lazy")
    recorder, meeting = register(file), Meeting(0.1 if remembers else 10)
    recorder.at_start = meeting.meet
    threads = [
        threading.Thread(target=punch, args=(file, start, start + 0x200)) for start in (0, 0x400)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(meeting.met) is not remembers
    assert not file.sequence().busy()
    file.put()


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("backing", [huge, partial(make_backing, "memfd")])
@pytest.mark.parametrize("design", NAMES)
def test_a_punch_of_all_there_can_be_walks_through_what_there_is(
    design: str, backing: Callable[[], Backing], registered: bool
) -> None:
    file = make_file(design, backing())
    recorder = register(file) if registered else None
    file.fallocate(KEEP, 0, 0x400 * PAGE_SIZE)
    punch(file, 0x300, 0x400)
    file.fallocate(PUNCH, 0, MAX_FILE_BYTES)
    assert file.backing.resident() == 0
    assert recorder is None or len(recorder.callbacks()) < 0x1000
    # Nothing is remembered of what was there before.
    file.fallocate(KEEP, 0x200 * PAGE_SIZE, 0x100 * PAGE_SIZE)
    resident = file.backing.resident()
    punch(file, 0x300, 0x400)
    assert file.backing.resident() == resident
    file.put()


def test_nobody_unbinds_while_a_range_is_told_of() -> None:
    file = make_file("bindings")
    recorder = register(file, pages(0, 8))
    inside, go = threading.Event(), threading.Event()

    def wait(start: pgoff_t, end: pgoff_t) -> None:
        inside.set()
        assert go.wait(10), "waited 10 s to be let go"

    recorder.at_start = wait
    puncher = threading.Thread(target=punch, args=(file, 0, 1))
    puncher.start()
    assert inside.wait(10), "waited 10 s for invalidate_start"
    leaver = threading.Thread(target=file.unbind, args=(0, 4, recorder))
    leaver.start()
    wait_until(lambda: waits(leaver), "the other thread to wait")
    assert file.notifier_count == 1
    go.set()
    puncher.join()
    leaver.join()
    assert recorder.callbacks() == [(0, 1, None)]
    punch(file, 0, 1)
    assert recorder.callbacks() == []
    file.put()
