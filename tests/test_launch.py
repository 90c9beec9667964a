"""The launch in an engine: what it measures, and when the launch is over."""

import os
import select
import struct
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launching import (
    GPA,
    STACK,
    code,
    engine,
    errno_of,
    explicit,
    fd,
    hypercall,
    private_slot,
    service,
    start,
    vm,
)
from outcomes import failing_at, in_child
from restrictedmem import guests
from restrictedmem.abi import kvm
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.conversions import Conversions
from restrictedmem.kvm.engine_vcpu import EngineVcpu as KvmVcpu
from restrictedmem.kvm.launch import Launch
from restrictedmem.kvm.machine import Machine
from restrictedmem.kvm.report_hypercall import Reporter
from restrictedmem.kvm.vcpu_socket import VcpuSocket
from restrictedmem.protocol import exits, guest_abi, vm_wire
from restrictedmem.protocol.measurement import measure
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Call, Channel
from restrictedmem.vmm import elf
from restrictedmem.vmm.boot import expected_measurement
from restrictedmem.vmm.vm import Vm
from restrictedmem.vmm.vmm import Vmm

__all__ = ["engine", "explicit", "fd", "service", "vm"]

MIB = 1 << 20
PAGE = 4096
EPERM, EIO, ENOMEM, EFAULT, EINVAL, ENOSPC = 1, 5, 12, 14, 22, 28


# In an engine.


@pytest.mark.requires("fuse")
def test_an_engine_measures_what_it_was_given(vm: Vm) -> None:
    # Enough for several messages.
    content = os.urandom(70 * PAGE)
    with vm.create_vcpu() as vcpu:
        vm.launch_update(GPA + PAGE, content)
        vm.launch_update(GPA, bytes(PAGE))
        vcpu.set_regs(rip=GPA, rsp=1, rdi=2, rsi=3)
        found = vm.launch_finish()
        regs = [kvm_regs(rip=GPA, rsp=1, rdi=2, rsi=3)]
        assert (
            found
            == measure(0, [(GPA + PAGE, content), (GPA, bytes(PAGE))], regs, [(GPA, MIB, 0, 0)])
            == vm.launch_finish()
        )


@pytest.mark.requires("fuse")
def test_a_vcpu_without_registers_is_measured_too(vm: Vm) -> None:
    with vm.create_vcpu():
        assert vm.launch_finish() == measure(0, [], [kvm_regs()], [(GPA, MIB, 0, 0)])


@pytest.mark.requires("fuse")
def test_private_memory_is_measured_as_it_is_at_the_end(service: Service, vm: Vm) -> None:
    vm.convert(GPA + 4 * PAGE, 2 * PAGE, private=False)
    rest = MIB - 6 * PAGE
    assert vm.launch_finish() == measure(
        0, [], [], [(GPA, 4 * PAGE, 0, 0), (GPA + 6 * PAGE, rest, 6 * PAGE, 0)]
    )


@pytest.mark.requires("fuse")
def test_where_private_memory_lies_is_measured(service: Service, engine: str, fd: int) -> None:
    half = MIB // 2
    with Vm(service, engine=engine) as vm:
        for slot, gpa, offset, readonly in ((0, GPA, half, False), (1, GPA + half, 0, True)):
            vm.set_user_memory_region(
                slot=slot,
                guest_phys_addr=gpa,
                memory_size=half,
                restricted_fd=fd,
                restricted_offset=offset,
                readonly=readonly,
            )
        if service.info["api"] == "v10":
            vm.set_memory_attributes(GPA, MIB, private=True)
        assert vm.launch_finish() == measure(
            0, [], [], [(GPA, half, half, 0), (GPA + half, half, 0, kvm.KVM_MEM_READONLY)]
        )


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_the_policy_is_measured(service: Service, engine: str, debug: bool, explicit: bool) -> None:
    with Vm(service, engine=engine, debug=debug, explicit=explicit) as vm:
        assert vm.launch_finish() == measure(debug | explicit << 1, [], [], ())


@pytest.mark.requires("fuse")
def test_an_update_that_fails_is_not_measured(service: Service, vm: Vm) -> None:
    vm.launch_update(GPA, bytes(PAGE))
    vm.convert(GPA + 8 * PAGE, PAGE, private=False)
    for gpa, content, errno in (
        (GPA + 1, bytes(PAGE), EINVAL),
        (GPA, bytes(PAGE - 1), EINVAL),
        (GPA, bytes(PAGE + 1), EINVAL),
        (GPA - PAGE, bytes(PAGE), EFAULT),
        (GPA + MIB - PAGE, bytes(2 * PAGE), EFAULT),
        (GPA + 7 * PAGE, bytes(2 * PAGE), EFAULT),
        ((1 << 64) - PAGE, bytes(PAGE), EFAULT),
    ):
        assert errno_of(vm.launch_update, gpa, content) == errno, hex(gpa)
    rest = MIB - 9 * PAGE
    assert vm.launch_finish() == measure(
        0, [(GPA, bytes(PAGE))], [], [(GPA, 8 * PAGE, 0, 0), (GPA + 9 * PAGE, rest, 9 * PAGE, 0)]
    )


