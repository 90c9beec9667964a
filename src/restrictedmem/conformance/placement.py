"""Where the pages of a descriptor lie, and what moves them or takes them out of memory.

Page frames are read in /proc/self/pagemap, which shows them to root alone. The pages of a
restricted descriptor lie in a memfd that its consumer has, which root can map.
"""

import ctypes
import os
import resource
import struct
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from mmap import MAP_ANONYMOUS, MAP_PRIVATE
from pathlib import Path
from typing import Final

from restrictedmem.abi import memory, process
from restrictedmem.conformance import calls
from restrictedmem.conformance.case import UnsupportedError
from restrictedmem.conformance.files import File
from restrictedmem.conformance.mappings import Mapping, mapping
from restrictedmem.conformance.outcome import Errno
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE

MOVED: Final = "moved"
STAYED: Final = "stayed"
SWAPPED: Final = "swapped out"
_FRAME: Final = (1 << 55) - 1
_SWAPPED_BIT: Final = 62
#: Bytes of the file, and of the memfd beside it.
_FILE: Final = 1 << 20
_BESIDE: Final = 32 << 20
_TRIES: Final = 8
#: How many parts of the file have to be due to move before it is said that they stay.
_DUE: Final = 10
#: Frames that lie so close together that compaction looks at all of them or at none.
_CLOSE: Final = 64
_COMPACT: Final = Path("/proc/sys/vm/compact_memory")


def after_compaction(file: File) -> str:
    """Compact memory; say what became of the file's pages.

    Their place in the zone decides which pages move. So a memfd has holes before the file takes its
    pages, and what has moved of it says how much of the file would have moved.

    Raises:
        UnsupportedError: without root, or where compaction moves too little.
    """
    _need_root()
    due = 0.0
    with ExitStack() as kept:
        for _ in range(_TRIES):
            control = kept.enter_context(memory.memfd_create("control")).fileno()
            os.ftruncate(control, _BESIDE)
            beside = kept.enter_context(_aligned(file, _BESIDE, control))
            _touch(beside)
            file.steps.note("every other page of it is punched")
            for offset in range(0, _BESIDE, 2 * PAGE_SIZE):
                memory.fallocate(control, memory.PUNCH, offset, PAGE_SIZE)
            m, _ = kept.enter_context(_taken(file, _FILE))
            before, before_beside = _frames(m), _frames(beside, 1)
            _compact(file)
            if _frames(m) != before:
                return MOVED
            due += _due(before, before_beside, _frames(beside, 1))
            if due >= _DUE:
                return STAYED
    raise UnsupportedError(f"compaction moved too little in {_TRIES} tries")


