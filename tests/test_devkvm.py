"""The handles of /dev/kvm: every method calls what its name says, says what failed, and gives back what the kernel gave."""

import ctypes
import gc
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import E2BIG, EAGAIN, EBADF, EEXIST, EFAULT, EINTR, EINVAL, ENOTTY, EOPNOTSUPP, ESRCH
from functools import partial

import pytest

from devkvm_machine import CODE, DATA, LOAD, OUTS, SPIN, Machine, machine
from outcomes import Errno, in_child, outcome
from restrictedmem.abi.kvm import KVM_X86_DEFAULT_VM, Cap, ExitReason, kvm_regs
from restrictedmem.abi.kvm_x86 import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_SYNC_X86_REGS,
    kvm_cpuid_entry2,
    kvm_fpu,
    kvm_sregs,
    kvm_vcpu_events,
    kvm_xcrs,
    kvm_xsave,
)
from restrictedmem.devkvm import GuestMemfd, Kvm, VcpuFd, VmFd, address_of
from restrictedmem.devkvm.vcpu_fd import KICK
from restrictedmem.fd import OwnedFd
from restrictedmem.units import PAGE_SIZE
from waiting import wait_until

pytestmark = pytest.mark.requires("kvm")

IA32_TSC = 0x10
IA32_SYSENTER_CS = 0x174
NO_SUCH_MSR = 0x12_3456


@pytest.fixture
def kvm() -> Generator[Kvm]:
    with Kvm.open() as opened:
        yield opened


@pytest.fixture
def guest() -> Generator[Machine]:
    with machine() as made:
        yield made


# Handles.


HANDLES: dict[type[OwnedFd], Callable[[int], OwnedFd]] = {
    Kvm: Kvm,
    VmFd: lambda number: VmFd(number, 2 * PAGE_SIZE),
    VcpuFd: lambda number: VcpuFd(number, 2 * PAGE_SIZE),
    GuestMemfd: lambda number: GuestMemfd(number, 0),
}


@contextmanager
def bad(kind: type[OwnedFd]) -> Generator[OwnedFd]:
    """Build a handle on a number that is no descriptor."""
    number = os.dup(0)
    os.close(number)
    handle = HANDLES[kind](number)
    yield handle
    handle.detach()


#: Arguments of the methods that have any; none of them is looked at when the descriptor is bad.
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "check_extension": (Cap.USER_MEMORY,),
    "enable_cap": (Cap.EXIT_HYPERCALL, 0),
    "create_guest_memfd": (PAGE_SIZE,),
    "set_user_memory_region": (0, 0, PAGE_SIZE, 0),
    "set_user_memory_region2": (0, 0, PAGE_SIZE, 0, -1),
    "delete_memory_region": (0,),
    "set_memory_attributes": (0, PAGE_SIZE, 0),
    "set_nr_mmu_pages": (64,),
    "set_tss_addr": (0xFFFB_D000,),
    "set_signal_mask": ((),),
    "set_regs": (kvm_regs(),),
    "set_sregs": (kvm_sregs(),),
    "set_fpu": (kvm_fpu(),),
    "set_xsave": (kvm_xsave(),),
    "set_xcrs": (kvm_xcrs(),),
    "set_vcpu_events": (kvm_vcpu_events(),),
    "get_msrs": ((IA32_TSC,),),
    "set_msrs": ({IA32_TSC: 0},),
    "set_cpuid2": ((),),
    "set_mp_state": (KVM_MP_STATE_RUNNABLE,),
    "set_guest_debug": (0,),
    "translate": (0,),
    "pre_fault_memory": (0, PAGE_SIZE),
    "allocate": (0, PAGE_SIZE),
    "punch_hole": (0, PAGE_SIZE),
    "resident_pages": (0, PAGE_SIZE),
    "mmap": (0, PAGE_SIZE),
}
#: Those of every owned descriptor, those that make no call on it, and the one that makes the
#: descriptor.
WITHOUT_A_CALL = {"close", "closed", "detach", "fileno", "kick", "flags", "run_errno", "open"}


