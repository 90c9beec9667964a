"""The bottom layer: units, owned descriptors, locks and shared words."""

import array
import mmap
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import EBADF, EINVAL, EMSGSIZE, ENOSYS, EPERM, EPIPE
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcomes import Errno, in_child, outcome
from processes import high
from restrictedmem import sync
from restrictedmem.abi import process
from restrictedmem.fd import OwnedFd, close_all, readable, receive_with_fds, send_with_fds
from restrictedmem.units import (
    MAX_FILE_BYTES,
    PAGE_SHIFT,
    PAGE_SIZE,
    PageRange,
    format_size,
    parse_size,
    pgoff_t,
)
from users import forbid
from waiting import wait_until, waits

# Units.


def pages(first: int, end: int) -> PageRange:
    return PageRange(pgoff_t(first), pgoff_t(end))


def test_ranges_of_bytes() -> None:
    assert PageRange.of_bytes(2 * PAGE_SIZE, 3 * PAGE_SIZE) == pages(2, 5)
    for offset, length in ((1, PAGE_SIZE), (0, PAGE_SIZE - 1), (PAGE_SIZE - 1, PAGE_SIZE + 1)):
        assert outcome(partial(PageRange.of_bytes, offset, length)) == Errno(EINVAL)
    assert PageRange.around_bytes(2 * PAGE_SIZE - 1, 2) == pages(1, 3)
    assert PageRange.around_bytes(PAGE_SIZE, PAGE_SIZE) == pages(1, 2)
    assert PageRange.around_bytes(5, 0) == pages(0, 1)
    assert str(pages(16, 32)) == "[0x10, 0x20)"
    assert 1 << PAGE_SHIFT == PAGE_SIZE


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 30))
def test_around_is_the_smallest_range_that_contains(offset: int, length: int) -> None:
    found = PageRange.around_bytes(offset, length)
    assert found.start * PAGE_SIZE <= offset < (found.start + 1) * PAGE_SIZE
    assert (found.end - 1) * PAGE_SIZE < offset + length <= found.end * PAGE_SIZE


@given(*[st.integers(0, 40)] * 4)
def test_clip_is_the_intersection(first: int, end: int, other_first: int, other_end: int) -> None:
    window, other = pages(first, max(first, end)), pages(other_first, max(other_first, other_end))
    clipped = window.clip(other)
    common = set(range(window.start, window.end)) & set(range(other.start, other.end))
    assert set(range(clipped.start, clipped.end)) == common
    assert len(clipped) == len(common)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 64 << 10),
        ("64M", 64 << 20),
        (" 1g ", 1 << 30),
        ("2T", 2 << 40),
        ("3MiB", 3 << 20),
        ("5KB", 5 << 10),
    ],
)
def test_sizes_that_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_the_largest_size_is_that_of_the_largest_file() -> None:
    assert parse_size(str(MAX_FILE_BYTES)) == MAX_FILE_BYTES
    with pytest.raises(
        ValueError, match=rf"^{MAX_FILE_BYTES + 1}: larger than any file \({MAX_FILE_BYTES}\)$"
    ):
        parse_size(str(MAX_FILE_BYTES + 1))


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1 0", "64Q", "0x10", "4096 bytes"])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (64 << 20, "64 MiB"),
        ((1 << 30) * 3 // 2, "1.5 GiB"),
        (1 << 40, "1 TiB"),
        (5 << 50, "5 PiB"),
        (1 << 63, "8 EiB"),
    ],
)
def test_sizes_that_are_written(size: int, text: str) -> None:
    assert format_size(size) == text


# Owned descriptors.


def is_open(fd: int) -> bool:
    return outcome(lambda: os.fstat(fd)) != Errno(EBADF)


def test_close_is_once_and_spares_a_number_used_again() -> None:
    owned = OwnedFd(os.open(os.devnull, os.O_RDONLY))
    number = owned.fileno()
    owned.close()
    assert owned.closed
    assert not is_open(number)
    again = os.open(os.devnull, os.O_RDONLY)
    try:
        assert again == number, "the kernel hands out the lowest number"
        owned.close()
        assert is_open(again)
    finally:
        os.close(again)
    for use in (owned.fileno, owned.detach):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_close_that_fails_is_not_tried_again() -> None:
    owned = OwnedFd(os.open(os.devnull, os.O_RDONLY))
    os.close(owned.fileno())
    assert outcome(owned.close) == Errno(EBADF)
    assert owned.closed
    owned.close()