def _due(file: list[int], before: list[int], after: list[int]) -> float:
    """Return how many parts of a file would have moved if its frames were a memfd's.

    ``before`` and ``after`` are a memfd's frames. The file's frames of one part are close together,
    and as much of the part was due to move as of the memfd's frames there. The kernel puts pages
    that cannot move in blocks of their own. Then all of the memfd's frames count.
    """
    there, moved = Counter[int](), Counter[int]()
    for was, now in zip(before, after, strict=True):
        there[was // _CLOSE] += 1
        moved[was // _CLOSE] += was != now
    parts = {frame // _CLOSE for frame in file}
    if parts.isdisjoint(there):
        return len(parts) * moved.total() / len(before)
    return sum(moved[part] / there[part] for part in parts if part in there)


def _compact(file: File) -> None:
    try:
        file.steps.call(f'write "1" to {_COMPACT}', lambda: _COMPACT.write_text("1"))
    except FileNotFoundError as error:
        raise UnsupportedError("the kernel has no compaction") from error


def after_collapse(file: File) -> str:
    """Ask for a huge page in place of 512 small ones; say what became of the pages.

    Raises:
        UnsupportedError: without root, or where the same call does nothing to a memfd.
    """
    _need_root()
    with memory.memfd_create("control") as control:
        os.ftruncate(control.fileno(), memory.PMD_SIZE)
        with _aligned(file, memory.PMD_SIZE, control.fileno()) as beside:
            _touch(beside)
            if _collapsed(beside) == STAYED:
                raise UnsupportedError("the kernel collapses no memfd here")
    with _taken(file, memory.PMD_SIZE) as (m, _):
        return _collapsed(m)


def _collapsed(m: Mapping) -> str:
    before = _frames(m)
    try:
        m.madvise(memory.MADV_COLLAPSE, 0, memory.PMD_SIZE)
    except OSError as error:
        m.steps.note(f"the call was refused: {Errno(error.errno or 0)}")
    return MOVED if _frames(m) != before else STAYED


def after_move_pages(file: File) -> str:
    """Ask for the first page to be moved to another node; say what became of it.

    Raises:
        UnsupportedError: on a machine of one node.
    """
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    if len(nodes) < 2:
        raise UnsupportedError("the machine has one NUMA node")
    with _taken(file, memory.PMD_SIZE) as (m, _):
        before = _frames(m)[:1]
        here = calls.move_page(m.address, None)
        other = next(int(node.name[4:]) for node in nodes if int(node.name[4:]) != here)
        m.steps.call(
            f"move_pages(0, 1, {{p}}, {{{other}}}, &status, MPOL_MF_MOVE), status",
            lambda: calls.move_page(m.address, other),
        )
        return MOVED if _frames(m)[:1] != before else STAYED


def after_pageout(file: File) -> str:
    """Ask for the pages to be swapped out; say what became of them.

    Raises:
        UnsupportedError: where no memory can be swapped out.
    """
    swaps = Path("/proc/swaps")
    # A kernel without swap has no such file.
    if not swaps.exists() or len(swaps.read_text(encoding="ascii").splitlines()) < 2:
        raise UnsupportedError("the machine has no swap area")
    with _taken(file, memory.PMD_SIZE) as (m, _):
        try:
            m.madvise(calls.MADV_PAGEOUT, 0, memory.PMD_SIZE)
        except OSError as error:
            file.steps.note(f"the call was refused: {Errno(error.errno or 0)}")
        return SWAPPED if any(entry >> _SWAPPED_BIT & 1 for entry in _entries(m)) else STAYED


def _need_root() -> None:
    if not process.effective_capabilities() >> process.CAP_SYS_ADMIN & 1:
        raise UnsupportedError("page frames are shown to root alone")


@contextmanager
def _taken(file: File, length: int) -> Generator[tuple[Mapping, File]]:
    """Make a file of a length with all pages, and map what has them; yield the mapping and it.

    Raises:
        UnsupportedError: without root, or where it may not have so many pages.
    """
    _need_root()
    with ExitStack() as made:
        made.enter_context(_without_locked_limit())
        mine = made.enter_context(file.another(length))
        mine.resize(length)
        fd = mine.fd
        if mine.creation.backing is not None:
            pages = length >> PAGE_SHIFT
            fd = made.enter_context(mine.creation.backing(fd, pages))
            file.steps.note(f"a consumer takes {pages} pages; root maps the memfd that has them")
        m = made.enter_context(_aligned(mine, length, fd))
        if file.steps.in_child(lambda: _touch(m)) == "SIGBUS":
            raise UnsupportedError("RLIMIT_MEMLOCK allows fewer pages")
        _touch(m)
        yield m, mine


@contextmanager
def _without_locked_limit() -> Generator[None]:
    """Lift RLIMIT_MEMLOCK where root may, because memfd_secret counts root's pages (Linux 7.3)."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with suppress(ValueError):
        resource.setrlimit(
            resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


@contextmanager
def _aligned(file: File, length: int, fd: int) -> Generator[Mapping]:
    """Map a descriptor at an address that a huge page can have."""
    size = length + memory.PMD_SIZE
    area = calls.mmap(0, size, 0, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    try:
        at = area + -area % memory.PMD_SIZE
        with mapping(file, length=length, at=at, fd=fd) as m:
            yield m
    finally:
        calls.munmap(area, size)


def _touch(m: Mapping, odd: int = 0) -> None:
    """Read a byte of every page, or (``odd`` is 1) of each page with an odd number."""
    content = memoryview((ctypes.c_ubyte * m.length).from_address(m.address)).cast("B")
    bytes(content[odd << PAGE_SHIFT :: PAGE_SIZE << odd])


def _frames(m: Mapping, odd: int = 0) -> list[int]:
    """Return the frames of its pages, or of those with odd numbers.

    A read waits for a migration of its page that is under way.
    """
    _touch(m, odd)
    return [entry & _FRAME for entry in _entries(m)[odd :: 1 + odd]]


def _entries(m: Mapping) -> list[int]:
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        count = m.length >> PAGE_SHIFT
        found = os.pread(pagemap.fileno(), count * 8, (m.address >> PAGE_SHIFT) * 8)
    return [entry for (entry,) in struct.iter_unpack("=Q", found)]
