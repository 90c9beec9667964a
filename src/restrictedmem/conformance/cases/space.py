"""Cases of fallocate: allocation, punching, and the modes that nobody has."""

import signal
from collections.abc import Callable
from contextlib import suppress
from errno import EFBIG, EINVAL, EOPNOTSUPP
from typing import Final

from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.conformance.case import Case, NotApplicable, Since
from restrictedmem.conformance.cases.rows import (
    GMEM_TEST,
    POSTING,
    everywhere,
    file,
    only_gmem,
)
from restrictedmem.conformance.facts import LAST_BYTE
from restrictedmem.conformance.files import SIZE, File, answers_of
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE

_P: Final = PAGE_SIZE
_KEEP: Final = int(FallocMode.KEEP_SIZE)
_POSTING: Final = f"{POSTING} restrictedmem_fallocate; mm/shmem.c shmem_fallocate"
_ALLOCATE: Final = f"{GMEM_TEST} test_fallocate; {_POSTING}"
_PUNCH: Final = f"{GMEM_TEST} test_fallocate, test_invalid_punch_hole; {_POSTING}"
_VFS: Final = "fallocate(2); fs/open.c vfs_fallocate"
#: A guest_memfd counts no blocks, and memfd_secret has no fallocate.
_GMEM: Final = (SIZE, 0)
_NONE: Final = Errno(EOPNOTSUPP)
_UNALIGNED: Final = tuple(
    (offset, length)
    for offset in (0, 1, _P)
    for length in (1, _P - 1, _P, _P + 1)
    if offset == 1 or length != _P
)
#: Bytes that take longer to allocate than a timer needs, and how often a case tries.
_LARGE: Final = 64 << 20
_ATTEMPTS: Final = 100
_MODES: Final = {
    "punch-alone": 0x02,
    "no-hide-stale": 0x04,
    "collapse-range": 0x08,
    "zero-range": 0x10,
    "zero-range-keep-size": 0x11,
    "zero-range-punch": 0x13,
    "insert-range": 0x20,
    "unshare-range": 0x40,
    "unshare-range-keep-size": 0x41,
    "write-zeroes": 0x80,
    "unknown-mode": 0x100,
}


def _allocate(
    mode: int, offset: int, length: int, size: int = 0
) -> Callable[[File], tuple[int, int]]:
    """Return an operation: set a size, then fallocate; (size, pages held)."""

    def operation(file: File) -> tuple[int, int]:
        if size:
            file.resize(size)
        file.fallocate(mode, offset, length)
        return file.held()

    return operation


def _punch(offset: int, length: int, mode: int = PUNCH) -> Callable[[File], tuple[int, int]]:
    """Return an operation: punch a hole into four allocated pages; (size, pages held)."""

    def operation(file: File) -> tuple[int, int]:
        file.resize(SIZE)
        with suppress(OSError):
            file.fallocate(_KEEP, 0, SIZE)
        file.fallocate(mode, offset, length)
        return file.held()

    return operation


def _counted(offset: int, length: int) -> Callable[[File], tuple[int, int, int]]:
    """Return an operation: cached pages at first, with three allocated, and after a punch."""

    def operation(file: File) -> tuple[int, int, int]:
        file.resize(SIZE)
        first = file.cached()
        file.fallocate(_KEEP, 0, 3 * _P)
        allocated = file.cached()
        file.fallocate(PUNCH, offset, length)
        return first, allocated, file.cached()

    return operation


def _unaligned_punches(file: File) -> str:
    file.resize(SIZE)
    return answers_of(lambda which: file.fallocate(PUNCH, *_UNALIGNED[which]), range(10))


def _then_0(file: File) -> tuple[int, int]:
    """Allocate a page at size 0, then set size 0."""
    file.fallocate(_KEEP, 0, _P)
    file.ftruncate(0)
    return file.held()


def _grow_after(file: File) -> tuple[int, int]:
    file.resize(_P)
    file.fallocate(0, 0, SIZE + 1)
    return file.held()


