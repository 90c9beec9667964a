"""Memory attributes of a VM: which calls are refused, and which half of a slot a guest reaches."""

from collections.abc import Callable
from errno import EINVAL, ENOTTY
from typing import Final

from restrictedmem.abi import kvm
from restrictedmem.conformance.case import Case, Family, NotApplicable
from restrictedmem.conformance.machines import DATA, PRIVATE, Machine
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.units import PAGE_SIZE

P: Final = PAGE_SIZE
MB: Final = 1 << 20
GB: Final = 1 << 30
_BAD: Final = Errno(EINVAL)
_NO_ARGUMENT: Final = NotApplicable("the call of v9 has no such argument")


def _set(
    gpa: int, size: int, attributes: int = PRIVATE, flags: int = 0
) -> Callable[[Machine], object]:
    return lambda m: outcome(lambda: m.set_attributes(gpa, size, attributes, flags))


def _set_and_again(m: Machine) -> object:
    return tuple(_set(GB, MB, attributes)(m) for attributes in (PRIVATE, PRIVATE, 0, 0))


def _unknown_bits(m: Machine) -> object:
    bits = set(range(64)) - {3}
    return tuple({_set(GB, MB, 1 << bit)(m) for bit in bits})


def _without_the_capability(m: Machine) -> object:
    # A kernel that has the call for other types of VMs answers EINVAL.
    answer = _set(GB, MB)(m)
    return "refused" if answer in (Errno(ENOTTY), _BAD) else answer


def _both_halves(m: Machine, size: int = 4 * P) -> int:
    """Make a slot with both halves at ``DATA``; return the private file."""
    fd = m.private_file(size)
    m.set_region(size=size, shared=0, private=fd)
    return fd


def _at_first(m: Machine) -> object:
    """Say which half a guest reaches before anybody has set an attribute."""
    _both_halves(m)
    m.store(0x5A)
    return "shared" if m.memory[0] else "private" if m.load() == 0x5A else "neither"


def _chosen_half(m: Machine) -> object:
    """Convert a page back and forth; no conversion moves content or frees it."""
    _both_halves(m)
    m.set_attributes(DATA, P, 0)
    m.fill(DATA, P, 1)
    m.set_attributes(DATA, P)
    fresh = m.sees(DATA, P)
    m.fill(DATA, P, 2)
    m.set_attributes(DATA, P, 0)
    shared = m.sees(DATA, P), m.host_sees(0, P)
    m.set_attributes(DATA, P)
    return fresh, *shared, m.sees(DATA, P)


def _one_page(m: Machine) -> object:
    _both_halves(m)
    m.set_attributes(DATA, 4 * P, 0)
    m.set_attributes(DATA + P, P)
    m.fill(DATA, 4 * P, 7)
    return m.host_sees(0, P), m.host_sees(P, P), m.host_sees(2 * P, 2 * P), m.sees(DATA, 4 * P)


def _before_the_slot(m: Machine) -> object:
    m.set_attributes(DATA, P)
    m.set_attributes(DATA + P, P, 0)
    _both_halves(m)
    m.fill(DATA, 2 * P, 7)
    return m.host_sees(0, P), m.host_sees(P, P)


def _after_the_slot(m: Machine) -> object:
    fd = _both_halves(m)
    m.set_attributes(DATA, P)
    m.set_attributes(DATA + P, P, 0)
    m.delete()
    m.set_region(size=4 * P, shared=0, private=fd)
    m.fill(DATA, 2 * P, 7)
    return m.host_sees(0, P), m.host_sees(P, P)


def _without_private_half(m: Machine) -> object:
    """Make a page private whose slot has no private half, and shared again after the fault."""
    m.host_fill(0, P, 9)
    m.set_region(size=P, shared=0)
    m.set_attributes(DATA, P)
    found = m.sees(DATA, P)
    m.set_attributes(DATA, P, 0)
    return found, m.go_on()


def _without_shared_half(m: Machine) -> object:
    m.set_region(size=P, private=m.private_file(P))
    m.set_attributes(DATA, P, 0)
    found = m.load()
    m.set_attributes(DATA, P)
    return found, m.go_on()


def _without_slot(m: Machine) -> object:
    m.set_attributes(DATA, P)
    return m.load()


