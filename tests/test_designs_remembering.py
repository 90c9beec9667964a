"""The designs that remember what was punched: batched and lazy."""

import mmap
import threading
from errno import EIO

import pytest

import hugetlb
from design_files import ALL, KEEP, huge, make_file, pages, punch, register
from hugetlb import SIZES
from model_backing import ModelBacking
from outcomes import Errno, outcome
from restrictedmem.mm.backing import make_backing
from restrictedmem.mm.punched import Punched
from restrictedmem.units import PAGE_SIZE

# batched.


def test_batched_tells_of_a_block_with_its_last_page() -> None:
    backing = ModelBacking()
    backing.place(0, 0, 0x200)
    file = make_file("batched", backing)
    recorder = register(file)
    for start, end in ((0x80, 0x200), (0, 0x40), (0x41, 0x80), (0, 0x20)):
        punch(file, start, end)
        assert recorder.callbacks() == []
    # Freed all the same, and told of to nobody: that is the design.
    assert backing.resident() == PAGE_SIZE
    punch(file, 0x40, 0x41)
    assert recorder.callbacks() == [(0, 0x200, 9)]
    # From the beginning again.
    punch(file, 0x40, 0x200)
    assert recorder.callbacks() == []
    file.put()


def test_batched_forgets_what_the_owner_allocates_again() -> None:
    file = make_file("batched")
    recorder = register(file)
    punch(file, 0, 0x100)
    file.fallocate(KEEP, 0x20 * PAGE_SIZE + 1, 1)
    punch(file, 0x100, 0x200)
    assert recorder.callbacks() == []
    punch(file, 0x20, 0x21)
    assert recorder.callbacks() == [(0, 0x200, 9)]
    file.put()


def test_batched_remembers_what_was_punched_before_anybody_registered() -> None:
    file = make_file("batched")
    punch(file, 0, 0x1FF)
    recorder = register(file)
    punch(file, 0x1FF, 0x200)
    assert recorder.callbacks() == [(0, 0x200, 9)]
    file.put()


@pytest.mark.parametrize("design", ["batched", "lazy"])
def test_a_renewed_file_remembers_no_punch(design: str) -> None:
    backing = huge(1)
    file = make_file(design, backing)
    punch(file, 0, 0x1FF)
    file.renew()
    backing.place(0, 9)
    recorder = register(file)
    punch(file, 0x1FF, 0x200)
    assert recorder.callbacks() == ([] if design == "batched" else [(0x1FF, 0x200, None)])
    punch(file, 0, 0x1FF)
    assert (0, 0x200, 9) in recorder.callbacks()
    file.put()


def test_batched_tells_of_whole_blocks_at_once_and_of_two_that_a_punch_completes() -> None:
    file = make_file("batched")
    recorder = register(file)
    punch(file, 0x100, 0x900)
    assert recorder.callbacks() == [(start, start + 0x200, 9) for start in (0x200, 0x400, 0x600)]
    punch(file, 0, 0xA00)
    assert recorder.callbacks() == [(start, start + 0x200, 9) for start in range(0, 0xA00, 0x200)]
    file.put()


def test_batched_does_not_remember_a_punch_that_failed() -> None:
    backing = ModelBacking()
    file = make_file("batched", backing)
    recorder = register(file)
    punch(file, 0, 0x100)
    for _ in range(2):
        backing.failures = [True]
        assert outcome(lambda: punch(file, 0x100, 0x200)) == Errno(EIO)
        # Told of, for nobody knows beforehand; and so the next time.
        assert recorder.callbacks() == [(0, 0x200, 9)]
    backing.failures = [True]
    assert outcome(lambda: punch(file, 0x200, 0x201)) == Errno(EIO)
    punch(file, 0x201, 0x400)
    assert recorder.callbacks() == []
    punch(file, 0x100, 0x200)
    assert recorder.callbacks() == [(0, 0x200, 9)]
    file.put()


# lazy.