METHODS = [
    (kind, name)
    for kind in HANDLES
    for name in dir(kind)
    if not name.startswith("_") and name not in WITHOUT_A_CALL
]


@pytest.mark.parametrize(
    ("kind", "name"), METHODS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_every_method_of_a_bad_descriptor_is_ebadf(kind: type[OwnedFd], name: str) -> None:
    with bad(kind) as handle, pytest.raises(OSError) as raised:
        getattr(handle, name)(*ARGUMENTS.get(name, ()))
    assert raised.value.errno == EBADF


def test_the_methods_of_bad_descriptors_are_many() -> None:
    # They come from the classes themselves; an empty list would pass.
    assert len(METHODS) > 45


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Kvm, "get_api_version"), (VmFd, "create_vcpu"), (VcpuFd, "get_regs"), (VcpuFd, "set_msrs")],
)
def test_errors_name_their_ioctl(kind: type[OwnedFd], name: str) -> None:
    with (
        bad(kind) as handle,
        pytest.raises(OSError, match=rf"^\[Errno 9\] KVM_{name.upper()}: Bad file descriptor$"),
    ):
        getattr(handle, name)(*ARGUMENTS.get(name, ()))


def test_an_ioctl_on_another_kind_of_descriptor_is_enotty_or_einval(kvm: Kvm) -> None:
    vcpu = VcpuFd(kvm.fileno(), PAGE_SIZE)
    try:
        assert outcome(vcpu.get_regs) in (Errno(ENOTTY), Errno(EINVAL))
    finally:
        vcpu.detach()


def test_every_descriptor_is_close_on_exec(guest: Machine) -> None:
    with guest.vm.create_guest_memfd(PAGE_SIZE) as memfd:
        for handle in (guest.kvm, guest.vm, guest.vcpu, memfd):
            assert not os.get_inheritable(handle.fileno()), handle


def test_handles_show_their_kind(guest: Machine) -> None:
    assert repr(guest.vm) == f"Vm({guest.vm.fileno()})"


def test_a_closed_vcpu_gives_its_mapping_back() -> None:
    # Those of other tests' VMs, which are cycles.
    gc.collect()
    with machine() as guest:
        guest.start(OUTS)
        assert guest.vcpu.run() == ExitReason.IO
        assert mappings() == 1
    assert mappings() == 0


def mappings() -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("kvm-vcpu" in line for line in maps)


def test_another_process_gets_eio(guest: Machine) -> None:
    assert in_child(guest.vm.create_vcpu) == "EIO"
    assert in_child(guest.vcpu.get_regs) == "EIO"


# /dev/kvm.


def test_the_device(kvm: Kvm) -> None:
    assert kvm.get_api_version() == 12
    assert kvm.get_vcpu_mmap_size() >= 2 * PAGE_SIZE
    assert kvm.check_extension(Cap.USER_MEMORY) == 1
    assert kvm.check_extension(9999) == 0


def test_supported_cpuid_begins_with_the_highest_function(kvm: Kvm) -> None:
    entries = kvm.get_supported_cpuid()
    (first,) = (entry for entry in entries if entry.function == 0)
    assert first.eax >= max(entry.function for entry in entries if entry.function < 0x4000_0000)
    assert struct.pack("=III", first.ebx, first.edx, first.ecx).isascii()


def test_vm_kinds_are_those_of_the_capability(kvm: Kvm) -> None:
    offered = kvm.check_extension(Cap.VM_TYPES) | 1 << KVM_X86_DEFAULT_VM
    for kind in range(8):
        if offered >> kind & 1:
            kvm.create_vm(kind).close()
        else:
            assert outcome(partial(kvm.create_vm, kind)) == Errno(EINVAL), kind


# VMs.


