"""The shim's files from put to renewal, and their attributes.

The tests try the limits that their memory meets, too.
"""

import os
import resource
import threading
from collections.abc import Callable
from contextlib import closing
from errno import EFBIG, EINTR, EINVAL, EPERM
from functools import partial

import pytest

from outcomes import Errno, in_child, outcome
from restrictedmem.abi import memory
from restrictedmem.abi.memory import PUNCH
from restrictedmem.fd import OwnedFd
from restrictedmem.mm import memfd
from restrictedmem.mm.backing import MemfdBacking, make_backing
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE
from shim_files import KEEP, Counting, file, new_file

__all__ = ["file"]


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
    """A concurrent call uses one memfd or the other, and never a closed one.

    The calls read st_blocks and st_blksize, allocate or punch.
    """
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
