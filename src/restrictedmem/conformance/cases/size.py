"""Cases of the calls that set a size."""

from collections.abc import Callable
from errno import EINVAL, EPERM
from typing import Final

from restrictedmem.abi.memory import FallocMode
from restrictedmem.conformance.case import Case, NotApplicable
from restrictedmem.conformance.cases.rows import POSTING, everywhere, file
from restrictedmem.conformance.files import SIZE, File
from restrictedmem.conformance.outcome import Errno
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE

_POSTING: Final = f"{POSTING} restrictedmem_setattr"
_TREE: Final = f"{_POSTING}; guest_memfd: kvm_gmem_setattr; mm/secretmem.c secretmem_setattr"
_LIMIT: Final = f"{_POSTING}; setrlimit(2), RLIMIT_FSIZE"
_KEEP: Final = int(FallocMode.KEEP_SIZE)
_NO_SIZE: Final = NotApplicable("its size never changes")

_ONCE: Final = (Errno(EPERM), PAGE_SIZE)
_ONCE_SECRET: Final = (Errno(EINVAL), PAGE_SIZE)
_FIXED: Final = {"gmem": (Errno(EINVAL), SIZE)}


def _set(id: str, *sizes: int, then: object, **others: object) -> Case:
    """Write a case that sets sizes; ``then`` is the proposal's answer, and that of the others."""
    return file(
        f"ftruncate-{id}",
        lambda f: f.sizes(*sizes),
        {**everywhere(then), **_FIXED, **others},
        _TREE,
    )


def _over_limit(
    id: str,
    does: Callable[[File], object],
    then: str,
    divergence: str = "",
    **others: object,
) -> Case:
    """Write a case under RLIMIT_FSIZE: an outcome, and the number of signals."""
    return file(
        f"{id}-over-rlimit",
        lambda f: f.over_limit(lambda: does(f)),
        {"proposal": then, "gmem": _NO_SIZE, "secret": _NO_SIZE, **others},
        _LIMIT,
        divergence=divergence,
    )


def _twice(file: File) -> None:
    file.ftruncate(PAGE_SIZE)
    file.ftruncate(SIZE)


CASES: Final[tuple[Case, ...]] = (
    _set("0", 0, then=(None, 0)),
    _set("0-0-then-size", 0, 0, PAGE_SIZE, then=(None, PAGE_SIZE)),
    _set("aligned", PAGE_SIZE, then=(None, PAGE_SIZE)),
    _set(
        "unaligned",
        PAGE_SIZE + 1,
        then=(Errno(EINVAL), 0),
        memfd=(None, PAGE_SIZE + 1),
        secret=(None, PAGE_SIZE + 1),
    ),
    _set(
        "unaligned-then-aligned",
        1,
        PAGE_SIZE,
        then=(None, PAGE_SIZE),
        secret=(Errno(EINVAL), 1),
    ),
    _set(
        "same-again", PAGE_SIZE, PAGE_SIZE, then=_ONCE, memfd=(None, PAGE_SIZE), secret=_ONCE_SECRET
    ),
    _set("0-again", PAGE_SIZE, 0, then=_ONCE, memfd=(None, 0), secret=_ONCE_SECRET),
    _set(
        "larger-again",
        PAGE_SIZE,
        2 * PAGE_SIZE,
        then=_ONCE,
        memfd=(None, 2 * PAGE_SIZE),
        secret=_ONCE_SECRET,
    ),
    _set(
        "unaligned-again",
        PAGE_SIZE,
        PAGE_SIZE + 1,
        then=_ONCE,
        memfd=(None, PAGE_SIZE + 1),
        secret=_ONCE_SECRET,
    ),
    _set("negative", -1, then=(Errno(EINVAL), 0)),
    _set("negative-again", PAGE_SIZE, -1, then=(Errno(EINVAL), PAGE_SIZE)),
    _set("4-pages", SIZE, then=(None, SIZE)),
    _set("to-maximum", MAX_FILE_BYTES, then=(None, MAX_FILE_BYTES)),
    _set(
        "beyond-maximum",
        (1 << 63) - 1,
        then=(Errno(EINVAL), 0),
        memfd=(None, (1 << 63) - 1),
        secret=(None, (1 << 63) - 1),
    ),
    file(
        "truncate-by-path",
        lambda f: f.truncate_by_path(),
        {**everywhere(PAGE_SIZE), "gmem": Errno(EINVAL)},
        "truncate(2), proc_pid_fd(5)",
    ),
    _over_limit("ftruncate", lambda f: f.ftruncate(SIZE), "EFBIG, 1", memfd="EFBIG, 1"),
    _over_limit(
        "ftruncate-unaligned",
        lambda f: f.ftruncate(SIZE + 1),
        "EINVAL, 0",
        "rlimit-fsize",
        descriptor="EFBIG, 1",
        memfd="EFBIG, 1",
    ),
    _over_limit(
        "ftruncate-again",
        _twice,
        "EPERM, 0",
        "rlimit-fsize",
        descriptor="EFBIG, 1",
        memfd="EFBIG, 1",
    ),
    _over_limit("fallocate", lambda f: f.fallocate(0, 0, SIZE), "EFBIG, 1", memfd="EFBIG, 1"),
    _over_limit(
        "fallocate-keep-size",
        lambda f: f.fallocate(_KEEP, 0, SIZE),
        "EFBIG, 1",
        "rlimit-fsize",
        descriptor="0, 0",
        memfd="EFBIG, 1",
    ),
)