def test_lazy_frees_a_huge_page_with_its_last_part() -> None:
    backing = huge(1)
    backing.content = {0: 1, 0x100: 2, 0x1FF: 3}
    file = make_file("lazy", backing)
    recorder = register(file)
    punch(file, 0, 0x100)
    assert recorder.callbacks() == [(0, 0x100, None)]
    assert (backing.resident(), backing.content) == (0x200 * PAGE_SIZE, {0x100: 2, 0x1FF: 3})
    punch(file, 0x101, 0x200)
    assert (recorder.callbacks(), backing.freed) == ([(0x101, 0x200, None)], [])
    punch(file, 0x100, 0x101)
    assert recorder.callbacks() == [(0x100, 0x101, None), (0, 0x200, 9)]
    assert (backing.resident(), backing.freed) == (0, [(0, 0x200)])
    # From the beginning again.
    recorder.take(0)
    punch(file, 0, 0x1FF)
    assert (recorder.callbacks(), backing.resident()) == ([(0, 0x1FF, None)], 0x200 * PAGE_SIZE)
    file.put()


def test_lazy_frees_a_gigantic_page_with_its_last_part() -> None:
    backing = ModelBacking(order=18, splits=False)
    backing.place(0, 18)
    file = make_file("lazy", backing)
    recorder = register(file)
    for start, end in ((0x3FFFF, 0x40000), (0, 0x20001), (0x20001, 0x3FFFE)):
        punch(file, start, end)
        assert recorder.callbacks() == [(start, end, None)]
    punch(file, 0x3FFFE, 0x3FFFF)
    assert recorder.callbacks() == [(0x3FFFE, 0x3FFFF, None), (0, 0x40000, 18)]
    assert backing.freed == [(0, 0x40000)]
    file.put()


def test_lazy_never_frees_a_page_that_was_taken_again() -> None:
    backing = huge(1)
    file = make_file("lazy", backing)
    recorder, other = register(file), register(file)
    punch(file, 0, 0x100)
    other.take(0x80)
    backing.content[0x80] = 7
    punch(file, 0x100, 0x200)
    assert other.callbacks() == [(0, 0x100, None), (0x100, 0x200, None)]
    assert (backing.freed, backing.content) == ([], {0x80: 7})
    # Once it is punched too, all goes.
    punch(file, 0x80, 0x81)
    assert recorder.callbacks()[-2:] == other.callbacks() == [(0x80, 0x81, None), (0, 0x200, 9)]
    assert backing.freed == [(0, 0x200)]
    file.put()


def test_lazy_never_frees_a_page_that_was_taken_again_and_told_of_by_a_punch_that_failed() -> None:
    backing = huge(1)
    file = make_file("lazy", backing)
    recorder = register(file)
    punch(file, 1, 0x200)
    recorder.take(1)
    backing.content[1] = 7
    backing.failures = [True]
    assert outcome(lambda: punch(file, 0, 3)) == Errno(EIO)
    assert not recorder.held
    punch(file, 0, 1)
    assert (backing.freed, backing.content) == ([], {1: 7})
    punch(file, 1, 3)
    assert backing.freed == [(0, 0x200)]
    file.put()


@pytest.mark.parametrize("design", ["lazy", "lazy+teardown"])
def test_lazy_never_frees_what_a_consumer_that_left_had_taken_again(design: str) -> None:
    backing = huge(2)
    file = make_file(design, backing)
    recorder, staying = register(file), register(file)
    punch(file, 0, 0x100)
    punch(file, 0x200, 0x300)
    recorder.take(0x80)
    backing.content[0x80] = 7
    file.unregister_notifier(recorder)
    staying.heard.clear()
    punch(file, 0x100, 0x200)
    punch(file, 0x300, 0x400)
    # The other huge page was nobody's.
    assert staying.callbacks() == [(0x100, 0x200, None), (0x300, 0x400, None), (0x200, 0x400, 9)]
    assert (backing.freed, backing.content) == ([(0x200, 0x400)], {0x80: 7})
    punch(file, 0, 0x100)
    assert backing.freed == [(0x200, 0x400), (0, 0x200)]
    file.put()


