"""The library for consumers.

A consumer takes pages of its windows, gives them back, and hears of punches.
"""

import os
import socket
from collections.abc import Iterator
from errno import EACCES, EAGAIN, EFAULT, ENOENT, ENOMEM
from functools import partial

import pytest

from outcomes import Errno, outcome
from restrictedmem import sync
from restrictedmem.abi import memory
from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.consumer import Bound, BoundFile, file_is_restrictedmem
from restrictedmem.fd import OwnedFd
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.units import PageRange, pgoff_t
from third_parties import Puppet, fd, punch, resident, service, serving
from users import as_user

__all__ = ["fd", "service"]


@pytest.mark.requires("fuse")
def test_file_is_restrictedmem(service: Service, fd: int) -> None:
    assert file_is_restrictedmem(fd)
    with Service.start() as other:
        theirs = other.memfd_restricted()
        assert file_is_restrictedmem(theirs)
        os.close(theirs)
    pipe = os.pipe()
    with memory.memfd_create("plain") as plain, socket.socket() as sock:
        assert not any(
            file_is_restrictedmem(number) for number in (plain.fileno(), sock.fileno(), *pipe)
        )
    closed, last = pipe
    os.close(closed)
    os.close(last)
    assert outcome(lambda: file_is_restrictedmem(last)) == Errno(9)


@pytest.mark.requires("fuse")
def test_pages_are_taken_and_given_back(service: Service, fd: int) -> None:
    with Puppet(service) as puppet:
        file = puppet.bind(fd, 4, 12)
        assert outcome(lambda: puppet("call", file, "get_page_noalloc", 4)) == Errno(ENOENT)
        assert resident(fd) == 0
        assert puppet("call", file, "get_page", 4) == 0
        puppet("write", file, 4, 7)
        # A service's consumer is undumpable: without root its own pagemap is closed to it
        # (docs/understand/folios.md).
        told = 0 if os.geteuid() == 0 else Errno(EACCES)
        assert outcome(lambda: puppet("call", file, "get_page_noalloc", 4)) == told
        assert (puppet("call", file, "page_count", 0, 100), resident(fd)) == (1, 1)
        puppet("call", file, "put_page", 4)
        assert (puppet("call", file, "page_count", 0, 100), resident(fd)) == (0, 1)
        assert (puppet("call", file, "get_page", 4), puppet("read", file, 4)) == (0, 7)
        for outside in (3, 12):
            assert outcome(lambda: puppet("call", file, "get_page", outside)) == Errno(EFAULT)  # noqa: B023


@pytest.mark.requires("fuse")
def test_what_was_taken_before_a_punch_has_to_be_taken_again(service: Service, fd: int) -> None:
    with Puppet(service) as puppet:
        file = puppet.bind(fd, 0, 8)
        before = puppet("call", file, "snapshot")
        puppet("call", file, "get_page", 1)
        assert not puppet("call", file, "retry", before, 1)
        punch(fd, 1)
        assert puppet("call", file, "retry", before, 1)
        assert not puppet("call", file, "retry", puppet("call", file, "snapshot"), 1)
        assert puppet("call", file, "page_count", 0, 8) == 0
        assert puppet("heard", file) == [["start", 1, 2, None], ["end", 1, 2, None]]


def _heard_of_two_folios() -> object:
    with (
        serving(design="folio", backing="thp") as service,
        Puppet(service) as puppet,
        OwnedFd(service.memfd_restricted()) as fd,
    ):
        file = puppet.bind(fd.fileno(), 0, 1024)
        memory.fallocate(fd.fileno(), 0, 0, 1024 * PAGE)
        punch(fd.fileno(), 0, 513)
        return puppet("heard", file)


@pytest.mark.requires("fuse", "root")
def test_the_service_of_an_ordinary_user_tells_folios() -> None:
    assert as_user(_heard_of_two_folios) == [
        [what, *folio, 9] for what in ("start", "end") for folio in ((0, 512), (512, 513))
    ]


