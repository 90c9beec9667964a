"""<linux/kvm.h>: ioctls and structs of /dev/kvm, VMs, guest_memfd, and of v9 and v10.

``kvm_x86`` has the x86 part, and ``kvm_run`` the memory that a vCPU shares with its process.
Numbers are those of the header, or of the posting if they never reached a header. An owner sends
the same numbers and structs to an engine process (docs/reference/wire-protocol.md).
"""

import ctypes
from enum import IntEnum
from typing import Annotated, Final

from restrictedmem.abi._ioctl import Dir, Ioctl, IoctlInt, request_number
from restrictedmem.abi._struct import ZERO, c_struct, u32, u64

KVMIO: Final = 0xAE

#: <errno.h>: the machine has lost the memory. Python has no name for it.
EHWPOISON: Final = 133

KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
#: Slot flag of v9 and v10: the slot has a private half in a restricted descriptor.
KVM_MEM_PRIVATE: Final = 1 << 2
#: The slot has a guest_memfd. The merged code reuses the bit.
KVM_MEM_GUEST_MEMFD: Final = 1 << 2
#: In ``kvm_memory_fault.flags``: the access was private (v10 and merged; bit 0 in v9).
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3

KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3

GUEST_MEMFD_FLAG_MMAP: Final = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 1 << 1

#: Flags of KVM_SET_MEMORY_ATTRIBUTES2: the content of pages that change. Without a flag it is not
#: specified.
KVM_SET_MEMORY_ATTRIBUTES2_ZERO: Final = 1 << 0
KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE: Final = 1 << 1

#: Types of KVM_CREATE_VM; ``Cap.VM_TYPES`` has a bit for each that the kernel offers.
KVM_X86_DEFAULT_VM: Final = 0
KVM_X86_SW_PROTECTED_VM: Final = 1

#: The hypercall by which a guest asks for a conversion: gpa, pages, attributes
#: (KVM_EXIT_HYPERCALL).
KVM_HC_MAP_GPA_RANGE: Final = 12

#: v9's capability of private memory, which KVM_CAP_MEMORY_ATTRIBUTES replaced in v10. Later kernels
#: use the number for another capability.
KVM_CAP_PRIVATE_MEM: Final = 224


class Cap(IntEnum):
    """``KVM_CAP_*``: the arguments of KVM_CHECK_EXTENSION."""

    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    INTERNAL_ERROR_DATA = 40
    VCPU_EVENTS = 41
    XSAVE = 55
    XCRS = 56
    MAX_VCPUS = 66
    SYNC_REGS = 74
    READONLY_MEM = 81
    CHECK_EXTENSION_VM = 105
    MAX_VCPU_ID = 128
    IMMEDIATE_EXIT = 136
    X86_USER_SPACE_MSR = 188
    EXIT_HYPERCALL = 201
    DISABLE_QUIRKS2 = 213
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    GUEST_MEMFD_FLAGS = 244


class ExitReason(IntEnum):
    """``KVM_EXIT_*``."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    X86_RDMSR = 29
    X86_WRMSR = 30
    MEMORY_FAULT = 39


@c_struct(size=160)
class kvm_userspace_memory_region_ext(ctypes.Structure):
    """A slot with a private half (v9 and v10 3/9).

    Its first 32 bytes are ``struct kvm_userspace_memory_region``.
    """

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64
    restricted_offset: u64 = 0
    restricted_fd: u32 = 0
    pad1: u32 = 0
    pad2: Annotated[object, ctypes.c_uint64 * 14] = ZERO


@c_struct(size=32)
class kvm_userspace_memory_region(ctypes.Structure):
    """A slot on memory of the caller; bytes."""

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


@c_struct(size=160)
class kvm_userspace_memory_region2(ctypes.Structure):
    """A slot with a guest_memfd beside, or instead of, memory of the caller; bytes.

    The guest_memfd is optional.
    """

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64
    guest_memfd_offset: u64 = 0
    guest_memfd: u32 = 0
    pad1: u32 = 0
    pad2: Annotated[object, ctypes.c_uint64 * 14] = ZERO


@c_struct(size=144)
class kvm_regs(ctypes.Structure):
    """The general registers of x86-64."""

    rax: u64 = 0
    rbx: u64 = 0
    rcx: u64 = 0
    rdx: u64 = 0
    rsi: u64 = 0
    rdi: u64 = 0
    rsp: u64 = 0
    rbp: u64 = 0
    r8: u64 = 0
    r9: u64 = 0
    r10: u64 = 0
    r11: u64 = 0
    r12: u64 = 0
    r13: u64 = 0
    r14: u64 = 0
    r15: u64 = 0
    rip: u64 = 0
    rflags: u64 = 0


@c_struct(size=64)
class kvm_create_guest_memfd(ctypes.Structure):
    """The size in bytes, and ``GUEST_MEMFD_FLAG_*``."""

    size: u64
    flags: u64
    reserved0: u64 = 0
    reserved1: u64 = 0
    reserved2: u64 = 0
    reserved3: u64 = 0
    reserved4: u64 = 0
    reserved5: u64 = 0


@c_struct(size=32)
class kvm_memory_attributes(ctypes.Structure):
    """v10 2/9 and merged: bytes of guest physical memory, and ``KVM_MEMORY_ATTRIBUTE_*``."""

    address: u64
    size: u64
    attributes: u64
    flags: u64 = 0


@c_struct(size=128)
class kvm_memory_attributes2(ctypes.Structure):
    """Conversion in place (v8): bytes of a guest_memfd, and ``KVM_MEMORY_ATTRIBUTE_*``.

    The kernel sets ``error_offset`` to the first page that kept it from the change.
    """

    offset: u64
    size: u64
    attributes: u64
    flags: u64 = 0
    error_offset: u64 = 0
    reserved: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 11] = ZERO


@c_struct(size=64)
class kvm_pre_fault_memory(ctypes.Structure):
    """Bytes of guest physical memory to map.

    The kernel advances ``gpa`` and ``size`` to the part that is left.
    """

    gpa: u64
    size: u64
    flags: u64 = 0
    padding: Annotated[object, ctypes.c_uint64 * 5] = ZERO


@c_struct(size=104)
class kvm_enable_cap(ctypes.Structure):
    """A capability to turn on, and its arguments."""

    cap: u32
    flags: u32 = 0
    args: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4] = ZERO
    pad: Annotated[object, ctypes.c_uint8 * 64] = ZERO


@c_struct(size=4)
class kvm_signal_mask(ctypes.Structure):
    """The head of a set of signals of ``len`` bytes, 8 for the kernel's own."""

    len: u32


