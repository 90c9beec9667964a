"""The shim, its backing and the pages a consumer takes: examples."""

import fcntl
import mmap
import os
import resource
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from errno import EFAULT, EFBIG, EINTR, EINVAL, ENOSPC, EOPNOTSUPP, EPERM
from functools import partial
from itertools import combinations_with_replacement
from typing import cast, final

import pytest

from outcomes import Errno, in_child, outcome
from restrictedmem.abi import memory
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.fd import OwnedFd
from restrictedmem.mm import memfd
from restrictedmem.mm.backing import MemfdBacking, make_backing
from restrictedmem.mm.design import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.sync import SharedWords
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE, PageRange, pgoff_t
from waiting import wait_until, waits

_F_SEAL_FUTURE_WRITE = 0x10
KEEP = int(FallocMode.KEEP_SIZE)


def new_file(api: Api = Api.V10, limit: int | None = None) -> RestrictedFile:
    return RestrictedFile(make(api.value), MemfdBacking(limit=limit), Inode.make(0, 0))


@pytest.fixture
def file() -> Iterator[RestrictedFile]:
    made = new_file()
    yield made
    made.put()


def pages(first: int, end: int) -> PageRange:
    return PageRange(pgoff_t(first), pgoff_t(end))


@final
class Counting:
    """Counts what a notifier hears."""

    def __init__(self) -> None:
        self.started = 0
        self.ended = 0

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.started += 1

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.ended += 1

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("no page was lost")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0


# Size.


def test_the_size_is_set_once(file: RestrictedFile) -> None:
    assert outcome(lambda: file.ftruncate(1)) == Errno(EINVAL)
    for _ in range(2):
        file.ftruncate(0)
    assert outcome(lambda: file.ftruncate(MAX_FILE_BYTES + PAGE_SIZE)) == Errno(EFBIG)
    file.ftruncate(PAGE_SIZE)
    for length in (0, 1, PAGE_SIZE, 2 * PAGE_SIZE, MAX_FILE_BYTES + PAGE_SIZE):
        assert outcome(partial(file.ftruncate, length)) == Errno(EPERM), length
    assert file.size == PAGE_SIZE


def test_plain_fallocate_grows_a_size_that_was_fixed(file: RestrictedFile) -> None:
    file.ftruncate(PAGE_SIZE)
    file.fallocate(0, PAGE_SIZE, 100)
    assert (file.size, file.backing.resident()) == (PAGE_SIZE + 100, PAGE_SIZE)
    file.fallocate(0, 0, 1)
    assert file.size == PAGE_SIZE + 100
    file.fallocate(KEEP, 8 * PAGE_SIZE, 1)
    assert (file.size, file.backing.resident()) == (PAGE_SIZE + 100, 3 * PAGE_SIZE)


def test_a_fallocate_that_fails_leaves_size_and_pages() -> None:
    file = new_file(limit=2 * PAGE_SIZE)
    assert outcome(lambda: file.fallocate(0, 0, 3 * PAGE_SIZE)) == Errno(ENOSPC)
    assert (file.size, file.backing.resident()) == (0, 0)
    file.put()


def test_an_allocation_that_is_abandoned_keeps_the_pieces_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memfd, "_PIECE", 4 * PAGE_SIZE)
    file, asked = new_file(), iter([False, False, True])
    # Pieces end where the file's do, not where the range begins: no folio lies in two.
    assert outcome(
        lambda: file.fallocate(0, 3 * PAGE_SIZE, 9 * PAGE_SIZE, lambda: next(asked))
    ) == Errno(EINTR)
    assert (file.size, file.backing.resident()) == (0, 5 * PAGE_SIZE)
    file.fallocate(0, 0, 4 * PAGE_SIZE, lambda: True)
    assert (file.size, file.backing.resident()) == (4 * PAGE_SIZE, 8 * PAGE_SIZE)
    file.put()


def test_a_large_allocation_beyond_the_limit_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfd, "_PIECE", PAGE_SIZE)
    file = new_file(limit=2 * PAGE_SIZE)
    assert outcome(lambda: file.fallocate(0, 0, 3 * PAGE_SIZE)) == Errno(ENOSPC)
    assert (file.size, file.backing.resident()) == (0, 0)
    file.put()


