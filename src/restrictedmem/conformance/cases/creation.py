"""Cases of the calls that create a descriptor."""

import fcntl
import os
import resource
from collections.abc import Callable
from errno import EFAULT, EINVAL, EMFILE
from typing import Final

from restrictedmem.abi import kvm
from restrictedmem.conformance.case import Case, NotApplicable, Since
from restrictedmem.conformance.cases.rows import (
    GMEM_TEST,
    MM_TEST,
    POSTING,
    everywhere,
    file,
    only_gmem,
    unaligned,
)
from restrictedmem.conformance.facts import FLAGS_OFFERED
from restrictedmem.conformance.files import File, answers_of
from restrictedmem.conformance.outcome import Errno
from restrictedmem.units import PAGE_SIZE

_FLAGS: Final = f"{POSTING}; memfd_create(2), memfd_secret(2)"
_SIZES: Final = f"{GMEM_TEST} test_create_guest_memfd_invalid_sizes"
_NO_SIZE: Final = "its creation takes no size"
_ASSERTED: Final = tuple(f"GM-SIZE-{size}" for size in range(1, PAGE_SIZE))


def _each_flag(file: File) -> tuple[str, str]:
    """Create with each flag: the answers for those that the VM offers, and for the others."""
    bits = range(64)
    offered = tuple(1 << bit for bit in bits if file.creation.offered >> bit & 1)
    others = tuple(1 << bit for bit in bits if not file.creation.offered >> bit & 1)
    return (
        answers_of(lambda flag: file.create(flag, PAGE_SIZE), offered),
        answers_of(lambda flag: file.create(flag, PAGE_SIZE), others),
    )


def _each_size(file: File) -> str:
    call = file.creation.says(file.creation.flags, 1)
    # Where no VM makes it, a service does.
    sizes = unaligned(by_message=file.creation.vm < 0)
    return file.steps.call(
        f"{call}, for {len(sizes)} sizes from 1 to {PAGE_SIZE - 1}",
        lambda: answers_of(lambda size: file.creation.make(file.creation.flags, size), sizes),
    )


def _two_sizes(file: File) -> tuple[int, int, int, bool]:
    """Create files of a page and of two: their sizes, that of the first again, two inodes."""
    with file.another(PAGE_SIZE) as first:
        size = first.stat().st_size
        with file.another(2 * PAGE_SIZE) as second:
            other = second.stat()
            again = first.stat()
            return size, other.st_size, again.st_size, again.st_ino != other.st_ino


def _reserved(file: File) -> int:
    """Create with a reserved word that is not 0."""
    flags = file.creation.flags
    wanted = kvm.kvm_create_guest_memfd(size=PAGE_SIZE, flags=flags, reserved0=1)
    fd = file.steps.call(
        "ioctl(vm, KVM_CREATE_GUEST_MEMFD, {.size = 4096, .reserved = {1}})",
        lambda: kvm.KVM_CREATE_GUEST_MEMFD(file.creation.vm, wanted),
    )
    os.close(fd)
    return 0


def _null(file: File) -> int:
    number = kvm.KVM_CREATE_GUEST_MEMFD.request
    return file.steps.call(
        "ioctl(vm, KVM_CREATE_GUEST_MEMFD, NULL)",
        lambda: fcntl.ioctl(file.creation.vm, number, 0),
    )


def _without_numbers(file: File) -> int:
    """Create in a process that may have no further descriptor.

    It is this process, because a VM serves no other.
    """
    number = os.dup(file.fd)
    os.close(number)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    file.steps.note(f"setrlimit(RLIMIT_NOFILE, {{{number}, …}})")
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, limits[1]))
    try:
        return file.create()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _sized(id: str, size: int, answer: object) -> Case:
    return file(
        f"create-size-{id}",
        lambda f: f.create(size=size),
        only_gmem(answer, _NO_SIZE),
        f"{_SIZES}; virt/kvm/guest_memfd.c kvm_gmem_create",
    )


def _with_flag(flag: int) -> Callable[[File], int]:
    return lambda file: file.create(flag)


_INVALID: Final = Errno(EINVAL)
_BY_NAME: Final = {"in-place": NotApplicable("its creation takes no structure")}
CASES: Final[tuple[Case, ...]] = (
    file("create-flags-99", _with_flag(99), everywhere(_INVALID), _FLAGS),
    file(
        "create-flag-31",
        _with_flag(1 << 31),
        {**everywhere(_INVALID), "memfd": Errno(EINVAL)},
        _FLAGS,
    ),
    file("create", _with_flag(0), everywhere(0), f"{MM_TEST}; {_FLAGS}", ("SEC-0",)),
    file(
        "create-without-numbers",
        _without_numbers,
        everywhere(Errno(EMFILE)),
        f"{_FLAGS}; getrlimit(2), RLIMIT_NOFILE",
    ),
    file(
        "create-each-flag",
        _each_flag,
        only_gmem(Since(("0", "EINVAL"), ("", "EINVAL"), FLAGS_OFFERED), "it has other flags"),
        f"{GMEM_TEST} test_guest_memfd_flags",
        tuple(f"GM-FLAG-{bit:02}" for bit in range(64)),
    ),
    file("create-each-size", _each_size, only_gmem("EINVAL", _NO_SIZE), _SIZES, _ASSERTED),
    file(
        "create-two-sizes",
        _two_sizes,
        only_gmem((PAGE_SIZE, 2 * PAGE_SIZE, PAGE_SIZE, True), _NO_SIZE),
        f"{GMEM_TEST} test_create_guest_memfd_multiple",
        ("GM-MULTI-1", "GM-MULTI-2", "GM-MULTI-3"),
    ),
    _sized("0", 0, _INVALID),
    _sized("unaligned", PAGE_SIZE + 1, _INVALID),
    _sized("sign-bit", 1 << 63, _INVALID),
    _sized("negative", (1 << 64) - PAGE_SIZE, _INVALID),
    _sized("sparse", 1 << 62, 0),
    file(
        "create-reserved",
        _reserved,
        {**only_gmem(0, "its creation has no reserved words"), **_BY_NAME},
        "virt/kvm/guest_memfd.c kvm_gmem_create: looks at size and flags; a run on Linux 6.18",
    ),
    file(
        "create-null",
        _null,
        {**only_gmem(Errno(EFAULT), "its creation takes no structure"), **_BY_NAME},
        "Documentation/virt/kvm/api.rst, KVM_CREATE_GUEST_MEMFD; a run on Linux 6.18",
    ),
)
