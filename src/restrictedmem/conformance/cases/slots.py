"""Slots without a private half: what can be made, moved and deleted, and what a guest sees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from errno import EEXIST, EINVAL, EIO
from functools import partial
from typing import Final

from restrictedmem.abi import kvm
from restrictedmem.conformance.case import Case, Family
from restrictedmem.conformance.machines import DATA, Machine
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.units import PAGE_SIZE

P: Final = PAGE_SIZE
MB: Final = 1 << 20
GB: Final = 1 << 30
_BAD: Final = Errno(EINVAL)
#: Of so many numbers, a slot has one.
_EACH: Final = 257
_TAKEN: Final = Errno(EEXIST)


@dataclass(frozen=True, slots=True)
class _Region:
    """One request for a slot; ``shared`` is its place in the owner's memory."""

    slot: int = 0
    gpa: int = GB
    size: int = MB
    shared: int = 0
    flags: int = 0

    def put_to(self, m: Machine) -> object:
        """Make the request; return the outcome."""
        return outcome(
            partial(
                m.set_region, self.slot, self.gpa, self.size, shared=self.shared, flags=self.flags
            )
        )


_FIRST: Final = _Region()
_READONLY: Final = replace(_FIRST, flags=kvm.KVM_MEM_READONLY)
_LOGGED: Final = replace(_FIRST, flags=kvm.KVM_MEM_LOG_DIRTY_PAGES)
_SECOND: Final = _Region(slot=1, gpa=GB + 2 * MB, shared=2 * MB)
_GONE: Final = replace(_FIRST, size=0)

#: Requests in a row, and the kernel's answers. This project's engines give the same.
_SEQUENCES: Final[dict[str, tuple[list[_Region], list[object]]]] = {
    "same-again": ([_FIRST, _FIRST], [None, None]),
    "move": ([_FIRST, replace(_FIRST, gpa=GB + MB), _FIRST], [None] * 3),
    "move-onto-itself": (
        [_FIRST, replace(_FIRST, gpa=GB + P), replace(_FIRST, gpa=GB - P)],
        [None] * 3,
    ),
    "move-onto-another": (
        [_FIRST, _SECOND, replace(_FIRST, gpa=GB + 2 * MB - P), replace(_FIRST, gpa=GB + MB)],
        [None, None, _TAKEN, None],
    ),
    "move-and-resize": ([_FIRST, replace(_FIRST, gpa=GB + MB, size=2 * MB)], [None, _BAD]),
    "resize": (
        [_FIRST, replace(_FIRST, size=MB - P), replace(_FIRST, size=MB + P)],
        [None, _BAD, _BAD],
    ),
    "other-memory": ([_FIRST, replace(_FIRST, shared=P)], [None, _BAD]),
    "other-memory-moved": ([_FIRST, replace(_FIRST, shared=P, gpa=GB + MB)], [None, _BAD]),
    "make-readonly": ([_FIRST, _READONLY], [None, _BAD]),
    "make-writable": ([_READONLY, _FIRST], [None, _BAD]),
    "move-and-make-readonly": ([_FIRST, replace(_READONLY, gpa=GB + MB)], [None, _BAD]),
    "move-readonly": ([_READONLY, replace(_READONLY, gpa=GB + MB)], [None, None]),
    "delete-again": ([_FIRST, _GONE, _GONE], [None, None, _BAD]),
    "delete-nothing": ([_GONE], [_BAD]),
    "delete-other-address": ([_FIRST, replace(_GONE, gpa=0x123000, shared=P)], [None, None]),
    "delete-unaligned-address": ([_FIRST, replace(_GONE, gpa=1), _FIRST], [None, _BAD, None]),
    "delete-with-flags": (
        [_FIRST, replace(_GONE, flags=kvm.KVM_MEM_READONLY), _FIRST],
        [None, None, None],
    ),
    "delete-and-make": (
        [_FIRST, _GONE, replace(_FIRST, gpa=GB + MB, size=2 * MB)],
        [None, None, None],
    ),
    "overlap": (
        [_FIRST, replace(_SECOND, gpa=GB + MB - P), replace(_SECOND, gpa=GB + MB)],
        [None, _TAKEN, None],
    ),
    "inside-another": ([_FIRST, replace(_SECOND, gpa=GB + P, size=P)], [None, _TAKEN]),
    "unaligned": (
        [
            replace(_FIRST, gpa=GB + 1),
            replace(_FIRST, size=MB + 1),
            replace(_FIRST, shared=1),
        ],
        [_BAD] * 3,
    ),
    "wraps": (
        [
            replace(_FIRST, gpa=(1 << 64) - MB),
            replace(_FIRST, gpa=(1 << 64) - P),
            replace(_FIRST, gpa=1 << 60),
        ],
        [_BAD] * 3,
    ),
    "number": (
        [
            replace(_FIRST, slot=32763),
            replace(_SECOND, slot=32764),
            replace(_SECOND, slot=0xFFFF),
        ],
        [None, _BAD, _BAD],
    ),
    "too-large": ([replace(_FIRST, gpa=0, size=(1 << 31) * P)], [_BAD]),
}


