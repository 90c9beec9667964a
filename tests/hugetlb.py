"""Huge pages for tests, reserved as root through sysfs and released afterwards.

Tests that need some take turns, in whatever process they run.
"""

import fcntl
import functools
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

#: Seconds in which the pages of processes that end come back.
_PATIENCE = 5
#: Bytes of a huge page by the kind of backing (``mm.backing``).
SIZES = {"hugetlb-2m": 2 << 20, "hugetlb-1g": 1 << 30}


def _pool(size: int) -> Path:
    return Path(f"/sys/kernel/mm/hugepages/hugepages-{size >> 10}kB")


def free_pages(size: int) -> int:
    return int((_pool(size) / "free_hugepages").read_text())


@contextmanager
def reserved(size: int, count: int) -> Generator[None, None, None]:
    """Reserve exactly ``count`` free huge pages of ``size`` bytes; not recursive for one size.

    Skips the test if so much memory cannot be had in one piece, which depends on what ran before.

    Raises:
        OSError: EACCES without root.
    """
    setting = _pool(size) / "nr_hugepages"
    with setting.open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(setting.read_text())
        try:
            deadline = time.monotonic() + _PATIENCE
            # A process that has just ended gives its pages back a moment later.
            while free_pages(size) != count:
                if time.monotonic() > deadline:
                    why = (
                        f"only {free_pages(size)} of {count} huge pages of {size >> 20} MiB can "
                        f"be had"
                    )
                    if "hugetlb" in os.environ.get("RESTRICTEDMEM_REQUIRE", "").split(","):
                        pytest.fail(why)
                    pytest.skip(why)
                setting.write_text(str(int(setting.read_text()) - free_pages(size) + count))
                if free_pages(size) < count:
                    _make_room()
            yield
        finally:
            setting.write_text(str(before))


def _make_room() -> None:
    """Let the kernel drop cached files and compact memory, as far as this kernel can."""
    for name, value in ("drop_caches", "3"), ("compact_memory", "1"):
        with suppress(OSError):
            Path(f"/proc/sys/vm/{name}").write_text(value)


@functools.cache
def missing() -> str:
    """Say why huge pages of both sizes cannot be had, with an empty word where they can."""
    if not all(os.access(_pool(size) / "nr_hugepages", os.W_OK) for size in SIZES.values()):
        return "huge pages of 2 MiB and 1 GiB cannot be reserved: not root, or the kernel has none"
    try:
        for size in SIZES.values():
            with reserved(size, 1):
                pass
    except OSError as error:
        return error.strerror or str(error)
    except pytest.skip.Exception as skipped:
        return str(skipped)
    return ""
