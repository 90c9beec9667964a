"""A call that fails half way undoes its work: slots, bindings, emulators, traces.

No descriptor is at stake here. The table has the places that undo by themselves, and the work that
each has to undo.
"""

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import pytest

from planting import PlantedError, always, fail, stub
from restrictedmem.abi import kvm, process, seccomp
from restrictedmem.consumer import consumer
from restrictedmem.fd import OwnedFd, spare
from restrictedmem.kvm import vcpu_socket, vm_memory
from restrictedmem.kvm.kernel import kernel_vm, private, slots
from restrictedmem.kvm.software import physical, software_vcpu, software_vm
from restrictedmem.machine import syscall
from restrictedmem.protocol import trace_events
from restrictedmem.protocol.vm_wire import NO_NAMES
from restrictedmem.service import consumer_process
from restrictedmem.units import PAGE_SIZE, PageRange, gfn_t, pgoff_t

BASE: Final = 0x10000
WINDOW: Final = PageRange(pgoff_t(0), pgoff_t(4))


class Undone(list[str]):
    """The work that was undone."""

    def note(self, what: str) -> Callable[..., None]:
        return lambda *_: self.append(what)


def slot(**parts: object) -> Any:
    return stub(base_gfn=gfn_t(0), end_gfn=gfn_t(4), attributes=bytearray(4), **parts)


def software_add(undone: Undone, _: pytest.MonkeyPatch) -> None:
    engines = [
        stub(add_slot=str, remove_slot=undone.note("first")),
        stub(add_slot=fail, remove_slot=undone.note("second")),
    ]
    mmu = stub(add_slot=str, remove_slot=undone.note("mmu"))
    vm = stub(mmu=mmu, _engines=engines)
    vm.remove_slot = partial(software_vm.SoftwareVm.remove_slot, vm)
    software_vm.SoftwareVm.add_slot(vm, slot())


def software_create(undone: Undone, patch: pytest.MonkeyPatch) -> None:
    engine = stub(add_slot=fail, close=undone.note("vcpu"))
    patch.setattr(software_vm, "SoftwareVcpu", always(engine))
    vm = stub(_engines=[], mmu=stub(slots=[slot()]), _report_page=None, _turns=None, _code=None)
    try:
        software_vm.SoftwareVm.create_vcpu(vm, 0)
    finally:
        assert vm._engines == []