@c_struct(size=16)
class kvm_enc_region(ctypes.Structure):
    """A range in bytes; in v9 5/8 ``addr`` is a guest physical address."""

    addr: u64
    size: u64


# /dev/kvm.
KVM_GET_API_VERSION: Final = IoctlInt("KVM_GET_API_VERSION", KVMIO, 0x00)
KVM_CREATE_VM: Final = IoctlInt("KVM_CREATE_VM", KVMIO, 0x01)
KVM_CHECK_EXTENSION: Final = IoctlInt("KVM_CHECK_EXTENSION", KVMIO, 0x03)
"""Of /dev/kvm, and of a VM with KVM_CAP_CHECK_EXTENSION_VM (105)."""
KVM_GET_VCPU_MMAP_SIZE: Final = IoctlInt("KVM_GET_VCPU_MMAP_SIZE", KVMIO, 0x04)

# VMs.
KVM_CREATE_VCPU: Final = IoctlInt("KVM_CREATE_VCPU", KVMIO, 0x41)
KVM_SET_NR_MMU_PAGES: Final = IoctlInt("KVM_SET_NR_MMU_PAGES", KVMIO, 0x44)
KVM_SET_USER_MEMORY_REGION: Final = Ioctl(
    "KVM_SET_USER_MEMORY_REGION", KVMIO, 0x46, Dir.WRITE, kvm_userspace_memory_region
)
KVM_SET_USER_MEMORY_REGION2: Final = Ioctl(
    "KVM_SET_USER_MEMORY_REGION2", KVMIO, 0x49, Dir.WRITE, kvm_userspace_memory_region2
)
"""Needs KVM_CAP_USER_MEMORY2 (231) of the VM."""
KVM_ENABLE_CAP: Final = Ioctl("KVM_ENABLE_CAP", KVMIO, 0xA3, Dir.WRITE, kvm_enable_cap)
KVM_SET_MEMORY_ATTRIBUTES: Final = Ioctl(
    "KVM_SET_MEMORY_ATTRIBUTES", KVMIO, 0xD2, Dir.WRITE, kvm_memory_attributes
)
"""Needs KVM_CAP_MEMORY_ATTRIBUTES (233) of the VM."""
#: v10 2/9, not in the merged code: the attributes that can be set, as a u64 (_IOR(KVMIO, 0xd2,
#: __u64)).
KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES_REQUEST: Final = request_number(KVMIO, 0xD2, Dir.READ, 8)
KVM_MEMORY_ENCRYPT_REG_REGION: Final = Ioctl(
    "KVM_MEMORY_ENCRYPT_REG_REGION", KVMIO, 0xBB, Dir.READ, kvm_enc_region
)
KVM_MEMORY_ENCRYPT_UNREG_REGION: Final = Ioctl(
    "KVM_MEMORY_ENCRYPT_UNREG_REGION", KVMIO, 0xBC, Dir.READ, kvm_enc_region
)
KVM_CREATE_GUEST_MEMFD: Final = Ioctl(
    "KVM_CREATE_GUEST_MEMFD", KVMIO, 0xD4, Dir.READ | Dir.WRITE, kvm_create_guest_memfd
)
"""Needs KVM_CAP_GUEST_MEMFD (234) of the VM; flags of KVM_CAP_GUEST_MEMFD_FLAGS (244)."""

# guest_memfd.
KVM_SET_MEMORY_ATTRIBUTES2: Final = Ioctl(
    "KVM_SET_MEMORY_ATTRIBUTES2", KVMIO, 0xD2, Dir.READ | Dir.WRITE, kvm_memory_attributes2
)

# vCPUs.
KVM_RUN: Final = IoctlInt("KVM_RUN", KVMIO, 0x80)
KVM_SET_SIGNAL_MASK: Final = Ioctl("KVM_SET_SIGNAL_MASK", KVMIO, 0x8B, Dir.WRITE, kvm_signal_mask)
KVM_PRE_FAULT_MEMORY: Final = Ioctl(
    "KVM_PRE_FAULT_MEMORY", KVMIO, 0xD5, Dir.READ | Dir.WRITE, kvm_pre_fault_memory
)
"""Needs KVM_CAP_PRE_FAULT_MEMORY (236) of the VM."""
