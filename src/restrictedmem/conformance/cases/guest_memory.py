"""The content of a private file for its guest and for its owner."""

from errno import ENODEV
from typing import Final

from restrictedmem.abi.kvm import KVM_MEM_LOG_DIRTY_PAGES
from restrictedmem.conformance.case import Case, Family, NotApplicable
from restrictedmem.conformance.machines import DATA, Machine
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.devkvm import address_of
from restrictedmem.units import PAGE_SIZE

P: Final = PAGE_SIZE
_SECRET: Final = 0x1234_5678_9ABC_DEF0


def _seen_by_both(m: Machine) -> object:
    """Fill a page as the owner, then as the guest; each finds what the other wrote."""
    fd = m.private_file(P)
    m.set_region(1, size=P, private=fd)
    m.host_fill_file(fd, 0xAA)
    guest = m.sees(DATA, P)
    m.fill(DATA, P, 0xFF)
    return guest, m.host_sees_file(fd)


def _secret(m: Machine) -> object:
    """Let the guest keep a word, and the owner look for it."""
    fd = m.private_file(4 * P)
    m.set_region(size=4 * P, private=fd)
    m.make_private(DATA, 4 * P)
    m.store(_SECRET, DATA + P)
    return m.load(DATA + P), outcome(lambda: m.host_reads(fd, P))


def _taken(m: Machine) -> object:
    """Let the guest touch one page of a file; return the pages that the file then has."""
    fd = m.private_file(64 * P)
    m.set_region(size=64 * P, private=fd)
    m.make_private(DATA, 64 * P)
    m.store(7, DATA + 20 * P)
    return m.held(fd)


def _freed(m: Machine) -> object:
    fd = m.private_file(4 * P)
    m.set_region(size=4 * P, private=fd)
    m.make_private(DATA, 4 * P)
    m.fill(DATA, 4 * P, 7)
    held = m.held(fd)
    m.punch(fd, P, P)
    return held, m.held(fd), m.load(DATA + P), m.held(fd), m.sees(DATA + 2 * P, 2 * P)


def _allocated(m: Machine) -> object:
    """Let the guest use pages that the owner has allocated."""
    fd = m.private_file(4 * P)
    m.allocate(fd, 0, 2 * P)
    m.set_region(size=4 * P, private=fd)
    m.make_private(DATA, 4 * P)
    return m.held(fd), m.sees(DATA, 2 * P)


def _kept_over_slots(m: Machine) -> object:
    """Delete the slot and show the file elsewhere; the content is the file's."""
    fd = m.private_file(P)
    m.set_region(size=P, private=fd)
    m.make_private(DATA, 2 * P)
    m.store(5)
    m.delete()
    m.set_region(gpa=DATA + P, size=P, private=fd)
    return m.load(DATA + P)


def _logged_alias(m: Machine) -> object:
    """Show the owner's mapping of the file in a second slot, with dirty logging."""
    fd = m.private_file(4 * P)
    m.set_region(11, size=4 * P, private=fd)
    view = m.view(fd)
    place = m.at(address_of(view))
    m.set_region(12, DATA + 4 * P, 4 * P, shared=place, flags=KVM_MEM_LOG_DIRTY_PAGES)
    m.store(0xABCD, DATA + P)
    return m.load(DATA + 5 * P)


_GUEST: Final = "guest_memfd_test.c test_guest_memfd_guest"
_REACHED: Final = ("private-memory",)
_NO_VIEW: Final = NotApplicable("the owner cannot map a restricted descriptor")
_NO_LOG: Final = NotApplicable("the engine has no dirty log, and no slot of a FUSE file alone")
_FREED: Final = (4, 3, 0, 4, "0x7")

CASES: Final = (
    Case(
        "guest-and-host",
        Family.VM,
        _seen_by_both,
        {"gmem": ("0xaa", "0xff"), "proposal": _NO_VIEW},
        _GUEST,
        (
            "GM-GUEST-1",
            "GM-GUEST-2",
            "GM-GUEST-3",
            "GM-GUEST-4",
            "GM-GUEST-5",
            "GM-GUEST-6",
            "GM-GUEST-7",
        ),
        ("mapping",),
    ),
    Case(
        "guest-keeps-secret",
        Family.VM,
        _secret,
        {
            "gmem-shared": (_SECRET, hex(_SECRET)),
            "gmem-mapped": (_SECRET, "SIGBUS"),
            "gmem-unmapped": (_SECRET, Errno(ENODEV)),
            "proposal": (_SECRET, Errno(ENODEV)),
        },
        "virt/kvm/guest_memfd.c kvm_gmem_mmap, kvm_gmem_fault_user_mapping; v10 1/9",
        needs=_REACHED,
    ),
    Case(
        "guest-takes-page",
        Family.VM,
        _taken,
        {"gmem": 1, "proposal": 1, "software": 16, "in-place": 16, "kernel-engine": 0},
        "virt/kvm/guest_memfd.c kvm_gmem_get_pfn; v10 1/9",
        needs=_REACHED,
        divergence="fault-around",
    ),
    Case(
        "guest-page-punched",
        Family.VM,
        _freed,
        {"gmem": _FREED, "proposal": _FREED, "kernel-engine": (0, 0, 0, 0, "0x7")},
        "virt/kvm/guest_memfd.c kvm_gmem_punch_hole; v10 1/9",
        needs=_REACHED,
        divergence="blocks",
    ),
    Case(
        "guest-uses-allocated",
        Family.VM,
        _allocated,
        {"gmem": (2, "0x0"), "in-place": (0, "0x0"), "proposal": (2, "0x0")},
        "virt/kvm/guest_memfd.c kvm_gmem_allocate; v10 1/9",
        needs=_REACHED,
    ),
    Case(
        "guest-memory-outlives-slot",
        Family.VM,
        _kept_over_slots,
        {"gmem": 5, "proposal": 5},
        "virt/kvm/guest_memfd.c kvm_gmem_unbind; v10 3/9",
        needs=_REACHED,
    ),
    Case(
        "guest-logged-alias",
        Family.VM,
        _logged_alias,
        {"gmem": 0xABCD, "in-place": _NO_LOG, "proposal": _NO_VIEW},
        "virt/kvm/kvm_main.c kvm_set_memory_region",
        needs=("mapping",),
    ),
)
