"""A guest's first touch of its memory, for each kind of backing."""

import fcntl
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.common import Figure, Lab, alternate, service
from benchmarks.guest import OVERHEAD, plain_to_hypercall, run_to_hypercall, spin
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import PAGE_SHIFT

_HUGE_PAGE: Final = 2 << 20
_POOL: Final = Path(f"/sys/kernel/mm/hugepages/hugepages-{_HUGE_PAGE >> 10}kB/nr_hugepages")


@contextmanager
def _huge_pages(count: int) -> Generator[None]:
    """Make the kernel reserve ``count`` more huge pages meanwhile."""
    with _POOL.open("r+") as setting:
        fcntl.flock(setting, fcntl.LOCK_EX)
        before = int(_POOL.read_text())
        _POOL.write_text(str(before + count))
        try:
            yield
        finally:
            _POOL.write_text(str(before))


def first_touch(lab: Lab) -> Iterator[Figure]:
    """Let a guest write to each page of 64 MiB for the first time.

    The memory comes as 4 KiB pages, as folios made by MADV_COLLAPSE, and as huge pages.
    """
    heap = lab.amount(64 << 20, 8 << 20)
    pages, rounds = heap >> PAGE_SHIFT, lab.rounds(9)
    counted: dict[str, Any] = {}

    def floor() -> float:
        return plain_to_hypercall(heap, "touch") * 1e6 / pages

    def ours(started: Service) -> float:
        with spin(started, heap, "touch") as vmm:
            taken = run_to_hypercall(vmm)
            counted.update(vmm.vm.statistics())
            return taken * 1e6 / pages

    def compare(backing: str) -> Iterator[Figure]:
        with service(Options(backing=backing)) as started:
            plain = alternate(floor, partial(ours, started), rounds)
            note = (
                f"{counted['mapped_4k']} translations of 4 KiB, {counted['mapped_2m']} of 2 MiB, "
                f"at {counted['faults_private']} faults"
            )
            yield plain.figure(
                f"guest's first touch of {heap >> 20} MiB, {backing}; a page", "µs", note=note
            )
            if backing != "memfd":
                beside = alternate(partial(ours, small), partial(ours, started), rounds)
                yield beside.figure(f"  the same, {backing} (floor: memfd)", "µs")

    with service() as small:
        yield from compare("memfd")
        yield from compare("thp")
        # Only root can reserve huge pages. The other backings are measured without root, too.
        if os.access(_POOL, os.W_OK):
            with _huge_pages(-(-(heap + OVERHEAD) // _HUGE_PAGE)):
                yield from compare("hugetlb-2m")


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {"first-touch-levels": first_touch}
