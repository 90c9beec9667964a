"""Targets of the engine process: what an owner sends to a VM's socket and to a vCPU's."""

import os
import select
import socket
import struct
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, contextmanager
from errno import EACCES, EINVAL, EMSGSIZE, EPROTO, errorcode
from itertools import pairwise
from typing import Any, Final, TypeVar, cast
from unittest import mock

from fuzz.service import TOKEN
from fuzz.source import Source, answer, is_request, messages, number_of
from restrictedmem.abi import kvm, memory
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.abi.kvm_x86 import kvm_sregs
from restrictedmem.consumer import Bound
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.conversions import Conversions
from restrictedmem.kvm.engine import Engine
from restrictedmem.kvm.engine_vcpu import EngineVcpu, EngineVcpus
from restrictedmem.kvm.half import forbid_shrinking
from restrictedmem.kvm.launch import Launch
from restrictedmem.kvm.machine import Machine
from restrictedmem.kvm.serving import serve_one
from restrictedmem.kvm.software.software_vm import SoftwareVm
from restrictedmem.kvm.vcpu_socket import VcpuSocket
from restrictedmem.kvm.vm_memory import MAX_PAGES, VmMemory
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.platform.platform import NoPlatform
from restrictedmem.protocol import exits, guest_abi, vm_wire
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.service.wire import Channel, Message
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, PageRange, gfn_t

_T = TypeVar("_T")
_HEAD: Final = struct.Struct("=II")
_SIZE: Final = 1 << 20
_PAGES: Final = _SIZE >> 12
_LARGE: Final = 64 << 30
_VM_CALLS: Final = (
    vm_wire.SET_USER_MEMORY_REGION, vm_wire.CREATE_VM, vm_wire.CREATE_VCPU, vm_wire.CHECK_EXTENSION,
    vm_wire.GET_SUPPORTED_MEMORY_ATTRIBUTES,
    vm_wire.SET_MEMORY_ATTRIBUTES, vm_wire.ENCRYPT_REG_REGION, vm_wire.ENCRYPT_UNREG_REGION,
    vm_wire.LAUNCH_UPDATE, vm_wire.LAUNCH_FINISH, vm_wire.STATISTICS,
    vm_wire.INTERRUPT, vm_wire.DESTROY_VM, vm_wire.INJECT_FAILURE, vm_wire.DBG_READ,
    vm_wire.DBG_WRITE, vm_wire.TRACE,
)  # fmt: skip
_VCPU_CALLS: Final = (
    vm_wire.RUN, vm_wire.PRE_FAULT_MEMORY, vm_wire.SET_REGS, vm_wire.GET_REGS, vm_wire.GET_SREGS,
    vm_wire.SET_GUEST_DEBUG,
)  # fmt: skip


class _Cpu:
    """A vCPU (``VcpuEngine``) that executes nothing.

    The previous run's value says how each run ends.
    """

    def __init__(self) -> None:
        self.regs = kvm_regs()
        self.next = 0

    @classmethod
    def numbered(cls, number: int) -> "_Cpu":
        assert number >= 0
        return cls()

    def set_regs(self, regs: kvm_regs) -> None:
        self.regs = kvm_regs.from_buffer_copy(regs)

    def get_regs(self) -> kvm_regs:
        return self.regs

    def change_regs(self, regs: kvm_regs) -> None:
        self.regs = kvm_regs.from_buffer_copy(regs)

    def get_sregs(self) -> kvm_sregs:
        return kvm_sregs()

    def set_guest_debug(self, *, step: bool, breakpoints: frozenset[int]) -> None:
        assert all(0 <= address < 1 << 64 for address in breakpoints)

    def complete(self, value: int) -> None:
        assert 0 <= value < 1 << 64
        self.next = value

    def settle(self) -> None:
        pass

    def run(self) -> exits.Exit | None:
        argument = self.next >> 8
        match self.next & 7:
            case 0:
                return exits.PortIn(argument & 0xFFFF, 1)
            case 1:
                return exits.MmioWrite(argument, 8, argument)
            case 2:
                return exits.Hypercall(
                    guest_abi.MAP_GPA_RANGE, (argument << 12, 4, self.next >> 3 & 1 << 4, 5)
                )
            case 3:
                return exits.Hypercall(argument & 0xFF, (1, 2, 3, 4))
            case 4:
                return exits.MemoryFault(8, argument, 4096, 14)
            case 5:
                return exits.Debug(3, argument)
            case 6:
                return exits.Interrupted()
            case _:
                return exits.Shutdown(argument & 0xFF)

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        pass

    def kick(self) -> None:
        pass

    def prefault(self, start: gfn_t, end: gfn_t) -> int:
        assert 0 <= start < end <= 1 << 52
        return end - start