@pytest.mark.requires("fuse")
def test_an_update_that_finds_no_memory_writes_and_measures_nothing() -> None:
    with (
        Service.start(Options(memory_max=4 * PAGE)) as service,
        OwnedFd(service.memfd_restricted()) as fd,
    ):
        os.ftruncate(fd.fileno(), MIB)
        # debug: to look for what was written.
        with Vm(service, engine="software", debug=True) as vm:
            private_slot(vm, service, fd.fileno())
            vm.launch_update(GPA, b"a" * PAGE)
            assert errno_of(vm.launch_update, GPA, b"b" * 8 * PAGE) == ENOSPC
            assert vm.read_memory(GPA, 8 * PAGE) == b"a" * PAGE + bytes(7 * PAGE)
            assert vm.launch_finish() == measure(1, [(GPA, b"a" * PAGE)], [], [(GPA, MIB, 0, 0)])


class _Update:
    """A machine, as far as LAUNCH_UPDATE needs it, with a failure.

    The call of a number finds no memory, or the write fails.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.written, self.held = error, False, False
        slot = SimpleNamespace(number=0)
        memory = SimpleNamespace(slot_of={GPA >> 12: slot}.get, launch_update=self._write, slots=[])
        reporter = SimpleNamespace(launched=None)
        owner, creation = (
            SimpleNamespace(reply=lambda: None),
            SimpleNamespace(policy=vm_wire.POLICY_EXPLICIT),
        )
        none, vcpus = cast(Any, None), SimpleNamespace(held=self._held)
        self.machine = Machine(
            cast(Any, owner),
            none,
            cast(Any, memory),
            none,
            cast(Any, vcpus),
            cast(Any, creation),
            cast(Any, reporter),
            none,
        )

    @contextmanager
    def _held(self) -> Generator[None]:
        self.held = True
        yield
        self.held = False

    def _write(self, *_: object) -> None:
        # A vCPU of the kernel engine writes, whose registers the owner may ask for in a debug VM.
        assert self.held
        if self.error is not None:
            raise self.error
        self.written = True

    def update(self, failing: int) -> tuple[bool, bool, bool, bool]:
        """Say whether memory was missing, and whether content was written and measured.

        The last value says whether the content keeps its slot.
        """
        content = vm_wire.LAUNCH.pack(GPA) + b"a" * PAGE
        failed = failing_at(failing, lambda: self.machine._launch_update(content))
        # This does not use ``finish``: a call that found no memory may have been the one to release
        # the mutex.
        value = self.machine._launch._measurement.finish(())
        measured = {measure(2, [], [], []): False, measure(2, [(GPA, b"a" * PAGE)], [], []): True}[
            value
        ]
        return failed, self.written, measured, 0 in self.machine._conversions._filled


def test_what_is_put_in_is_measured_whatever_fails() -> None:
    """Its owner may limit the engine's memory at every moment (prlimit)."""
    done, outcomes = repr((False, True, True, True)), list[str]()
    while done not in outcomes:
        outcomes.append(in_child(partial(_Update().update, len(outcomes))))
    # "": the engine ended.
    assert set(outcomes) == {
        "",
        repr((True, False, False, False)),
        repr((True, True, True, True)),
        done,
    }
    assert in_child(partial(_Update(RuntimeError("a part may be there")).update, 1000)) == ""


def test_what_was_not_put_in_is_neither_measured_nor_kept() -> None:
    update = _Update(OSError(EFAULT, "refused"))
    assert errno_of(update.machine._launch_update, vm_wire.LAUNCH.pack(GPA) + bytes(PAGE)) == EFAULT
    assert update.update(0) == (True, False, False, False)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("platform", ["", "snp", "snp-unmapped"])