@pytest.mark.parametrize("mode", [0x08, 0x10, 0x20, 0x40, 0x02, PUNCH | 0x10])
def test_other_modes_are_not_supported(file: RestrictedFile, mode: int) -> None:
    file.fallocate(KEEP, 0, PAGE_SIZE)
    before = file.inode.mtime
    assert outcome(lambda: file.fallocate(mode, 0, PAGE_SIZE)) == Errno(EOPNOTSUPP)
    assert file.backing.resident() == PAGE_SIZE
    assert file.inode.mtime == before


def test_operations_move_the_times(file: RestrictedFile) -> None:
    file.inode.mtime = file.inode.ctime = 0
    file.fallocate(KEEP, 0, PAGE_SIZE)
    assert file.inode.mtime == file.inode.ctime > 0
    file.inode.mtime = 0
    file.fallocate(PUNCH, 0, PAGE_SIZE)
    assert file.inode.mtime > 0
    file.inode.mtime = 0
    file.ftruncate(PAGE_SIZE)
    assert file.inode.mtime > 0


# The backing.


def test_a_memfd_is_made_with_the_first_page_and_closed_with_the_file() -> None:
    before = set(os.listdir("/proc/self/fd"))
    file = new_file()
    file.fallocate(PUNCH, 0, PAGE_SIZE)
    assert set(os.listdir("/proc/self/fd")) == before
    file.fallocate(KEEP, 0, PAGE_SIZE)
    fd = file.backing.fileno()
    assert file.backing.fileno() == fd
    assert os.fstat(fd).st_size == MAX_FILE_BYTES
    file.put()
    assert set(os.listdir("/proc/self/fd")) == before
    assert file.backing.resident() == 0


@pytest.mark.requires("cachestat")
def test_the_limit_counts_pages_held_and_not_pages_asked_for() -> None:
    backing = MemfdBacking(limit=4 * PAGE_SIZE)
    backing.allocate(0, 3 * PAGE_SIZE)
    # Two of them are there already.
    backing.allocate(PAGE_SIZE, 3 * PAGE_SIZE)
    assert backing.resident() == 4 * PAGE_SIZE
    backing.allocate(0, 4 * PAGE_SIZE)
    assert outcome(lambda: backing.allocate(4 * PAGE_SIZE, 1)) == Errno(ENOSPC)
    assert outcome(lambda: backing.allocate(4 * PAGE_SIZE - 1, 2)) == Errno(ENOSPC)
    assert backing.resident() == 4 * PAGE_SIZE
    backing.punch(0, PAGE_SIZE)
    backing.allocate(1 << 40, 1)
    assert backing.resident() == 4 * PAGE_SIZE
    backing.close()


def test_fresh_and_reallocated_pages_are_zero(file: RestrictedFile) -> None:
    window = Pages(file.backing, pages(0, 4))
    assert window.get_page(pgoff_t(2)) == 0
    with mmap.mmap(file.backing.fileno(), 4 * PAGE_SIZE) as memory_of:
        at = slice(2 * PAGE_SIZE, 3 * PAGE_SIZE)
        assert memory_of[at] == bytes(PAGE_SIZE)
        memory_of[at] = b"\xa5" * PAGE_SIZE
        # A page that is there keeps its content, whoever allocates it again.
        file.fallocate(KEEP, 2 * PAGE_SIZE, PAGE_SIZE)
        assert memory_of[at] == b"\xa5" * PAGE_SIZE
        file.fallocate(PUNCH, 2 * PAGE_SIZE, PAGE_SIZE)
        window.forget(pages(2, 3))
        assert file.backing.resident() == 0
        window.get_page(pgoff_t(2))
        assert memory_of[at] == bytes(PAGE_SIZE)
        assert file.backing.resident() == PAGE_SIZE


# Pages that a consumer takes.


def test_get_page_ignores_the_size(file: RestrictedFile) -> None:
    far = (1 << 40) // PAGE_SIZE
    window = Pages(file.backing, pages(far, far + 2))
    window.get_page(pgoff_t(far + 1))
    assert (file.size, file.backing.resident(), window.taken) == (0, PAGE_SIZE, 1)


def test_get_page_takes_each_page_once(file: RestrictedFile) -> None:
    window = Pages(file.backing, pages(4, 8))
    for _ in range(3):
        window.get_page(pgoff_t(5))
    window.get_pages(pages(4, 7))
    window.get_pages(pages(4, 7))
    window.get_pages(pages(6, 6))
    assert (window.taken, file.backing.resident()) == (3, 3 * PAGE_SIZE)


