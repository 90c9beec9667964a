"""A debug policy opens registers, memory, breakpoints and single steps.

Without it they stay closed.
"""

import os
import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import pytest

from planting import always, stub
from restrictedmem.abi import kvm_x86, memory
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.kvm import debug_requests
from restrictedmem.kvm.software.guest_debug import GuestDebug
from restrictedmem.protocol import exits
from restrictedmem.protocol.exits import BREAKPOINT, DR6_BS, SINGLE_STEP, Debug
from restrictedmem.protocol.guest_abi import HYPERCALL_PAGE
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.vm import Vcpu, Vm
from software_machine import CODE, DATA, DEVICE, STACK, Machine, machine_code, make_machine

EPERM, EFAULT, EINVAL, EPROTO, EOPNOTSUPP = 1, 14, 22, 71, 95
GPA = 0x4000_0000
NOWHERE = 0x7000_0000


def step(pc: int) -> Debug:
    return Debug(SINGLE_STEP, pc, DR6_BS)


def stop(pc: int) -> Debug:
    return Debug(BREAKPOINT, pc)


# On the software engine, instruction by instruction.


@pytest.fixture
def machine() -> Iterator[Machine]:
    with make_machine() as found:
        yield found


def test_each_instruction_is_one_step(machine: Machine) -> None:
    code = machine_code(
        "48c7c003000000",  # mov    rax, 3
        "50",  # push   rax
        "59",  # pop    rcx
        "e2fe",  # loop   .
        "e640",  # out    0x40, al
        "90",  # nop
        "f4",  # hlt
    )
    machine.start(code)
    machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
    for offset in (7, 8, 9, 9, 9, 11):
        assert machine.vcpu.run() == step(CODE + offset)
    assert machine.engine.get_regs().rcx == 0
    # The exit first, then the step that it was.
    assert machine.vcpu.run() == exits.PortOut(0x40, 1, 3)
    assert machine.vcpu.run() == step(CODE + 13)
    assert machine.vcpu.run() == step(CODE + 14)
    assert machine.vcpu.run() == exits.Shutdown(13)
    assert not machine.engine.get_regs().rflags & 0x100


def test_steps_go_through_ports_and_devices(machine: Machine) -> None:
    code = machine_code(
        "e440",  # in     al, 0x40
        "a0000000d000000000",  # mov    al, [DEVICE]
        "a2000000d000000000",  # mov    [DEVICE], al
        "90",  # nop
    )
    machine.start(code)
    machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
    assert machine.vcpu.run() == exits.PortIn(0x40, 1)
    assert machine.go_on(0x11) == step(CODE + 2)
    assert machine.vcpu.run() == exits.MmioRead(DEVICE, 1)
    assert machine.go_on(0x22) == step(CODE + 11)
    assert machine.engine.get_regs().rax & 0xFF == 0x22
    assert machine.vcpu.run() == exits.MmioWrite(DEVICE, 1, 0x22)
    assert machine.vcpu.run() == step(CODE + 20)


def test_a_step_goes_across_a_hypercall(machine: Machine) -> None:
    code = machine_code(
        "b900001000",  # mov    ecx, HYPERCALL_PAGE
        "b802000000",  # mov    eax, 2
        "ffd1",  # call   rcx
        "4889c3",  # mov    rbx, rax
        "f4",  # hlt
    )
    assert HYPERCALL_PAGE == 0x100000
    machine.start(code)
    machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
    for pc in (CODE + 5, CODE + 10, HYPERCALL_PAGE):
        assert machine.vcpu.run() == step(pc)
    assert machine.vcpu.run() == exits.Hypercall(2, (DATA, 0, 0, 0))
    assert machine.go_on(77) == step(HYPERCALL_PAGE + 2)
    assert machine.vcpu.run() == step(CODE + 12)
    assert machine.vcpu.run() == step(CODE + 15)
    assert machine.engine.get_regs().rbx == 77


def test_a_breakpoint_on_the_hypercall_page_stops_before_the_call(machine: Machine) -> None:
    machine.start(machine_code("b900001000", "ffd1", "f4"))
    machine.engine.set_guest_debug(step=False, breakpoints=frozenset({HYPERCALL_PAGE}))
    assert machine.vcpu.run() == stop(HYPERCALL_PAGE)
    machine.engine.set_guest_debug(step=False, breakpoints=frozenset())
    assert machine.vcpu.run() == exits.Hypercall(0, (DATA, 0, 0, 0))


def test_a_breakpoint_stops_before_its_instruction_and_leaves_no_trace_in_memory(
    machine: Machine,
) -> None:
    code = machine_code(
        "48ffc0",  # inc    rax
        "8a1df7ffffff",  # mov    bl, [rip - 9]    (the byte that the breakpoint is on)
        "ebf5",  # jmp    back to inc
    )
    machine.start(code)
    # Translated before there is a breakpoint.
    machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
    for _ in range(3):
        machine.vcpu.run()
    machine.engine.set_guest_debug(step=False, breakpoints=frozenset({CODE}))
    for _ in range(2):
        # It comes again until it is taken away.
        assert machine.vcpu.run() == stop(CODE)
    assert machine.engine.get_regs().rax == 1
    assert machine.engine.get_regs().rbx == 0x48
    machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
    assert machine.vcpu.run() == step(CODE + 3)
    machine.engine.set_guest_debug(step=False, breakpoints=frozenset({CODE, CODE + 9}))
    assert machine.vcpu.run() == stop(CODE + 9)
    assert machine.engine.get_regs().rax == 2


