"""Operations of several steps on a mapped descriptor, and what other processes see of it."""

import mmap as python_mmap
import os
import resource
from functools import partial

from restrictedmem.abi import process
from restrictedmem.abi.memory import MADV_COLLAPSE, PMD_SIZE, PUNCH, FallocMode
from restrictedmem.conformance import calls
from restrictedmem.conformance.files import SIZE, File
from restrictedmem.conformance.mappings import HUGE_PAGES, Mapping, mapping, need_process_vm_readv
from restrictedmem.conformance.outcome import outcome
from restrictedmem.units import PAGE_SIZE

FILLED = 0xAA
_FEW = 8
_LIMIT = 2 * SIZE


def fill_and_punch(file: File) -> tuple[str, str, str, str]:
    """Fill, punch the first page, fill it again: the bytes seen after each step."""
    file.resize(SIZE)
    with mapping(file) as m:
        m.fill(FILLED)
        filled = m.values()
        file.fallocate(PUNCH, 0, PAGE_SIZE)
        hole, rest = m.values(0, PAGE_SIZE), m.values(PAGE_SIZE, SIZE - PAGE_SIZE)
        m.fill(FILLED, 0, PAGE_SIZE)
        return filled, hole, rest, m.values()


def over_end(file: File) -> tuple[str, str, str]:
    """Fill 16 pages over a file of four, read past its end, and read what was filled."""
    file.resize(SIZE)
    with mapping(file, length=4 * SIZE) as m:
        in_child = m.steps.in_child
        return (
            in_child(lambda: m.fill(FILLED, 0, 4 * SIZE)),
            in_child(lambda: m.load(SIZE)),
            in_child(m.values),
        )


def touched_at_size_0(file: File) -> str:
    """Map a file that has no size yet, and read a byte."""
    with mapping(file) as m:
        return m.steps.in_child(m.load)


def collapse(small: File) -> tuple[object, ...]:
    """Read 2 MiB, advise for a huge page, collapse, drop the pages, and read again."""
    with small.another(PMD_SIZE) as file:
        file.resize(PMD_SIZE)
        reserved = python_mmap.MAP_PRIVATE | python_mmap.MAP_ANONYMOUS
        area = calls.mmap(0, 2 * PMD_SIZE, 0, reserved, -1, 0)
        with mapping(file, length=PMD_SIZE, at=area + -area % PMD_SIZE) as m:
            read = m.values(0, PMD_SIZE)
            m.advised(python_mmap.MADV_HUGEPAGE, HUGE_PAGES)
            advise = [
                outcome(partial(m.madvise, advice, 0, PMD_SIZE))
                for advice in (MADV_COLLAPSE, python_mmap.MADV_DONTNEED)
            ]
            found = read, *advise, m.load()
        calls.munmap(area, 2 * PMD_SIZE)
        return found


def allocated_or_touched(file: File) -> tuple[str, str]:
    """Return what mincore says of pages that are allocated, and then of a page touched."""
    file.resize(SIZE)
    with mapping(file) as m:
        file.fallocate(int(FallocMode.KEEP_SIZE), 0, SIZE)
        before = m.mincore()
        m.steps.in_child(m.load)
        return before, m.mincore()


def dropped_after_mlock(m: Mapping) -> tuple[object, object]:
    """Lock a mapping, which may fail, then drop its pages."""
    return outcome(m.mlock), outcome(lambda: m.madvise(python_mmap.MADV_DONTNEED))


def kept_after_dontneed(m: Mapping) -> int:
    """Store a byte, drop the pages of the mapping, and load it."""
    m.store(FILLED)
    m.madvise(python_mmap.MADV_DONTNEED)
    return m.load()


def gone_after_remove(m: Mapping) -> int:
    """Store a byte, remove the pages from the file, and load it."""
    m.store(FILLED)
    m.madvise(python_mmap.MADV_REMOVE)
    return m.load()


def punched_in_pipe(file: File) -> tuple[int, int]:
    """Give a page to a pipe and punch it: the byte in the mapping, and the byte in the pipe."""
    file.resize(SIZE)
    reader, writer = os.pipe()
    try:
        with mapping(file) as m:
            m.store(FILLED)
            m.steps.call(
                "vmsplice(pipe, {p, 4096}, 1, 0)",
                lambda: calls.vmsplice(writer, m.address, PAGE_SIZE),
            )
            file.fallocate(PUNCH, 0, PAGE_SIZE)
            return m.load(), m.steps.call("read(pipe, &c, 1), c", lambda: os.read(reader, 1)[0])
    finally:
        os.close(reader)
        os.close(writer)


def locked_limit(file: File) -> str:
    """Map as much as RLIMIT_MEMLOCK allows, then twice as much, in a child without capabilities."""

    def body() -> tuple[object, object]:
        process.set_capabilities(0)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (_LIMIT, _LIMIT))
        file.steps.note(f"setrlimit(RLIMIT_MEMLOCK, {{{_LIMIT:#x}, {_LIMIT:#x}}})")
        return tuple(outcome(partial(_maps, file, length)) for length in (_LIMIT, 2 * _LIMIT))  # type: ignore[return-value]

    file.resize(SIZE)
    return file.steps.in_child(body)


def touched_over_locked_limit(small: File) -> str:
    """Fill twice as much as RLIMIT_MEMLOCK allows, in a child without capabilities."""

    def body() -> str:
        process.set_capabilities(0)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (_LIMIT, _LIMIT))
        file.steps.note(f"setrlimit(RLIMIT_MEMLOCK, {{{_LIMIT:#x}, {_LIMIT:#x}}})")
        with mapping(file, length=2 * _LIMIT) as m:
            m.fill(FILLED, 0, 2 * _LIMIT)
            return m.values(0, 2 * _LIMIT)

    with small.another(2 * _LIMIT) as file:
        file.resize(2 * _LIMIT)
        return file.steps.in_child(body)


def _maps(file: File, length: int) -> int:
    with mapping(file, length=length):
        return 0


def read_by_child(m: Mapping) -> str:
    """Let a child read the parent's mapping by process_vm_readv.

    Raises:
        UnsupportedError: where the kernel lacks the call.
    """
    need_process_vm_readv()
    parent = os.getpid()
    m.store(FILLED)
    return m.steps.in_child(
        lambda: m.steps.call(
            "process_vm_readv(getppid(), {buf, 8}, 1, {p, 8}, 1, 0)",
            lambda: calls.process_vm_readv(parent, m.address, _FEW),
        )
    )


def peeked_by_child(m: Mapping) -> str:
    """Let a child read the parent's mapping as a debugger does."""
    parent = os.getpid()
    m.store(FILLED)
    return m.steps.in_child(
        lambda: m.steps.call(
            "ptrace(PTRACE_ATTACH, getppid()), ptrace(PTRACE_PEEKDATA, getppid(), p)",
            lambda: calls.peek(parent, m.address),
        )
    )


def spliced(m: Mapping) -> int:
    """Touch a page where its owner may, then give it to a pipe; return the number of bytes."""
    m.steps.in_child(m.load)
    return m.vmsplice()