@pytest.mark.parametrize("page", [0, 3, 8, 1 << 40])
def test_get_page_outside_the_window(file: RestrictedFile, page: int) -> None:
    window = Pages(file.backing, pages(4, 8))
    assert outcome(lambda: window.get_page(pgoff_t(page))) == Errno(EFAULT)
    assert outcome(lambda: window.get_pages(pages(min(page, 4), max(page + 1, 8)))) == Errno(EFAULT)
    assert (window.taken, file.backing.resident()) == (0, 0)


def test_forget_clips_to_the_window(file: RestrictedFile) -> None:
    window = Pages(file.backing, pages(4, 8))
    window.get_pages(pages(4, 8))
    assert (
        window.forget(pages(0, 4))
        == window.forget(pages(8, 1 << 40))
        == window.forget(pages(5, 5))
        == 0
    )
    assert window.forget(pages(0, 6)) == 2
    assert window.forget(pages(0, 6)) == 0
    assert window.forget(pages(0, 1 << 40)) == 2


def test_a_page_over_the_limit_is_not_taken() -> None:
    file = new_file(limit=2 * PAGE_SIZE)
    window = Pages(file.backing, pages(0, 8))
    window.get_pages(pages(0, 2))
    for call in (lambda: window.get_page(pgoff_t(2)), lambda: window.get_pages(pages(1, 3))):
        assert outcome(call) == Errno(ENOSPC)
    assert window.taken == 2
    # A refusal is not remembered: with a page freed there is room for another.
    file.fallocate(PUNCH, 0, PAGE_SIZE)
    window.forget(pages(0, 1))
    window.get_page(pgoff_t(2))
    assert (window.taken, file.backing.resident()) == (3, 2 * PAGE_SIZE)
    file.put()


def test_two_consumers_with_one_memfd_share_pages_and_limit() -> None:
    file = new_file(limit=2 * PAGE_SIZE)
    other = MemfdBacking(fd=OwnedFd(os.dup(file.backing.fileno())), limit=2 * PAGE_SIZE)
    first, second = Pages(file.backing, pages(0, 4)), Pages(other, pages(0, 4))
    first.get_page(pgoff_t(0))
    second.get_page(pgoff_t(0))
    second.get_page(pgoff_t(1))
    assert outcome(lambda: first.get_page(pgoff_t(2))) == Errno(ENOSPC)
    assert file.backing.resident() == 2 * PAGE_SIZE
    other.close()
    file.put()


# Invalidation.


def test_sequence_merges_ranges_that_overlap_in_time() -> None:
    sequence = InvalidationSequence.create()
    before = sequence.snapshot()
    sequence.begin(pgoff_t(10), pgoff_t(20))
    sequence.begin(pgoff_t(40), pgoff_t(50))
    # The hull counts, as in KVM: 30 lies in neither.
    assert sequence.retry(before, pgoff_t(30), pgoff_t(31))
    assert not sequence.retry(before, pgoff_t(9), pgoff_t(10))
    assert not sequence.retry(before, pgoff_t(50), pgoff_t(51))
    sequence.end()
    assert sequence.busy()
    assert sequence.retry(sequence.snapshot(), pgoff_t(30), pgoff_t(31))
    sequence.end()
    assert not sequence.busy()
    assert not sequence.retry(sequence.snapshot(), pgoff_t(30), pgoff_t(31))
    # Whoever took the sequence before has to start again, wherever it was.
    assert sequence.retry(before, pgoff_t(1000), pgoff_t(1001))
    assert sequence.snapshot() == before + 2
    sequence.close()


@final
class _Words:
    """A sequence's words: stores are kept for later, and come one by one before the loads of ``moments``."""

    def __init__(self, words: SharedWords) -> None:
        self._words = words
        self._stores: list[tuple[int, int]] = []
        self._loads = 0
        self.moments: list[int] | None = None

    def write(self, index: int, value: int) -> None:
        self._stores.append((index, value))

    def read(self, index: int) -> int:
        while self.moments and self.moments[0] <= self._loads:
            self.moments.pop(0)
            self._words.write(*self._stores.pop(0))
        self._loads += self.moments is not None
        return self._words.read(index)


