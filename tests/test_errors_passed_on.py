"""Where one errno leads to another way, every other errno is passed on.

The other way is not taken then.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from errno import (
    EACCES,
    EAGAIN,
    EBADF,
    EFAULT,
    EINVAL,
    EIO,
    ENOENT,
    ENOMEM,
    ENOSPC,
    ENOTCONN,
    EOPNOTSUPP,
    ESTALE,
)
from functools import partial
from typing import Any, Final, NoReturn

import pytest

from outcomes import Errno, outcome
from planting import always, stub
from restrictedmem.abi import memory, pagemap, seccomp
from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.audit import on_processes, reading, syscalls
from restrictedmem.kvm.kernel import slots
from restrictedmem.mm import backing, folios, memfd, pin
from restrictedmem.service import client
from restrictedmem.units import PAGE_SIZE, PageRange, gfn_t, pgoff_t
from restrictedmem.vmm import vm

Fail = Callable[..., NoReturn]
Act = Callable[[pytest.MonkeyPatch, Fail], object]
ONE: Final = PageRange(pgoff_t(0), pgoff_t(1))


def raising(number: int) -> Fail:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(number, "planted")

    return refuse


def map_pages(_: pytest.MonkeyPatch, refuse: Fail) -> object:
    file = stub(charge=always(None), hugepage=False, allocate=always(None))
    backing.MappedBacking(file, stub(madvise=refuse), 0).allocate(0, PAGE_SIZE)
    return "other"


def find_large_folios(patch: pytest.MonkeyPatch, refuse: Fail) -> object:
    patch.setattr(pagemap, "runs", refuse)
    patch.setattr(folios, "is_present", always(True))
    patch.setattr(folios, "_large_by_smaps", always([]))
    with memory.memfd_create("looked at") as fd:
        return "other" if folios._large(fd.fileno(), 0, folios.BLOCK) == set() else None


def collapse(_: pytest.MonkeyPatch, refuse: Fail) -> object:
    tries = list[int]()

    def madvise(*_: object) -> None:
        tries.append(1)
        if len(tries) == 1:
            refuse()

    folios._collapse(stub(madvise=madvise), 0)
    return "other"


def charge(_: pytest.MonkeyPatch, refuse: Fail) -> object:
    file = stub(limit=PAGE_SIZE, base_order=0, resident=lambda: PAGE_SIZE, _held_of=refuse)
    try:
        memfd.InMemfd.charge(file, 0, PAGE_SIZE)
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        return "other"
    return None


def pin_a_block(_: pytest.MonkeyPatch, refuse: Fail) -> object:
    takes = iter([refuse, always(None)])

    def take(*_: object) -> None:
        next(takes)()

    file = stub(
        _runs={},
        _window=PageRange(pgoff_t(0), pgoff_t(4)),
        _is_invalidated=always(False),
        _take=take,
    )
    pin.PinnedBacking._allocate_block(file, 0, ONE)
    return "other"


def make_a_memfd(patch: pytest.MonkeyPatch, refuse: Fail) -> object:
    def create(_: str, flags: int) -> int:
        return refuse() if flags & memory.MFD_NOEXEC_SEAL else 1 << 20

    patch.setattr(os, "memfd_create", create)
    return "other" if memory.memfd_create("made").detach() == 1 << 20 else None


def ask_for_an_action(patch: pytest.MonkeyPatch, refuse: Fail) -> object:
    patch.setattr(seccomp, "_seccomp", refuse)
    return None if seccomp.action_available(0) else "other"


def ask_for_flags(patch: pytest.MonkeyPatch, refuse: Fail) -> object:
    patch.setattr(seccomp, "_seccomp", refuse)
    return None if seccomp.flags_known(seccomp.FilterFlag.NEW_LISTENER) else "other"


def run_in_turn(patch: pytest.MonkeyPatch, refuse: Fail) -> object:
    patch.setattr(seccomp, "SECCOMP_IOCTL_NOTIF_SET_FLAGS", refuse)
    seccomp.wake_up_synchronously(stub())
    return "other"


def guard(_: pytest.MonkeyPatch, refuse: Fail) -> object:
    slot: Any = stub(base_gfn=0, shared=stub(mapping=stub(madvise=refuse)))
    slots._hide(slot, gfn_t(0), gfn_t(1))
    return "other"


def read_a_process(patch: pytest.MonkeyPatch, refuse: Fail) -> object:
    patch.setattr(syscalls, "process_vm_readv", refuse)
    patch.setattr(reading, "regions", always([]))
    return "other" if list(reading.by_process_vm_readv(1)) == [] else None


def try_each(_: pytest.MonkeyPatch, refuse: Fail) -> object:
    """A missing way says less than a refusal before it."""
    with suppress(PermissionError):
        list(on_processes._each([raising(EACCES), refuse]))
        return None
    return "other"


def name_a_file(_: pytest.MonkeyPatch, refuse: Fail) -> object:
    calls = iter([refuse, always(None)])

    def set_region(*_: object) -> None:
        next(calls)()

    some = stub(_shown=[], _set_region=set_region)
    vm.Vm.set_user_memory_region(some, slot=0, guest_phys_addr=0, memory_size=0)
    return "other"


def call_again(_: pytest.MonkeyPatch, refuse: Fail) -> object:
    calls = iter([stub(call=refuse, fileno=lambda: -1), stub(call=always("other"))])
    return client.Service._call(stub(_own_channel=lambda: next(calls)), stub())


#: Who asks, and the errnos that mean another way.
PLACES: Final[dict[str, tuple[Act, set[int]]]] = {
    "MADV_POPULATE_WRITE": (map_pages, {EINVAL, EFAULT}),
    "PAGEMAP_SCAN": (find_large_folios, {EACCES}),
    "MADV_COLLAPSE": (collapse, {EAGAIN}),
    "cachestat": (charge, set(folios.NOT_TOLD)),
    "a block's pin": (pin_a_block, {ENOSPC}),
    "MFD_NOEXEC_SEAL": (make_a_memfd, {EINVAL}),
    "GET_ACTION_AVAIL": (ask_for_an_action, {EOPNOTSUPP}),
    "filter flags": (ask_for_flags, {EINVAL}),
    "NOTIF_SET_FLAGS": (run_in_turn, {EINVAL}),
    "MADV_GUARD_INSTALL": (guard, {EINVAL}),
    "process_vm_readv": (read_a_process, {EFAULT}),
    "each descriptor": (try_each, {EBADF, ENOENT}),
    "a file's name": (name_a_file, {ESTALE}),
    "a closed connection": (call_again, {ENOTCONN}),
}
#: Errnos that are neither: EFAULT says that flags are known, EACCES was an earlier refusal, ENOSPC
#: is the limit.
ACCEPTED: Final = {("filter flags", EFAULT), ("each descriptor", EACCES), ("cachestat", ENOSPC)}
#: Errnos of which most mean nothing to any of them.
ALL: Final = {
    EIO,
    EACCES,
    EAGAIN,
    EBADF,
    EFAULT,
    EINVAL,
    ENOENT,
    ENOMEM,
    ENOSPC,
    ENOTCONN,
    EOPNOTSUPP,
    ESTALE,
}


@pytest.mark.parametrize("name", PLACES)
def test_no_other_errno_means_another_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, other_way = PLACES[name]
    for number in ALL | other_way:
        if (name, number) in ACCEPTED:
            continue
        with monkeypatch.context() as patch:
            found = outcome(partial(act, patch, raising(number)))
        wanted = "other" if number in other_way else Errno(number)
        assert found == wanted, Errno(number)


@pytest.mark.parametrize(
    ("number", "found"),
    [(EFAULT, False), (EHWPOISON, True), (EINVAL, Errno(EINVAL)), (ENOMEM, Errno(ENOMEM))],
)
def test_a_page_that_the_machine_has_lost_is_there(number: int, found: object) -> None:
    mapping: Any = stub(madvise=raising(number))
    assert outcome(lambda: folios.is_present(mapping, 0)) == found