def test_what_a_platform_refuses_was_never_there(platform: str) -> None:
    """The same page of the file is at a second address.

    Content written there would be in no measurement.
    """
    honest, other = (
        bytes.fromhex("b048e642").ljust(PAGE, b"\0"),
        bytes.fromhex("b045e642").ljust(PAGE, b"\0"),
    )
    with Service.start() as service, Vm(service, explicit=True, platform=platform) as vm:
        fd = service.memfd_restricted()
        private_slot(vm, service, fd)
        vm.launch_update(GPA, honest)
        alias = GPA + (1 << 28)
        vm.set_user_memory_region(slot=1, guest_phys_addr=alias, memory_size=MIB, restricted_fd=fd)
        vm.set_memory_attributes(alias, MIB, private=True)
        if platform:
            assert errno_of(vm.launch_update, alias, other) == EFAULT
            vm.set_user_memory_region(slot=1, guest_phys_addr=alias, memory_size=0)
            with vm.create_vcpu() as vcpu:
                vcpu.set_regs(rip=GPA, rsp=STACK)
                assert vcpu.run() == exits.PortOut(0x42, 1, ord("H"))
        else:
            # It went in, so the slot stays, and such a launch has no end.
            vm.launch_update(alias, other)
            assert (
                errno_of(vm.set_user_memory_region, slot=1, guest_phys_addr=alias, memory_size=0)
                == EPERM
            )
            assert errno_of(vm.launch_finish) == EINVAL
        os.close(fd)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("by_run", [False, True])
def test_after_the_launch_everything_is_the_guests_own(vm: Vm, by_run: bool) -> None:
    with start(vm, code(hypercall(guest_abi.EXIT, 7))) as vcpu:
        if by_run:
            assert vcpu.run() == exits.Hypercall(guest_abi.EXIT, (7, 0, 0, 0))
        before = vm.launch_finish()
        assert errno_of(vm.launch_update, GPA, bytes(PAGE)) == EPERM
        assert errno_of(vm.launch_update, GPA, b"x") == EPERM
        assert errno_of(vcpu.set_regs, rip=GPA) == EPERM
        assert errno_of(vm.create_vcpu) == EPERM
        assert vm.launch_finish() == before
        if not by_run:
            assert vcpu.run() == exits.Hypercall(guest_abi.EXIT, (7, 0, 0, 0))


@pytest.mark.requires("fuse")
def test_content_goes_in_few_messages(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    call = Channel.call

    def counted(self: Channel, what: Call, body: bytes = b"", fds: Sequence[int] = ()) -> Any:
        calls.append(what.name)
        return call(self, what, body, fds)

    monkeypatch.setattr(Channel, "call", counted)
    vm.launch_update(GPA, bytes(MIB))
    assert calls == ["LAUNCH_UPDATE"] * 9


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(("name", "vcpus"), [*((name, 1) for name in guests.names()), ("spin", 3)])
def test_what_to_expect_is_known_without_running(
    service: Service, engine: str, name: str, vcpus: int
) -> None:
    image = elf.parse(guests.path(name).read_bytes())
    with Vmm(4 * MIB, service, engine=engine, vcpus=vcpus) as vmm:
        vmm.load(image, ["an", "argument"])
        expected = expected_measurement(
            image,
            ["an", "argument"],
            private_size=4 * MIB,
            vcpus=vcpus,
            policy=vm_wire.POLICY_EXPLICIT,
        )
        assert vmm.launch_finish() == expected


# An engine without memory, which its owner can see to (prlimit).


class _Failing:
    """Conversions for which the memory does not suffice."""

    def asked(self, *_: int) -> None:
        raise MemoryError

    def answered(self, _: object, result: int) -> int:
        return result


def test_a_vcpu_that_lost_an_exit_runs_no_more() -> None:
    """Or its owner would answer a conversion that nobody has noted."""
    told: list[int] = []
    vcpu = SimpleNamespace(
        run=lambda: exits.Hypercall(
            guest_abi.MAP_GPA_RANGE, (GPA, 1, guest_abi.MAP_GPA_RANGE_ENCRYPTED, 0)
        ),
        complete=told.append,
    )
    channel, theirs = Channel.pair("owner")
    with theirs, select.epoll() as watched:
        watched.register(channel.fileno(), 0)
        made = VcpuSocket(
            0,
            channel,
            watched,
            vm_wire.POLICY_EXPLICIT,
            cast(Launch, _launch()),
            cast(Conversions, _Failing()),
            cast(Reporter, None),
            Trace(),
        )
        made.begin(cast(KvmVcpu, vcpu))
        for expected in (ENOMEM, EIO, EIO):
            theirs.send(struct.pack("=IIQ", vm_wire.RUN.number, 0, 0))
            assert struct.unpack_from("=I", theirs.recv(1000)) == (expected,)
        assert told == []
        watched.unregister(channel.fileno())
        vcpu.interrupt = lambda: None
        made.let_go()


def _launch() -> SimpleNamespace:
    return SimpleNamespace(finish=lambda: b"", finished=True)