def test_a_page_taken_before_the_end_was_heard_stays_taken() -> None:
    """The sequence rises before invalidate_end comes.

    A page installed in between is in use, and must be counted.
    """
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    memfd, sequence = (
        OwnedFd(os.dup(number)) for number in (file.backing.fileno(), file.sequence().fd.fileno())
    )
    span = PageRange(pgoff_t(0), pgoff_t(8))
    taken = Bound(1, 1, None, memfd, sequence, flags=0, order=0)
    bound = BoundFile(taken, span, Heard(), lambda: None)
    first, lock, told = span.start, sync.mutex(), list[object]()

    def invalidate_start(start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        BoundFile.invalidate_start(bound, start, end, order)
        told.append(outcome(lambda: bound.get_page(first)))

    def invalidate_end(start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        told.append(bound.fault(first, lock, lambda _: None))
        BoundFile.invalidate_end(bound, start, end, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound, "invalidate_start", invalidate_start)
        patch.setattr(bound, "invalidate_end", invalidate_end)
        file.register_notifier(bound)
        file.fallocate(memory.PUNCH, 0, PAGE)
    assert told == [Errno(EAGAIN), 0]
    assert bound.page_count(span.start, span.end) == 1
    file.unregister_notifier(bound)
    bound.close()
    file.put()


@pytest.fixture
def bound() -> Iterator[tuple[RestrictedFile, BoundFile]]:
    """Yield a window of two folios and three more pages, from page 3 on, of a local file."""
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    memfd, sequence = (
        OwnedFd(os.dup(number)) for number in (file.backing.fileno(), file.sequence().fd.fileno())
    )
    taken = Bound(1, 1, None, memfd, sequence, flags=0, order=0)
    made = BoundFile(taken, PageRange(pgoff_t(3), pgoff_t(1030)), Heard(), lambda: None)
    yield file, made
    made.close()
    file.put()


@pytest.mark.parametrize(
    ("punched", "first", "second"),
    [(511, True, False), (512, False, True), (1023, False, True), (1024, False, False)],
)
def test_a_folio_is_not_installed_while_any_of_its_pages_is_punched(
    bound: tuple[RestrictedFile, BoundFile], punched: int, first: bool, second: bool
) -> None:
    file, window = bound
    before = window.snapshot()
    file.sequence().begin(pgoff_t(punched), pgoff_t(punched + 1))
    assert [window.retry(before, pgoff_t(page), 9) for page in (5, 515)] == [first, second]
    # Without an order it is one page that was taken, and not the other of two.
    assert window.retry(before, pgoff_t(punched))
    assert not window.retry(before, pgoff_t(punched ^ 1))
    file.sequence().end()


def test_a_window_lies_where_its_blocks_can_be_mapped_as_one(
    bound: tuple[RestrictedFile, BoundFile],
) -> None:
    assert (bound[1]._mapping.address - 3 * PAGE) % memory.PMD_SIZE == 0


def test_lost_pages_are_refused_and_the_consumer_hears_of_all_of_them(
    bound: tuple[RestrictedFile, BoundFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window begins at page 3; the range is not cut for the consumer."""
    _, window = bound
    heard: list[tuple[int, int]] = []

    def error(_: Heard, start: pgoff_t, end: pgoff_t) -> None:
        heard.append((start, end))

    monkeypatch.setattr(Heard, "error", error)
    window.error(pgoff_t(1), pgoff_t(5))
    assert heard == [(1, 5)]
    refused = [outcome(partial(window.get_page, pgoff_t(page))) for page in (3, 4, 5)]
    assert refused == [Errno(EHWPOISON), Errno(EHWPOISON), 0]
    window.invalidate_start(pgoff_t(4), pgoff_t(5), None)
    window.invalidate_end(pgoff_t(4), pgoff_t(5), None)
    assert [outcome(partial(window.get_page, pgoff_t(page))) for page in (3, 4)] == [
        Errno(EHWPOISON),
        0,
    ]


@pytest.mark.parametrize("failing", ["Mapping", "MemfdFile.pages"])
def test_a_window_that_cannot_be_made_keeps_no_descriptor(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    memfd, sequence = (
        OwnedFd(os.dup(number)) for number in (file.backing.fileno(), file.sequence().fd.fileno())
    )
    taken = Bound(1, 1, None, memfd, sequence, flags=0, order=0)

    def refuse(*_: object) -> None:
        raise OSError(ENOMEM, "refused")

    monkeypatch.setattr(f"restrictedmem.consumer.bound_file.{failing}", refuse)
    with pytest.raises(OSError, match="refused"):
        BoundFile(taken, PageRange(pgoff_t(0), pgoff_t(8)), Heard(), lambda: None)
    assert memfd.closed
    assert sequence.closed
    file.put()


class Heard:
    """Ops that do nothing."""

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None: ...

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None: ...

    def error(self, start: pgoff_t, end: pgoff_t) -> None: ...


@pytest.mark.requires("fuse")
def test_each_window_of_a_file_has_its_own_notifier(service: Service, fd: int) -> None:
    with Puppet(service) as puppet:
        files = [
            puppet.bind(fd, 0, 8),
            puppet.bind(fd, 4, 12),
            puppet("register_notifier", service.token_for(fd).hex(), 0, 4),
        ]
        punch(fd, 100)
        assert [puppet("heard", file) for file in files] == [
            [["start", 100, 101, None], ["end", 100, 101, None]]
        ] * 3
        puppet("call", files[0], "close")
        punch(fd, 5)
        assert [len(puppet("heard", file)) for file in files] == [2, 4, 4]
        puppet("call", files[1], "get_page", 5)
        assert service.status()["descriptors"][0]["notifiers"] == 2
