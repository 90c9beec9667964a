"""What the tools of ``run --prove`` read, and what they call: each byte, and each refusal."""

import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from errno import EACCES, EBADF, EFAULT, EINVAL, EIO, ENOENT, ENXIO, EPERM, ESRCH
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import pytest

from hidden_pattern import SEED, START
from outcomes import Errno, in_child, outcome
from planting import always
from restrictedmem.abi import memory, process
from restrictedmem.abi._syscall import libc
from restrictedmem.audit import reading, syscalls
from restrictedmem.audit.attacker import fork_twin, parent_of
from restrictedmem.audit.pattern import Buffer, Pattern, content
from restrictedmem.child import end_child
from restrictedmem.fd import OwnedFd
from restrictedmem.units import PAGE_SIZE

MIB: Final = 1 << 20


def held() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


# The pattern.


@pytest.mark.parametrize(
    ("size", "distance"),
    [
        (1 << 12, 16),
        ((1 << 18) + (23 << 14), 32),
        (16 * MIB, 1024),
        (65 * MIB, 4096),
        (128 * MIB, 4096),
    ],
)
def test_samples_lie_evenly_and_in_every_page(size: int, distance: int) -> None:
    samples = Pattern(SEED, START, START + size)._words.values()
    assert sorted({*samples}) == [*range(START, START + size - 8, distance)]


def test_a_sample_is_two_words_at_any_shift() -> None:
    one = Pattern(SEED, START, START + 16)
    data = content(SEED, START, 16)
    for shift in range(8):
        assert one.find(data[shift : shift + 8]) == START
    assert one.find(data[8:]) is None
    assert one.find(data[:7]) is None
    # The last word has no sample of its own; the one after the heap is not the guest's.
    assert one.find(content(SEED, START + 16, 16)) is None


# Files and processes.


