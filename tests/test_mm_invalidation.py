"""Invalidation by the shim: its sequence, and who registers meanwhile."""

import fcntl
import mmap
import os
import struct
import threading
from errno import EINVAL, EPERM
from functools import partial
from itertools import combinations_with_replacement
from typing import cast, final

import pytest

from outcomes import Errno, outcome
from restrictedmem.abi import memory
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.fd import OwnedFd
from restrictedmem.mm.backing import make_backing
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.sync import SharedWords
from restrictedmem.units import PAGE_SIZE, pgoff_t
from shim_files import Counting, file, new_file
from waiting import wait_until, waits

__all__ = ["file"]

_F_SEAL_FUTURE_WRITE = 0x10


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
    # A fault that read the sequence before has to retry, at any page.
    assert sequence.retry(before, pgoff_t(1000), pgoff_t(1001))
    assert sequence.snapshot() == before + 2
    sequence.close()


@final
class _Words:
    """A sequence's words.

    Stores are delayed, and become visible one by one before ``moments``' loads.
    """

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
    """The consumer has the memfd.

    A seal set there would forbid punches to the owner and to the next consumer.
    """
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
    """Such a consumer could block the faults of other consumers for ever, or let stale ones in."""
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