@pytest.mark.parametrize("moments", list(combinations_with_replacement(range(5), 2)))
def test_a_reader_finds_an_invalidation_however_it_ends_meanwhile(moments: tuple[int, int]) -> None:
    """An engine that maps a page got before the punch would leave the guest a freed one."""
    sequence = InvalidationSequence.create()
    before = sequence.snapshot()
    sequence.begin(pgoff_t(10), pgoff_t(20))
    words, sequence._words = (
        sequence._words,
        cast("SharedWords", interleaved := _Words(sequence._words)),
    )
    sequence.end()
    interleaved.moments = list(moments)
    assert sequence.retry(before, pgoff_t(15), pgoff_t(16))
    sequence._words = words
    sequence.close()


def test_a_consumer_maps_the_sequence_for_reading() -> None:
    writer = InvalidationSequence.create()
    reader = InvalidationSequence(OwnedFd(os.dup(writer.fd.fileno())), writable=False)
    writer.begin(pgoff_t(1), pgoff_t(2))
    assert reader.busy()
    assert reader.retry(0, pgoff_t(1), pgoff_t(2))
    writer.end()
    assert (reader.busy(), reader.snapshot()) == (False, 1)
    with pytest.raises(TypeError):
        reader.begin(pgoff_t(1), pgoff_t(2))
    writer.begin(pgoff_t(1), pgoff_t(2))
    reader.close()
    # A vCPU may look at the slots when one of them goes.
    assert not reader.busy()
    writer.close()


@pytest.mark.parametrize(
    "kind", ["memfd", "thp", pytest.param("hugetlb-2m", marks=pytest.mark.requires("hugetlb"))]
)
def test_a_consumer_takes_no_punch_from_the_owner(kind: str) -> None:
    """It has the memfd, and what it could seal there it could forbid the owner and the next consumer."""
    backing = make_backing(kind)
    with OwnedFd(os.dup(backing.fileno())) as consumers:
        number = consumers.fileno()
        seals = (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE, _F_SEAL_FUTURE_WRITE)
        assert [
            outcome(partial(fcntl.fcntl, number, fcntl.F_ADD_SEALS, seal)) for seal in seals
        ] == [Errno(EPERM)] * 4
        assert outcome(lambda: os.ftruncate(number, 0)) == Errno(EPERM)
        backing.punch(0, 2 << 20)
        backing.renew()()
    backing.close()


def test_only_who_made_the_sequence_writes_it() -> None:
    """A consumer that writes could keep the faults of other consumers out for ever, or let stale ones in."""
    sequence = InvalidationSequence.create()
    fd = sequence.fd.fileno()
    reader = mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ)

    def try_all(fd: int) -> None:
        assert outcome(lambda: mmap.mmap(fd, PAGE_SIZE)) == Errno(EPERM)
        assert outcome(lambda: os.pwrite(fd, b"\xff" * 32, 0)) == Errno(EPERM)
        assert outcome(lambda: os.ftruncate(fd, 0)) == Errno(EPERM)
        assert outcome(lambda: os.ftruncate(fd, 2 * PAGE_SIZE)) == Errno(EPERM)
        assert outcome(lambda: memory.fallocate(fd, PUNCH, 0, PAGE_SIZE)) == Errno(EPERM)
        assert outcome(lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)) == Errno(
            EPERM
        )

    try_all(fd)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try_all(again)
    os.close(again)
    sequence.begin(pgoff_t(1), pgoff_t(2))
    assert struct.unpack_from("=4Q", reader) == (0, 1, 1, 2)
    sequence.end()
    assert struct.unpack_from("=4Q", reader) == (1, 0, 1, 2)
    reader.close()
    sequence.close()


def test_a_sequence_that_cannot_be_sealed_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(EINVAL, "made to fail")

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "fcntl", fail)
    assert outcome(InvalidationSequence.create) == Errno(EINVAL)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_without_notifiers_has_no_sequence_page(file: RestrictedFile) -> None:
    before = set(os.listdir("/proc/self/fd"))
    file.fallocate(PUNCH, 0, PAGE_SIZE)
    assert set(os.listdir("/proc/self/fd")) == before
    notifier = Counting()
    file.register_notifier(notifier)
    file.fallocate(PUNCH, 0, PAGE_SIZE)
    assert (notifier.started, notifier.ended, file.sequence().snapshot(), file.notifier_count) == (
        1,
        1,
        1,
        1,
    )


