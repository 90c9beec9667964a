"""Exits of a guest: accesses that no memory serves, in the words of KVM_RUN."""

from typing import Final

from restrictedmem.conformance.case import Case, Family, NotApplicable
from restrictedmem.conformance.machines import DATA, Machine
from restrictedmem.units import PAGE_SIZE

P: Final = PAGE_SIZE


def _private_slot(m: Machine) -> int:
    """Make a slot of four pages whose private half the guest reaches; return the file."""
    fd = m.private_file(4 * P)
    m.set_region(size=4 * P, private=fd)
    m.make_private(DATA, 4 * P)
    return fd


def _deleted_under_a_guest(m: Machine) -> object:
    _private_slot(m)
    with m.waiting(0) as end:
        m.delete()
        return end()


def _deleted(m: Machine) -> object:
    _private_slot(m)
    m.store(7)
    m.delete()
    return m.load()


def _closed(m: Machine) -> object:
    """Close the last descriptor of a bound file; what the slot shows is gone or is not."""
    fd = _private_slot(m)
    m.store(7)
    m.close_file(fd)
    return m.load(DATA + P + 8)


def _closed_and_deleted(m: Machine) -> object:
    fd = _private_slot(m)
    m.close_file(fd)
    m.delete()
    m.set_region(size=P, shared=0)
    m.make_shared(DATA, P)
    m.host_fill(0, P, 3)
    return m.sees(DATA, P)


def _no_half(m: Machine) -> object:
    """Let a guest load from a slot that has a private half and no shared one."""
    m.set_region(size=P, private=m.private_file(P))
    return m.load()


def _unmapped(m: Machine) -> object:
    """Show the second page of the address space, where no process has memory."""
    m.set_region(size=P, shared=m.at(P))
    return m.load()


def _mmio(m: Machine) -> object:
    return m.load(DATA + 8), m.go_on(0x0807_0605_0403_0201), m.store(0xBEEF), m.go_on()


def _hypercall(m: Machine) -> object:
    return m.map_gpa_range(DATA, 2, 1 << 4), m.go_on(0), m.map_gpa_range(DATA, 1, 0), m.go_on(5)


_FAULT: Final = "MEMORY_FAULT flags={} gpa={:#x} size=0x1000"
_SHARED_FAULT: Final = _FAULT.format("0x0", DATA)
_PRIVATE_FAULT: Final = _FAULT.format("0x8", DATA)
_MMIO: Final = f"MMIO read 8 at {DATA:#x}"
_MMIO_CALLS: Final = (
    f"MMIO read 8 at {DATA + 8:#x}",
    0x0807_0605_0403_0201,
    f"MMIO write 8 at {DATA:#x}: 0xbeef",
    0,
)
_CALLS: Final = (
    f"HYPERCALL MAP_GPA_RANGE {DATA:#x} 2 0x10",
    0,
    f"HYPERCALL MAP_GPA_RANGE {DATA:#x} 1 0x0",
    5,
)
_TEST: Final = "private_mem_kvm_exits_test.c "
_API: Final = "Documentation/virt/kvm/api.rst KVM_EXIT_MEMORY_FAULT"
_REACHED: Final = ("private-memory",)
_DELETED: Final = {
    "gmem-attributes": _PRIVATE_FAULT,
    "gmem": _MMIO,
    "v10": _PRIVATE_FAULT,
    "kernel-engine/v9": _SHARED_FAULT,
    "v9": _MMIO,
}

CASES: Final = (
    Case(
        "exit-deleted-under-guest",
        Family.VM,
        _deleted_under_a_guest,
        _DELETED,
        _TEST + "test_private_access_memslot_deleted",
        ("PME-1",),
        _REACHED,
        divergence="mmio",
    ),
    Case(
        "exit-deleted",
        Family.VM,
        _deleted,
        _DELETED,
        _API,
        ("PME-4",),
        _REACHED,
        divergence="mmio",
    ),
    Case(
        "exit-closed-file",
        Family.VM,
        _closed,
        {
            "gmem-attributes": _FAULT.format("0x8", DATA + P),
            "gmem": _FAULT.format("0x0", DATA + P),
            # The slot holds the file.
            **dict.fromkeys(("proposal", "in-place"), 0),
        },
        "virt/kvm/guest_memfd.c kvm_gmem_release; v10 3/9",
        ("PME-3",),
        _REACHED,
    ),
    Case(
        "exit-after-closed-file",
        Family.VM,
        _closed_and_deleted,
        {"gmem": "0x3", "proposal": "0x3"},
        "virt/kvm/guest_memfd.c kvm_gmem_release; v10 3/9",
        needs=_REACHED,
    ),
    Case(
        "exit-no-half",
        Family.VM,
        _no_half,
        {
            "gmem-mapped": 0,
            "gmem-attributes-mapped": 0,
            "gmem-attributes": "EFAULT",
            "gmem-unmapped": "EFAULT",
            "v10": _SHARED_FAULT,
            "v9": 0,
        },
        _API,
    ),
    Case(
        "exit-inaccessible-memory",
        Family.VM,
        _unmapped,
        {
            "gmem": "EFAULT",
            **dict.fromkeys(
                ("proposal", "in-place"),
                NotApplicable("the shared half is a memfd, which stays accessible"),
            ),
        },
        _API,
    ),
    Case(
        "exit-mmio",
        Family.VM,
        _mmio,
        {"gmem": _MMIO_CALLS, "proposal": _MMIO_CALLS, "kernel-engine": (_SHARED_FAULT,) * 4},
        "Documentation/virt/kvm/api.rst KVM_EXIT_MMIO",
        divergence="mmio",
    ),
    Case(
        "exit-hypercall",
        Family.VM,
        _hypercall,
        {"gmem": _CALLS, "proposal": _CALLS},
        "Documentation/virt/kvm/x86/hypercalls.rst KVM_HC_MAP_GPA_RANGE",
        needs=("hypercall",),
    ),
    Case(
        "exit-undefined-opcode",
        Family.VM,
        lambda m: m.trap(),
        {"gmem": "SHUTDOWN", "proposal": "SHUTDOWN"},
        "Documentation/virt/kvm/api.rst KVM_EXIT_SHUTDOWN",
    ),
)