def _unless_engine(answer: object) -> dict[str, object]:
    """Return the same answer of both engines, where it is not that of the postings."""
    return {"software": answer, "kernel-engine": answer, "in-place": answer}


def _sequence(regions: Sequence[_Region]) -> Callable[[Machine], object]:
    return lambda m: tuple(region.put_to(m) for region in regions)


def _flag_bits(m: Machine) -> object:
    """Return the flags that a plain slot may have."""
    taken = [
        bit
        for bit in range(32)
        if _Region(slot=bit, gpa=(bit + 1) * GB, flags=1 << bit).put_to(m) is None
    ]
    return hex(sum(1 << bit for bit in taken))


def _to_the_last_number(m: Machine) -> object:
    """Make slots up to the last number, and one more; all of them would take a quarter minute."""
    most = m.check_extension(kvm.Cap.NR_MEMSLOTS)
    # A line for each slot would tell nobody anything.
    with m.steps.summed(f"slots of a page, each {_EACH}th number, {most - 1}, and {most}"):
        numbers = [*range(0, most - 1, _EACH), most - 1]
        made = {_Region(slot, (slot + 1) * 2 * MB, P).put_to(m) for slot in numbers}
        return most > 0, *made, _Region(most, 1 << 40, P).put_to(m)


def _seen_by_the_guest(m: Machine) -> object:
    m.set_region(size=P, shared=0)
    m.store(1)
    # Moved: the old address is no memory any more, the new one has the same content.
    m.set_region(gpa=DATA + P, size=P, shared=0)
    moved = m.load(DATA + P), m.load(DATA)
    m.delete()
    return *moved, m.load(DATA + P)


def _read_only(m: Machine) -> object:
    m.host_fill(0, P, 9)
    m.set_region(size=P, shared=0, flags=kvm.KVM_MEM_READONLY)
    return m.sees(DATA, P), m.store(5), m.host_sees(0, P)


def _deleted_under_a_guest(m: Machine) -> object:
    found: set[object] = set()
    for _ in range(10):
        m.host_fill(0, P, 0)
        m.set_region(size=P, shared=0)
        with m.waiting(0) as end:
            m.delete()
            found |= {end(), m.go_on(3)}
    return tuple(sorted(found, key=str))


def _moved_under_a_guest(m: Machine) -> object:
    """Move a slot by a page and back while a guest waits for the content of its first page."""
    m.host_fill(0, 2 * P, 1)
    m.set_region(size=2 * P, shared=0)
    word = int.from_bytes(b"\1" * 8, "little")
    # Between two slots the guest reads from a device, and is told to go on waiting.
    with m.waiting(word, answer=word) as end:
        for _ in range(10):
            m.set_region(gpa=DATA - P, size=2 * P, shared=0)
            # The guest's address is the second page now: it must never see this.
            m.memory[0] = 2
            m.memory[0] = 1
            m.set_region(size=2 * P, shared=0)
        m.memory[0:8] = (3).to_bytes(8, "little")
        return end()


def _last_slot_deleted(m: Machine) -> object:
    """Delete the slot with the guest's code under the guest."""
    with m.spinning() as end:
        m.delete_guest()
        found = end()
    return "stopped" if found in _STOPPED else found


#: How a guest ends that has lost its code, or with it the page tables that lead to it.
_STOPPED: Final = (
    "SHUTDOWN",
    "INTERNAL_ERROR 1",
    "EXCEPTION 14",
    "MEMORY_FAULT flags=0x0 gpa=0x10000000 size=0x1000",
)
_TEST: Final = "set_memory_region_test.c "
_MMIO: Final = f"MMIO read 8 at {DATA:#x}"
_FAULT: Final = f"MEMORY_FAULT flags=0x0 gpa={DATA:#x} size=0x1000"
_LATER: Final = DATA + P