def test_a_file_is_read_whole_and_in_chunks() -> None:
    with memory.memfd_create("whole") as file:
        os.write(file.fileno(), os.urandom(5 * MIB // 2))
        chunks = list(reading.of_file(file.fileno()))
        assert [len(chunk) for chunk in chunks] == [MIB, MIB, MIB // 2]
        assert b"".join(chunks) == os.pread(file.fileno(), 3 * MIB, 0)


def test_a_file_without_data_gives_none() -> None:
    with memory.memfd_create("empty") as file:
        assert list(reading.of_file(file.fileno())) == []
        os.ftruncate(file.fileno(), MIB)
        assert list(reading.of_file(file.fileno())) == []


@pytest.mark.parametrize(("number", "found"), [(ENXIO, []), (EIO, Errno(EIO))])
def test_no_data_is_the_end_and_no_other_error(
    number: int, found: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(number, "planted")

    monkeypatch.setattr(os, "lseek", refuse)
    with memory.memfd_create("sought") as file:
        os.ftruncate(file.fileno(), PAGE_SIZE)
        assert outcome(lambda: list(reading.of_file(file.fileno()))) == found


def test_spans_are_read_as_far_as_they_can_be() -> None:
    asked = list[tuple[int, int]]()

    def read(at: int, size: int) -> bytes:
        asked.append((at, size))
        if at == 10:
            raise OSError(EIO, "a device's")
        # At 30 it is at its end.
        return {20: b"ab", 22: b"c", 23: b"d"}.get(at, b"")

    assert list(reading._of(read, iter([(10, 12), (20, 24), (30, 31)]))) == [b"ab", b"c", b"d"]
    assert asked == [(10, 2), (20, 4), (22, 2), (23, 1), (30, 1)]


def test_a_file_that_is_refused_from_its_beginning_is_refused() -> None:
    def read(at: int, _: int) -> bytes:
        if at in (0, 10):
            return b"a"
        raise OSError(EACCES, "refused")

    def refuse(*_: object) -> NoReturn:
        raise OSError(EACCES, "refused")

    assert outcome(lambda: list(reading._of(refuse, iter([(0, 1)])))) == Errno(EACCES)
    # What could be read before tells that it is no refusal.
    assert list(reading._of(read, iter([(0, 2), (10, 12)]))) == [b"a", b"a"]


def test_pages_that_are_there_are_found_and_no_others() -> None:
    pages = 5
    with (
        mmap.mmap(-1, pages * PAGE_SIZE, mmap.MAP_PRIVATE) as private,
        mmap.mmap(-1, pages * PAGE_SIZE, mmap.MAP_PRIVATE, prot=mmap.PROT_WRITE) as unreadable,
        mmap.mmap(-1, pages * PAGE_SIZE) as shared,
        memory.memfd_create("untouched") as file,
    ):
        # No huge page brings its neighbours in.
        private.madvise(mmap.MADV_NOHUGEPAGE)
        for page in (1, 2, 4):
            private[page * PAGE_SIZE] = unreadable[page * PAGE_SIZE] = 1
        os.ftruncate(file.fileno(), pages * PAGE_SIZE)
        with mmap.mmap(file.fileno(), pages * PAGE_SIZE) as of_file:
            own, hidden, given, other = map(address_of, (private, unreadable, shared, of_file))
            found = list(reading.regions(os.getpid()))
    inside = [
        ((start - own) // PAGE_SIZE, (end - own) // PAGE_SIZE)
        for start, end in found
        if own <= start < own + pages * PAGE_SIZE
    ]
    assert inside == [(1, 3), (4, 5)]
    for none in (hidden, other):
        assert not [span for span in found if none <= span[0] < none + pages * PAGE_SIZE]
    # Another process may have touched what this one did not.
    assert (given, given + pages * PAGE_SIZE) in found


def test_the_kernels_own_page_has_no_entry() -> None:
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        assert os.pread(pagemap.fileno(), 8, 0xFFFF_FFFF_FF60_0000 // PAGE_SIZE * 8) == b""


def of_task(pid: int) -> Iterator[Buffer]:
    return reading.of_process(pid, f"task/{pid}/")


@pytest.mark.parametrize("read", [reading.of_process, reading.by_process_vm_readv, of_task])
def test_each_way_into_a_process_reads_its_memory(
    read: Callable[[int], Iterator[Buffer]],
) -> None:
    twin = fork_twin(lambda: content(SEED + 3, START, PAGE_SIZE))
    before = held()
    try:
        assert content(SEED + 3, START, PAGE_SIZE) in b"".join(map(bytes, read(twin)))
    finally:
        end_child(twin)
    assert held() == before
    assert outcome(lambda: list(read(twin))) in (Errno(ENOENT), Errno(ESRCH))


def test_what_a_process_refuses_is_asked_before_its_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    def regions(_: int) -> NoReturn:
        raise AssertionError

    def refuse(*_: object) -> NoReturn:
        raise OSError(EPERM, "refused")

    monkeypatch.setattr(reading, "regions", regions)
    monkeypatch.setattr(syscalls, "process_vm_readv", refuse)
    assert outcome(lambda: list(reading.by_process_vm_readv(1))) == Errno(EPERM)


def test_open_directories_give_their_names(tmp_path: Path) -> None:
    for name in ("a secret name", "another"):
        (tmp_path / name).mkdir()
    with OwnedFd(os.open(tmp_path, os.O_RDONLY)):
        names = [sorted(bytes(chunk).split(b"\0")) for chunk in reading.of_descriptors()]
    assert [b"a secret name", b"another"] in names


def test_a_parents_pid_is_read_behind_any_name() -> None:
    def body() -> bool:
        process.set_name(") x 7 (")
        return parent_of(os.getpid()) == os.getppid()

    assert in_child(body) == "True"


# System calls.


def gone() -> int:
    """The pid of a process that has ended."""
    pid = fork_twin()
    end_child(pid)
    return pid


CALLS: Final[dict[str, Callable[[int], object]]] = {
    "process_vm_readv": lambda pid: syscalls.process_vm_readv(pid, 8, 8),
    "ptrace": partial(syscalls.ptrace, syscalls.PTRACE_SEIZE),
    "pidfd_getfd": lambda pid: syscalls.pidfd_getfd(pid, 0),
    "setns": lambda pid: syscalls.setns(pid, 0),
    "kcmp": syscalls.kcmp,
    "move_pages": syscalls.move_pages,
    "get_robust_list": syscalls.get_robust_list,
    "process_madvise": lambda pid: syscalls.process_madvise(pid, PAGE_SIZE),
    "perf_event_open": syscalls.perf_event_open,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_process_that_is_gone_cannot_be_looked_into(name: str) -> None:
    assert outcome(lambda: CALLS[name](gone())) == Errno(ESRCH)


def test_calls_that_fail_say_why() -> None:
    own = os.getpid()
    assert outcome(lambda: syscalls.process_vm_readv(own, 8, 8)) == Errno(EFAULT)
    assert outcome(lambda: syscalls.setns(own, 0)) == Errno(EINVAL)
    assert outcome(lambda: syscalls.pidfd_getfd(own, 1 << 30)) == Errno(EBADF)
    assert outcome(lambda: syscalls.namespace_handle("/no/such/file")) == Errno(ENOENT)


def test_a_read_of_a_process_ends_where_its_memory_does() -> None:
    with mmap.mmap(-1, 2 * PAGE_SIZE) as mapping:
        mapping[:6] = b"secret"
        start = address_of(mapping)
        assert syscalls.process_vm_readv(os.getpid(), start, 6) == b"secret"
        assert syscalls.process_vm_readv(os.getpid(), start, 0) == b""
        file = memory.memfd_create("behind its end")
        with file:
            os.ftruncate(file.fileno(), PAGE_SIZE)
            memory.map_over(start, 2 * PAGE_SIZE, file.fileno())
        came = syscalls.process_vm_readv(os.getpid(), start, 2 * PAGE_SIZE)
        assert came == bytes(PAGE_SIZE)


def test_descriptor_0_is_compared_and_nothing_else() -> None:
    def other() -> None:
        os.dup2(os.open("/", os.O_RDONLY), 0)

    same, different = fork_twin(), fork_twin(other)
    try:
        # A fork has the parent's open files, and another address space.
        assert syscalls.kcmp(same) == 0
        assert syscalls.kcmp(different) != 0
    finally:
        end_child(same)
        end_child(different)


def test_a_descriptor_is_duplicated() -> None:
    with memory.memfd_create("given") as file:
        twin = fork_twin()
        before = held()
        try:
            with syscalls.pidfd_getfd(twin, file.fileno()) as got:
                assert os.path.samestat(os.fstat(got.fileno()), os.fstat(file.fileno()))
        finally:
            end_child(twin)
        assert held() == before


def test_calls_on_a_process_of_ones_own_are_allowed() -> None:
    twin = fork_twin()
    try:
        assert syscalls.move_pages(twin) == 0
        assert syscalls.get_robust_list(twin) == 0
        syscalls.ptrace(syscalls.PTRACE_SEIZE, twin)
    finally:
        end_child(twin)


def test_a_page_of_another_process_is_asked_to_leave() -> None:
    with mmap.mmap(-1, PAGE_SIZE) as mapping:
        mapping[0] = 1
        assert syscalls.process_madvise(os.getpid(), address_of(mapping)) == PAGE_SIZE


def test_the_clock_of_another_process_is_sampled() -> None:
    try:
        event = syscalls.perf_event_open(0)
    except OSError as error:
        pytest.skip(f"perf_event_open: {error.strerror}")
    with event:
        counted, ran = int.from_bytes(os.read(event.fileno(), 8), "little"), time.thread_time_ns()
        while time.thread_time_ns() < ran + 2_000_000:
            pass
        counted = int.from_bytes(os.read(event.fileno(), 8), "little") - counted
    # No other event comes so often without the kernel.
    assert counted >= 1_000_000


def test_a_program_for_a_kprobe_is_taken_or_refused() -> None:
    assert outcome(lambda: syscalls.bpf_prog_load().close()) in (None, Errno(EPERM))


def test_a_ring_reads_nothing_at_a_files_end() -> None:
    with tempfile.TemporaryFile() as file:
        try:
            assert syscalls.io_uring_read(file.fileno(), 100) == b""
        except PermissionError:
            pytest.skip("no rings here: kernel.io_uring_disabled")


def test_a_namespace_is_opened_by_its_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        number, inode = syscalls.namespace_handle("/proc/self/ns/user")
    except OSError:
        pytest.skip("namespaces have no handles before Linux 6.18")
    assert inode == os.stat("/proc/self/ns/user").st_ino
    found = syscalls.open_namespace(number, process.CLONE_NEWUSER, inode)
    assert found is not None
    with found:
        assert os.path.samestat(os.fstat(found.fileno()), os.stat("/proc/self/ns/user"))
    assert syscalls.open_namespace(number, process.CLONE_NEWUSER, inode + 1) is None
    # The first descriptor of all is one.
    monkeypatch.setattr(libc, "open_by_handle_at", always(0))
    first = syscalls.open_namespace(number, process.CLONE_NEWUSER, inode)
    assert first is not None
    assert first.detach() == 0