def test_vm_refusals(guest: Machine) -> None:
    vm = guest.vm
    assert outcome(lambda: vm.create_vcpu(0).close()) == Errno(EEXIST)
    assert outcome(lambda: vm.create_vcpu(vm.check_extension(Cap.MAX_VCPU_ID)).close()) == Errno(
        EINVAL
    )
    assert outcome(lambda: vm.enable_cap(Cap.USER_MEMORY)) == Errno(EINVAL)
    assert outcome(lambda: vm.set_nr_mmu_pages(63)) == Errno(EINVAL)
    assert outcome(lambda: vm.set_tss_addr(0xFFFF_F000)) == Errno(EINVAL)


def test_what_a_vm_takes(guest: Machine) -> None:
    guest.vm.set_nr_mmu_pages(64)
    guest.vm.set_tss_addr(0xFFFB_D000)
    mask = guest.vm.check_extension(Cap.EXIT_HYPERCALL)
    guest.vm.enable_cap(Cap.EXIT_HYPERCALL, mask)
    assert outcome(lambda: guest.vm.enable_cap(Cap.EXIT_HYPERCALL, ~mask & 0xFFFF)) == Errno(EINVAL)


def test_memory_attributes_take_the_capability(guest: Machine) -> None:
    # The device speaks for any VM: whether the kernel has the call at all.
    offered = guest.kvm.check_extension(Cap.MEMORY_ATTRIBUTES)
    expected = Errno(EINVAL) if offered else Errno(ENOTTY)
    assert outcome(lambda: guest.vm.set_memory_attributes(DATA, PAGE_SIZE, 1 << 5)) == expected


# Registers.


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


# Exits.


@contextmanager
def real_mode(code: bytes) -> Generator[VcpuFd]:
    memory = mmap.mmap(-1, PAGE_SIZE)
    memory[: len(code)] = code
    with Kvm.open() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        vm.set_user_memory_region(0, 0x1000, PAGE_SIZE, address_of(memory))
        sregs = vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(kvm_regs(rip=0x1000, rflags=2))
        yield vcpu


def test_port_output_and_input() -> None:
    with real_mode(
        bytes.fromhex("b85a12 e742 e543 e642 f4")
    ) as vcpu:  # mov ax, 0x125a; out 0x42, ax; in ax, 0x43; out 0x42, al; hlt
        io = vcpu.kvm_run.exit.io
        assert vcpu.run() == ExitReason.IO
        assert (io.direction, io.port, io.size, io.count, bytes(vcpu.io_data())) == (
            1,
            0x42,
            2,
            1,
            b"\x5a\x12",
        )
        assert vcpu.run() == ExitReason.IO
        assert (io.direction, io.port, io.size) == (0, 0x43, 2)
        vcpu.io_data()[:] = b"\x77\x88"
        assert vcpu.run() == ExitReason.IO
        assert (io.direction, io.size, bytes(vcpu.io_data())) == (1, 1, b"\x77")
        assert vcpu.get_regs().rax == 0x8877
        assert vcpu.run() == ExitReason.HLT


def test_a_string_instruction_brings_several_items() -> None:
    # cld; mov di, 0x1000; mov cx, 4; mov dx, 0x42; rep insb; mov si, 0x1000; mov cx, 4; rep outsb;
    # hlt
    with real_mode(bytes.fromhex("fc bf0010 b90400 ba4200 f36c be0010 b90400 f36e f4")) as vcpu:
        assert vcpu.run() == ExitReason.IO
        io = vcpu.kvm_run.exit.io
        assert (io.direction, io.size, io.count, len(vcpu.io_data())) == (0, 1, 4, 4)
        vcpu.io_data()[:] = b"ABCD"
        written = b""
        while vcpu.run() == ExitReason.IO:
            written += bytes(vcpu.io_data())
        assert written == b"ABCD"
        assert vcpu.kvm_run.exit_reason == ExitReason.HLT


def test_memory_mapped_io(guest: Machine) -> None:
    mmio = guest.vcpu.kvm_run.exit.mmio
    guest.start(LOAD, rdi=DATA + 8)
    assert guest.vcpu.run() == ExitReason.MMIO
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (DATA + 8, 8, 0)
    mmio.data[:] = list(b"\x01\x02\x03\x04\x05\x06\x07\x08")
    assert guest.port()
    assert guest.vcpu.get_regs().rax == 0x0807060504030201
    guest.start(bytes.fromhex("668907 e610"), rdi=DATA, rax=0xBEEF)  # mov [rdi], ax
    assert guest.vcpu.run() == ExitReason.MMIO
    assert (mmio.phys_addr, mmio.len, mmio.is_write, bytes(mmio.data[:2])) == (
        DATA,
        2,
        1,
        b"\xef\xbe",
    )


