"""<asm/kvm.h> of x86: the state of a vCPU, and the ioctls that read and write it."""

import ctypes
from typing import Annotated, Final

from restrictedmem.abi._ioctl import Dir, Ioctl, IoctlInt
from restrictedmem.abi._struct import ZERO, c_struct, u8, u16, u32, u64
from restrictedmem.abi.kvm import KVMIO, kvm_regs

KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final = 1 << 0

KVM_GUESTDBG_ENABLE: Final = 0x0000_0001
KVM_GUESTDBG_SINGLESTEP: Final = 0x0000_0002
KVM_GUESTDBG_USE_SW_BP: Final = 0x0001_0000
KVM_GUESTDBG_USE_HW_BP: Final = 0x0002_0000

#: For ``kvm_run.kvm_valid_regs`` and ``kvm_dirty_regs``: the parts of ``kvm_sync_regs`` that KVM
#: copies out, and takes in.
KVM_SYNC_X86_REGS: Final = 1 << 0
KVM_SYNC_X86_SREGS: Final = 1 << 1
KVM_SYNC_X86_EVENTS: Final = 1 << 2

#: For ``Cap.DISABLE_QUIRKS2``: the deletion of one slot zaps the pages of all slots (Linux 6.12).
KVM_X86_QUIRK_SLOT_ZAP_ALL: Final = 1 << 7

KVM_MP_STATE_RUNNABLE: Final = 0
KVM_MP_STATE_HALTED: Final = 3

_Bytes = ctypes.Array[ctypes.c_uint8]
_Words = ctypes.Array[ctypes.c_uint64]


@c_struct(size=24)
class kvm_segment(ctypes.Structure):
    """A segment register with the processor's cached descriptor."""

    base: u64 = 0
    limit: u32 = 0
    selector: u16 = 0
    type: u8 = 0
    present: u8 = 0
    dpl: u8 = 0
    db: u8 = 0
    s: u8 = 0
    l: u8 = 0  # noqa: E741
    g: u8 = 0
    avl: u8 = 0
    unusable: u8 = 0
    padding: u8 = 0


@c_struct(size=16)
class kvm_dtable(ctypes.Structure):
    """GDTR or IDTR."""

    base: u64 = 0
    limit: u16 = 0
    padding: Annotated[object, ctypes.c_uint16 * 3] = ZERO


@c_struct(size=312)
class kvm_sregs(ctypes.Structure):
    """Segment, descriptor table and control registers."""

    cs: kvm_segment = ZERO
    ds: kvm_segment = ZERO
    es: kvm_segment = ZERO
    fs: kvm_segment = ZERO
    gs: kvm_segment = ZERO
    ss: kvm_segment = ZERO
    tr: kvm_segment = ZERO
    ldt: kvm_segment = ZERO
    gdt: kvm_dtable = ZERO
    idt: kvm_dtable = ZERO
    cr0: u64 = 0
    cr2: u64 = 0
    cr3: u64 = 0
    cr4: u64 = 0
    cr8: u64 = 0
    efer: u64 = 0
    apic_base: u64 = 0
    interrupt_bitmap: Annotated[_Words, ctypes.c_uint64 * 4] = ZERO


@c_struct(size=416)
class kvm_fpu(ctypes.Structure):
    """The x87 and SSE registers."""

    fpr: Annotated[ctypes.Array[_Bytes], (ctypes.c_uint8 * 16) * 8] = ZERO  # codespell:ignore
    fcw: u16 = 0
    fsw: u16 = 0
    ftwx: u8 = 0
    pad1: u8 = 0
    last_opcode: u16 = 0
    last_ip: u64 = 0
    last_dp: u64 = 0
    xmm: Annotated[ctypes.Array[_Bytes], (ctypes.c_uint8 * 16) * 16] = ZERO
    mxcsr: u32 = 0
    pad2: u32 = 0


@c_struct(size=4096)
class kvm_xsave(ctypes.Structure):
    """The area that XSAVE writes, in the processor's own layout."""

    region: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 1024] = ZERO