def test_detach_gives_the_number_away() -> None:
    with OwnedFd(os.open(os.devnull, os.O_RDONLY)) as owned:
        number = owned.detach()
    assert is_open(number)
    os.close(number)


def test_with_closes_after_an_exception_too() -> None:
    owned = OwnedFd(os.open(os.devnull, os.O_RDONLY))
    number = owned.fileno()
    assert repr(owned) == f"OwnedFd({number})"
    with suppress(KeyError), owned:
        raise KeyError
    assert not is_open(number)


def test_a_forgotten_descriptor_is_closed_with_a_warning() -> None:
    number = os.open(os.devnull, os.O_RDONLY)
    owned = [OwnedFd(number)]
    with pytest.warns(ResourceWarning, match=f"descriptor {number} was never closed"):
        owned.clear()
    assert not is_open(number)


def opened() -> set[int]:
    """Return what is open, without what lists it."""
    return {
        fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.lexists(f"/proc/self/fd/{fd}")
    }


@pytest.mark.parametrize("refusal", [None, ENOSYS, EPERM])
def test_all_others_are_closed_whatever_their_numbers_and_the_limit(refusal: int | None) -> None:
    def body() -> list[int]:
        before = opened()
        for number in (600, 601, 700, 900):
            os.dup2(0, number)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
        if refusal is not None:
            forbid(refusal, [process.SYS_close_range])
        process.close_others([700, *before])
        return sorted(opened() - before)

    assert in_child(body) == "[700]"


