"""Slots with a private half: which files and ranges can be bound, and what may change later."""

import os
from collections.abc import Callable
from errno import EBADF, EEXIST, EINVAL
from typing import Any, Final

from restrictedmem.abi.kvm import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
)
from restrictedmem.abi.memory import memfd_create
from restrictedmem.conformance.case import Case, Family, NotApplicable, Since
from restrictedmem.conformance.cases.rows import unaligned
from restrictedmem.conformance.facts import OVERLAP_IN_FILE, SIGNED_OFFSET
from restrictedmem.conformance.machines import SLOT, Machine
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.units import PAGE_SIZE

P: Final = PAGE_SIZE
MB: Final = 1 << 20
GB: Final = 1 << 30
_FILE: Final = 8 * MB
_PART: Final = 4 * MB
_BAD: Final = Errno(EINVAL)
_PRIVATE: Final = KVM_MEM_GUEST_MEMFD


def bind(
    m: Machine,
    fd: int,
    *,
    gpa: int = GB,
    size: int = _PART,
    offset: int = 0,
    slot: int = SLOT,
    **more: Any,
) -> object:
    """Set a slot with a private half; return the outcome."""
    return outcome(lambda: m.set_region(slot, gpa, size, private=fd, offset=offset, **more))


def _of_new(**more: Any) -> Callable[[Machine], object]:
    """Return an operation that binds a new file."""
    return lambda m: bind(m, m.private_file(_FILE), **more)


def _change(**more: Any) -> Callable[[Machine], object]:
    """Return an operation that binds a file, and then sets the slot once more."""

    def does(m: Machine) -> object:
        fd = m.private_file(_FILE)
        return bind(m, fd), bind(m, fd, **more)

    return does


def _plain_memfd(m: Machine) -> object:
    with memfd_create("plain") as plain:
        os.ftruncate(plain.fileno(), _FILE)
        return bind(m, plain.fileno())


def _of_another_vm(m: Machine) -> object:
    with m.another() as other:
        fd = other.private_file(_FILE)
        return bind(m, fd), bind(other, fd)


def _unaligned_offsets(m: Machine) -> object:
    fd = m.private_file(_FILE)
    offsets = unaligned(by_message=m.by_message)
    with m.steps.summed(f"slots at {len(offsets)} offsets from 1 to {P - 1}"):
        answers = {bind(m, fd, offset=offset) for offset in offsets}
    return *answers, bind(m, fd)


def _overlap_in_file(offset: int, size: int) -> Callable[[Machine], object]:
    """Bind a range of which a part is bound already, at other guest addresses."""

    def does(m: Machine) -> object:
        fd = m.private_file(_FILE)
        bind(m, fd, slot=11, gpa=2 * GB, offset=_PART)
        return bind(m, fd, size=size, offset=offset)

    return does


def _overlap_of_addresses(m: Machine) -> object:
    fd = m.private_file(_FILE)
    bind(m, fd)
    halves = bind(m, fd, slot=11, gpa=2 * GB, offset=_PART)
    m.set_region(SLOT, 0, flags=_PRIVATE, private=-1)
    return (
        halves,
        bind(m, fd, gpa=2 * GB - 2 * MB),
        bind(m, fd, gpa=2 * GB + 2 * MB),
    )


def _again(m: Machine) -> object:
    fd = m.private_file(_FILE)
    found: list[object] = []
    for gpa in (GB, 2 * GB, GB):
        found += [bind(m, fd, gpa=gpa), outcome(m.delete)]
    return tuple(found)


def _deleted_twice(m: Machine) -> object:
    bind(m, m.private_file(_FILE))
    return outcome(m.delete), outcome(m.delete)


def _deleted_with_the_flag(m: Machine) -> object:
    fd = m.private_file(_FILE)
    bind(m, fd)
    return bind(m, -1, gpa=0, size=0), bind(m, fd)


def _deleted_after_its_file(m: Machine) -> object:
    fd = m.private_file(_FILE)
    bind(m, fd)
    m.close_file(fd)
    return outcome(m.delete), bind(m, m.private_file(_FILE))


def _plain_slot_gets_a_file(m: Machine) -> object:
    fd = m.private_file(_FILE)
    m.set_region(SLOT, GB, _PART, shared=0)
    return bind(m, fd, shared=0)