class _Service:
    """A stand-in for the engine's ``Channel`` to its service.

    It takes messages, and signs with zeroes.
    """

    def call(self, call: object, body: bytes = b"") -> tuple[bytes, list[OwnedFd]]:
        return bytes(64), []


class _Reporter:
    """``Reporter`` without a page."""

    def launched(self, measurement: bytes) -> None:
        assert len(measurement) == 48

    def answer(self) -> int:
        return -EINVAL


class _Binder:
    """``Binder`` on one file of this process, which is shown by one token."""

    def __init__(self) -> None:
        self._file = RestrictedFile(make("v10"), MemfdBacking(limit=_SIZE), Inode.make(0, 0))
        self._made = 0
        self.bound: set[int] = set()

    def bind(self, token: bytes, window: PageRange, take: Callable[[Bound], _T]) -> _T:
        if token != TOKEN:
            raise OSError(EACCES, "the token was never presented on a descriptor")

        def bound(number: int) -> Bound:
            fd, sequence = (
                OwnedFd(os.dup(fd))
                for fd in (self._file.backing.fileno(), self._file.sequence().fd.fileno())
            )
            return Bound(number, 7, _SIZE, fd, sequence, flags=0, order=0)

        return self.bind_again(0, window, lambda number: take(bound(number)))

    def bind_again(self, binding: int, window: PageRange, take: Callable[[int], _T]) -> _T:
        # As the service does for a range that no file has; none is larger here.
        if not 0 <= window.start <= window.end <= _PAGES:
            raise OSError(EINVAL, f"{window} is not a range of a file")
        self._made += 1
        self.bound.add(self._made)
        try:
            return take(self._made)
        except BaseException:
            self.bound.remove(self._made)
            raise

    def unbind(self, number: int) -> None:
        self.bound.remove(number)

    def close(self) -> None:
        assert not self.bound, "a binding that nobody has"
        self._file.put()


def _end(status: int) -> None:
    raise RuntimeError(f"the engine ends with {status}")


class _Vm:
    """A VM on the software engine without guest code, all in this process."""

    def __init__(self, api: Api, policy: int, undo: ExitStack) -> None:
        channel, self.owner = Channel.pair("owner")
        undo.callback(self.owner.close)
        undo.callback(channel.close)
        self.binder = _Binder()
        undo.callback(self.binder.close)
        self.vcpus, trace, attributes = EngineVcpus(), Trace(), Attributes(api)
        undo.callback(trace.end)
        self.engine = SoftwareVm(self.binder, self.vcpus, attributes, trace, NoPlatform())
        undo.enter_context(mock.patch.object(SoftwareVm, "create_vcpu", side_effect=_Cpu.numbered))
        # A change that is broken off ends the engine (``whole``): a bug's answer here.
        undo.enter_context(mock.patch("os._exit", _end))
        service = cast("Channel", _Service())
        self.memory = VmMemory(
            cast("Engine", self.engine), service, api, attributes, forbid_shrinking
        )
        creation, reporter = vm_wire.Creation(policy=policy), cast("Any", _Reporter())
        self.machine = Machine(
            channel,
            cast("Any", None),
            self.memory,
            self.engine,
            self.vcpus,
            creation,
            reporter,
            trace,
        )
        undo.callback(self.memory.clear)
        undo.callback(self._let_go)
        dispatch = trace.requests(self.machine._dispatch)
        self.brings: dict[int, int] = {}
        self.serve: Callable[[], bool] = lambda: serve_one(
            channel, lambda: self._receive(channel), dispatch
        )

    def _receive(self, channel: Channel) -> Message | None:
        """Receive a request with the descriptors that its checker would have let through."""
        message = channel.receive()
        if message is not None and message.number in self.brings:
            message.fds.append(OwnedFd(os.dup(self.brings[message.number])))
        return message

    def _let_go(self) -> None:
        for fd, vcpu in self.machine._open.items():
            self.machine._watched.unregister(fd)
            vcpu.let_go()


