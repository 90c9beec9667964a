"""Conversion in place: KVM_SET_MEMORY_ATTRIBUTES2 on a guest_memfd that its owner has mapped.

The first cases do what guest_memfd_conversions_test.c of the series does, with its values.
"""

import fcntl
from collections.abc import Callable, Iterator
from errno import EAGAIN, EFAULT, EINVAL, ENOTTY, EOPNOTSUPP
from functools import partial
from typing import Any, Final

from restrictedmem.abi.kvm import (
    KVM_SET_MEMORY_ATTRIBUTES2,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    KVM_SET_MEMORY_ATTRIBUTES2_ZERO,
)
from restrictedmem.conformance import calls
from restrictedmem.conformance.case import Case, Family, NotApplicable
from restrictedmem.conformance.cases.conversions import Check, all_right
from restrictedmem.conformance.files import pipe
from restrictedmem.conformance.in_place_machine import PRIVATE, SHARED, InPlace
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.devkvm import address_of
from restrictedmem.units import PAGE_SIZE

P: Final = PAGE_SIZE
_A, _B, _C, _D, _E = b"ABCDE"
#: Pages of the cases that look at each page.
_FEW, _MANY = 4, 8


# The steps of the selftest.


def _private(it: InPlace, page: int, starting: int, write: int) -> Iterator[Check]:
    """Look at a private page from both sides; the guest changes it."""
    yield f"the host's store, page {page}", it.touch(page, write), "SIGBUS"
    yield f"the guest's word, page {page}", it.guest(page, write), starting
    yield f"the host's load, page {page}", it.touch(page), "SIGBUS"


def _shared(it: InPlace, page: int, starting: int, host: int, write: int) -> Iterator[Check]:
    """Look at a shared page from both sides; each side changes it."""
    yield f"the host's word, page {page}", it.load(page), starting
    it.store(page, host)
    yield f"the guest's word, page {page}", it.guest(page, write), host
    yield f"the guest's store, page {page}", it.load(page), write


def _to_private(it: InPlace, page: int, starting: int, write: int) -> Iterator[Check]:
    it.convert(page, private=True)
    yield from _private(it, page, starting, write)


def _to_shared(it: InPlace, page: int, starting: int, host: int, write: int) -> Iterator[Check]:
    it.convert(page, private=False)
    yield from _shared(it, page, starting, host, write)


def _init_private(it: InPlace) -> Iterator[Check]:
    yield from _private(it, 0, 0, _A)
    yield from _to_shared(it, 0, _A, _B, _C)
    yield from _to_private(it, 0, _C, _E)


def _init_shared(it: InPlace) -> Iterator[Check]:
    yield from _shared(it, 0, 0, _A, _B)
    yield from _to_private(it, 0, _B, _C)
    yield from _to_shared(it, 0, _C, _D, _E)


def _index(page: int, it: InPlace) -> Iterator[Check]:
    """Convert one page of four; the others stay shared, and each keeps its own word."""

    def word(of: int, step: int) -> int:
        return (of << 4) + step

    for each in reversed(range(_FEW)):
        yield from _shared(it, each, 0, word(each, 1), word(each, 2))
    yield from _to_private(it, page, word(page, 2), word(page, 3))
    for each in range(_FEW):
        if each == page:
            yield from _private(it, each, word(each, 3), word(each, 4))
        else:
            yield from _shared(it, each, word(each, 2), word(each, 3), word(each, 4))
    yield from _to_shared(it, page, word(page, 4), word(page, 5), word(page, 6))
    for each in range(_FEW):
        last = word(each, 6 if each == page else 4)
        yield from _shared(it, each, last, word(each, 7), word(each, 8))


