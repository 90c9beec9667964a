"""A call that fails leaves nothing behind.

The engine keeps no descriptor, mapping, thread or slot, and the service no binding.
"""

import fcntl
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from processes import descriptors
from restrictedmem.abi import memory
from restrictedmem.abi import process as this_process
from restrictedmem.failure import FAULT
from restrictedmem.kvm import checker
from restrictedmem.kvm import engine_process as kvm_process
from restrictedmem.kvm.software.software_vcpu import SoftwareVcpu
from restrictedmem.kvm.software.uc import Uc
from restrictedmem.protocol import exits, vm_wire
from restrictedmem.protocol.measurement import measure
from restrictedmem.protocol.vm_wire import Creation
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vm
from software_machine import machine_code, make_machine

pytestmark = pytest.mark.requires("fuse")

GPA = 0x4000_0000
PAGE, MIB = 4096, 1 << 20
EAGAIN, ENOMEM, EFAULT, EEXIST, EINVAL, EMFILE, EPROTO = 11, 12, 14, 17, 22, 24, 71
OUT_LOOP = bytes.fromhex("e642 ebfc")  # out %al, $0x42; jmp back
_PR_SET_MDWE = 65


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start() as found:
        yield found


@pytest.fixture(params=["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))])
def vm(request: pytest.FixtureRequest, service: Service) -> Iterator[Vm]:
    with Vm(service, engine=request.param) as found:
        yield found


@pytest.fixture
def fd(service: Service) -> Iterator[int]:
    found = service.memfd_restricted()
    os.ftruncate(found, MIB)
    yield found
    os.close(found)


@dataclass(frozen=True)
class Held:
    """The objects that a VM's engine and its service hold."""

    descriptors: list[str]
    threads: int
    mappings: list[str]
    private_bytes: int
    notifiers: list[int]


def held(service: Service, vm: Vm) -> Held:
    pid = int(vm.statistics()["pid"])
    mapped = [
        line.split()[-1]
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
        if "memfd:" in line
    ]
    return Held(
        sorted(link.split(":")[0] for link in descriptors(pid)),
        len(os.listdir(f"/proc/{pid}/task")),
        sorted(mapped),
        vm.statistics()["private_bytes"],
        [file["notifiers"] for file in service.status()["descriptors"]],
    )


def leave_room(pid: int, size: int) -> None:
    """Let a process's address space grow by so many bytes, and no more."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * PAGE + size, resource.RLIM_INFINITY))


@pytest.mark.requires("root")
@pytest.mark.parametrize(
    ("room", "errno"), [(MIB, EAGAIN), (64 * MIB, ENOMEM)], ids=["no thread", "no emulator"]
)
def test_a_vcpu_without_memory_is_an_errno_and_the_vm_goes_on(
    service: Service, fd: int, room: int, errno: int
) -> None:
    with Vm(service, engine="software") as vm:
        vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=PAGE, restricted_fd=fd)
        vm.set_memory_attributes(GPA, PAGE, private=True)
        vm.launch_update(GPA, OUT_LOOP.ljust(PAGE, b"\0"))
        pid = int(vm.statistics()["pid"])
        before = held(service, vm)
        leave_room(pid, room)
        for _ in range(3):
            with pytest.raises(OSError) as caught:
                vm.create_vcpu()
            assert caught.value.errno == errno
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        wait_held(service, vm, before)
        with vm.create_vcpu() as vcpu:
            assert vcpu.number == 0
            vcpu.set_regs(rip=GPA)
            assert vcpu.run() == exits.PortOut(0x42, 1, 0)


def wait_held(service: Service, vm: Vm, expected: Held) -> None:
    """Wait for threads and sockets that are on their way out."""
    last = held(service, vm)
    for _ in range(2000):
        if last == expected:
            return
        os.sched_yield()
        last = held(service, vm)
    assert last == expected


@pytest.mark.parametrize(
    ("hook", "instruction"),
    [("_on_interrupt", "cc"), ("_on_system_call", "0f05"), ("_on_in", "e442"), ("_on_out", "e642")],
    ids=["int3", "syscall", "in", "out"],
)
def test_a_guest_does_not_pass_what_a_hook_had_no_memory_for(
    monkeypatch: pytest.MonkeyPatch, hook: str, instruction: str
) -> None:
    def fail(*_: object) -> int:
        raise MemoryError

    def run(*_: object) -> object:
        # One that passes it may go on for ever.
        signal.alarm(20)
        with make_machine() as machine:
            machine.start(machine_code(instruction, "f4"))
            machine.vcpu.run()
        os._exit(7)

    monkeypatch.setattr(SoftwareVcpu, hook, fail)
    monkeypatch.setattr(checker, "start", run)
    owner, service, notify, _ = sockets = [*socket.socketpair(), *socket.socketpair()]
    pid = os.fork()
    if pid == 0:
        try:
            kvm_process.serve(owner, service, notify, Options(), Creation("software", 0, "").dump())
        finally:
            os._exit(9)
    for sock in sockets:
        sock.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == FAULT


def test_where_memory_is_not_executable_a_vcpu_is_enomem() -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            this_process.prctl(_PR_SET_MDWE, 1)
        except OSError:
            os._exit(77)
        try:
            Uc()
        except OSError as error:
            status = error.errno or 1
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(ended) == 77:
        pytest.skip("PR_SET_MDWE came with Linux 6.3")
    assert os.waitstatus_to_exitcode(ended) == ENOMEM


Call = Callable[[Vm, int, int], object]


def region(vm: Vm, fd: int | None, shared: int | None = None, **changed: int) -> None:
    right = {"slot": 0, "guest_phys_addr": GPA, "memory_size": PAGE}
    given: dict[str, Any] = {**right, **changed}
    vm.set_user_memory_region(**given, restricted_fd=fd, shared_fd=shared)


F_SEAL_FUTURE_WRITE = 0x10


@cache
def sealed(size: int, seal: int = fcntl.F_SEAL_SEAL) -> int:
    memfd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, size)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seal)
    return memfd


#: By name: a call of the VM that fails, with a restricted descriptor and a memfd of one page, and
#: its errno.
FAILURES: dict[str, tuple[Call, int]] = {
    "restricted_offset": (lambda vm, fd, _: region(vm, fd, restricted_offset=1), EINVAL),
    "slot number": (lambda vm, fd, _: region(vm, fd, slot=1 << 20), EINVAL),
    "overlap": (lambda vm, fd, _: region(vm, fd, guest_phys_addr=0x10_0000), EEXIST),
    "no restricted file": (lambda vm, _, memfd: region(vm, memfd), EINVAL),
    "memfd too small": (lambda vm, fd, memfd: region(vm, fd, memfd, memory_size=2 * PAGE), EINVAL),
    "memfd sealed": (lambda vm, fd, _: region(vm, fd, sealed(PAGE)), EINVAL),
    "memfd sealed against writing": (
        lambda vm, fd, _: region(vm, fd, sealed(PAGE, fcntl.F_SEAL_WRITE)),
        EINVAL,
    ),
    "memfd sealed against later writing": (
        lambda vm, fd, _: region(vm, fd, sealed(PAGE, F_SEAL_FUTURE_WRITE)),
        EINVAL,
    ),
    "another kind of file": (lambda vm, fd, _: region(vm, fd, 0), EINVAL),
    "deletion of nothing": (lambda vm, fd, _: region(vm, None, memory_size=0), EINVAL),
    "more than there is": (lambda vm, fd, _: region(vm, fd, memory_size=(1 << 31) * PAGE), EINVAL),
    "attributes": (
        lambda vm, _fd, _memfd: vm.set_memory_attributes(GPA + 1, PAGE, private=True),
        EINVAL,
    ),
    "launch_update": (lambda vm, _fd, _memfd: vm.launch_update(GPA, bytes(PAGE)), EFAULT),
    "injection": (lambda vm, _fd, _memfd: vm.inject_failure(GPA), EFAULT),
    "trace": (lambda vm, _fd, _memfd: vm._channel.call(vm_wire.TRACE, b"1"), EPROTO),
}


@pytest.mark.requires("root")
@pytest.mark.parametrize("name", FAILURES)
def test_a_call_that_fails_leaves_nothing_behind(
    service: Service, vm: Vm, fd: int, name: str
) -> None:
    call, errno = FAILURES[name]
    with memory.memfd_create("half", os.MFD_ALLOW_SEALING) as memfd:
        os.ftruncate(memfd.fileno(), PAGE)
        before = held(service, vm)
        # More often than a connection may have tokens.
        for _ in range(70):
            with pytest.raises(OSError) as caught:
                call(vm, fd, memfd.fileno())
            assert caught.value.errno == errno
        assert held(service, vm) == before
        if name != "memfd sealed":
            assert not fcntl.fcntl(memfd.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    region(vm, fd)
    vm.set_memory_attributes(GPA, PAGE, private=True)
    vm.launch_update(GPA, bytes(PAGE))
    measured = vm.launch_finish()
    assert measured == measure(0, [(GPA, bytes(PAGE))], [], [(GPA, PAGE, 0, 0)])


@pytest.mark.requires("root")
def test_an_engine_without_descriptors_left_is_an_errno_and_hears_of_punches(
    service: Service, vm: Vm, fd: int
) -> None:
    pid = int(vm.statistics()["pid"])
    before = held(service, vm)
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    # There is room for none of the two that come with a binding, then for one.
    for room in (1, 2):
        taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        free = [number for number in range(len(taken) + 3) if number not in taken]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[room - 1], hard))
        for call in (partial(region, vm, fd), vm.create_vcpu)[: 3 - room]:
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == EMFILE
        memory.fallocate(fd, memory.PUNCH, 0, PAGE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert held(service, vm) == before
    region(vm, fd)