def _interrupted(small: File) -> str:
    """Allocate 64 MiB, in a child, until a signal comes meanwhile; say whether a part is there."""
    with small.another(_LARGE) as large:

        def body() -> tuple[object, bool]:
            answer: object = None
            there = 0
            signal.signal(signal.SIGALRM, lambda _number, _frame: None)
            for attempt in range(_ATTEMPTS):
                large.steps.note("setitimer(ITIMER_REAL, {0, a few 100 µs})")
                signal.setitimer(signal.ITIMER_REAL, (attempt % 10 + 1) * 2e-4)
                answer = outcome(lambda: large.fallocate(_KEEP, 0, _LARGE))
                there = large.cached(0, _LARGE)
                # The signal may come before the first page.
                if answer is not None and there:
                    break
                large.fallocate(PUNCH, 0, _LARGE)
            return answer, 0 < there < _LARGE // _P

        return large.steps.in_child(body)


def _refilled(file: File) -> tuple[int, int]:
    """Allocate, punch, and allocate the hole again."""
    file.resize(SIZE)
    file.fallocate(_KEEP, 0, SIZE)
    file.fallocate(PUNCH, _P, _P)
    file.fallocate(_KEEP, _P, _P)
    return file.held()


def _row(
    id: str,
    does: Callable[[File], object],
    then: object,
    gmem: object,
    source: str,
    covers: tuple[str, ...] = (),
    *,
    divergence: str = "",
    **others: object,
) -> Case:
    """Write a case that memfd answers as the proposal does, and memfd_secret as not supported."""
    expected = {"proposal": then, "memfd": then, "secret": _NONE, "gmem": gmem, **others}
    return file(id, does, expected, source, covers, divergence=divergence)


_INVALID: Final = Errno(EINVAL)
_ALL: Final = (SIZE, 4)

