"""Thousands of slots: the containers' answers, and that the number of slots slows no call down."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from design_files import make_file, punch
from model_backing import Recorder
from restrictedmem.abi.kvm import kvm_userspace_memory_region_ext
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm import vm_memory
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine_vcpu import EngineVcpus
from restrictedmem.kvm.half import forbid_shrinking
from restrictedmem.kvm.kernel.slots import KernelSlots
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.kvm.memslots import Memslots
from restrictedmem.kvm.software.software_vm import SoftwareVm
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.mm.notifier import Api
from restrictedmem.platform.platform import NoPlatform
from restrictedmem.protocol import exits
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SHIFT, gfn_t, pgoff_t
from restrictedmem.vmm.vm import Vm
from software_machine import HALTED, machine_code, make_machine, shared_half

GPA = 0x4000_0000
WINDOW = 0x1000_0000
PAGE = 4096
COUNT = 256


def slot(number: int, base: int, npages: int) -> Memslot:
    return Memslot(number, gfn_t(base), npages, private=None, shared=None)


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20), st.booleans()), max_size=40))
def test_slots_are_found_as_a_list_finds_them(wanted: list[tuple[int, int, bool]]) -> None:
    slots = Memslots()
    kept: list[Memslot] = []
    for number, (base, npages, remove) in enumerate(wanted):
        overlaps = [one for one in kept if one.base_gfn < base + npages and one.end_gfn > base]
        assert slots.overlapping(base, base + npages) == sorted(
            overlaps, key=lambda one: one.base_gfn
        )
        if overlaps and remove:
            kept.remove(overlaps[0])
            slots.remove(overlaps[0])
        elif not overlaps:
            kept.append(slot(number, base, npages))
            slots.add(kept[-1])
    assert list(slots) == kept
    assert len(slots) == len(kept)
    for gfn in range(230):
        assert slots.at(gfn) is next(
            (one for one in kept if one.base_gfn <= gfn < one.end_gfn), None
        )
    assert [slots.get(number) for number in range(40)] == [
        next((s for s in kept if s.number == n), None) for n in range(40)
    ]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start() as found:
        yield found


@pytest.fixture(params=["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))])
def vm(request: pytest.FixtureRequest, service: Service) -> Iterator[Vm]:
    with Vm(service, engine=request.param) as found:
        yield found


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("vcpus_first", [False, True])
def test_a_guest_reaches_each_of_many_slots(service: Service, vm: Vm, vcpus_first: bool) -> None:
    """The guest adds up the first bytes of all slots.

    They were made in another order than they lie, and some were made anew.
    """
    fd = service.memfd_restricted()
    os.ftruncate(fd, PAGE)
    vm.set_user_memory_region(slot=COUNT, guest_phys_addr=GPA, memory_size=PAGE, restricted_fd=fd)
    os.close(fd)
    vm.set_memory_attributes(GPA, PAGE, private=True)
    vcpu = vm.create_vcpu() if vcpus_first else None
    window = os.memfd_create("window", os.MFD_ALLOW_SEALING)
    os.ftruncate(window, 2 * COUNT * PAGE)
    for index in range(COUNT):
        os.pwrite(window, bytes([index & 0x7F, 1]), index * PAGE)

    def make(number: int) -> None:
        at = number * PAGE
        vm.set_user_memory_region(
            slot=number,
            guest_phys_addr=WINDOW + at,
            memory_size=PAGE,
            shared_fd=window,
            shared_offset=at,
        )

    order = [index * 37 % COUNT for index in range(COUNT)]
    for number in order:
        make(number)
    for number in order[::3]:
        vm.set_user_memory_region(
            slot=number, guest_phys_addr=WINDOW + number * PAGE, memory_size=0
        )
    for number in reversed(order[::3]):
        make(number)
    code = bytes.fromhex(
        "be00000010"  # mov    esi, WINDOW
        "31db"  # xor    ebx, ebx
        f"b9{COUNT.to_bytes(4, 'little').hex()}"  # mov    ecx, COUNT
        "0fb606"  # movzx  eax, byte [rsi]
        "01c3"  # add    ebx, eax
        "c6460201"  # mov    byte [rsi + 2], 1
        "81c600100000"  # add    esi, 4096
        "ffc9"  # dec    ecx
        "75ed"  # jnz    back to movzx
        "89d8"  # mov    eax, ebx
        "b900001000ffd1"  # mov    ecx, HYPERCALL_PAGE; call rcx
    )
    vm.launch_update(GPA, code.ljust(PAGE, b"\0"))
    with vcpu or vm.create_vcpu() as found:
        found.set_regs(rip=GPA, rsp=GPA + PAGE)
        exit_ = found.run()
        assert isinstance(exit_, exits.Hypercall)
        assert exit_.number == sum(index & 0x7F for index in range(COUNT))
        assert all(os.pread(window, 1, index * PAGE + 2) == b"\1" for index in range(COUNT))
    os.close(window)


def test_a_slot_is_mapped_when_the_guest_touches_it() -> None:
    """Unicorn takes as long to map a slot as there are others that are mapped."""
    with make_machine(vcpus=2) as machine, ExitStack() as made:
        slots = [
            Memslot(number, gfn_t(0x20000 + number), 1, private=None, shared=shared_half(1))
            for number in range(2, 50)
        ]
        for one in slots:
            made.callback(one.close)
            machine.mmu.add_slot(one)
            for engine in machine.engines:
                engine.add_slot(one)
        # mov al, [0x20007000], [0x20008000], [0x20007001]; hlt
        code = machine_code("a00070002000000000", "a00080002000000000", "a00170002000000000", "f4")
        for number, engine in enumerate(machine.engines):
            assert engine._memory._views == []
            # The second finds translations that the first has made.
            machine.start(code, vcpu=number)
            assert machine.vcpus.all[number].run() == HALTED
            # The slot of the code, and those two.
            assert len(engine._memory._views) == 3
            engine.remove_slot(slots[5])
            assert len(engine._memory._views) == 2


def cost_of(act: Callable[[], object]) -> int:
    """Count the instructions of Python that something takes."""
    count = 0

    def traced(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def test_no_call_takes_longer_for_the_slots_there_are() -> None:
    attributes = Attributes(Api.V10)
    engine = SoftwareVm(cast("Any", None), EngineVcpus(), attributes, Trace(), NoPlatform())
    memory = VmMemory(engine, cast("Any", None), Api.V10, attributes, forbid_shrinking)
    with OwnedFd(os.memfd_create("window", os.MFD_ALLOW_SEALING)) as fd:
        os.ftruncate(fd.fileno(), PAGE)

        def change(number: int, at: int, size: int = PAGE) -> None:
            region = kvm_userspace_memory_region_ext(
                slot=number, flags=0, guest_phys_addr=at, memory_size=size, userspace_addr=0
            )
            memory.set_region(region, b"", fd)

        def calls(number: int) -> list[int]:
            at = GPA + number * 2 * PAGE
            return [
                cost_of(partial(change, number, at)),
                cost_of(partial(change, number, at + PAGE)),
                cost_of(partial(change, number, at)),
                cost_of(partial(memory.slot_of, at >> PAGE_SHIFT)),
                cost_of(partial(engine.mmu.slot_of, at >> PAGE_SHIFT)),
                cost_of(lambda: engine.mmu.wait_settled(unless=lambda: False)),
                cost_of(partial(memory.set_attributes, Api.V10, at, PAGE, 0, 0)),
                cost_of(partial(change, number, at, 0)),
            ]

        # A slot on a memfd that no slot shows yet takes longer.
        change(1, GPA + 2 * PAGE)
        first = calls(0)
        for number in range(2, 500):
            change(number, GPA + number * 2 * PAGE)
        # Where a slot lies changes it by a few; to look at each of 500 takes more than 500.
        assert calls(500) == [pytest.approx(cost, abs=50) for cost in first]
        for number in range(1, 500):
            change(number, GPA, 0)


class Reports:
    """The service, as far as a VM tells it for ``ps``, at times of the test's choice."""

    def __init__(self) -> None:
        self.now = 100.0
        self.heard = 0
        self.error = 0

    def monotonic(self) -> float:
        return self.now

    def call(self, *_: object) -> None:
        self.heard += 1
        if self.error:
            raise OSError(self.error, "REPORT")