def _unallocated(page: int, it: InPlace) -> Iterator[Check]:
    """Convert eight pages in one call, of which two are allocated."""
    touched = {page, _MANY // 2}
    for each in sorted(touched):
        it.store(each, _A)
    it.convert(0, _MANY, private=True)
    for each in range(_MANY):
        yield from _private(it, each, _A if each in touched else 0, _B)
    for each in range(_MANY):
        yield from _to_shared(it, each, _B, _C, _D)


def _punched(it: InPlace) -> Iterator[Check]:
    it.store(0, _A)
    it.punch(0)
    yield "a shared page after a punch", it.load(0), 0
    it.store(0, _A)
    yield from _to_private(it, 0, _A, _B)
    it.punch(0)
    yield from _private(it, 0, 0, _A)


def _forked(it: InPlace) -> Iterator[Check]:
    """Convert a page that a forked child has in its own page tables."""
    yield from _shared(it, 0, 0, 0xA, 0xB)
    checks = list[Check]()
    found = it.beside(0, 0xC, lambda: checks.extend(_to_private(it, 0, 0xC, 0xD)))
    yield from checks
    yield "the child's word, its store and its load", found, (str(0xB), "SIGBUS", "SIGBUS")


def _held(page: int, it: InPlace) -> object:
    """Convert four pages of which somebody holds one, and then that page alone."""
    for each in range(_FEW):
        it.store(each, _A)
    with it.held(page):
        refused = it.refused(0, _FEW), it.refused(page, 1)
        others = [each for each in range(_FEW) if each != page]
        for each in others:
            it.convert(each, private=True)
            it.guest(each, _C)
    it.convert(0, _FEW, private=True)
    return *refused, *(it.guest(each) for each in range(_FEW))


# What the selftest does not ask.


def _state(it: InPlace) -> object:
    """Convert pages that have never been allocated, then allocate and punch all of them."""

    def touches() -> str:
        return " ".join(it.touch(page) for page in range(_FEW))

    it.convert(1, private=True)
    it.convert(3, private=True)
    found = [touches()]
    for change in (it.allocate, it.punch):
        change(0, _FEW)
        found.append(touches())
    return tuple(found)


def _kept(flags: int, it: InPlace) -> object:
    """Convert a page and back with a mode; return what each side then finds."""
    it.store(0, _A)
    it.convert(0, private=True, flags=flags)
    private = it.guest(0, _B)
    it.convert(0, private=False, flags=flags)
    return private, it.load(0)


def _zeroed(it: InPlace) -> object:
    """Make three pages shared with ZERO, of which the second is shared already."""
    for page in range(3):
        it.store(page, _A)
    it.convert(0, private=True)
    it.convert(2, private=True)
    it.convert(0, 3, private=False, flags=KVM_SET_MEMORY_ATTRIBUTES2_ZERO)
    return *map(it.load, range(3)), *map(it.guest, range(3))


def _again(it: InPlace) -> object:
    """Convert pages to what they are."""
    it.store(0, _A)
    it.convert(0, 2, private=False, flags=KVM_SET_MEMORY_ATTRIBUTES2_ZERO)
    shared = it.load(0)
    it.convert(0, 2, private=True)
    it.convert(0, 2, private=True)
    return shared, it.guest(0)


def _two_mappings(it: InPlace) -> object:
    """Load by a mapping that was made while the page was private."""
    it.store(0, _A)
    it.convert(0, private=True)
    second = it.machine.host_reads(it.fd, 0)
    it.convert(0, private=False)
    return second, it.machine.host_reads(it.fd, 0)


def _by_kernel(it: InPlace) -> object:
    """Let the kernel load from the mapping, for write(2) and vmsplice(2)."""
    it.store(0, _A)
    it.convert(0, private=True)
    at = address_of(it.mapping)
    with pipe() as (_, into):
        return tuple(
            outcome(partial(it.steps.call, text, partial(call, into, at, 8)))
            for text, call in (
                ("write(pipe, view, 8)", calls.write_from),
                ("vmsplice(pipe, {view, 8}, 1, 0)", calls.vmsplice),
            )
        )


def _refusal(fields: dict[str, Any], it: InPlace) -> object:
    """Make a call that changes nothing; return its errno, and the pages after it."""
    it.store(0, _A)
    wanted = {"offset": 0, "size": P, **fields}
    answer = outcome(lambda: it.machine.convert(it.fd, **wanted))
    return answer, *map(it.load, range(_FEW))


def _raw(request: int, argument: int | bytes, text: str, it: InPlace) -> object:
    def act() -> None:
        fcntl.ioctl(it.fd, request, argument)

    return outcome(lambda: it.steps.call(text, act))


def _case(
    id_: str,
    does: Callable[[InPlace], object],
    answer: object,
    source: str,
    covers: tuple[str, ...] = (),
    *,
    npages: int = 1,
    flags: int = SHARED,
    here: object = None,
) -> Case:
    """Write a case of a file of some pages. ``here`` is the answer of this project if it differs.

    The kernel's column with flags 3 stands for all, because the cases choose the flags.
    """
    expected = {
        "gmem-shared": answer,
        "gmem": NotApplicable("it chooses the flags; it is run in the column flags=3"),
        "proposal": NotApplicable("the postings have no conversion in place"),
    }
    if here is not None:
        expected["in-place"] = here
    return Case(
        f"in-place-{id_}",
        Family.VM,
        lambda m: does(InPlace(m, npages, flags)),
        expected,
        source,
        covers,
        ("in-place",),
    )


def _selftest(
    id_: str,
    name: str,
    body: Callable[[InPlace], Iterator[Check]],
    covers: str,
    npages: int = 1,
    flags: int = SHARED,
) -> Case:
    """Write a case of the selftest."""
    return _case(
        id_,
        lambda it: all_right(body(it)),
        "as expected",
        f"guest_memfd_conversions_test.c {name}",
        (covers,),
        npages=npages,
        flags=flags,
    )


_SERIES: Final = "guest_memfd: In-place conversion support, v8: "
_CALL: Final = f"{_SERIES}kvm_gmem_set_attributes"
_UNCHANGED: Final = (_A, 0, 0, 0)
_REFUSED: Final[dict[str, tuple[dict[str, Any], int]]] = {
    "flags": ({"flags": 4}, EINVAL),
    "both-modes": (
        {"flags": KVM_SET_MEMORY_ATTRIBUTES2_ZERO | KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE},
        EINVAL,
    ),
    "zero": ({"flags": KVM_SET_MEMORY_ATTRIBUTES2_ZERO}, EOPNOTSUPP),
    "error-offset": ({"error_offset": P}, EINVAL),
    "reserved": ({"reserved": (*(0,) * 10, 1)}, EINVAL),
    "attribute": ({"attributes": 1}, EINVAL),
    "empty": ({"size": 0}, EINVAL),
    "wrap": ({"offset": (1 << 64) - P, "size": 2 * P}, EINVAL),
    "unaligned-offset": ({"offset": 1}, EINVAL),
    "unaligned-size": ({"size": P + 1}, EINVAL),
    "at-end": ({"offset": _FEW * P}, EINVAL),
    "over-end": ({"offset": (_FEW - 1) * P, "size": 2 * P}, EINVAL),
}
_STATE: Final = ("0 SIGBUS 0 SIGBUS",) * 3
_REQUEST: Final = KVM_SET_MEMORY_ATTRIBUTES2.request
_DONE: Final = (None, 0)

CASES: Final = (
    _selftest("init-private", "init_private", _init_private, "IPC-1", flags=PRIVATE),
    _selftest("init-shared", "init_shared", _init_shared, "IPC-2"),
    *(
        _selftest(f"index-{page}", "indexing", partial(_index, page), f"IPC-3.{page}", _FEW)
        for page in range(_FEW)
    ),
    _selftest(
        "untouched-shared",
        "before_allocation_shared",
        lambda it: _to_private(it, 0, 0, _A),
        "IPC-4",
    ),
    _selftest(
        "untouched-private",
        "before_allocation_private",
        lambda it: _to_shared(it, 0, 0, _A, _B),
        "IPC-5",
        flags=PRIVATE,
    ),
    *(
        _selftest(
            f"unallocated-{page}",
            "unallocated_folios",
            partial(_unallocated, page),
            f"IPC-6.{page}",
            _MANY,
        )
        for page in range(_MANY)
    ),
    _selftest("punched", "truncate", _punched, "IPC-7"),
    _selftest("forked", "forked_accesses", _forked, "IPC-8"),
    *(
        _case(
            f"held-{page}",
            partial(_held, page),
            (*((Errno(EAGAIN), page),) * 2, *(_A if each == page else _C for each in range(_FEW))),
            "guest_memfd_conversions_test.c elevated_refcount",
            (f"IPC-9.{page}",),
            npages=_FEW,
            here=(*(_DONE,) * 2, *(_A if each == page else _C for each in range(_FEW))),
        )
        for page in range(_FEW)
    ),
    _case("state", _state, _STATE, f"{_SERIES}attributes of the inode", npages=_FEW),
    _case("mode-none", partial(_kept, 0), (_A, _B), "guest_memfd_conversions_test.c"),
    _case(
        "mode-preserve",
        partial(_kept, KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE),
        (_A, _B),
        _CALL,
    ),
    _case("mode-zero", _zeroed, (0, _A, 0) * 2, _CALL, npages=3),
    _case("again", _again, (_A, _A), _CALL, npages=2),
    _case("two-mappings", _two_mappings, ("SIGBUS", hex(_A)), f"{_SERIES}kvm_gmem_fault"),
    _case("kernel-access", _by_kernel, (Errno(EFAULT),) * 2, f"{_SERIES}kvm_gmem_fault"),
    *(
        _case(
            f"refused-{name}",
            partial(_refusal, fields),
            (Errno(errno), *_UNCHANGED),
            _CALL,
            npages=_FEW,
        )
        for name, (fields, errno) in _REFUSED.items()
    ),
    _case(
        "refused-pointer",
        # 8 is no address of this process.
        partial(_raw, _REQUEST, 8, "ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, 8)"),
        Errno(EFAULT),
        _CALL,
    ),
    _case(
        "other-ioctl",
        partial(_raw, _REQUEST + 1, bytes(128), "ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2 + 1, buf)"),
        Errno(ENOTTY),
        f"{_SERIES}kvm_gmem_ioctl",
    ),
)