def test_an_exception_without_a_handler_is_a_shutdown(guest: Machine) -> None:
    guest.start(bytes.fromhex("0f0b"))  # ud2
    assert guest.vcpu.run() == ExitReason.SHUTDOWN


def test_single_steps_are_debug_exits() -> None:
    with real_mode(bytes.fromhex("9090 e642")) as vcpu:
        vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
        for rip in (0x1001, 0x1002):
            assert vcpu.run() == ExitReason.DEBUG
            arch = vcpu.kvm_run.exit.debug.arch
            assert (arch.exception, arch.pc, arch.dr6 >> 14 & 1) == (1, rip, 1)
        vcpu.set_guest_debug(0)
        assert vcpu.run() == ExitReason.IO


@pytest.mark.requires("debug-registers")
def test_a_hardware_breakpoint_is_a_debug_exit() -> None:
    with real_mode(bytes.fromhex("90909090 e642")) as vcpu:
        vcpu.set_guest_debug(
            KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, [0, 0x1002, 0, 0, 0, 0, 0, 0x404]
        )
        assert vcpu.run() == ExitReason.DEBUG
        assert (vcpu.kvm_run.exit.debug.arch.pc, vcpu.kvm_run.exit.debug.arch.dr6 & 0xF) == (
            0x1002,
            0b10,
        )


def test_registers_travel_with_the_exit(guest: Machine) -> None:
    run = guest.vcpu.kvm_run
    assert guest.vm.check_extension(Cap.SYNC_REGS) & KVM_SYNC_X86_REGS
    run.kvm_valid_regs = KVM_SYNC_X86_REGS
    guest.start(OUTS, rax=0x55)
    assert guest.vcpu.run() == ExitReason.IO
    assert (run.s.regs.regs.rax, run.s.regs.regs.rip) == (0x55, guest.vcpu.get_regs().rip)
    run.s.regs.regs.rax = 0x66
    run.kvm_dirty_regs = KVM_SYNC_X86_REGS
    assert guest.vcpu.run() == ExitReason.IO
    assert bytes(guest.vcpu.io_data()) == b"\x66"
    run.kvm_valid_regs = 1 << 63
    assert outcome(guest.vcpu.run) == Errno(EINVAL)


def test_an_errno_other_than_efault_leaves_no_old_reason_behind(guest: Machine) -> None:
    guest.start(OUTS)
    assert guest.vcpu.run() == ExitReason.IO
    guest.vcpu.kvm_run.kvm_valid_regs = 1 << 63
    assert outcome(guest.vcpu.run) == Errno(EINVAL)
    assert guest.vcpu.kvm_run.exit_reason == ExitReason.UNKNOWN


def test_efault_alone_is_an_error(guest: Machine) -> None:
    memory = mmap.mmap(-1, PAGE_SIZE)
    address = address_of(memory)
    guest.vm.set_user_memory_region(1, DATA, PAGE_SIZE, address)
    guest.store(1)
    mprotect = ctypes.CDLL(None).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert mprotect(address, PAGE_SIZE, 0) == 0
    guest.start(LOAD)
    found = outcome(guest.vcpu.run)
    if found == ExitReason.MEMORY_FAULT:  # kernels that say more
        assert guest.vcpu.run_errno == EFAULT
    else:
        assert found == Errno(EFAULT)
        assert guest.vcpu.kvm_run.exit_reason != ExitReason.MEMORY_FAULT


# Taking a vCPU out of the guest.


def test_immediate_exit_comes_before_the_guest(guest: Machine) -> None:
    guest.start(SPIN)
    guest.vcpu.kvm_run.immediate_exit = 1
    with pytest.raises(InterruptedError, match=r"^\[Errno 4\] KVM_RUN: "):
        guest.vcpu.run()
    guest.vcpu.kvm_run.immediate_exit = 0