def vm(data: bytes) -> None:
    """Send requests to a VM's socket.

    Each has one answer, which no bug caused. No slot overlaps another, and none is lost.
    """
    source = Source(data)
    kind = source.number(1)
    with ExitStack() as undo:
        api, policy = Api.V9 if kind & 1 else Api.V10, kind >> 1 & 3
        made = _Vm(api, policy, undo)
        made.brings = _descriptors(kind, undo)
        for message in messages(source, [call.number for call in _VM_CALLS]):
            if not message:
                break
            if _is_large(message):
                continue
            made.owner.send(message)
            assert made.serve() is is_request(message)
            error, body = answer(made.owner)
            _check_slots(made)
            if not is_request(message):
                break
            if not error:
                _check_vm_reply(made, message, body, policy)


def _is_large(message: bytes) -> bool:
    """Say whether a request for a slot may need more memory than a search has.

    The engine keeps some bytes for each page, and its owner pays for them.
    """
    body = message[_HEAD.size :]
    if (
        number_of(message) != vm_wire.SET_USER_MEMORY_REGION.number
        or len(body) < vm_wire.TOKEN_OFFSET
    ):
        return False
    return (
        _LARGE
        < kvm.kvm_userspace_memory_region_ext.from_buffer_copy(body).memory_size
        <= MAX_PAGES << PAGE_SHIFT
    )


def _descriptors(kind: int, undo: ExitStack) -> dict[int, int]:
    """Make what comes with a request, by its number: a memfd to share."""
    shared = undo.enter_context(memory.memfd_create("shared"))
    os.ftruncate(shared.fileno(), _SIZE)
    return {vm_wire.SET_USER_MEMORY_REGION.number: shared.fileno()} if kind & 8 else {}


def _check_slots(made: _Vm) -> None:
    slots = sorted(made.memory.slots, key=lambda slot: slot.base_gfn)
    assert all(one.end_gfn <= other.base_gfn for one, other in pairwise(slots))
    assert len(made.binder.bound) == sum(slot.private is not None for slot in slots)
    pages = range(guest_abi.HYPERCALL_PAGE >> 12, (guest_abi.REPORT_PAGE >> 12) + 1)
    assert not any(made.memory.slot_of(gfn) for gfn in pages)
    for slot in slots:
        assert 0 < len(slot.attributes) == slot.end_gfn - slot.base_gfn
        if slot.private is not None:
            assert len(slot.private.window) == len(slot.attributes)


def _check_vm_reply(made: _Vm, message: bytes, reply: bytes, policy: int) -> None:
    """Check what a call that succeeded has done."""
    body = message[_HEAD.size :]
    match number_of(message):
        case vm_wire.SET_USER_MEMORY_REGION.number:
            region = kvm.kvm_userspace_memory_region_ext.from_buffer_copy(body)
            slot = made.memory.slots.get(region.slot)
            assert (slot is not None) == bool(region.memory_size)
            assert not slot or (slot.base_gfn, len(slot.attributes)) == (
                region.guest_phys_addr >> 12,
                region.memory_size >> 12,
            )
        case vm_wire.SET_MEMORY_ATTRIBUTES.number:
            asked = kvm.kvm_memory_attributes.from_buffer_copy(body)
            left = kvm.kvm_memory_attributes.from_buffer_copy(reply)
            assert asked.address + asked.size == left.address + left.size
            assert not (asked.address | asked.size) & PAGE_MASK
            slot = made.memory.slot_of(asked.address >> 12)
            if slot is not None and left.address > asked.address:
                assert slot.attributes[(asked.address >> 12) - slot.base_gfn] == bool(
                    asked.attributes
                )
        case vm_wire.LAUNCH_UPDATE.number:
            (gpa,) = vm_wire.LAUNCH.unpack_from(body)
            slot = made.memory.slot_of(gpa >> 12)
            assert slot is not None
            content = body[vm_wire.LAUNCH.size :]
            assert content
            assert made.engine.read_private(slot, gpa, len(content)) == content
        case vm_wire.DBG_READ.number:
            assert policy & vm_wire.POLICY_DEBUG
            _, size = vm_wire.DBG.unpack(body)
            assert len(reply) <= size
        case vm_wire.DBG_WRITE.number:
            assert policy & vm_wire.POLICY_DEBUG
        case vm_wire.CREATE_VCPU.number:
            assert len(made.vcpus.all) == 1 + int.from_bytes(reply, "little")
        case vm_wire.LAUNCH_FINISH.number:
            assert len(reply) == 48
        case _:
            pass