def software_vcpu_(undone: Undone, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(software_vcpu, "Uc", lambda: stub(close=undone.note("emulator")))
    patch.setattr(software_vcpu.SoftwareVcpu, "_set_up", fail)
    some = stub(join=fail, add_vcpu=fail)
    software_vcpu.SoftwareVcpu(stub(), stub(), some, some)


def software_show(undone: Undone, _: pytest.MonkeyPatch) -> None:
    def map_first(_: object) -> object:
        return views.pop() if views else fail()

    views = [stub(base=0)]
    memory = stub(_map=map_first, _unmap=undone.note("shared view"))
    window = stub(slot=slot(shared=stub(), private=stub(), memfd_half=stub(half=stub())))
    physical.PhysicalMemory.show(memory, window)


def kernel_add(undone: Undone, _: pytest.MonkeyPatch) -> None:
    vm = stub(_conversion=stub(add=str, remove=undone.note("conversion")), _slots=stub(add=fail))
    kernel_vm.KernelVm.add_slot(vm, slot(shared=None))


def tables_add(undone: Undone, patch: pytest.MonkeyPatch) -> None:
    tables = stub(reserve=always(None), write=fail)
    by = slots.ByAddress(stub(add=always(BASE), remove=undone.note("slot")), tables)
    patch.setattr(by, "remove", undone.note("whole"))
    by.add(slot(private=None, shared=stub(address=0), rights=0))


def attributes_reserve(undone: Undone, _: pytest.MonkeyPatch) -> None:
    some = stub(add=always(BASE), remove=undone.note("slot"))
    slots.ByAttribute(stub(), some, stub(reserve=fail)).add(
        slot(private=None, shared=stub(address=0))
    )


def attributes_convert(undone: Undone, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slots.ByAttribute, "convert", fail)
    patch.setattr(slots.ByAttribute, "remove", undone.note("whole"))
    some = stub(add=always(BASE), remove=undone.note("slot"))
    slots.ByAttribute(stub(), some, stub(reserve=always(None))).add(
        slot(private=None, shared=stub(address=0))
    )


def private_bind(undone: Undone, _: pytest.MonkeyPatch) -> None:
    with os.fdopen(os.memfd_create("bound"), "rb") as file:
        fd = stub(fileno=file.fileno, close=undone.note("descriptor"))
        bound = stub(number=5, ino=1, memfd=fd, sequence=fd, flags=0, limit=None)
        binder = stub(bind=always(bound), unbind=undone.note("binding"))
        files = private.PrivateFiles(stub(create_guest_memfd=fail), binder, 0)
        files.bind(b"", WINDOW)


def private_show(undone: Undone, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(private, "GuestMemfdHalf", fail)
    files = private.PrivateFiles(stub(), stub(unbind=undone.note("binding")), 0)
    file = stub(ranged=True, bindings=set[int](), size=4 * PAGE_SIZE, check_limit=str, ino=1)
    patch.setattr(files, "_let_go", undone.note("window"))
    files._show(file, 5, WINDOW)


def slot_of_two_halves(undone: Undone, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vm_memory, "Memslot", fail)
    patch.setattr(vm_memory, "SharedHalf", always(stub(close=undone.note("shared"))))
    vm = stub(
        _engine=stub(bind=always(stub(close=undone.note("private")))),
        _shared_files=stub(of_fd=always(stub())),
    )
    region = kvm.kvm_userspace_memory_region_ext(
        slot=0,
        flags=kvm.KVM_MEM_PRIVATE,
        guest_phys_addr=0,
        memory_size=PAGE_SIZE,
        userspace_addr=0,
    )
    vm_memory.VmMemory._create(vm, region, b"", stub(fileno=int), NO_NAMES)


def vcpu_runs(undone: Undone, _: pytest.MonkeyPatch) -> None:
    vcpu = stub(_lost=False, _run_guest=fail)
    try:
        vcpu_socket.VcpuSocket._run(vcpu, 0)
    finally:
        undone += ["lost"] * vcpu._lost


def notifier_is_made(undone: Undone, _: pytest.MonkeyPatch) -> None:
    some = stub(_remember=undone.note("deaf"), unbind=undone.note("binding"))
    consumer.Consumer._register(some, 1, fail)


def service_binds(undone: Undone, _: pytest.MonkeyPatch) -> None:
    backing = stub(base_order=0)
    process = stub(bindings={}, _next_binding=1, _register=fail)
    file = stub(backing=backing, get=str, put=undone.note("file"))
    try:
        consumer_process.ConsumerProcess.bind(process, 1, file, WINDOW, exclusive=False)
    finally:
        assert (process.bindings, process._next_binding) == ({}, 1)


def service_notifies(undone: Undone, patch: pytest.MonkeyPatch) -> None:
    made = consumer_process.ConsumerProcess("dma", 1, 1, undone.note("consumer"))
    patch.setattr(made, "_make_round_trip", fail)
    try:
        made.notify(stub(), b"", 0)
    finally:
        for sock in (*made.give_sockets(), made.requests.sock, made._notify):
            sock.close()


def trace_starts(undone: Undone, _: pytest.MonkeyPatch) -> None:
    trace = trace_events.Trace()
    trace.start(stub(send=len, close=undone.note("old")))
    try:
        with trace.starting(stub(send=len, close=undone.note("new"))):
            fail()
    finally:
        assert trace.on


def call_is_answered(undone: Undone, patch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, number: int) -> None:
        undone.append("caller")
        before(pid, number)
        os.waitpid(pid, 0)

    def fork(_: object) -> int:
        pid = os.fork()
        if not pid:
            signal.pause()
        return pid

    def install(*_: object) -> OwnedFd:
        return spare()

    before = os.kill
    patch.setattr(os, "kill", kill)
    patch.setattr(syscall, "fork", fork)
    patch.setattr(process, "prctl", always(None))
    patch.setattr(seccomp, "install", install)
    patch.setattr(seccomp, "SECCOMP_IOCTL_NOTIF_RECV", always(None))
    patch.setattr(seccomp, "SECCOMP_IOCTL_NOTIF_ADDFD", fail)
    syscall._answer_one_call()


#: Who fails, and what that takes back, in its order.
PLACES: Final[dict[str, tuple[Callable[[Undone, pytest.MonkeyPatch], None], list[str]]]] = {
    "a slot for every emulator": (software_add, ["mmu", "first", "second"]),
    "an emulator for every slot": (software_create, ["vcpu"]),
    "a vCPU's emulator": (software_vcpu_, ["emulator"]),
    "a slot's views": (software_show, ["shared view"]),
    "a slot in KVM": (kernel_add, ["conversion"]),
    "a slot's tables": (tables_add, ["whole"]),
    "room in the tables": (attributes_reserve, ["slot"]),
    "a slot's attributes": (attributes_convert, ["whole"]),
    "a guest_memfd": (private_bind, ["descriptor", "descriptor", "binding"]),
    "a guest_memfd's half": (private_show, ["window"]),
    "a slot of two halves": (slot_of_two_halves, ["private", "shared"]),
    "a run": (vcpu_runs, ["lost"]),
    "a notifier": (notifier_is_made, ["deaf", "binding"]),
    "a binding": (service_binds, ["file"]),
    "a notification": (service_notifies, ["consumer"]),
    "a trace": (trace_starts, ["new"]),
    "an answered call": (call_is_answered, ["caller"]),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_fails_half_way_is_taken_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, wanted = PLACES[name]
    undone = Undone()
    with monkeypatch.context() as patch, pytest.raises(PlantedError):
        act(undone, patch)
    assert undone == wanted