def test_a_kick_before_the_run_is_not_lost_and_counts_once(guest: Machine) -> None:
    with own_thread() as call:
        call(guest.vcpu.accept_kicks)
        guest.start(OUTS)
        guest.vcpu.kick()
        guest.vcpu.kick()
        assert call(lambda: outcome(guest.vcpu.run)) == Errno(EINTR)
        assert call(guest.vcpu.run) == ExitReason.IO


def test_a_kick_ends_a_guest_that_never_exits(guest: Machine) -> None:
    guest.start(SPIN)
    entered, came_back = threading.Event(), threading.Event()
    said: list[object] = []

    def body() -> None:
        guest.vcpu.accept_kicks()
        entered.set()
        for _ in range(20):
            said.append(outcome(guest.vcpu.run))
            came_back.set()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    assert entered.wait(10)
    slowest = 0.0
    for _ in range(20):
        came_back.clear()
        began = time.monotonic()
        guest.vcpu.kick()
        assert came_back.wait(10), "KVM_RUN did not come back"
        slowest = max(slowest, time.monotonic() - began)
    thread.join(10)
    assert not thread.is_alive()
    assert said == [Errno(EINTR)] * 20
    assert guest.vcpu.get_regs().rip == CODE
    print(f"slowest of 20 kicks: {slowest * 1e6:.0f} us")


def test_kicks_without_a_thread_are_refused(guest: Machine) -> None:
    assert outcome(guest.vcpu.kick) == Errno(EINVAL)
    thread = threading.Thread(target=guest.vcpu.accept_kicks)
    thread.start()
    thread.join()
    wait_until(lambda: outcome(guest.vcpu.kick) == Errno(ESRCH), "the end of the thread")


def test_a_kick_does_no_harm_to_a_thread_that_expects_none() -> None:
    assert signal.getsignal(KICK) == signal.SIG_DFL
    os.kill(os.getpid(), KICK)


def test_a_signal_with_a_handler_ends_the_run(guest: Machine) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: seen.append(number))
    try:
        guest.start(SPIN)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(InterruptedError):
            guest.vcpu.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen == [signal.SIGALRM]
    assert guest.vcpu.kvm_run.exit_reason == ExitReason.INTR


def test_a_signal_outside_the_mask_does_not_end_the_run(guest: Machine) -> None:
    with own_thread() as call:
        guest.start(OUTS)
        call(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, (KICK,)))
        call(lambda: guest.vcpu.set_signal_mask((KICK,)))
        call(lambda: signal.pthread_kill(threading.get_ident(), KICK))
        assert call(guest.vcpu.run) == ExitReason.IO
        call(lambda: guest.vcpu.set_signal_mask(()))
        assert call(lambda: outcome(guest.vcpu.run)) == Errno(EINTR)


def test_a_vcpu_that_waits_to_be_started_is_eagain_or_runs(guest: Machine) -> None:
    with guest.vm.create_vcpu(1) as second:
        assert outcome(second.get_mp_state) in (0, 1)
        second.kvm_run.immediate_exit = 1
        assert outcome(second.run) in (Errno(EINTR), Errno(EAGAIN))


@contextmanager
def own_thread() -> Generator[Callable[[Callable[[], object]], object]]:
    """Yield a function that calls others in one thread, whose signal mask is its own."""
    asked: list[Callable[[], object]] = []
    given: list[object] = []
    turn = threading.Condition()
    ended = False

    def body() -> None:
        with turn:
            while turn.wait_for(lambda: asked or ended) and not ended:
                given.append(asked.pop()())
                turn.notify_all()

    def call(function: Callable[[], object]) -> object:
        with turn:
            asked.append(function)
            turn.notify_all()
            assert turn.wait_for(lambda: given, 10), "the thread did not answer"
            return given.pop()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    try:
        yield call
    finally:
        with turn:
            ended = True
            turn.notify_all()
        thread.join()
