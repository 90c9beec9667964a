"""Data that threads share is changed under its lock.

A race that never happens would not show. So each change itself checks that the lock is held.
"""

from collections.abc import Callable, Iterator
from typing import Final

import pytest

from restrictedmem.fs.usage import Usage
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.platform.direct_map import DirectMap
from restrictedmem.platform.snp import Snp
from restrictedmem.service import wire
from restrictedmem.service.consumer_process import ConsumerProcess
from restrictedmem.sync import Mutex
from restrictedmem.units import PAGE_SIZE, PageRange, gfn_t, pgoff_t

FIRST: Final = pgoff_t(0)
SPAN: Final = PageRange(FIRST, pgoff_t(4))


class Deaf:
    """A notifier that does nothing."""

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None: ...

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None: ...

    def error(self, start: pgoff_t, end: pgoff_t) -> None: ...

    @staticmethod
    def failed(consumer: ConsumerProcess, reason: str) -> None: ...

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0


class Number(int):
    """A number that says, when it is added to, whether a lock is held."""

    def __new__(cls, value: int, lock: Mutex, held: list[bool]) -> "Number":
        found = super().__new__(cls, value)
        found.lock, found.held = lock, held
        return found

    lock: Mutex
    held: list[bool]

    def __add__(self, other: int) -> int:
        self.held.append(self.lock.locked())
        return int(self) + other

    def __sub__(self, other: int) -> int:
        self.held.append(self.lock.locked())
        return int(self) - other


def watch(patch: pytest.MonkeyPatch, owner: type, name: str, lock: Mutex) -> list[bool]:
    """Note at each call of a method whether a lock is held."""
    real, held = getattr(owner, name), list[bool]()

    def call(*arguments: object, **keywords: object) -> object:
        held.append(lock.locked())
        return real(*arguments, **keywords)

    patch.setattr(owner, name, call)
    return held


@pytest.fixture
def file() -> Iterator[RestrictedFile]:
    made = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    made.get()
    yield made
    while made.get_unless_zero():
        made.put()
        made.put()


#: Calls, and what each does under the lock.
PAGES: Final[dict[str, tuple[Callable[[Pages], object], str]]] = {
    "get_page": (lambda pages: pages.get_page(FIRST), "allocate"),
    "get_page_noalloc": (lambda pages: pages.get_page_noalloc(FIRST), "order_of"),
    "get_pages": (lambda pages: pages.get_pages(SPAN), "allocate"),
    "put_page": (lambda pages: pages.put_page(FIRST), "release"),
    "invalidate_start": (lambda pages: pages.invalidate_start(SPAN), "release"),
    "forget": (lambda pages: pages.forget(SPAN), "release"),
}


@pytest.mark.parametrize("name", PAGES)
def test_pages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, inside = PAGES[name]
    backing = MemfdBacking()
    backing.allocate(0, PAGE_SIZE)
    pages = Pages(backing, SPAN)
    held = watch(monkeypatch, MemfdBacking, inside, pages._mutex)
    call(pages)
    assert held == [True]
    pages.close()


def test_orders_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(MemfdBacking(), SPAN)
    held = watch(monkeypatch, Pages, "_blocks", pages._mutex)
    pages.invalidate_end(SPAN)
    assert held == [True]
    pages.close()


def fallocate_heard(file: RestrictedFile) -> None:
    file.register_notifier(Deaf())
    file.fallocate(0, 0, PAGE_SIZE)


FILES: Final[dict[str, tuple[Callable[[RestrictedFile], object], type, str]]] = {
    "ftruncate": (lambda file: file.ftruncate(PAGE_SIZE), Inode, "modified"),
    "fallocate": (
        lambda file: file.fallocate_unheard(0, 0, PAGE_SIZE),
        RestrictedFile,
        "_fallocate",
    ),
    "fallocate that is heard": (
        fallocate_heard,
        RestrictedFile,
        "_fallocate",
    ),
    "renew": (lambda file: file.renew(), Inode, "modified"),
    "sequence": (lambda file: file.sequence(), InvalidationSequence, "create"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file(file: RestrictedFile, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, owner, inside = FILES[name]
    held = watch(monkeypatch, owner, inside, file._mutex)
    call(file)
    assert held == [True]


def test_registrations_of_a_file(file: RestrictedFile) -> None:
    held: list[bool] = []
    file._count = Number(0, file._mutex, held)
    file.register_notifier(Deaf())
    assert held == [True]


@pytest.mark.parametrize(
    "call",
    [RestrictedFile.get, RestrictedFile.get_unless_zero, RestrictedFile.put],
    ids=lambda call: call.__name__,
)
def test_references_to_a_file(
    file: RestrictedFile, call: Callable[[RestrictedFile], object]
) -> None:
    held: list[bool] = []
    file._references = Number(2, file._references_lock, held)
    call(file)
    assert held == [True]


USAGE: Final[dict[str, tuple[Callable[[Usage, RestrictedFile], object], str]]] = {
    "create": (Usage.create, "created"),
    "size": (lambda usage, file: usage.size(file.size), "sized"),
    "punch": (lambda usage, file: usage.punch(file, PAGE_SIZE), "punched"),
    "allocate": (Usage.allocate, "_bytes"),
    "close": (Usage.close, "_bytes"),
    "before_punch": (Usage.before_punch, "_bytes"),
    "report": (lambda usage, file: usage.report([file]), "_bytes"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage(file: RestrictedFile, name: str) -> None:
    call, count = USAGE[name]
    usage, held = Usage(), list[bool]()
    usage.create(file)
    file.holder = 1
    setattr(usage, count, Number(0, usage._mutex, held))
    call(usage, file)
    assert held[:1] == [True]


PLATFORM: Final[dict[str, Callable[[Snp], object]]] = {
    "prepare": lambda snp: snp.prepare(1, SPAN, gfn_t(0), 0),
    "invalidate": lambda snp: snp.invalidate(1, SPAN, None),
    "freed": lambda snp: snp.freed(1, SPAN),
}


@pytest.mark.parametrize("name", PLATFORM)
def test_what_a_confidential_host_keeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snp = Snp(unmap=False)
    held = watch(monkeypatch, Snp, "_remember", snp._lock)
    PLATFORM[name](snp)
    assert held == [True]


def test_what_is_reported_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    snp = Snp(unmap=False)
    held = watch(monkeypatch, DirectMap, "entries", snp._lock)
    snp.report()
    assert held == [True]


def test_round_trips_to_a_consumer_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object) -> bytes:
        return b""

    consumer = ConsumerProcess("puppet", 1, 1.0, Deaf.failed)
    monkeypatch.setattr(ConsumerProcess, "_make_round_trip", answer)
    held = watch(monkeypatch, ConsumerProcess, "_make_round_trip", consumer._turn)
    consumer.notify(wire.INVALIDATE_START, b"", 0)
    assert held == [True]
    for sock in consumer.give_sockets():
        sock.close()
    consumer.close()