CASES: Final[tuple[Case, ...]] = (
    _row("allocate-grows", _allocate(0, 0, _P), (_P, 1), _NONE, _ALLOCATE),
    _row("allocate-grows-unaligned", _allocate(0, 0, _P + 1), (_P + 1, 2), _NONE, _POSTING),
    _row("allocate-grows-from-unaligned", _allocate(0, _P - 1, 2), (_P + 1, 2), _NONE, _POSTING),
    _row("allocate-grows-after-ftruncate", _grow_after, (SIZE + 1, 5), _NONE, _POSTING),
    _row("allocate-within", _allocate(0, 0, _P, SIZE), (SIZE, 1), _NONE, _POSTING),
    _row(
        "allocate-keep-size",
        _allocate(_KEEP, 0, SIZE, SIZE),
        _ALL,
        _GMEM,
        _ALLOCATE,
        ("GM-FALLOC-1",),
    ),
    _row(
        "allocate-past-end",
        _allocate(_KEEP, SIZE, _P, SIZE),
        (SIZE, 1),
        _INVALID,
        _ALLOCATE,
        ("GM-FALLOC-3",),
    ),
    _row(
        "allocate-further-past-end",
        _allocate(_KEEP, 5 * _P, _P, SIZE),
        (SIZE, 1),
        _INVALID,
        _ALLOCATE,
        ("GM-FALLOC-4",),
    ),
    _row(
        "allocate-across-end", _allocate(_KEEP, 3 * _P, 2 * _P, SIZE), (SIZE, 2), _INVALID, _POSTING
    ),
    _row("allocate-at-size-0", _allocate(_KEEP, 0, _P), (0, 1), _GMEM, _POSTING),
    _row("allocate-unaligned", _allocate(_KEEP, 1, _P, SIZE), (SIZE, 2), _INVALID, _POSTING),
    _row("allocate-unaligned-length", _allocate(_KEEP, 0, 1, SIZE), (SIZE, 1), _INVALID, _POSTING),
    _row(
        "ftruncate-0-after-allocate",
        _then_0,
        (0, 0),
        _INVALID,
        f"{POSTING} restrictedmem_setattr; mm/shmem.c shmem_setattr",
        divergence="ftruncate-empty",
        descriptor=(0, 1),
    ),
    _row("allocate-last-page", _allocate(_KEEP, MAX_FILE_BYTES - _P, _P), (0, 1), _INVALID, _VFS),
    _row(
        "allocate-last-byte",
        _allocate(0, MAX_FILE_BYTES, _P - 1),
        (MAX_FILE_BYTES + _P - 1, 1),
        _NONE,
        _VFS,
        divergence="last-byte",
        descriptor=Since(Errno(EFBIG), (MAX_FILE_BYTES + _P - 1, 1), LAST_BYTE),
        memfd=Since(Errno(EFBIG), (MAX_FILE_BYTES + _P - 1, 1), LAST_BYTE),
    ),
    _row("punch", _punch(_P, _P), (SIZE, 3), _GMEM, _PUNCH, ("GM-FALLOC-8",)),
    _row("punch-all", _punch(0, SIZE), (SIZE, 0), _GMEM, _POSTING),
    _row("punch-to-maximum", _punch(0, MAX_FILE_BYTES), (SIZE, 0), _GMEM, _POSTING),
    _row("punch-across-end", _punch(3 * _P, 8 * _P), (SIZE, 3), _GMEM, _POSTING),
    _row("punch-at-end", _punch(SIZE, _P), _ALL, _GMEM, _PUNCH, ("GM-FALLOC-5",)),
    _row("punch-past-end", _punch(5 * _P, _P), _ALL, _GMEM, _PUNCH, ("GM-FALLOC-6",)),
    _row("punch-far-past-end", _punch(1 << 40, _P), _ALL, _GMEM, _POSTING),
    _row("punch-hole", _allocate(PUNCH, 0, _P, SIZE), (SIZE, 0), _GMEM, _POSTING),
    _row("punch-at-size-0", _allocate(PUNCH, 0, _P), (0, 0), _GMEM, _POSTING),
    _row("punch-refilled", _refilled, _ALL, _GMEM, _ALLOCATE, ("GM-FALLOC-9",)),
    _row("punch-unaligned-offset", _punch(1, _P), _INVALID, _INVALID, _PUNCH, memfd=_ALL),
    _row(
        "punch-before-boundary",
        _punch(_P - 1, _P),
        _INVALID,
        _INVALID,
        _PUNCH,
        ("GM-FALLOC-2",),
        memfd=_ALL,
    ),
    _row(
        "punch-unaligned-length",
        _punch(_P, _P - 1),
        _INVALID,
        _INVALID,
        _PUNCH,
        ("GM-FALLOC-7",),
        memfd=_ALL,
    ),
    _row(
        "punch-unaligned-both",
        _punch(_P - 1, _P + 1),
        _INVALID,
        _INVALID,
        _PUNCH,
        memfd=(SIZE, 3),
    ),
    _row(
        "punch-unaligned-ranges",
        _unaligned_punches,
        "EINVAL",
        "EINVAL",
        f"{GMEM_TEST} test_invalid_punch_hole",
        tuple(f"GM-PUNCH-{number}" for number in range(1, 11)),
        memfd="0",
        secret="EOPNOTSUPP",  # noqa: S106  not a password
    ),
    *(
        file(f"fallocate-{id}", _punch(0, _P, mode), everywhere(_NONE), f"{_VFS}; {_POSTING}")
        for id, mode in _MODES.items()
    ),
    _row("allocate-nothing", _allocate(_KEEP, 0, 0), _INVALID, _INVALID, _VFS, secret=_INVALID),
    file(
        "allocate-interrupted",
        _interrupted,
        {
            **only_gmem("EINTR, yes", "its file system decides"),
            "in-place": NotApplicable("only a signal that kills the caller ends it"),
        },
        "virt/kvm/guest_memfd.c kvm_gmem_allocate; fallocate(2), EINTR",
    ),
    _row("allocate-negative", _allocate(0, 0, -1), _INVALID, _INVALID, _VFS, secret=_INVALID),
    _row(
        "allocate-negative-offset",
        _allocate(_KEEP, -_P, _P),
        _INVALID,
        _INVALID,
        _VFS,
        secret=_INVALID,
    ),
    _row(
        "allocate-overflow",
        _allocate(0, 1 << 62, 1 << 62),
        Errno(EFBIG),
        Errno(EFBIG),
        _VFS,
        secret=Errno(EFBIG),
    ),
    _row(
        "allocate-beyond-maximum",
        _allocate(_KEEP, (1 << 63) - 1, 1),
        Errno(EFBIG),
        Errno(EFBIG),
        _VFS,
        secret=Errno(EFBIG),
    ),
    _row("punch-nothing", _punch(0, 0), _INVALID, _INVALID, _VFS, secret=_INVALID),
    _row(
        "punch-overflow",
        _punch(MAX_FILE_BYTES, _P),
        Errno(EFBIG),
        Errno(EFBIG),
        _VFS,
        secret=Errno(EFBIG),
    ),
    file(
        "cached-pages",
        _counted(_P, _P),
        {
            "proposal": (0, 0, 0),
            "memfd": (0, 3, 2),
            "secret": _NONE,
            "gmem": (0, 3, 2),
            "in-place": (0, 0, 0),
        },
        "cachestat(2); a run on Linux 6.18",
    ),
)
