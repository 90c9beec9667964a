"""Everything an owner can do to the descriptor, compared with v9 and v10, and with other files.

Each row is one operation. ``proposal`` is the answer of memfd_restricted(2). Where FUSE cannot
express that, ``here`` is this project's answer, and ``key`` names the row of
docs/reference/divergences.md. The other columns are the answers of a memfd, of memfd_secret (a file
made by the proposal's own recipe) and of guest_memfd, where these were measured. They run if the
machine has these kinds. The rows are in descriptor_rows_*.py.
"""

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from errno import EBADF, EINVAL, ENOSYS, ENOTTY
from pathlib import Path
from typing import Any

import pytest

from descriptor_operations import PAGE, Thing
from descriptor_rows import SAME, UNSAID, Row
from descriptor_rows_content import CONTENT, SIZE
from descriptor_rows_handle import DESCRIPTOR
from descriptor_rows_space import ATTRIBUTES, SPACE
from outcomes import in_child, outcome
from restrictedmem.abi import kvm, memory
from restrictedmem.abi.memory import fallocate
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options

DIVERGENCES = Path(__file__).parent.parent / "docs" / "reference" / "divergences.md"

ROWS = [*CONTENT, *SIZE, *SPACE, *ATTRIBUTES, *DESCRIPTOR]

Make = Callable[[int], int]
_MARKS = {
    "v9": [pytest.mark.requires("fuse")],
    "v10": [pytest.mark.requires("fuse")],
    "gmem": [pytest.mark.requires("kvm")],
    "gmem-mmap": [pytest.mark.requires("kvm")],
}


def _guest_memfd(base: int) -> Make:
    # ``devkvm`` would make the descriptor close-on-exec, and a row asks what the kernel made it.
    def make(flags: int) -> int:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        try:
            vm = kvm.KVM_CREATE_VM(device)
        finally:
            os.close(device)
        try:
            return kvm.KVM_CREATE_GUEST_MEMFD(
                vm, kvm.kvm_create_guest_memfd(size=4 * PAGE, flags=base | flags)
            )
        finally:
            os.close(vm)

    return make


@pytest.fixture(scope="module")
def makers() -> Iterator[Callable[[str], Make]]:
    """Return a function that makes descriptors of a kind. Services start at their first use."""
    services: dict[str, Service] = {}
    kinds: dict[str, Make] = {
        "memfd": lambda flags: os.memfd_create("compared", flags),
        "secret": lambda flags: memory.memfd_secret(flags).detach(),
        "gmem": _guest_memfd(0),
        "gmem-mmap": _guest_memfd(kvm.GUEST_MEMFD_FLAG_MMAP),
    }

    def maker(subject: str) -> Make:
        if subject in kinds:
            return kinds[subject]
        if subject not in services:
            services[subject] = Service.start(Options(api=subject))
        return services[subject].memfd_restricted

    yield maker
    for service in services.values():
        service.close()


def _cases() -> Iterator[Any]:
    for case in ROWS:
        for subject in ("v9", "v10", "memfd", "secret", "gmem", "gmem-mmap"):
            if case.expected(subject) is not UNSAID:
                marks = [
                    *_MARKS.get(subject, ()),
                    *([pytest.mark.requires("inotify")] if case.id == "inotify" else []),
                ]
                yield pytest.param(case, subject, id=f"{subject}-{case.id}", marks=marks)


@pytest.mark.parametrize(("case", "subject"), list(_cases()))
def test_operation(case: Row, subject: str, makers: Callable[[str], Make]) -> None:
    make = makers(subject)
    try:
        fd = make(0)
    except OSError as error:
        # guest_memfd without the MMAP flag came with 6.8, with it in 6.18; memfd_secret may be left
        # out of a kernel or disabled at boot.
        if subject in ("v9", "v10") or error.errno not in (EINVAL, ENOSYS, ENOTTY):
            raise
        pytest.skip(f"{subject} cannot be made here: {error}")
    try:
        assert outcome(lambda: case.operation(Thing(fd, make))) == case.expected(subject)
    finally:
        os.close(fd)


def test_ids_are_unique() -> None:
    ids = [case.id for case in ROWS]
    assert sorted(set(ids)) == sorted(ids)


#: Keys of divergences that a row cannot show everywhere. For ``path-after-close`` nobody can state
#: the proposal's answer, because it reads freed memory. The others exist on some kernels only.
_NOT_ALWAYS = {"path-after-close", "fibmap", "splice-empty", "splice-out", "last-byte"}


def test_a_divergence_is_one_and_has_a_key() -> None:
    for case in ROWS:
        differs = case.here is not SAME and case.here != case.proposal
        assert differs == bool(case.key) or case.key in _NOT_ALWAYS, case.id


def _documented() -> dict[str, list[str]]:
    """Return key and cells of every row of the descriptor's table."""
    text = (
        DIVERGENCES.read_text(encoding="utf-8")
        .partition("\n## Descriptor\n")[2]
        .partition("\n## ")[0]
    )
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert len({row[0] for row in cells}) == len(cells), "a key stands twice"
    return {row[0].strip("`"): row for row in cells}


def test_every_divergence_is_documented_and_every_row_is_shown() -> None:
    documented = _documented()
    in_table = {
        key
        for key, cells in documented.items()
        if cells[-1] == "`test_descriptor.py::test_operation`"
    }
    assert {case.key for case in ROWS if case.key} == in_table
    for key, cells in documented.items():
        file, _, function = cells[-1].strip("`").partition("::")
        assert f"def {function}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), key


@pytest.mark.requires("fuse")
def test_a_closed_number_is_ebadf(makers: Callable[[str], Make]) -> None:
    fd = makers("v10")(0)
    os.close(fd)
    for operation in (
        lambda: os.ftruncate(fd, PAGE),
        lambda: os.fstat(fd),
        lambda: fallocate(fd, 0, 0, PAGE),
    ):
        with pytest.raises(OSError) as raised:
            operation()
        assert raised.value.errno == EBADF


@pytest.mark.requires("fuse")
def test_regular_file_of_the_caller(makers: Callable[[str], Make]) -> None:
    fd = makers("v10")(0)
    try:
        assert stat.S_ISREG(os.fstat(fd).st_mode)
        assert in_child(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "None"
    finally:
        os.close(fd)