def test_a_notifier_registered_twice_hears_twice_and_leaves_at_once(file: RestrictedFile) -> None:
    notifier = Counting()
    file.register_notifier(notifier)
    file.register_notifier(notifier)
    file.fallocate(PUNCH, 0, PAGE_SIZE)
    assert notifier.started == notifier.ended == 2
    file.unregister_notifier(notifier)
    file.unregister_notifier(notifier)
    assert file.notifier_count == 0


@final
class Gate:
    """A notifier that stops in its start until it is let go."""

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.go = threading.Event()
        self.ended = threading.Event()

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.inside.set()
        assert self.go.wait(10), "waited 10 s to be let go"

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.ended.set()

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("no page was lost")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0


@pytest.mark.parametrize("leave", [False, True])
def test_nobody_registers_or_unregisters_inside_an_invalidation(
    file: RestrictedFile, leave: bool
) -> None:
    gate, late = Gate(), Counting()
    file.register_notifier(gate)
    punch = threading.Thread(target=file.fallocate, args=(PUNCH, 0, PAGE_SIZE))
    punch.start()
    assert gate.inside.wait(10), "waited 10 s for invalidate_start"
    done = threading.Event()

    def change() -> None:
        if leave:
            file.unregister_notifier(gate)
            # No callback runs any more, the end included.
            assert gate.ended.is_set()
        else:
            file.register_notifier(late)
        done.set()

    other = threading.Thread(target=change)
    other.start()
    wait_until(lambda: waits(other) or done.is_set(), "the other thread to wait")
    assert file.notifier_count == 1
    assert not done.is_set()
    gate.go.set()
    punch.join()
    other.join()
    assert done.is_set()
    assert (late.started, late.ended) == (0, 0)
    assert file.notifier_count == (0 if leave else 2)