def test_lazy_takes_back_a_page_that_was_taken_while_the_huge_page_was_going() -> None:
    """A consumer takes the page during the start, as a fault inside get_page does.

    Such a fault finds that it must retry. It must find its page forgotten then.
    """
    backing = huge(1)
    file = make_file("lazy", backing)
    recorder = register(file)
    punch(file, 0, 0x100)
    recorder.at_start = lambda start, end: recorder.take(0x80) if end - start == 0x200 else None
    punch(file, 0x100, 0x200)
    assert (backing.freed, recorder.held) == ([(0, 0x200)], set())
    file.put()


def test_lazy_asks_about_what_a_punch_does_not_tell_of_and_only_if_it_matters() -> None:
    file = make_file("lazy", huge())
    recorder = register(file)
    # Nothing to be freed; all of it told of; one part punched before, which is asked about once.
    for start, end, asked in ((0, 0x100, []), (0x200, 0x600, []), (0x100, 0x300, [(0, 0x100)])):
        recorder.asked.clear()
        punch(file, start, end)
        assert recorder.asked == asked
    file.put()


def test_lazy_forgets_what_the_owner_allocates_again() -> None:
    backing = huge(1)
    file = make_file("lazy", backing)
    recorder = register(file)
    punch(file, 0, 0x100)
    file.fallocate(KEEP, 0x10 * PAGE_SIZE, PAGE_SIZE)
    backing.content[0x10] = 7
    punch(file, 0x100, 0x200)
    assert (backing.freed, backing.content) == ([], {0x10: 7})
    punch(file, 0x10, 0x11)
    assert backing.freed == [(0, 0x200)]
    assert recorder.callbacks()[-1] == (0, 0x200, 9)
    file.put()


def test_lazy_frees_at_once_and_unheard_where_nobody_is_to_be_told() -> None:
    backing = huge(1)
    file = make_file("lazy", backing)
    punch(file, 0, 0x100)
    assert backing.freed == []
    punch(file, 0x100, 0x200)
    assert backing.freed == [(0, 0x200)]
    file.put()


def test_lazy_lets_small_pages_go_at_once_and_told_of_once() -> None:
    backing = ModelBacking()
    backing.place(0, 0, 8)
    file = make_file("lazy", backing)
    recorder = register(file)
    punch(file, 0, 6)
    assert (recorder.callbacks(), backing.resident()) == ([(0, 6, None)], 2 * PAGE_SIZE)
    file.put()


def test_lazy_on_a_backing_that_splits_has_nothing_to_hold() -> None:
    backing = ModelBacking(order=9)
    backing.place(0, 9)
    file = make_file("lazy", backing)
    recorder = register(file)
    punch(file, 0, 0x100)
    assert backing.resident() == 0x100 * PAGE_SIZE
    punch(file, 0x100, 0x200)
    assert recorder.callbacks() == [(0, 0x100, None), (0x100, 0x200, None)]
    assert backing.resident() == 0
    file.put()


def test_lazy_does_not_remember_a_punch_that_failed() -> None:
    backing = huge(1)
    file = make_file("lazy", backing)
    recorder = register(file)
    punch(file, 0, 0x100)
    # First the part fails, which then stays, then what follows from it: the huge page.
    for failures in ([True], [False, True]):
        backing.failures = failures
        assert outcome(lambda: punch(file, 0x100, 0x200)) == Errno(EIO)
        assert backing.freed == []
        assert recorder.callbacks()[-2:] == [(0x100, 0x200, None), (0, 0x200, 9)]
        assert not file.sequence().busy()
    recorder.heard.clear()
    # The part that had worked is gone, too.
    punch(file, 0, 1)
    assert backing.freed == []
    punch(file, 0x100, 0x200)
    assert backing.freed == [(0, 0x200)]
    file.put()


