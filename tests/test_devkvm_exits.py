"""Exits of a vCPU of /dev/kvm, and ways to take it out of the guest."""

import ctypes
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EAGAIN, EFAULT, EINTR, EINVAL, ESRCH

import pytest

from devkvm_machine import CODE, OUTS, SPIN, Machine, guest
from outcomes import Errno, outcome
from planting import stub
from restrictedmem.abi.kvm import EHWPOISON, Cap, ExitReason, kvm_regs
from restrictedmem.abi.kvm_x86 import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_SYNC_X86_REGS,
)
from restrictedmem.devkvm import Kvm, VcpuFd, address_of
from restrictedmem.devkvm.vcpu_fd import KICK
from restrictedmem.units import PAGE_SIZE
from waiting import wait_until

__all__ = ["guest"]

pytestmark = pytest.mark.requires("kvm")


# Exits.


@pytest.mark.parametrize("errno", [EFAULT, EINTR, EAGAIN])
def test_a_failure_without_a_memory_fault_is_an_error(errno: int) -> None:
    """EFAULT is also the errno of a page that the kernel cannot get for another reason."""
    ctypes.set_errno(errno)
    with pytest.raises(OSError, match="KVM_RUN") as found:
        VcpuFd._run_failed(stub(_thread=0), stub(exit_reason=0))
    assert found.value.errno == errno


@pytest.mark.parametrize("errno", [EFAULT, EHWPOISON])
def test_a_memory_fault_is_an_exit_with_an_errno(errno: int) -> None:
    ctypes.set_errno(errno)
    vcpu = stub(_thread=0)
    VcpuFd._run_failed(vcpu, stub(exit_reason=ExitReason.MEMORY_FAULT))
    assert vcpu.run_errno == errno


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
