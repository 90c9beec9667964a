"""The launch: what is measured and how, when it is over, and that nothing of a guest leaves its engine afterwards."""

import os
import select
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha384
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcomes import failing_at, in_child
from restrictedmem import guests
from restrictedmem.abi import kvm, memory
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.conversions import Conversions
from restrictedmem.kvm.engine_vcpu import EngineVcpu as KvmVcpu
from restrictedmem.kvm.launch import Launch
from restrictedmem.kvm.machine import Machine
from restrictedmem.kvm.report_hypercall import Reporter
from restrictedmem.kvm.vcpu_socket import VcpuSocket
from restrictedmem.protocol import exits, guest_abi, vm_wire
from restrictedmem.protocol.measurement import Measurement, measure
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Call, Channel
from restrictedmem.vmm import elf
from restrictedmem.vmm.vm import Vcpu, Vm
from restrictedmem.vmm.vmm import Vmm, expected_measurement

GPA = 0x4000_0000
STACK = GPA + 0x8000
MIB = 1 << 20
PAGE = 4096
EPERM, EIO, ENOMEM, EFAULT, EINVAL, ENOSPC = 1, 5, 12, 14, 22, 28


@pytest.fixture(scope="module", params=["v10", "v9"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with Service.start(Options(api=request.param)) as found:
        yield found


@pytest.fixture(params=["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))])
def engine(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def errno_of(call: Callable[..., object], *args: object, **kwargs: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)
    assert caught.value.errno is not None
    return caught.value.errno


# The measurement itself.


@dataclass(frozen=True)
class Launched:
    """All that a measurement is made of."""

    policy: int
    pages: tuple[tuple[int, bytes], ...]
    registers: tuple[tuple[int, ...], ...]
    private: tuple[tuple[int, int, int, int], ...]

    def measured(self) -> bytes:
        return measure(
            self.policy,
            self.pages,
            [kvm_regs.from_buffer_copy(struct.pack("<18Q", *regs)) for regs in self.registers],
            self.private,
        )

    def by_the_book(self) -> bytes:
        """Compute it as docs/use/reports.md has it, from nothing of the package."""
        value = sha384(b"restrictedmem launch 1\0" + struct.pack("<II", self.policy, 0)).digest()
        for gpa, content in self.pages:
            for start in range(0, len(content), PAGE):
                digest = sha384(content[start : start + PAGE]).digest()
                value = sha384(value + struct.pack("<IIQ", 1, 0, gpa + start) + digest).digest()
        for number, regs in enumerate(self.registers):
            value = sha384(
                value
                + struct.pack("<IIQ", 2, 0, number)
                + sha384(struct.pack("<18Q", *regs)).digest()
            ).digest()
        for gpa, *rest in sorted(self.private):
            value = sha384(
                value + struct.pack("<IIQ", 3, 0, gpa) + sha384(struct.pack("<QQQ", *rest)).digest()
            ).digest()
        return value


VECTORS = {
    "nothing": (
        Launched(0, (), (), ()),
        "71a1eb64f794590096cb3140cf374fe956fa75f8e2023db4797f4910000422a99ea4cbb8a5c497ce4c60bc1239346994",
    ),
    "a page": (
        Launched(0, ((GPA, bytes(range(256)) * 16),), (), ()),
        "85b73019e1b82861cd370d2ba8bb11863f949beeb862b091f14226f56e19f1da51179f37b90fd0dbb807684d2a4dedb0",
    ),
    "all there is": (
        Launched(
            3,
            ((GPA, b"\x90" * 2 * PAGE), (GPA, bytes(PAGE))),
            (tuple(range(18)), (0,) * 18),
            ((GPA, MIB, 0, 2),),
        ),
        "bd1bbf9eef2a85796eba17f2aab417df66fdc8c711fb9202c0705bedbc35e0a8ee74cf204de4d89fca8cb68117500ffa",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_recorded_measurements(name: str) -> None:
    launched, recorded = VECTORS[name]
    assert launched.measured().hex() == recorded
    assert launched.by_the_book().hex() == recorded


_PAGES = st.tuples(
    st.integers(0, 1 << 32).map(lambda gfn: gfn * PAGE),
    st.binary(min_size=1, max_size=8).map(lambda data: data.ljust(PAGE, b"\0")),
)
_REGISTERS = st.tuples(*[st.integers(0, (1 << 64) - 1)] * 18)
_RUNS = st.tuples(
    *[st.integers(0, 1 << 32).map(lambda page: page * PAGE)] * 3, st.sampled_from((0, 2))
)
LAUNCHES = st.builds(
    Launched,
    st.integers(0, 3),
    st.lists(_PAGES, max_size=4).map(tuple),
    st.lists(_REGISTERS, max_size=2).map(tuple),
    st.lists(_RUNS, max_size=2, unique_by=lambda run: run[0]).map(lambda runs: tuple(sorted(runs))),
)


@given(LAUNCHES)
def test_measurements_by_the_book(launched: Launched) -> None:
    assert launched.measured() == launched.by_the_book()


@given(LAUNCHES, LAUNCHES)
def test_another_launch_has_another_measurement(one: Launched, other: Launched) -> None:
    assert (one.measured() == other.measured()) == (one == other)


@given(
    LAUNCHES.filter(lambda launched: launched.pages and launched.registers and launched.private),
    st.data(),
)
def test_every_change_of_a_launch_changes_the_measurement(
    launched: Launched, data: st.DataObject
) -> None:
    gpa, content = page = data.draw(st.sampled_from(launched.pages))
    at, bit = data.draw(st.integers(0, PAGE - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    index = launched.pages.index(page)

    def with_page(*instead: tuple[int, bytes]) -> Launched:
        return replace(
            launched, pages=(*launched.pages[:index], *instead, *launched.pages[index + 1 :])
        )

    regs = list(launched.registers[0])
    regs[data.draw(st.integers(0, 17))] ^= 1 << data.draw(st.integers(0, 63))
    run, *runs = launched.private
    others = [
        replace(launched, policy=launched.policy ^ 1 << data.draw(st.integers(0, 31))),
        with_page((gpa, bytes(changed))),
        with_page((gpa ^ PAGE << data.draw(st.integers(0, 30)), content)),
        with_page(),
        with_page(page, page),
        replace(launched, registers=(tuple(regs), *launched.registers[1:])),
        replace(launched, registers=(*launched.registers, (0,) * 18)),
        replace(launched, private=((run[0], run[1] ^ PAGE, *run[2:]), *runs)),
        replace(launched, private=((*run[:2], run[2] ^ PAGE, run[3]), *runs)),
        replace(launched, private=((*run[:3], run[3] ^ 2), *runs)),
        replace(launched, private=tuple(runs)),
    ]
    if launched.pages != launched.pages[::-1]:
        others.append(replace(launched, pages=launched.pages[::-1]))
    assert launched.measured() not in [other.measured() for other in others]


def test_the_same_words_as_another_record_are_not_the_same() -> None:
    page, regs = bytes(PAGE), kvm_regs()
    as_page, as_registers = Measurement(0), Measurement(0)
    as_page.add_pages(0, bytes(regs).ljust(PAGE, b"\0"))
    as_registers.set_registers(0, regs)
    assert as_page.finish(()) != as_registers.finish(())
    assert measure(0, [(0, page)], [], ()) != measure(0, [], [], [(0, 0, 0, 0)])


# Its states.


def test_a_launch_is_open_until_it_is_finished() -> None:
    said: list[bytes] = []
    launch = Launch(0, tuple, said.append)
    with launch.opened() as measurement:
        measurement.add_pages(0, bytes(PAGE))
    first = launch.finish()
    assert first == measure(0, [(0, bytes(PAGE))], [], ()) == launch.finish()
    assert said == [first]
    with pytest.raises(PermissionError), launch.opened():
        pytest.fail("it was opened again")


def test_registers_count_as_they_were_set_last_and_in_the_order_of_vcpus() -> None:
    launch = Launch(0, tuple, lambda _: None)
    with launch.opened() as measurement:
        for vcpu, rip in ((1, 5), (0, 6), (1, 7)):
            measurement.set_registers(vcpu, kvm_regs(rip=rip))
    assert launch.finish() == measure(0, [], [kvm_regs(rip=6), kvm_regs(rip=7)], ())


def test_what_cannot_be_announced_is_not_finished() -> None:
    failures = [OSError(EIO, "the service is gone")]

    def announce(_: bytes) -> None:
        if failures:
            raise failures.pop()

    launch = Launch(0, tuple, announce)
    with launch.opened() as measurement:
        measurement.set_registers(0, kvm_regs(rip=1))
    assert errno_of(launch.finish) == EIO
    assert launch.finish() == measure(0, [], [kvm_regs(rip=1)], ())


# In an engine.


def private_slot(vm: Vm, service: Service, fd: int) -> None:
    vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd)
    if service.info["api"] == "v10":
        vm.set_memory_attributes(GPA, MIB, private=True)


@pytest.fixture
def fd(service: Service) -> Iterator[int]:
    found = service.memfd_restricted()
    os.ftruncate(found, MIB)
    yield found
    os.close(found)


@pytest.fixture
def vm(service: Service, fd: int, engine: str) -> Iterator[Vm]:
    with Vm(service, engine=engine) as found:
        private_slot(found, service, fd)
        yield found


@pytest.fixture
def explicit(service: Service, fd: int, engine: str) -> Iterator[Vm]:
    """A VM whose pages become shared only when its guest asks, with a shared half."""
    with Vm(service, engine=engine, explicit=True) as found, memory.memfd_create("half") as half:
        os.ftruncate(half.fileno(), MIB)
        found.set_user_memory_region(
            slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd, shared_fd=half.fileno()
        )
        if service.info["api"] == "v10":
            found.set_memory_attributes(GPA, MIB, private=True)
        yield found


# movl $0, %eax; out %al, $0xf4 on the hypercall page is reached by: mov $0x100000,%ecx; call *%rcx
_CALL = "b900001000 ffd1"


def mov(register: int, value: int) -> str:
    """Return ``movabs $value, register``, by the register's number."""
    return (
        bytes([0x48 | register >> 3, 0xB8 | register & 7]).hex()
        + (value & (1 << 64) - 1).to_bytes(8, "little").hex()
    )


RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R10 = 10


def hypercall(number: int, *arguments: int) -> str:
    return (
        "".join(
            mov(register, value)
            for register, value in zip(
                (RAX, RDI, RSI, RDX, R10), (number, *arguments), strict=False
            )
        )
        + _CALL
    )


def code(*instructions: str) -> bytes:
    found = bytes.fromhex("".join(instructions))
    return found.ljust(-(-len(found) // PAGE) * PAGE, b"\xf4")


def start(vm: Vm, content: bytes) -> Vcpu:
    vm.launch_update(GPA, content)
    vcpu = vm.create_vcpu()
    vcpu.set_regs(rip=GPA, rsp=STACK)
    return vcpu


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
    """A machine, as far as LAUNCH_UPDATE needs one, whose call of a number finds no memory, or whose write fails."""

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
        """Say whether memory was missing, and whether content was written, was measured, and keeps its slot."""
        content = vm_wire.LAUNCH.pack(GPA) + b"a" * PAGE
        failed = failing_at(failing, lambda: self.machine._launch_update(content))
        # Not by ``finish``: a call that found no memory may have been the one to let go of the
        # mutex.
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
    """The same page of the file at a second address: content that came in there would be in no measurement."""
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


# Conversions at the guest's word.

SHARED_PAGE = GPA + 16 * PAGE


@pytest.mark.requires("fuse")
def test_pages_become_shared_only_when_the_guest_asks(service: Service, explicit: Vm) -> None:
    ask = hypercall(guest_abi.MAP_GPA_RANGE, SHARED_PAGE, 2, 0)
    take_back = hypercall(
        guest_abi.MAP_GPA_RANGE, SHARED_PAGE, 2, guest_abi.MAP_GPA_RANGE_ENCRYPTED
    )
    # mov %rax, %rdi: tells what it was told
    tell = "4889c7" + mov(RAX, guest_abi.EXIT) + _CALL
    with start(
        explicit, code(hypercall(guest_abi.EXIT, 1), ask, take_back, tell, take_back, tell)
    ) as vcpu:
        vcpu.run()
        assert errno_of(explicit.convert, SHARED_PAGE, PAGE, private=False) == EPERM
        asked = exits.Hypercall(guest_abi.MAP_GPA_RANGE, (SHARED_PAGE, 2, 0, 0))
        assert vcpu.run() == asked
        assert errno_of(explicit.convert, SHARED_PAGE, 3 * PAGE, private=False) == EPERM
        assert errno_of(explicit.convert, SHARED_PAGE - PAGE, 2 * PAGE, private=False) == EPERM
        explicit.convert(SHARED_PAGE, 2 * PAGE, private=False)
        vcpu.run(0)
        explicit.convert(SHARED_PAGE, PAGE, private=True)
        assert errno_of(vcpu.run, 0) == EPERM, "one page is shared still"
        explicit.convert(SHARED_PAGE, 2 * PAGE, private=False)
        assert vcpu.run(0) == exits.Hypercall(guest_abi.EXIT, ((1 << 64) - EIO, 0, 0, 0)), (
            "both are shared still"
        )
        vcpu.run(0)
        explicit.convert(SHARED_PAGE, 2 * PAGE, private=True)
        assert vcpu.run(0) == exits.Hypercall(guest_abi.EXIT, (0, 0, 0, 0))


@pytest.mark.requires("fuse")
def test_slots_that_were_private_at_the_launch_stay(service: Service, explicit: Vm) -> None:
    with start(explicit, code(hypercall(guest_abi.EXIT, 1))) as vcpu:
        with OwnedFd(service.memfd_restricted()) as other:
            os.ftruncate(other.fileno(), PAGE)
            explicit.set_user_memory_region(
                slot=5, guest_phys_addr=GPA + MIB, memory_size=PAGE, restricted_fd=other.fileno()
            )
        explicit.set_user_memory_region(slot=5, guest_phys_addr=GPA + MIB, memory_size=0)
        explicit.launch_finish()
        with OwnedFd(service.memfd_restricted()) as other:
            os.ftruncate(other.fileno(), PAGE)
            again = {
                "guest_phys_addr": GPA + MIB,
                "memory_size": PAGE,
                "restricted_fd": other.fileno(),
            }
            assert errno_of(explicit.set_user_memory_region, slot=5, **again) == EPERM
        assert (
            errno_of(explicit.set_user_memory_region, slot=0, guest_phys_addr=GPA, memory_size=0)
            == EPERM
        )
        # Others come and go.
        with memory.memfd_create("window") as window:
            os.ftruncate(window.fileno(), PAGE)
            explicit.set_user_memory_region(
                slot=1, guest_phys_addr=0x1000_0000, memory_size=PAGE, shared_fd=window.fileno()
            )
            explicit.set_user_memory_region(slot=1, guest_phys_addr=0x1000_0000, memory_size=0)
        assert vcpu.run() == exits.Hypercall(guest_abi.EXIT, (1, 0, 0, 0))


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(
    "asked",
    [
        (SHARED_PAGE + 1, 1, 0),
        (SHARED_PAGE, 0, 0),
        (SHARED_PAGE, (1 << 64) - 1, 16),
        (0, (1 << 64) - 1, 16),
        ((1 << 64) - PAGE, 2, 0),
    ],
)
def test_words_of_a_guest_that_mean_nothing(
    service: Service, explicit: Vm, asked: tuple[int, int, int]
) -> None:
    with start(
        explicit, code(hypercall(guest_abi.MAP_GPA_RANGE, *asked), hypercall(guest_abi.EXIT, 1))
    ) as vcpu:
        assert vcpu.run() == exits.Hypercall(guest_abi.MAP_GPA_RANGE, (*asked, 0))
        assert errno_of(explicit.convert, SHARED_PAGE, PAGE, private=False) == EPERM
        assert vcpu.run(0) == exits.Hypercall(guest_abi.EXIT, (1, 0, 0, 0))


# Nothing else leaves the engine.

SECRET = int.from_bytes(b"\xf5secret\x9b", "little")
#: All but rsp, which a call needs.
_FULL = "".join(mov(register, SECRET) for register in range(16) if register != RSP)

OFFENCES = {
    "hlt": "f4",
    "ud2": "0f0b",
    "div by zero": mov(RCX, 0) + mov(RDX, 0) + "48f7f1",
    "int3": "cc",
    "syscall": "0f05",
    "load where nothing is": "48a1" + (0x9000_0000).to_bytes(8, "little").hex(),
    "load where nothing can be": "488b03",
    "call where nothing is": mov(RAX, 0x9000_0000) + "ffd0",
    "cpuid": "0fa2f4",
    "out": "e642",
    "in": "e442",
    "string out": mov(RSI, GPA) + mov(RDX, 0x42) + "6e",
    **{
        f"hypercall {number}": mov(RAX, number)
        + "".join(
            mov(register, 0)
            for register in (RDI, RSI, RDX, R10)[: guest_abi.ARGUMENTS.get(number, 4)]
        )
        + _CALL
        for number in (*guest_abi.ARGUMENTS, 6, 1000)
        if number != guest_abi.REPORT
    },
}


def replies(sock: Channel, number: int, body: bytes) -> bytes:
    """Make a call, whatever the number, and return all that comes back."""
    try:
        data, _ = sock.call(Call("a call", number), body)
    except OSError as error:
        return str(error).encode()
    return data


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("offence", OFFENCES)
def test_no_exit_shows_a_register_that_the_guest_did_not_pass(vm: Vm, offence: str) -> None:
    secret = SECRET.to_bytes(8, "little")
    with start(vm, code(_FULL, OFFENCES[offence])) as vcpu:
        channel: Channel = vcpu._channel  # pyright: ignore[reportPrivateUsage]
        found = [replies(channel, vm_wire.RUN.number, vm_wire.COMPLETION.pack(0)) for _ in range(3)]
    for reply in found:
        # Nor a piece of one: ports are a byte wide, and nothing else is asked for.
        assert not any(secret[at : at + 2] in reply for at in range(7)), reply.hex()


@pytest.mark.requires("fuse")
def test_no_message_shows_a_register_or_private_memory(vm: Vm) -> None:
    secret = SECRET.to_bytes(8, "little")
    numbers = [call.number for call in vars(vm_wire).values() if isinstance(call, Call)] + [
        0,
        1,
        1 << 16,
        1 << 31,
        kvm.KVM_RUN.request + 2,
    ]
    bodies = [
        b"",
        struct.pack("<Q", GPA),
        struct.pack("<QQ", GPA, PAGE),
        struct.pack("<QQQQ", GPA, PAGE, 0, 0),
        bytes(144),
        bytes(160),
    ]
    with start(
        vm, code(_FULL, hypercall(guest_abi.EXIT, 1), "ebfe") + secret * (PAGE // 8)
    ) as vcpu:
        assert isinstance(vcpu.run(), exits.Hypercall)
        mine: Channel = vm._channel  # pyright: ignore[reportPrivateUsage]
        its: Channel = vcpu._channel  # pyright: ignore[reportPrivateUsage]
        for channel, runs in ((mine, False), (its, True)):
            for number in numbers:
                for body in bodies:
                    if not (
                        runs
                        and number == vm_wire.RUN.number
                        and len(body) == vm_wire.COMPLETION.size
                    ):
                        reply = replies(channel, number, body)
                        assert secret[:4] not in reply, (hex(number), reply)
                        assert secret[4:] not in reply, (hex(number), reply)


@pytest.mark.requires("fuse")
def test_a_port_shows_as_many_bytes_as_it_is_wide(vm: Vm, engine: str) -> None:
    if engine == "kernel":
        pytest.skip("ports in private memory: docs/reference/engines.md")
    with start(vm, code(_FULL, mov(RAX, SECRET), "e642", "66e742", "e742")) as vcpu:
        assert [vcpu.run() for _ in range(3)] == [
            exits.PortOut(0x42, size, SECRET & (1 << 8 * size) - 1) for size in (1, 2, 4)
        ]


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