def test_a_negative_number_is_no_descriptor() -> None:
    with pytest.raises(ValueError, match="negative"):
        OwnedFd(-1)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_descriptors_arrive_owned_and_close_on_exec(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    with OwnedFd(os.open(os.devnull, os.O_RDONLY)) as sent:
        send_with_fds(ours, b"two", [sent.fileno(), sent.fileno()])
        data, arrived = receive_with_fds(theirs, 10)
        assert data == b"two"
        assert len(arrived) == 2
        for fd in arrived:
            assert os.path.sameopenfile(fd.fileno(), sent.fileno())
            assert not os.get_inheritable(fd.fileno())
        close_all(arrived)
        send_with_fds(ours, b"none")
        assert receive_with_fds(theirs, 10) == (b"none", [])
        ours.close()
        assert receive_with_fds(theirs, 10) == (b"", [])
        assert outcome(lambda: send_with_fds(theirs, b"x")) == Errno(EPIPE)


@pytest.mark.parametrize(("size", "count"), [(3, 1), (100, 5), (3, 5)])
def test_what_was_cut_off_is_an_error_and_leaks_nothing(
    pair: tuple[socket.socket, socket.socket], size: int, count: int
) -> None:
    ours, theirs = pair
    with OwnedFd(os.open(os.devnull, os.O_RDONLY)) as sent:
        before = open_fds()
        send_with_fds(ours, b"message", [sent.fileno()] * count)
        assert outcome(lambda: receive_with_fds(theirs, size, max_fds=4)) == Errno(EMSGSIZE)
        assert open_fds() == before


def test_what_can_be_read_whatever_its_number(pair: tuple[socket.socket, socket.socket]) -> None:
    """select(2) knows no number above 1023, and says so to whoever has many descriptors."""
    ours, theirs = pair
    with high(ours.fileno()) as reader, high(theirs.fileno()) as writer:
        assert min(reader.fileno(), writer.fileno()) > 1023
        assert readable([reader, writer], 0) == []
        os.write(writer.fileno(), b".")
        assert readable([reader, writer]) == [reader]
        assert readable([writer.fileno(), reader.fileno()], 10) == [reader.fileno()]
        os.read(reader.fileno(), 1)
        ours.shutdown(socket.SHUT_RDWR)
        assert readable([writer]) == [writer]


def test_other_ancillary_data_is_passed_over(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
    data, arrived = receive_with_fds(theirs, 10, max_fds=20)
    assert (data, len(arrived)) == (b"x", 1)
    close_all(arrived)


# Locks.


class Worker:
    """A thread that does one thing, and whether it is done."""

    def __init__(self, *calls: Callable[[], object]) -> None:
        self._calls = calls
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        for call in self._calls:
            call()
        self.done.set()

    def join(self) -> None:
        assert self.done.wait(10), "waited 10 s for a thread"
        self.thread.join()


def blocked(worker: Worker) -> None:
    """Wait until a worker waits; it must not get through."""
    wait_until(lambda: waits(worker.thread) or worker.done.is_set(), "a thread to wait")
    assert not worker.done.is_set()


def test_readers_share() -> None:
    sem = sync.RwSem()
    sem.down_read()
    Worker(sem.down_read, sem.up_read).join()
    sem.up_read()
    Worker(sem.down_write, sem.up_write).join()


def test_a_writer_waits_for_every_reader() -> None:
    sem = sync.RwSem()
    sem.down_read()
    sem.down_read()
    writer = Worker(sem.down_write, sem.up_write)
    blocked(writer)
    sem.up_read()
    blocked(writer)
    sem.up_read()
    writer.join()


def test_a_writer_excludes_readers_and_writers() -> None:
    sem = sync.RwSem()
    sem.down_write()
    others = [
        Worker(sem.down_read, sem.up_read),
        Worker(sem.down_read, sem.up_read),
        Worker(sem.down_write, sem.up_write),
    ]
    for other in others:
        blocked(other)
    sem.up_write()
    for other in others:
        other.join()


def test_a_waiting_writer_goes_before_new_readers() -> None:
    sem = sync.RwSem()
    order: list[str] = []
    sem.down_read()
    writer = Worker(sem.down_write, lambda: order.append("writer"), sem.up_write)
    blocked(writer)
    reader = Worker(sem.down_read, lambda: order.append("reader"), sem.up_read)
    blocked(reader)
    sem.up_read()
    writer.join()
    reader.join()
    assert order == ["writer", "reader"]


def test_the_semaphore_under_load() -> None:
    sem = sync.RwSem()
    inside = [0, 0]
    wrong: list[tuple[int, int]] = []

    def use(side: int) -> None:
        down, up = ((sem.down_read, sem.up_read), (sem.down_write, sem.up_write))[side]
        for _ in range(300):
            down()
            inside[side] += side
            if inside[1] > 1 or (side == 0 and inside[1]):
                wrong.append((inside[0], inside[1]))
            inside[side] -= side
            up()

    workers = [Worker(partial(use, side)) for side in (0, 0, 0, 1, 1)]
    for worker in workers:
        worker.join()
    assert wrong == []


# Words that processes share.


def test_words_are_seen_by_another_process() -> None:
    mapping = mmap.mmap(-1, PAGE_SIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    view = memoryview(mapping)
    words = sync.SharedWords(view)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if child == 0:
            try:
                for _ in range(3):
                    theirs.recv(1)
                    words.write(1, words.read(0) * 2)
                    theirs.send(b".")
            finally:
                os._exit(0)
        for value in (1, 1 << 62, (1 << 63) - 1):
            words.write(0, value)
            ours.send(b".")
            assert readable([ours], 10), "waited 10 s for the other process"
            ours.recv(1)
            assert words.read(1) == value * 2
        os.waitpid(child, 0)
    assert bytes(mapping[16:]) == bytes(PAGE_SIZE - 16)
    words.release()
    view.release()
    mapping.close()


def test_a_word_is_64_bits_and_unsigned() -> None:
    words = sync.SharedWords(memoryview(bytearray(16)))
    words.write(0, (1 << 64) - 1)
    assert (words.read(0), words.read(1)) == ((1 << 64) - 1, 0)
    with pytest.raises(ValueError, match="invalid value"):
        words.write(0, -1)
    with pytest.raises(IndexError):
        words.read(2)