def _without_the_flag(m: Machine) -> object:
    return outcome(lambda: m.set_region(SLOT, GB, MB, shared=0, private=12345, offset=7, flags=0))


def _flag_bits(m: Machine) -> object:
    """Return the bits that go with a private half, apart from its own."""
    taken = 0
    for bit in sorted(set(range(32)) - {2}):
        fd = m.private_file(MB)
        if bind(m, fd, slot=bit, gpa=(bit + 1) * GB, size=MB, flags=_PRIVATE | 1 << bit) is None:
            taken |= 1 << bit
        m.close_file(fd)
    return hex(taken)


_OVERLAP: Final = Since(Errno(EEXIST), _BAD, OVERLAP_IN_FILE)
_BIND = "virt/kvm/guest_memfd.c kvm_gmem_bind"
_REGION = "virt/kvm/kvm_main.c kvm_set_memory_region"
_POSTING = "v10 3/9, kvm_vm_ioctl_set_memory_region"


def _case(id_: str, does: Callable[[Machine], object], gmem: object, **more: Any) -> Case:
    """Return a case whose answers by posting and engine are in ``more``."""
    answers = {
        "gmem": gmem,
        **{name.replace("_", "-"): more.pop(name) for name in _NAMES if name in more},
    }
    return Case(id_, Family.VM, does, answers, more.pop("source", _BIND), **more)


_NAMES: Final = ("proposal", "software", "kernel_engine", "in_place")

_NO_ADDRESS: Final = NotApplicable("the call has no userspace_addr beside a guest_memfd")