def test_ps_hears_of_many_changes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    service, attributes = Reports(), Attributes(Api.V10)
    monkeypatch.setattr(vm_memory, "time", service)
    memory = VmMemory(
        cast("Any", None), cast("Any", service), Api.V10, attributes, forbid_shrinking
    )
    assert memory.report_due_in() is None
    for _ in range(1000):
        memory._changed()
    assert service.heard == 1
    due = memory.report_due_in()
    assert due is not None
    assert 0 < due <= 0.05
    memory.report_if_due()
    assert service.heard == 1
    service.now += due
    assert memory.report_due_in() == 0
    memory.report_if_due()
    assert (service.heard, memory.report_due_in()) == (2, None)
    # Later, the next change is told at once. No slot fails for it.
    service.now, service.error = service.now + 1, 107
    memory._changed()
    assert (service.heard, memory.report_due_in()) == (3, None)


@pytest.mark.parametrize("design", ["v10", "bindings"])
def test_no_registration_of_a_file_takes_longer_for_those_there_are(design: str) -> None:
    """Each slot of a VM is one, and when the VM ends each of them goes."""
    file = make_file(design)
    recorders = [Recorder(file.backing) for _ in range(501)]

    def register(recorder: Recorder) -> None:
        if file.design.binds:
            start = 2 * recorders.index(recorder)
            file.bind(pgoff_t(start), pgoff_t(start + 1), recorder, exclusive=True)
        else:
            file.register_notifier(recorder)

    def calls(recorder: Recorder) -> list[int]:
        unregister = partial(file.unregister_notifier, recorder)
        return [
            cost_of(partial(register, recorder)),
            cost_of(lambda: file.notifier_count),
            cost_of(unregister),
        ]

    file.sequence()
    first = calls(recorders[0])
    for recorder in recorders[1:]:
        register(recorder)
    assert calls(recorders[0]) == [pytest.approx(cost, abs=50) for cost in first]
    punch(file, 0, 2000)
    assert calls(recorders[0]) == [pytest.approx(cost, abs=50) for cost in first]
    for recorder in recorders[1:]:
        file.unregister_notifier(recorder)
    assert [len(recorder.heard) for recorder in recorders] == [0] + 500 * [2]
    file.put()


class NoVm:
    """/dev/kvm's VM, and the engine's own memory, as far as slots need them."""

    address = 0

    def set_user_memory_region(self, *_: int) -> None:
        """Do nothing."""

    def delete_memory_region(self, _number: int) -> None:
        """Do nothing."""


def test_the_kernels_slots_take_no_longer_either() -> None:
    slots = KernelSlots(cast("Any", NoVm()), cast("Any", NoVm()))

    def calls() -> list[int]:
        base = 0

        def add() -> None:
            nonlocal base
            base = slots.add(PAGE, 0, None)

        return [
            cost_of(add),
            cost_of(lambda: slots.base_below(base)),
            cost_of(lambda: slots.remove(base)),
        ]

    first = calls()
    bases = [slots.add(PAGE, 0, None) for _ in range(500)]
    assert calls() == [pytest.approx(cost, abs=50) for cost in first]
    # A gap is filled where there is one that is large enough, and a number is given again.
    for base in bases[10:14]:
        slots.remove(base)
    assert slots.add(5 * PAGE, 0, None) == bases[-1] + PAGE
    assert sorted(slots.add(PAGE, 0, None) for _ in range(4)) == bases[10:14]
    numbers = sorted(slots._numbers.values())
    assert numbers == list(range(1, 502))