CASES: Final = (
    *(
        Case(
            f"slot-{name}",
            Family.VM,
            _sequence(regions),
            {"gmem": tuple(answers), "proposal": tuple(answers)},
            source="virt/kvm/kvm_main.c kvm_set_memory_region",
        )
        for name, (regions, answers) in _SEQUENCES.items()
    ),
    Case(
        "slot-log-dirty",
        Family.VM,
        _sequence([_LOGGED, _FIRST, _LOGGED]),
        {"gmem": (None,) * 3, "proposal": (None,) * 3, **_unless_engine((_BAD, None, _BAD))},
        source="virt/kvm/kvm_main.c kvm_set_memory_region",
        divergence="dirty-log",
    ),
    Case(
        "slot-flag-bits",
        Family.VM,
        _flag_bits,
        {"gmem": "0x3", "proposal": "0x3", **_unless_engine("0x2")},
        source=_TEST + "test_invalid_memory_region_flags",
        covers=("SMR-FLAGS",),
        divergence="dirty-log",
    ),
    Case(
        "slot-last-number",
        Family.VM,
        _to_the_last_number,
        {"gmem": (True, None, _BAD), "proposal": (True, None, _BAD)},
        source=_TEST + "test_add_max_memory_regions",
        covers=("SMR-MAX-1", "SMR-MAX-3"),
    ),
    Case(
        "slot-from-another-process",
        Family.VM,
        lambda m: m.steps.in_child(lambda: m.set_region(size=P, shared=0)),
        {"gmem": Errno(EIO), "proposal": Errno(EIO), **_unless_engine(None)},
        source="Documentation/virt/kvm/api.rst, VM ioctls",
        divergence="other-process",
    ),
    Case(
        "slot-none",
        Family.VM,
        lambda m: m.run_bare(),
        {
            "gmem": "INTERNAL_ERROR 1",
            "proposal": "INTERNAL_ERROR 1",
            "software": "SHUTDOWN",
            "in-place": "SHUTDOWN",
            "kernel-engine": "MEMORY_FAULT flags=0x0 gpa=0x0 size=0x1000",
        },
        source=_TEST + "test_zero_memory_regions",
        divergence="no-slots",
        covers=("SMR-ZERO-1",),
    ),
    Case(
        "guest-sees-slots",
        Family.VM,
        _seen_by_the_guest,
        {
            "gmem": (1, _MMIO, f"MMIO read 8 at {_LATER:#x}"),
            "proposal": (1, _MMIO, f"MMIO read 8 at {_LATER:#x}"),
            "kernel-engine": (1, _FAULT, _FAULT.replace(hex(DATA), hex(_LATER))),
        },
        divergence="mmio",
        source=_TEST + "test_move_memory_region",
    ),
    Case(
        "guest-writes-readonly",
        Family.VM,
        _read_only,
        {
            "gmem": ("0x9", f"MMIO write 8 at {DATA:#x}: 0x5", "0x9"),
            "proposal": ("0x9", f"MMIO write 8 at {DATA:#x}: 0x5", "0x9"),
            "kernel-engine": ("0x9", f"{_FAULT} EACCES", "0x9"),
        },
        divergence="readonly-store",
        source="Documentation/virt/kvm/api.rst KVM_MEM_READONLY",
    ),
    Case(
        "delete-under-guest",
        Family.VM,
        _deleted_under_a_guest,
        {"gmem": (3, _MMIO), "proposal": (3, _MMIO), "kernel-engine": (_FAULT,)},
        divergence="mmio",
        source=_TEST + "test_delete_memory_region",
        covers=("SMR-DEL",),
    ),
    Case(
        "move-under-guest",
        Family.VM,
        _moved_under_a_guest,
        {"gmem": 3, "proposal": 3},
        source=_TEST + "test_move_memory_region",
        covers=("SMR-MOVE",),
    ),
    Case(
        "delete-last-under-guest",
        Family.VM,
        _last_slot_deleted,
        {"gmem": "stopped", "proposal": "stopped"},
        source=_TEST + "test_delete_memory_region",
        covers=("SMR-DEL",),
    ),
)
