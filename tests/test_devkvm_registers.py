"""Registers of a vCPU of /dev/kvm: what is set comes back."""

from errno import E2BIG, EINVAL, EOPNOTSUPP

import pytest

from devkvm_machine import CODE, DATA, Machine, guest, kvm
from outcomes import Errno, outcome
from restrictedmem.abi.kvm import Cap, kvm_regs
from restrictedmem.abi.kvm_x86 import KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_cpuid_entry2
from restrictedmem.devkvm import Kvm
from restrictedmem.units import PAGE_SIZE

__all__ = ["guest", "kvm"]

pytestmark = pytest.mark.requires("kvm")


IA32_TSC = 0x10
IA32_SYSENTER_CS = 0x174
NO_SUCH_MSR = 0x12_3456


def test_general_and_special_registers_come_back(guest: Machine) -> None:
    regs = kvm_regs(
        **{
            name: number << 32 | 7 for number, name in enumerate(("rax", "rbx", "r8", "r15", "rsp"))
        },
        rip=CODE,
        rflags=2,
    )
    guest.vcpu.set_regs(regs)
    assert bytes(guest.vcpu.get_regs()) == bytes(regs)
    sregs = guest.vcpu.get_sregs()
    assert (sregs.cs.selector, sregs.cs.dpl, sregs.cs.l, sregs.cr3, sregs.efer) == (
        0x33,
        3,
        1,
        0x1000,
        0x500,
    )
    sregs.fs.base = 0x7000_1234
    guest.vcpu.set_sregs(sregs)
    assert guest.vcpu.get_sregs().fs.base == 0x7000_1234
    sregs.cr0 = 1 << 31  # paging without protection
    assert outcome(lambda: guest.vcpu.set_sregs(sregs)) == Errno(EINVAL)


def test_floating_point_registers_come_back(guest: Machine) -> None:
    fpu = guest.vcpu.get_fpu()
    assert fpu.fcw == 0x37F
    fpu.xmm[15][3] = 0x5A
    fpu.fcw = 0x27F
    guest.vcpu.set_fpu(fpu)
    found = guest.vcpu.get_fpu()
    assert (found.xmm[15][3], found.fcw) == (0x5A, 0x27F)
    xsave = guest.vcpu.get_xsave()
    xsave.region[0] = 0x17F
    xsave.region[128] |= 3  # XSTATE_BV: the x87 and SSE parts are not in their initial state
    guest.vcpu.set_xsave(xsave)
    assert guest.vcpu.get_fpu().fcw == 0x17F


def test_extended_control_registers_come_back(guest: Machine) -> None:
    xcrs = guest.vcpu.get_xcrs()
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value & 1) == (1, 0, 1)
    xcrs.xcrs[0].value = 3
    guest.vcpu.set_xcrs(xcrs)
    assert guest.vcpu.get_xcrs().xcrs[0].value == 3
    xcrs.xcrs[0].value = 2  # without x87
    assert outcome(lambda: guest.vcpu.set_xcrs(xcrs)) == Errno(EINVAL)


def test_model_specific_registers_come_back(guest: Machine) -> None:
    guest.vcpu.set_msrs({IA32_SYSENTER_CS: 0x33, IA32_TSC: 1 << 40})
    found = guest.vcpu.get_msrs([IA32_SYSENTER_CS, IA32_TSC])
    assert found[IA32_SYSENTER_CS] == 0x33
    # It counts from there on; of a VM that was just made it may be 0.
    assert found[IA32_TSC] >= 1 << 40


def test_a_register_that_is_not_there_is_named(guest: Machine) -> None:
    with pytest.raises(
        OSError, match=r"^\[Errno 22\] KVM_GET_MSRS: Invalid argument \(MSR 0x123456\)$"
    ):
        guest.vcpu.get_msrs([IA32_TSC, NO_SUCH_MSR])
    with pytest.raises(
        OSError, match=r"^\[Errno 22\] KVM_SET_MSRS: Invalid argument \(MSR 0x123456\)$"
    ):
        guest.vcpu.set_msrs({IA32_SYSENTER_CS: 0, NO_SUCH_MSR: 1})


def test_cpuid_comes_back(kvm: Kvm) -> None:
    with kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.set_cpuid2(
            [
                kvm_cpuid_entry2(function=0, eax=1),
                kvm_cpuid_entry2(function=0x4000_0000, ebx=0x1234),
            ]
        )
        assert [(entry.function, entry.eax, entry.ebx) for entry in vcpu.get_cpuid2()] == [
            (0, 1, 0),
            (0x4000_0000, 0, 0x1234),
        ]
        assert outcome(lambda: vcpu.set_cpuid2([kvm_cpuid_entry2()] * 257)) == Errno(E2BIG)
        assert outcome(lambda: vcpu.set_msrs(dict.fromkeys(range(257), 0))) == Errno(E2BIG)


def test_run_state_comes_back(guest: Machine) -> None:
    assert guest.vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE
    # Without an interrupt controller of the kernel a vCPU can only run.
    assert outcome(lambda: guest.vcpu.set_mp_state(KVM_MP_STATE_HALTED)) in (None, Errno(EINVAL))
    guest.vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)
    events = guest.vcpu.get_vcpu_events()
    assert (events.exception.injected, events.nmi.pending) == (0, 0)
    events.nmi.masked, events.flags = 1, 0
    guest.vcpu.set_vcpu_events(events)
    assert guest.vcpu.get_vcpu_events().nmi.masked == 1


def test_translation_follows_the_guests_page_tables(guest: Machine) -> None:
    assert guest.vcpu.translate(CODE + 5) == CODE + 5
    assert guest.vcpu.translate(DATA + PAGE_SIZE) == DATA + PAGE_SIZE
    assert guest.vcpu.translate(1 << 40) is None


def test_prefault_takes_the_capability(guest: Machine) -> None:
    if guest.vm.check_extension(Cap.PRE_FAULT_MEMORY):
        assert guest.vcpu.pre_fault_memory(0, 2 * PAGE_SIZE) < 2 * PAGE_SIZE
    else:
        assert outcome(lambda: guest.vcpu.pre_fault_memory(0, PAGE_SIZE)) == Errno(EOPNOTSUPP)