CASES: Final = (
    _case(
        "bind",
        _of_new(),
        None,
        proposal=None,
        source="set_memory_region_test.c test_add_private_memory_region",
        covers=("SMR-ADD-last",),
    ),
    _case("bind-no-descriptor", lambda m: bind(m, -1), Errno(EBADF), proposal=_BAD, in_place=_BAD),
    _case(
        "bind-device",
        lambda m: bind(m, m.descriptor("device")),
        _BAD,
        proposal=_BAD,
        covers=("SMR-ADD-1",),
    ),
    _case(
        "bind-vm-descriptor",
        lambda m: bind(m, m.descriptor("vm")),
        _BAD,
        proposal=_BAD,
        covers=("SMR-ADD-2",),
    ),
    _case("bind-memfd", _plain_memfd, _BAD, proposal=_BAD, covers=("SMR-ADD-3",)),
    _case(
        "bind-file-of-another-vm",
        _of_another_vm,
        (_BAD, None),
        proposal=(None, None),
        software=(None, _BAD),
        kernel_engine=(None, _BAD),
        in_place=(None, _BAD),
        divergence="one-vm-a-file",
        covers=("SMR-ADD-4", "SMR-ADD-5"),
    ),
    _case(
        "bind-unaligned-offset",
        _unaligned_offsets,
        (_BAD, None),
        proposal=(_BAD, None),
        covers=("SMR-ADD-6..4100",),
    ),
    _case("bind-negative-offset", _of_new(offset=-P), _BAD, proposal=_BAD),
    _case("bind-offset-at-end", _of_new(offset=_FILE), _BAD, proposal=None),
    _case("bind-range-over-end", _of_new(offset=_PART + P), _BAD, proposal=None),
    _case("bind-size-over-file", _of_new(size=_FILE + P), _BAD, proposal=None),
    _case(
        "bind-offset-overflow",
        _of_new(size=MB, offset=0x7FFF_FFFF_FFF0_0000),
        Since(_BAD, None, SIGNED_OFFSET),
        proposal=None,
        software=_BAD,
        kernel_engine=_BAD,
        divergence="last-offset",
    ),
    _case("bind-unaligned-gpa", _of_new(gpa=GB + 1), _BAD, proposal=_BAD, source=_REGION),
    _case("bind-unaligned-size", _of_new(size=P + 1), _BAD, proposal=_BAD, source=_REGION),
    _case(
        "bind-unaligned-shared",
        _of_new(shared=1),
        _BAD,
        proposal=_BAD,
        in_place=_NO_ADDRESS,
        source=_REGION,
    ),
    _case(
        "bind-shared-of-kernel",
        lambda m: bind(m, m.private_file(_FILE), shared=m.at(0xFFFF_8000_0000_0000)),
        _BAD,
        proposal=_BAD,
        in_place=_NO_ADDRESS,
        source=_REGION,
    ),
    _case("bind-both-halves", _of_new(shared=0), None, proposal=None, source=_REGION),
    _case(
        "bind-log-dirty",
        _of_new(flags=_PRIVATE | KVM_MEM_LOG_DIRTY_PAGES),
        _BAD,
        proposal=None,
        software=_BAD,
        kernel_engine=_BAD,
        divergence="dirty-log",
        source="set_memory_region_test.c test_invalid_memory_region_flags",
        covers=("SMR-FLAGS-G1",),
    ),
    _case(
        "bind-readonly",
        _of_new(flags=_PRIVATE | KVM_MEM_READONLY),
        _BAD,
        proposal=None,
        source="set_memory_region_test.c test_invalid_memory_region_flags",
        covers=("SMR-FLAGS-G2",),
    ),
    _case(
        "bind-flag-bits",
        _flag_bits,
        "0x0",
        proposal="0x3",
        software="0x2",
        kernel_engine="0x2",
        divergence="dirty-log",
        source=_REGION,
    ),
    _case(
        "bind-by-old-call",
        _of_new(shared=0, old=True),
        _BAD,
        proposal=NotApplicable("the postings have one call, with a longer struct"),
        in_place=NotApplicable("this project has one call, for both kinds of private files"),
        source="set_memory_region_test.c test_invalid_memory_region_flags",
        covers=("SMR-FLAGS",),
    ),
    _case("unflagged-private-half-ignored", _without_the_flag, None, proposal=None, source=_REGION),
    _case("rebind-same", _change(), (None, _BAD), proposal=(None, _BAD), source=_REGION),
    _case(
        "rebind-drop-flag",
        _change(flags=0),
        (None, _BAD),
        proposal=(None, None),
        software=(None, _BAD),
        kernel_engine=(None, _BAD),
        divergence="drop-private-flag",
        source=_REGION,
    ),
    _case("rebind-move", _change(gpa=2 * GB), (None, _BAD), proposal=(None, _BAD), source=_REGION),
    _case(
        "rebind-offset", _change(offset=_PART), (None, _BAD), proposal=(None, _BAD), source=_REGION
    ),
    _case(
        "rebind-log-dirty",
        _change(flags=_PRIVATE | KVM_MEM_LOG_DIRTY_PAGES),
        (None, _BAD),
        proposal=(None, _BAD),
        source=_REGION,
    ),
    _case(
        "rebind-readonly",
        _change(flags=_PRIVATE | KVM_MEM_READONLY),
        (None, _BAD),
        proposal=(None, _BAD),
        source=_REGION,
    ),
    _case("bind-plain-slot", _plain_slot_gets_a_file, _BAD, proposal=_BAD, source=_REGION),
    _case(
        "bind-same-addresses",
        _overlap_of_addresses,
        (None, Errno(EEXIST), Errno(EEXIST)),
        proposal=(None, Errno(EEXIST), Errno(EEXIST)),
        source="set_memory_region_test.c test_add_overlapping_private_memory_regions",
        covers=("SMR-OVL-1", "SMR-OVL-2", "SMR-OVL-3", "SMR-OVL-4", "SMR-OVL-5"),
    ),
    *(
        _case(
            f"bind-same-pages-{name}",
            _overlap_in_file(offset, size),
            _OVERLAP,
            proposal=None,
            kernel_engine=_BAD,
            in_place=Errno(EEXIST),
            divergence="overlap",
            covers=covers,
        )
        for name, offset, size, covers in (
            ("half", 2 * MB, _PART, ("SMR-OVL-6",)),
            ("all", _PART, _PART, ("SMR-OVL-7",)),
            ("tail", 6 * MB, 2 * MB, ()),
        )
    ),
    _case("bind-freed-range", _again, (None,) * 6, proposal=(None,) * 6),
    _case("delete-twice", _deleted_twice, (None, _BAD), proposal=(None, _BAD), source=_REGION),
    _case(
        "delete-with-flag",
        _deleted_with_the_flag,
        (None, None),
        proposal=(None, None),
        source="set_memory_region_test.c test_add_overlapping_private_memory_regions",
    ),
    _case("delete-after-file", _deleted_after_its_file, (None, None), proposal=(None, None)),
)