def test_registers_change_on_the_way(machine: Machine) -> None:
    machine.start(machine_code("90", "e642", "90", "e643"))
    machine.engine.set_guest_debug(step=True, breakpoints=frozenset())
    assert machine.vcpu.run() == step(CODE + 1)
    regs = machine.engine.get_regs()
    assert (regs.rip, regs.rsp, regs.rdi) == (CODE + 1, STACK, DATA)
    regs.rax, regs.r15, regs.rip = 0x5A, 0xFEDC_BA98_7654_3210, CODE + 4
    machine.engine.change_regs(regs)
    machine.engine.set_guest_debug(step=False, breakpoints=frozenset())
    assert machine.vcpu.run() == exits.PortOut(0x43, 1, 0x5A)
    assert machine.engine.get_regs().r15 == 0xFEDC_BA98_7654_3210


def test_a_jump_away_from_an_unanswered_load_forgets_it(machine: Machine) -> None:
    load = machine_code("a0000000d000000000")  # mov al, [DEVICE]
    machine.start(load + machine_code("e642"))
    assert machine.vcpu.run() == exits.MmioRead(DEVICE, 1)
    regs = machine.engine.get_regs()
    assert regs.rip == CODE
    regs.rip, regs.rax = CODE + len(load), 9
    machine.engine.change_regs(regs)
    assert machine.go_on(0x77) == exits.PortOut(0x42, 1, 9)


def test_special_registers(machine: Machine) -> None:
    machine.start(machine_code("f4"))
    sregs = machine.engine.get_sregs()
    assert (sregs.cs.selector, sregs.ss.selector, sregs.cs.selector & 3) == (0x23, 0x1B, 3)
    assert sregs.cr0 & 1


# The message.


def body(control: int, *addresses: int, registers: dict[int, int] | None = None) -> bytes:
    found = kvm_x86.kvm_guest_debug(control=control)
    for number, value in (registers or {}).items():
        found.debugreg[number] = value
    return bytes(found) + struct.pack(f"={len(addresses)}Q", *addresses)


def test_what_kvm_guest_debug_means() -> None:
    on, software, hardware = (
        kvm_x86.KVM_GUESTDBG_ENABLE,
        kvm_x86.KVM_GUESTDBG_USE_SW_BP,
        kvm_x86.KVM_GUESTDBG_USE_HW_BP,
    )
    assert debug_requests.parse(body(on | kvm_x86.KVM_GUESTDBG_SINGLESTEP)) == (True, frozenset())
    assert debug_requests.parse(body(on | software, 1, 2)) == (False, frozenset({1, 2}))
    assert debug_requests.parse(body(on, 1, 2)) == (False, frozenset())
    assert debug_requests.parse(body(kvm_x86.KVM_GUESTDBG_SINGLESTEP | software, 1)) == (
        False,
        frozenset(),
    )
    # DR0 locally, DR2 globally enabled; DR1 not.
    assert debug_requests.parse(body(on | hardware, registers={0: 10, 1: 11, 2: 12, 7: 0x21})) == (
        False,
        frozenset({10, 12}),
    )
    for bad, errno in (
        (body(on)[:-1], EPROTO),
        (body(on) + b"\0", EPROTO),
        (body(on | hardware, registers={7: 0x10001}), EOPNOTSUPP),
    ):
        with pytest.raises(OSError) as caught:
            debug_requests.parse(bad)
        assert caught.value.errno == errno


# A VM in its engine process.


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start(Options()) as found:
        yield found