_FAULT: Final = f"MEMORY_FAULT flags={{}} gpa={DATA:#x} size=0x1000"
_PRIVATE_FAULT: Final = _FAULT.format("0x8")
_SHARED_FAULT: Final = _FAULT.format("0x0")
_MMIO: Final = f"MMIO read 8 at {DATA:#x}"
_CALL: Final = "virt/kvm/kvm_main.c kvm_vm_ioctl_set_mem_attributes; v10 2/9; v9 5/8"
_API: Final = "Documentation/virt/kvm/api.rst KVM_SET_MEMORY_ATTRIBUTES; v10 2/9; v9 5/8"
_BOTH: Final = ("halves",)


def _refused(id_: str, does: Callable[[Machine], object], **answers: object) -> Case:
    expected = {"gmem": _BAD, "proposal": _BAD, **answers}
    return Case(id_, Family.VM, does, expected, _CALL, needs=("attributes",))


def _same(id_: str, does: Callable[[Machine], object], answer: object) -> Case:
    return Case(id_, Family.VM, does, {"gmem": answer, "proposal": answer}, _API, needs=_BOTH)


CASES: Final = (
    Case(
        "attributes-supported",
        Family.VM,
        lambda m: m.check_extension(kvm.Cap.MEMORY_ATTRIBUTES),
        {"gmem-attributes": PRIVATE, "gmem": 0, "v10": PRIVATE, "v9": 0, "in-place": PRIVATE},
        _API,
    ),
    Case(
        "attributes-without-capability",
        Family.VM,
        _without_the_capability,
        {
            "gmem-attributes": NotApplicable("the VM has the capability"),
            "gmem": "refused",
            **dict.fromkeys(("proposal", "in-place"), NotApplicable("the VM has the capability")),
        },
        _CALL,
    ),
    Case(
        "attributes-set",
        Family.VM,
        _set_and_again,
        {"gmem": (None,) * 4, "proposal": (None,) * 4},
        _CALL,
        needs=("attributes",),
    ),
    _refused("attributes-flags", _set(GB, MB, PRIVATE, 1), v9=_NO_ARGUMENT),
    _refused("attributes-unknown-bits", _unknown_bits, v9=_NO_ARGUMENT),
    _refused("attributes-empty", _set(GB, 0)),
    _refused("attributes-unaligned-gpa", _set(GB + 1, MB)),
    _refused("attributes-unaligned-size", _set(GB, MB + 1)),
    _refused("attributes-wrap", _set((1 << 64) - P, 2 * P)),
    _refused("attributes-wrap-to-zero", _set((1 << 64) - P, P)),
    Case(
        "attributes-at-first",
        Family.VM,
        _at_first,
        {
            "gmem-attributes-mapped": "private",
            "gmem-attributes": "shared",
            "gmem-mapped": "private",
            "gmem-unmapped": "shared",
            "v9": "private",
            "v10": "shared",
        },
        _API,
    ),
    _same("attributes-choose-half", _chosen_half, ("0x0", "0x1", "0x1", "0x2")),
    _same("attributes-of-one-page", _one_page, ("0x7", "0x0", "0x7", "0x7")),
    _same("attributes-before-slot", _before_the_slot, ("0x0", "0x7")),
    _same("attributes-after-slot", _after_the_slot, ("0x0", "0x7")),
    Case(
        "private-without-file",
        Family.VM,
        _without_private_half,
        {
            "gmem-attributes": (_PRIVATE_FAULT, "0x9"),
            "v10": (_PRIVATE_FAULT, "0x9"),
            # v9 looked at attributes only where the slot has a private half.
            "v9": ("0x9", "0x9"),
        },
        "private_mem_kvm_exits_test.c test_private_access_memslot_not_private",
        ("PME-2",),
        ("attributes",),
    ),
    Case(
        "shared-without-memory",
        Family.VM,
        _without_shared_half,
        {"gmem-attributes": ("EFAULT", 0), "proposal": (_SHARED_FAULT, 0)},
        _API,
        needs=_BOTH,
    ),
    Case(
        "private-without-slot",
        Family.VM,
        _without_slot,
        {
            "gmem-attributes": _PRIVATE_FAULT,
            "v10": _PRIVATE_FAULT,
            "kernel-engine/v9": _SHARED_FAULT,
            "v9": _MMIO,
        },
        "private_mem_kvm_exits_test.c test_private_access_memslot_deleted",
        needs=("attributes",),
        divergence="mmio",
    ),
)