@c_struct(size=16)
class kvm_xcr(ctypes.Structure):
    """One extended control register."""

    xcr: u32 = 0
    reserved: u32 = 0
    value: u64 = 0


@c_struct(size=392)
class kvm_xcrs(ctypes.Structure):
    """The extended control registers; only XCR0 exists."""

    nr_xcrs: u32 = 0
    flags: u32 = 0
    xcrs: Annotated[ctypes.Array[kvm_xcr], kvm_xcr * 16] = ZERO
    padding: Annotated[object, ctypes.c_uint64 * 16] = ZERO


@c_struct(size=16)
class kvm_msr_entry(ctypes.Structure):
    """A model specific register and its value."""

    index: u32 = 0
    reserved: u32 = 0
    data: u64 = 0


@c_struct(size=8)
class kvm_msrs(ctypes.Structure):
    """The head of ``nmsrs`` entries."""

    nmsrs: u32
    pad: u32 = 0


@c_struct(size=40)
class kvm_cpuid_entry2(ctypes.Structure):
    """The result of CPUID for one function (and index)."""

    function: u32 = 0
    index: u32 = 0
    flags: u32 = 0
    eax: u32 = 0
    ebx: u32 = 0
    ecx: u32 = 0
    edx: u32 = 0
    padding: Annotated[object, ctypes.c_uint32 * 3] = ZERO


@c_struct(size=8)
class kvm_cpuid2(ctypes.Structure):
    """The head of ``nent`` entries."""

    nent: u32
    padding: u32 = 0


@c_struct(size=8)
class kvm_vcpu_exception(ctypes.Structure):
    """``kvm_vcpu_events.exception``."""

    injected: u8 = 0
    nr: u8 = 0
    has_error_code: u8 = 0
    pending: u8 = 0
    error_code: u32 = 0


@c_struct(size=4)
class kvm_vcpu_interrupt(ctypes.Structure):
    """``kvm_vcpu_events.interrupt``."""

    injected: u8 = 0
    nr: u8 = 0
    soft: u8 = 0
    shadow: u8 = 0


@c_struct(size=4)
class kvm_vcpu_nmi(ctypes.Structure):
    """``kvm_vcpu_events.nmi``."""

    injected: u8 = 0
    pending: u8 = 0
    masked: u8 = 0
    pad: u8 = 0


@c_struct(size=4)
class kvm_vcpu_smi(ctypes.Structure):
    """``kvm_vcpu_events.smi``."""

    smm: u8 = 0
    pending: u8 = 0
    smm_inside_nmi: u8 = 0
    latched_init: u8 = 0


@c_struct(size=64)
class kvm_vcpu_events(ctypes.Structure):
    """Exceptions and interrupts on their way into the guest."""

    exception: kvm_vcpu_exception = ZERO
    interrupt: kvm_vcpu_interrupt = ZERO
    nmi: kvm_vcpu_nmi = ZERO
    sipi_vector: u32 = 0
    flags: u32 = 0
    smi: kvm_vcpu_smi = ZERO
    triple_fault_pending: u8 = 0
    reserved: Annotated[object, ctypes.c_uint8 * 26] = ZERO
    exception_has_payload: u8 = 0
    exception_payload: u64 = 0


@c_struct(size=520)
class kvm_sync_regs(ctypes.Structure):
    """The registers that ``kvm_run`` can carry in and out (KVM_CAP_SYNC_REGS)."""

    regs: kvm_regs = ZERO
    sregs: kvm_sregs = ZERO
    events: kvm_vcpu_events = ZERO


@c_struct(size=32)
class kvm_debug_exit_arch(ctypes.Structure):
    """The place of a debug exit, and the debug registers that tell its cause."""

    exception: u32 = 0
    pad: u32 = 0
    pc: u64 = 0
    dr6: u64 = 0
    dr7: u64 = 0


@c_struct(size=72)
class kvm_guest_debug(ctypes.Structure):
    """``KVM_GUESTDBG_*``, and the debug registers for hardware breakpoints."""

    control: u32
    pad: u32 = 0
    debugreg: Annotated[_Words, ctypes.c_uint64 * 8] = ZERO