def errno_of(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


def private_vm(vm: Vm, service: Service, code: bytes) -> Vcpu:
    """Four pages of private memory, the last two of them shared; ``code`` in the first page."""
    fd = service.memfd_restricted()
    os.ftruncate(fd, 4 * PAGE_SIZE)
    with memory.memfd_create("shared") as shared:
        os.ftruncate(shared.fileno(), 4 * PAGE_SIZE)
        vm.set_user_memory_region(
            slot=0,
            guest_phys_addr=GPA,
            memory_size=4 * PAGE_SIZE,
            restricted_fd=fd,
            shared_fd=shared.fileno(),
        )
        os.pwrite(shared.fileno(), b"shared" * 2, 2 * PAGE_SIZE)
    vm.set_memory_attributes(GPA, 2 * PAGE_SIZE, private=True)
    vm.launch_update(GPA, code.ljust(PAGE_SIZE, b"\0"))
    vcpu = vm.create_vcpu()
    vcpu.set_regs(rip=GPA)
    os.close(fd)
    return vcpu


@pytest.mark.requires("fuse")
def test_without_the_policy_everything_is_refused(service: Service) -> None:
    with (
        Vm(service, engine="software") as vm,
        private_vm(vm, service, bytes.fromhex("e642 ebfc")) as vcpu,
    ):
        for _ in range(2):
            assert errno_of(vcpu.get_regs) == EPERM
            assert errno_of(vcpu.get_sregs) == EPERM
            assert errno_of(lambda: vcpu.set_guest_debug(step=True)) == EPERM
            assert errno_of(vm.read_memory, GPA, 1) == EPERM
            assert errno_of(vm.write_memory, GPA, b"\xf4") == EPERM
            assert vcpu.run() == exits.PortOut(0x42, 1, 0)
        assert errno_of(vcpu.change_regs, kvm_regs(rip=GPA)) == EPERM


@pytest.mark.requires("fuse")
def test_the_policy_is_in_the_measurement(service: Service) -> None:
    found: set[bytes] = set()
    for policy in (False, True):
        with Vm(service, engine="software", debug=policy) as vm, private_vm(vm, service, b"\xf4"):
            found.add(vm.launch_finish())
    assert len(found) == 2


@pytest.mark.requires("fuse")
def test_before_the_launch_ends_registers_are_as_narrow_as_ever(service: Service) -> None:
    with Vm(service, engine="software", debug=True) as vm, private_vm(vm, service, b"\xf4") as vcpu:
        assert errno_of(vcpu.change_regs, kvm_regs(rip=GPA, rax=1)) == EINVAL
        vm.launch_finish()
        vcpu.change_regs(kvm_regs(rip=GPA, rax=1, rflags=0x3002))
        assert vcpu.get_regs().rax == 1


@pytest.mark.requires("fuse")
def test_memory_as_the_guest_has_it(service: Service) -> None:
    with (
        Vm(service, engine="software", debug=True) as vm,
        private_vm(vm, service, bytes.fromhex("b042 e642 ebfa")) as vcpu,
    ):
        assert vm.read_memory(GPA, 4) == bytes.fromhex("b042 e642")
        # From a private page that nobody took into a shared one.
        held = vm.statistics()["pages_taken"]
        assert vm.read_memory(GPA + 2 * PAGE_SIZE - 3, 9) == b"\0\0\0shared"
        assert vm.statistics()["pages_taken"] == held
        assert vcpu.run() == exits.PortOut(0x42, 1, 0x42)
        # The code that the vCPU has translated.
        vm.write_memory(GPA + 1, b"\x17")
        assert vcpu.run() == exits.PortOut(0x42, 1, 0x17)
        vm.write_memory(GPA + 2 * PAGE_SIZE - 2, b"both")
        assert vm.read_memory(GPA + 2 * PAGE_SIZE - 2, 6) == b"bothar"
        assert len(vm.read_memory(GPA, 4 * PAGE_SIZE)) == 4 * PAGE_SIZE
        for where, size in ((NOWHERE, 1), (GPA + 4 * PAGE_SIZE - 1, 2)):
            assert errno_of(vm.read_memory, where, size) == EFAULT
            assert errno_of(vm.write_memory, where, bytes(size)) == EFAULT


@pytest.mark.requires("fuse")
def test_steps_and_breakpoints_by_the_owner(service: Service) -> None:
    code = bytes.fromhex("48ffc0 48ffc0 e642 ebf6")  # inc rax; inc rax; out; jmp back
    with Vm(service, engine="software", debug=True) as vm, private_vm(vm, service, code) as vcpu:
        vcpu.set_guest_debug(breakpoints=[GPA + 3])
        assert vcpu.run() == stop(GPA + 3)
        assert vcpu.get_regs().rax == 1
        vcpu.set_guest_debug(step=True)
        assert vcpu.run() == step(GPA + 6)
        regs = vcpu.get_regs()
        regs.rax = 0x55
        vcpu.change_regs(regs)
        vcpu.set_guest_debug()
        assert vcpu.run() == exits.PortOut(0x42, 1, 0x55)
        assert vcpu.get_sregs().cs.selector == 0x23


def test_the_last_breakpoint_takes_its_hooks_out_of_translated_code() -> None:
    """Translated code calls the hooks that it was translated with, removed or not."""
    did: list[str] = []

    @contextmanager
    def maintenance() -> Generator[None]:
        did.append("stop")
        yield
        did.append("go on")

    def hook_code(address: int, _: object) -> str:
        return f"hook at {address}"

    def unhook(hook: str) -> None:
        did.append(f"no {hook}")

    uc = stub(
        registers=always(None),
        hook_code=hook_code,
        stop_inside_blocks=always(None),
        flush_code=lambda: did.append("flush"),
        unhook=unhook,
    )
    debug = GuestDebug(uc, stub(maintenance=maintenance), always(None))
    debug.set(step=False, breakpoints=frozenset({1}))
    assert did == ["flush"]
    debug.set(step=True, breakpoints=frozenset())
    assert did == ["flush"]
    debug.set(step=False, breakpoints=frozenset())
    assert did == ["flush", "stop", "no hook at 1", "go on", "flush"]
    assert not debug.has_hook(1)