def test_lazy_counts_no_punch_that_failed() -> None:
    backing = huge(1)
    file = make_file("lazy", backing)
    register(file)
    backing.failures = [True]
    assert outcome(lambda: punch(file, 0, 0x100)) == Errno(EIO)
    punch(file, 0x100, 0x200)
    assert backing.freed == []
    file.put()


# Both.


def test_teardown_does_not_count_as_a_punch() -> None:
    """A design remembers the state of the file, whichever consumers come and go."""
    for design in ("batched+teardown", "lazy+teardown"):
        file = make_file(design, huge(1))
        first = register(file)
        punch(file, 0, 0x100)
        file.unregister_notifier(first)
        second = register(file)
        punch(file, 0x100, 0x200)
        assert second.callbacks()[-1] == (0, 0x200, 9)
        file.put()


@pytest.mark.parametrize("design", ["batched", "lazy"])
def test_two_halves_punched_at_once_are_told_of_as_a_whole_once(design: str) -> None:
    backing = huge(1)
    file = make_file(design, backing)
    recorder = register(file)
    inside, go = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go.wait(10), "waited 10 s to be let go"

    backing.on_punch = wait
    first = threading.Thread(target=punch, args=(file, 0, 0x100))
    first.start()
    assert inside.wait(10), "waited 10 s for the first punch"
    second = threading.Thread(target=punch, args=(file, 0x100, 0x200))
    second.start()
    backing.on_punch = lambda: None
    go.set()
    first.join()
    second.join()
    assert recorder.callbacks().count((0, 0x200, 9)) == 1
    assert backing.resident() == (0 if design == "lazy" else 0x200 * PAGE_SIZE)
    file.put()


# Real memory.


@pytest.mark.requires("hugetlb")
@pytest.mark.parametrize(("kind", "order"), [("hugetlb-2m", 9), ("hugetlb-1g", 18)])
def test_lazy_clears_and_frees_real_huge_pages(kind: str, order: int) -> None:
    count = 1 << order
    with hugetlb.reserved(SIZES[kind], 1):
        backing = make_backing(kind)
        file = make_file("lazy", backing)
        recorder = register(file)
        file.fallocate(KEEP, 0, PAGE_SIZE)
        with mmap.mmap(backing.fileno(), count * PAGE_SIZE) as memory_of:
            for page in (0, 0xFF, 0x100, count - 1):
                memory_of[page * PAGE_SIZE] = 7
        punch(file, 0, 0x100)
        with mmap.mmap(backing.fileno(), count * PAGE_SIZE) as memory_of:
            assert [memory_of[page * PAGE_SIZE] for page in (0, 0xFF, 0x100, count - 1)] == [
                0,
                0,
                7,
                7,
            ]
        assert (backing.resident(), hugetlb.free_pages(SIZES[kind])) == (count * PAGE_SIZE, 0)
        punch(file, 0x100, count)
        assert recorder.callbacks() == [(0, 0x100, None), (0x100, count, None), (0, count, order)]
        assert (backing.resident(), hugetlb.free_pages(SIZES[kind])) == (0, 1)
        file.put()


# The design's memory of a file.


def test_punched_is_a_set_of_pages() -> None:
    punched, model = Punched(), set[int]()
    spans = [
        pages(start, start + length)
        for start in (0, 1, 511, 512, 700, 1 << 30)
        for length in (1, 511, 513, 1500)
    ]
    for number, span in enumerate(spans * 3):
        if number % 3:
            punched.add(span)
            model |= set(range(span.start, span.end))
        else:
            punched.discard(span)
            model -= set(range(span.start, span.end))
        assert len(punched) == len(model)
        for asked in spans:
            assert punched.has([asked]) == (set(range(asked.start, asked.end)) <= model)
            blocks = {
                page & -512
                for page in model
                if asked.start & -512 <= page < asked.end + -asked.end % 512
            }
            assert {block.start for block in punched.touched(asked)} == blocks
    punched.discard(ALL)
    assert (len(punched), list(punched.touched(ALL))) == (0, [])