def test_registering_while_punching_stays_balanced() -> None:
    file = new_file(Api.V9)
    keeper = Counting()
    file.register_notifier(keeper)
    failures: list[str] = []
    rounds = 200

    def punch(page: int) -> None:
        for number in range(rounds):
            # Every third fails, and must be as balanced as the others.
            mode = int(FallocMode.ZERO_RANGE) if number % 3 == 0 else PUNCH
            outcome(partial(file.fallocate, mode, page * PAGE_SIZE, PAGE_SIZE))

    def come_and_go() -> None:
        for _ in range(rounds):
            notifier = Counting()
            file.register_notifier(notifier)
            file.unregister_notifier(notifier)
            heard = notifier.started, notifier.ended
            if heard[0] != heard[1]:
                failures.append(f"{heard[0]} starts, {heard[1]} ends")

    threads = [threading.Thread(target=punch, args=(page,)) for page in range(3)]
    threads += [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert file.notifier_count == 1
    assert file.sequence().snapshot() == 3 * rounds
    assert not file.sequence().busy()
    file.put()


# Lifetime and attributes.


def test_put_is_silent_and_drops_the_pages_with_the_last_reference() -> None:
    file, notifier = new_file(), Counting()
    file.register_notifier(notifier)
    file.fallocate(KEEP, 0, PAGE_SIZE)
    file.get()
    file.put()
    assert file.backing.resident() == PAGE_SIZE
    with OwnedFd(os.dup(file.backing.fileno())) as consumers:
        file.put()
        # A consumer that still holds the memfd keeps its pages, as a mapping would.
        assert os.fstat(consumers.fileno()).st_blocks * 512 == PAGE_SIZE
    assert (notifier.started, notifier.ended) == (0, 0)


@pytest.mark.parametrize("kind", ["memfd", "thp"])
def test_a_renewed_file_leaves_nothing_to_who_kept_its_descriptors(kind: str) -> None:
    file, notifier = RestrictedFile(make("v10"), make_backing(kind), Inode.make(0, 0)), Counting()
    before = set(os.listdir("/proc/self/fd"))
    # There is nothing yet.
    file.renew()
    assert set(os.listdir("/proc/self/fd")) == before
    file.register_notifier(notifier)
    file.fallocate(KEEP, 0, PAGE_SIZE)
    assert outcome(file.renew) == Errno(EINVAL)
    assert file.backing.resident() == PAGE_SIZE
    with (
        OwnedFd(os.dup(file.backing.fileno())) as memfd,
        OwnedFd(os.dup(file.sequence().fd.fileno())) as sequence,
    ):
        file.fallocate(PUNCH, PAGE_SIZE, PAGE_SIZE)
        file.unregister_notifier(notifier)
        inode_was = file.inode.mtime
        file.renew()
        assert file.inode.mtime > inode_was
        assert (os.fstat(memfd.fileno()).st_blocks, file.backing.resident(), notifier.started) == (
            0,
            0,
            1,
        )
        file.register_notifier(notifier)
        assert file.sequence().snapshot() == 0
        file.fallocate(KEEP, 0, PAGE_SIZE)
        os.pwrite(file.backing.fileno(), b"secret", 0)
        assert os.fstat(file.backing.fileno()).st_size == MAX_FILE_BYTES
        assert os.pread(memfd.fileno(), 6, 0) == bytes(6)
        file.fallocate(PUNCH, 0, PAGE_SIZE)
        assert (file.sequence().snapshot(), os.pread(sequence.fileno(), 8, 0)) == (
            1,
            (1).to_bytes(8, "little"),
        )
    file.put()
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_a_renewed_file_had_is_freed_under_no_lock(
    monkeypatch: pytest.MonkeyPatch, file: RestrictedFile
) -> None:
    """They may be gigabytes; meanwhile the file is used as any other."""
    file.fallocate(KEEP, 0, 2 * PAGE_SIZE)
    free, freed = memory.fallocate, list[int]()

    def use_and_free(fd: int, mode: int, offset: int, length: int) -> None:
        if not freed:
            freed.append(os.fstat(fd).st_blocks * 512)
            notifier = Counting()
            file.register_notifier(notifier)
            file.fallocate(KEEP, 0, PAGE_SIZE)
            file.fallocate(PUNCH, PAGE_SIZE, PAGE_SIZE)
            file.unregister_notifier(notifier)
        free(fd, mode, offset, length)

    monkeypatch.setattr(memory, "fallocate", use_and_free)
    renewing = threading.Thread(target=file.renew, daemon=True)
    renewing.start()
    renewing.join(10)
    assert not renewing.is_alive(), "waited 10 s for a lock"
    assert (freed, file.backing.resident()) == ([2 * PAGE_SIZE], PAGE_SIZE)


def test_a_renewed_file_is_empty_whatever_becomes_of_the_pages(
    monkeypatch: pytest.MonkeyPatch, file: RestrictedFile
) -> None:
    file.fallocate(KEEP, 0, PAGE_SIZE)
    before, sequence = len(os.listdir("/proc/self/fd")), file.sequence()

    def fail(*_: int) -> None:
        raise OSError(EINTR, "made to fail")

    with monkeypatch.context() as patched:
        patched.setattr(memory, "fallocate", fail)
        assert outcome(file.renew) == Errno(EINTR)
    assert (file.backing.resident(), len(os.listdir("/proc/self/fd"))) == (0, before - 1)
    assert file.sequence() is not sequence
    file.fallocate(PUNCH, 0, PAGE_SIZE)


def test_a_file_is_renewed_between_punches_and_under_looks() -> None:
    """Who looks at st_blocks and st_blksize, allocates or punches meanwhile, uses one memfd or the other, and never a closed one."""
    file, failed, stop = new_file(), list[BaseException](), threading.Event()

    def again(*acts: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                for act in acts:
                    act()
        except BaseException as error:
            failed.append(error)

    punch, allocate = (
        partial(file.fallocate, PUNCH, 0, PAGE_SIZE),
        partial(file.fallocate, KEEP, 0, PAGE_SIZE),
    )
    looks = (file.backing.resident, lambda: file.backing.blksize)
    threads = [
        threading.Thread(target=again, args=acts) for acts in ((allocate, punch), looks, looks)
    ]
    for thread in threads:
        thread.start()
    notifier = Counting()
    for _ in range(300):
        file.renew()
        file.register_notifier(notifier)
        file.unregister_notifier(notifier)
    stop.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert notifier.started == notifier.ended
    file.put()


def test_inode_attributes() -> None:
    inode = Inode.make(1000, 100)
    inode.chmod(0o100640, 1000)
    assert inode.mode == 0o100640
    assert outcome(lambda: inode.chmod(0o600, 1001)) == Errno(EPERM)
    assert outcome(lambda: inode.utimens(1, None, 1001)) == Errno(EPERM)
    inode.utimens(1, None, 1000)
    assert inode.atime == 1 != inode.mtime
    inode.utimens(None, 2, 0)
    assert (inode.atime, inode.mtime) == (1, 2)
    inode.chown(None, 200, 1000, 200)
    assert outcome(lambda: inode.chown(None, 300, 1000, 200)) == Errno(EPERM)
    assert outcome(lambda: inode.chown(1001, None, 1000, 200)) == Errno(EPERM)
    # A stranger, who would give the file its own group.
    assert outcome(lambda: inode.chown(None, 300, 1001, 300)) == Errno(EPERM)
    inode.chown(1, 2, 0, 0)
    assert (inode.uid, inode.gid) == (1, 2)
    assert outcome(lambda: inode.chmod(0o600, 1000)) == Errno(EPERM)


def test_which_modes_notify() -> None:
    modes = (0, KEEP, PUNCH, 0x08, 0x10, 0x20, 0x40)
    assert [make("v9").notifies(mode) for mode in modes] == [True] * 7
    assert [make("v10").notifies(mode) for mode in modes] == [mode == PUNCH for mode in modes]


def test_a_bare_memfd_grows_as_the_restricted_file_does(file: RestrictedFile) -> None:
    with memory.memfd_create("compared") as plain:
        for mode, offset, length in (
            (0, PAGE_SIZE - 1, 2),
            (KEEP, 1 << 30, 1),
            (0, 0, 1),
            (PUNCH, 0, PAGE_SIZE),
        ):
            memory.fallocate(plain.fileno(), mode, offset, length)
            file.fallocate(mode, offset, length)
            found = os.fstat(plain.fileno())
            assert (file.size, file.backing.resident()) == (found.st_size, found.st_blocks * 512)


def test_threads_that_need_the_memfd_at_once_get_one() -> None:
    for _ in range(50):
        backing, barrier = MemfdBacking(), threading.Barrier(6)
        numbers: list[int] = []

        def use(
            backing: MemfdBacking = backing,
            barrier: threading.Barrier = barrier,
            numbers: list[int] = numbers,
        ) -> None:
            barrier.wait()
            numbers.append(backing.fileno())

        threads = [threading.Thread(target=use) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(numbers)) == 1
        backing.close()


def test_a_reference_is_not_taken_after_the_last() -> None:
    file = new_file()
    assert file.get_unless_zero()
    file.put()
    file.put()
    assert not file.get_unless_zero()


def test_a_memfd_is_as_large_as_the_limit_on_file_sizes_lets_it_be_in_whole_folios() -> None:
    def sizes() -> list[int]:
        found: list[int] = []
        for limit in (resource.RLIM_INFINITY, -2, (5 << 20) + 1, PAGE_SIZE - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            for folio in (PAGE_SIZE, memory.PMD_SIZE):
                with memfd.make_memfd(folio) as fd:
                    found.append(os.fstat(fd.fileno()).st_size)
        return found

    whole = [MAX_FILE_BYTES, MAX_FILE_BYTES & -memory.PMD_SIZE]
    assert in_child(sizes) == repr([*whole, *whole, 5 << 20, 4 << 20, 0, 0])


def test_what_is_partly_beyond_the_limit_on_file_sizes_takes_nothing() -> None:
    def body() -> tuple[object, int]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, resource.RLIM_INFINITY))
        with closing(MemfdBacking()) as backing:
            return outcome(lambda: backing.allocate(255 << 20, 2 << 20)), backing.resident()

    assert in_child(body) == repr((Errno(EFBIG), 0))


@pytest.mark.parametrize(
    ("span", "pieces"),
    [
        ((255, 2), [(255, 2)]),
        ((100, 256), [(100, 256)]),
        ((100, 600), [(100, 156), (256, 256), (512, 188)]),
    ],
)
def test_a_quarter_of_a_gibibyte_is_taken_whole_or_not_at_all(
    span: tuple[int, int], pieces: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, int]] = []

    def allocate(_: MemfdBacking, offset: int, length: int) -> None:
        taken.append((offset >> 20, length >> 20))

    monkeypatch.setattr(MemfdBacking, "_allocate", allocate)
    with closing(MemfdBacking()) as backing:
        backing.allocate(span[0] << 20, span[1] << 20)
    assert taken == pieces
