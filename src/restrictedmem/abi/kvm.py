"""<linux/kvm.h>: ioctls and structs of KVM, of guest_memfd, and of the v9 and v10 postings.

Numbers are those of the header, or of the posting where it never reached a header. The same numbers and structs are what an owner sends
to an engine process (docs/wire-protocol.md).
"""

import ctypes
from enum import IntEnum
from typing import Annotated, Final

from restrictedmem.abi._ioctl import Dir, Ioctl, IoctlInt
from restrictedmem.abi._struct import c_struct, u32, u64

KVMIO: Final = 0xAE

#: Slot flag of v9 and v10: the slot has a private half in a restricted descriptor. (guest_memfd reuses the bit: KVM_MEM_GUEST_MEMFD.)
KVM_MEM_PRIVATE: Final = 1 << 2
KVM_MEM_READONLY: Final = 1 << 1
#: In ``kvm_memory_fault.flags``: the access was private (v10 and merged; bit 0 in v9).
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3

KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3

GUEST_MEMFD_FLAG_MMAP: Final = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 1 << 1


class Cap(IntEnum):
    """``KVM_CAP_*`` that decide what a machine can do here."""

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
    HLT = 5
    MMIO = 6
    SHUTDOWN = 8
    INTERNAL_ERROR = 17
    MEMORY_FAULT = 39


@c_struct(size=160)
class kvm_userspace_memory_region_ext(ctypes.Structure):
    """A slot with a private half (v9 and v10 3/9); its first 32 bytes are ``struct kvm_userspace_memory_region``."""

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64
    restricted_offset: u64 = 0
    restricted_fd: u32 = 0
    pad1: u32 = 0
    pad2: Annotated[object, ctypes.c_uint64 * 14] = 0


@c_struct(size=144)
class kvm_regs(ctypes.Structure):
    """General registers of x86-64."""

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
    """Size in bytes and ``GUEST_MEMFD_FLAG_*``."""

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
    """v10 2/9 and merged: bytes of guest physical memory and ``KVM_MEMORY_ATTRIBUTE_*``."""

    address: u64
    size: u64
    attributes: u64
    flags: u64 = 0


@c_struct(size=16)
class kvm_enc_region(ctypes.Structure):
    """v9 5/8 takes ``addr`` as a guest physical address."""

    addr: u64
    size: u64


KVM_GET_API_VERSION: Final = IoctlInt("KVM_GET_API_VERSION", KVMIO, 0x00)
KVM_CREATE_VM: Final = IoctlInt("KVM_CREATE_VM", KVMIO, 0x01)
KVM_CHECK_EXTENSION: Final = IoctlInt("KVM_CHECK_EXTENSION", KVMIO, 0x03)
KVM_CREATE_VCPU: Final = IoctlInt("KVM_CREATE_VCPU", KVMIO, 0x41)
KVM_RUN: Final = IoctlInt("KVM_RUN", KVMIO, 0x80)
KVM_SET_REGS: Final = Ioctl("KVM_SET_REGS", KVMIO, 0x82, Dir.WRITE, kvm_regs)
KVM_SET_MEMORY_ATTRIBUTES: Final = Ioctl("KVM_SET_MEMORY_ATTRIBUTES", KVMIO, 0xD2, Dir.WRITE, kvm_memory_attributes)
"""Needs KVM_CAP_MEMORY_ATTRIBUTES (233) of the VM."""
KVM_MEMORY_ENCRYPT_REG_REGION: Final = Ioctl("KVM_MEMORY_ENCRYPT_REG_REGION", KVMIO, 0xBB, Dir.READ, kvm_enc_region)
KVM_MEMORY_ENCRYPT_UNREG_REGION: Final = Ioctl("KVM_MEMORY_ENCRYPT_UNREG_REGION", KVMIO, 0xBC, Dir.READ, kvm_enc_region)
KVM_CREATE_GUEST_MEMFD: Final = Ioctl("KVM_CREATE_GUEST_MEMFD", KVMIO, 0xD4, Dir.READ | Dir.WRITE, kvm_create_guest_memfd)
"""Needs KVM_CAP_GUEST_MEMFD (234) of the VM."""

#: KVM_SET_USER_MEMORY_REGION: v9 and v10 kept its number, which encodes the size of the base struct, and chose what to copy by the flag.
KVM_SET_USER_MEMORY_REGION_REQUEST: Final = Dir.WRITE << 30 | 32 << 16 | KVMIO << 8 | 0x46