def vcpu(data: bytes) -> None:
    """Send requests to a vCPU's socket.

    Each has one answer, which no bug caused, and the owner cannot change the guest's registers.
    """
    source = Source(data)
    policy = source.number(1) & 3
    with ExitStack() as undo:
        made = _Vm(Api.V10, policy, undo)
        cpu = _Cpu()
        with _socket(made, policy, cpu, undo) as (vcpu_socket, theirs):
            for message in messages(source, [call.number for call in _VCPU_CALLS]):
                if not message:
                    break
                theirs.send(message)
                channel = vcpu_socket._owner
                assert serve_one(channel, channel.receive, vcpu_socket._dispatch) is is_request(
                    message
                )
                error, reply = answer(theirs)
                if not is_request(message):
                    assert error in (EPROTO, EMSGSIZE), errorcode[error]
                    break
                if not error:
                    _check_vcpu_reply(cpu, vcpu_socket, message, reply, policy)


@contextmanager
def _socket(
    made: _Vm, policy: int, cpu: _Cpu, undo: ExitStack
) -> Generator[tuple[VcpuSocket, socket.socket]]:
    """Make a vCPU's socket whose thread does not serve it: this one does."""
    channel, theirs = Channel.pair("owner")
    watched = undo.enter_context(closing(select.epoll()))
    conversions = Conversions(made.memory, explicit=bool(policy & vm_wire.POLICY_EXPLICIT))
    launch = Launch(policy, conversions.launched, lambda _: None)
    with closing(theirs), closing(channel), mock.patch("restrictedmem.threads.start"):
        found = VcpuSocket(
            0, channel, watched, policy, launch, conversions, cast("Any", _Reporter()), Trace()
        )
        found.vcpu = EngineVcpu(cpu)
        watched.register(channel.fileno(), select.EPOLLRDHUP)
        yield found, theirs


def _check_vcpu_reply(
    cpu: _Cpu, served: VcpuSocket, message: bytes, reply: bytes, policy: int
) -> None:
    body = message[_HEAD.size :]
    match number_of(message):
        case vm_wire.RUN.number:
            assert served.started
            assert len(body) == 8
            assert exits.pack(exits.unpack(reply)) == reply
        case vm_wire.SET_REGS.number:
            assert bytes(cpu.regs) == body[: len(bytes(cpu.regs))]
            others = kvm_regs.from_buffer_copy(cpu.regs)
            others.rip = others.rsp = others.rdi = others.rsi = 0
            assert (
                policy & vm_wire.POLICY_DEBUG
                if served.started
                else bytes(others) == bytes(kvm_regs())
            )
        case vm_wire.GET_REGS.number:
            assert policy & vm_wire.POLICY_DEBUG
            assert reply == bytes(cpu.regs)
        case vm_wire.GET_SREGS.number | vm_wire.SET_GUEST_DEBUG.number:
            assert policy & vm_wire.POLICY_DEBUG
        case vm_wire.PRE_FAULT_MEMORY.number:
            asked, left = (
                kvm.kvm_pre_fault_memory.from_buffer_copy(each) for each in (body, reply)
            )
            assert (left.gpa, left.size) == (asked.gpa + asked.size, 0)
        case _:
            raise AssertionError("an unknown call succeeded")
