"""The file system without a mount: what its notifiers hear of a request."""

from collections.abc import Iterator
from errno import EINVAL, ENFILE, EOPNOTSUPP
from typing import final

import pytest

from fuse_requests import KEEP, Mount
from outcomes import Errno, outcome
from restrictedmem.abi import fuse
from restrictedmem.abi.fuse import AttrValid, Opcode
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.fs.filesystem import Request
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import PAGE_SIZE, pgoff_t


@final
class Recorder:
    """Records each callback, with the sequence page's state inside of it."""

    def __init__(
        self, name: str, log: list[tuple[str, str, int, int]], file: RestrictedFile
    ) -> None:
        self._name = name
        self._log = log
        self._sequence = file.sequence()
        self.seen: list[tuple[bool, bool, int]] = []

    def _note(self, what: str, start: int, end: int) -> None:
        self._log.append((self._name, what, start, end))
        retry = self._sequence.retry(self._sequence.snapshot(), pgoff_t(start), pgoff_t(end))
        self.seen.append((self._sequence.busy(), retry, self._sequence.snapshot()))

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self._note("start", start, end)

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self._note("end", start, end)

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("no page was lost")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0


@pytest.fixture(params=list(Api), ids=lambda api: api.value)
def watched(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[Mount, int, list[tuple[str, str, int, int]], Recorder]]:
    """Give a file of eight pages with two notifiers, the second of which is the newest."""
    mount = Mount(request.param)
    node = mount.create()
    file = mount.file(node)
    mount.setattr(node, AttrValid.SIZE, size=8 * PAGE_SIZE)
    log: list[tuple[str, str, int, int]] = []
    file.register_notifier(Recorder("old", log, file))
    newest = Recorder("new", log, file)
    file.register_notifier(newest)
    with mount:
        yield mount, node, log, newest


Watched = tuple[Mount, int, list[tuple[str, str, int, int]], Recorder]


def pair(start: int, end: int) -> list[tuple[str, str, int, int]]:
    return [(name, what, start, end) for what in ("start", "end") for name in ("new", "old")]


@pytest.mark.parametrize(("first", "count"), [(1, 2), (0, 8), (6, 9), (100, 1), (1 << 40, 1)])
def test_a_punch_notifies_in_pages_holes_and_beyond_the_end_too(
    watched: Watched, first: int, count: int
) -> None:
    mount, node, log, _ = watched
    mount.fallocate(node, PUNCH, first * PAGE_SIZE, count * PAGE_SIZE)
    assert log == pair(first, first + count)


@pytest.mark.parametrize(
    ("offset", "length"), [(1, PAGE_SIZE), (0, PAGE_SIZE - 1), (PAGE_SIZE - 1, 1)]
)
def test_an_unaligned_punch_tells_nobody(watched: Watched, offset: int, length: int) -> None:
    mount, node, log, newest = watched
    assert outcome(lambda: mount.fallocate(node, PUNCH, offset, length)) == Errno(EINVAL)
    assert log == []
    assert mount.file(node).sequence().snapshot() == 0
    assert newest.seen == []


@pytest.mark.parametrize("mode", [0, KEEP])
def test_allocation_notifies_in_v9_alone(watched: Watched, mode: int) -> None:
    mount, node, log, _ = watched
    mount.fallocate(node, mode, PAGE_SIZE + 1, PAGE_SIZE)
    assert log == (pair(1, 3) if mount.api is Api.V9 else [])


def test_a_mode_that_fails_delivers_its_end_in_v9(watched: Watched) -> None:
    mount, node, log, _ = watched
    assert outcome(
        lambda: mount.fallocate(node, int(FallocMode.ZERO_RANGE), 0, PAGE_SIZE)
    ) == Errno(EOPNOTSUPP)
    assert log == (pair(0, 1) if mount.api is Api.V9 else [])


def test_a_punch_that_fails_delivers_its_end(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, node, log, newest = watched

    def fail(_self: object, offset: int, length: int) -> None:
        raise OSError(ENFILE, f"punch of {length} at {offset}")

    monkeypatch.setattr("restrictedmem.mm.backing.MemfdBacking.punch", fail)
    assert outcome(lambda: mount.fallocate(node, PUNCH, 0, PAGE_SIZE)) == Errno(ENFILE)
    assert log == pair(0, 1)
    assert [busy for busy, _, _ in newest.seen] == [True, False]
    assert mount.file(node).sequence().snapshot() == 1


def test_the_operation_is_between_start_and_end(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, node, log, _ = watched

    def note(_self: object, offset: int, length: int) -> None:
        log.append(("memfd", "punch", offset, length))

    monkeypatch.setattr("restrictedmem.mm.backing.MemfdBacking.punch", note)
    mount.fallocate(node, PUNCH, PAGE_SIZE, PAGE_SIZE)
    assert log == [*pair(1, 2)[:2], ("memfd", "punch", PAGE_SIZE, PAGE_SIZE), *pair(1, 2)[2:]]


def test_the_sequence_seen_inside_callbacks(watched: Watched) -> None:
    mount, node, _, newest = watched
    for done in range(3):
        newest.seen.clear()
        mount.fallocate(node, PUNCH, PAGE_SIZE, PAGE_SIZE)
        # start: in progress, so a fault on the range must retry; end: over, and the sequence has
        # risen by one.
        assert newest.seen == [(True, True, done), (False, False, done + 1)]


def test_an_unregistered_notifier_hears_nothing(watched: Watched) -> None:
    mount, node, log, newest = watched
    mount.file(node).unregister_notifier(newest)
    mount.fallocate(node, PUNCH, 0, PAGE_SIZE)
    assert log == [("old", "start", 0, 1), ("old", "end", 0, 1)]


def test_release_is_silent(watched: Watched) -> None:
    mount, node, log, _ = watched
    file = mount.file(node)
    file.get()
    mount.ask(Opcode.RELEASE, node, bytes(24))
    mount.ask(Opcode.FORGET, node, bytes(8))
    assert log == []
    file.put()


def test_what_waits_says_so_before(watched: Watched) -> None:
    mount, node, _, _ = watched
    plain = mount.create()
    mount.file(node).holder = 7
    said: list[int | None] = []

    def before_waiting(consumer: int | None) -> bool:
        said.append(consumer)
        return True

    mount.filesystem.before_waiting = before_waiting

    def waits(node: int, length: int) -> bool:
        said.clear()
        mount.filesystem.handle(
            Request(
                Opcode.FALLOCATE, 1, node, 0, 0, 0, fuse.FALLOCATE_IN.pack(0, 0, length, PUNCH, 0)
            )
        )
        return bool(said)

    assert waits(node, PAGE_SIZE)
    assert said == [7]
    assert not waits(plain, PAGE_SIZE)
    assert waits(plain, 1 << 30)
    assert said == [None]
