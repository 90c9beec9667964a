"""``struct kvm_run``: the page through which a vCPU reports an exit and gets the answer."""

import ctypes
from typing import Annotated

from restrictedmem.abi._struct import ZERO, c_struct, u8, u16, u32, u64
from restrictedmem.abi.kvm_x86 import kvm_debug_exit_arch, kvm_sync_regs

_Words = ctypes.Array[ctypes.c_uint64]


@c_struct(size=8)
class kvm_exit_unknown(ctypes.Structure):
    """KVM_EXIT_UNKNOWN."""

    hardware_exit_reason: u64 = 0


@c_struct(size=16)
class kvm_exit_fail_entry(ctypes.Structure):
    """KVM_EXIT_FAIL_ENTRY."""

    hardware_entry_failure_reason: u64 = 0
    cpu: u32 = 0


@c_struct(size=8)
class kvm_exit_exception(ctypes.Structure):
    """KVM_EXIT_EXCEPTION."""

    exception: u32 = 0
    error_code: u32 = 0


@c_struct(size=16)
class kvm_exit_io(ctypes.Structure):
    """KVM_EXIT_IO: ``count`` accesses of ``size`` bytes.

    Their data are ``data_offset`` bytes from the start of the page.
    """

    direction: u8 = 0
    size: u8 = 0
    port: u16 = 0
    count: u32 = 0
    data_offset: u64 = 0


@c_struct(size=32)
class kvm_exit_debug(ctypes.Structure):
    """KVM_EXIT_DEBUG."""

    arch: kvm_debug_exit_arch = ZERO


@c_struct(size=24)
class kvm_exit_mmio(ctypes.Structure):
    """KVM_EXIT_MMIO: ``len`` bytes at a guest physical address.

    The caller puts the data of a read into ``data``.
    """

    phys_addr: u64 = 0
    data: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 8] = ZERO
    len: u32 = 0
    is_write: u8 = 0


@c_struct(size=72)
class kvm_exit_hypercall(ctypes.Structure):
    """KVM_EXIT_HYPERCALL: the caller puts the result into ``ret``.

    The kernel exits for KVM_HC_MAP_GPA_RANGE only.
    """

    nr: u64 = 0
    args: Annotated[_Words, ctypes.c_uint64 * 6] = ZERO
    ret: u64 = 0
    longmode: u32 = 0
    pad: u32 = 0


@c_struct(size=136)
class kvm_exit_internal(ctypes.Structure):
    """KVM_EXIT_INTERNAL_ERROR: ``KVM_INTERNAL_ERROR_*`` and ``ndata`` words."""

    suberror: u32 = 0
    ndata: u32 = 0
    data: Annotated[_Words, ctypes.c_uint64 * 16] = ZERO


@c_struct(size=136)
class kvm_exit_system_event(ctypes.Structure):
    """KVM_EXIT_SYSTEM_EVENT: ``KVM_SYSTEM_EVENT_*`` and ``ndata`` words."""

    type: u32 = 0
    ndata: u32 = 0
    data: Annotated[_Words, ctypes.c_uint64 * 16] = ZERO


@c_struct(size=24)
class kvm_exit_msr(ctypes.Structure):
    """KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR.

    The caller sets ``error``, and for a read ``data``.
    """

    error: u8 = 0
    pad: Annotated[object, ctypes.c_uint8 * 7] = ZERO
    reason: u32 = 0
    index: u32 = 0
    data: u64 = 0


@c_struct(size=24)
class kvm_exit_memory_fault(ctypes.Structure):
    """KVM_EXIT_MEMORY_FAULT: ``KVM_MEMORY_EXIT_FLAG_*``, and bytes of guest physical memory."""

    flags: u64 = 0
    gpa: u64 = 0
    size: u64 = 0


@c_struct(size=256)
class kvm_exit(ctypes.Union):
    """The data of an exit; ``kvm_run.exit_reason`` says which member is valid."""

    hw: kvm_exit_unknown = ZERO
    fail_entry: kvm_exit_fail_entry = ZERO
    ex: kvm_exit_exception = ZERO
    io: kvm_exit_io = ZERO
    debug: kvm_exit_debug = ZERO
    mmio: kvm_exit_mmio = ZERO
    hypercall: kvm_exit_hypercall = ZERO
    internal: kvm_exit_internal = ZERO
    system_event: kvm_exit_system_event = ZERO
    msr: kvm_exit_msr = ZERO
    memory_fault: kvm_exit_memory_fault = ZERO
    padding: Annotated[object, ctypes.c_uint8 * 256] = ZERO


@c_struct(size=2048)
class kvm_run_regs(ctypes.Union):
    """The space for shared registers."""

    regs: kvm_sync_regs = ZERO
    padding: Annotated[object, ctypes.c_uint8 * 2048] = ZERO


@c_struct(size=2352)
class kvm_run(ctypes.Structure):
    """The start of a vCPU's mapping; ``exit`` is the header's unnamed union."""

    request_interrupt_window: u8 = 0
    immediate_exit: u8 = 0
    padding1: Annotated[object, ctypes.c_uint8 * 6] = ZERO
    exit_reason: u32 = 0
    ready_for_interrupt_injection: u8 = 0
    if_flag: u8 = 0
    flags: u16 = 0
    cr8: u64 = 0
    apic_base: u64 = 0
    exit: kvm_exit = ZERO
    kvm_valid_regs: u64 = 0
    kvm_dirty_regs: u64 = 0
    s: kvm_run_regs = ZERO