@c_struct(size=4)
class kvm_mp_state(ctypes.Structure):
    """``KVM_MP_STATE_*``."""

    mp_state: u32 = 0


@c_struct(size=24)
class kvm_translation(ctypes.Structure):
    """A linear address, and its translation by the guest's page tables."""

    linear_address: u64
    physical_address: u64 = 0
    valid: u8 = 0
    writeable: u8 = 0
    usermode: u8 = 0
    pad: Annotated[object, ctypes.c_uint8 * 5] = ZERO


KVM_GET_SUPPORTED_CPUID: Final = Ioctl(
    "KVM_GET_SUPPORTED_CPUID", KVMIO, 0x05, Dir.READ | Dir.WRITE, kvm_cpuid2
)

KVM_SET_TSS_ADDR: Final = IoctlInt("KVM_SET_TSS_ADDR", KVMIO, 0x47)

KVM_GET_REGS: Final = Ioctl("KVM_GET_REGS", KVMIO, 0x81, Dir.READ, kvm_regs)
KVM_SET_REGS: Final = Ioctl("KVM_SET_REGS", KVMIO, 0x82, Dir.WRITE, kvm_regs)
KVM_GET_SREGS: Final = Ioctl("KVM_GET_SREGS", KVMIO, 0x83, Dir.READ, kvm_sregs)
KVM_SET_SREGS: Final = Ioctl("KVM_SET_SREGS", KVMIO, 0x84, Dir.WRITE, kvm_sregs)
KVM_TRANSLATE: Final = Ioctl("KVM_TRANSLATE", KVMIO, 0x85, Dir.READ | Dir.WRITE, kvm_translation)
KVM_GET_MSRS: Final = Ioctl("KVM_GET_MSRS", KVMIO, 0x88, Dir.READ | Dir.WRITE, kvm_msrs)
KVM_SET_MSRS: Final = Ioctl("KVM_SET_MSRS", KVMIO, 0x89, Dir.WRITE, kvm_msrs)
KVM_GET_FPU: Final = Ioctl("KVM_GET_FPU", KVMIO, 0x8C, Dir.READ, kvm_fpu)
KVM_SET_FPU: Final = Ioctl("KVM_SET_FPU", KVMIO, 0x8D, Dir.WRITE, kvm_fpu)
KVM_SET_CPUID2: Final = Ioctl("KVM_SET_CPUID2", KVMIO, 0x90, Dir.WRITE, kvm_cpuid2)
KVM_GET_CPUID2: Final = Ioctl("KVM_GET_CPUID2", KVMIO, 0x91, Dir.READ | Dir.WRITE, kvm_cpuid2)
KVM_GET_MP_STATE: Final = Ioctl("KVM_GET_MP_STATE", KVMIO, 0x98, Dir.READ, kvm_mp_state)
KVM_SET_MP_STATE: Final = Ioctl("KVM_SET_MP_STATE", KVMIO, 0x99, Dir.WRITE, kvm_mp_state)
KVM_SET_GUEST_DEBUG: Final = Ioctl("KVM_SET_GUEST_DEBUG", KVMIO, 0x9B, Dir.WRITE, kvm_guest_debug)
KVM_GET_VCPU_EVENTS: Final = Ioctl("KVM_GET_VCPU_EVENTS", KVMIO, 0x9F, Dir.READ, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS: Final = Ioctl("KVM_SET_VCPU_EVENTS", KVMIO, 0xA0, Dir.WRITE, kvm_vcpu_events)
KVM_GET_XSAVE: Final = Ioctl("KVM_GET_XSAVE", KVMIO, 0xA4, Dir.READ, kvm_xsave)
KVM_SET_XSAVE: Final = Ioctl("KVM_SET_XSAVE", KVMIO, 0xA5, Dir.WRITE, kvm_xsave)
KVM_GET_XCRS: Final = Ioctl("KVM_GET_XCRS", KVMIO, 0xA6, Dir.READ, kvm_xcrs)
KVM_SET_XCRS: Final = Ioctl("KVM_SET_XCRS", KVMIO, 0xA7, Dir.WRITE, kvm_xcrs)
