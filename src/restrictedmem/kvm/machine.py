"""One VM in its engine process, and what each message of its owner does."""

import json
import select
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from errno import EBADF, EINVAL, EPROTO
from typing import Final, final

from restrictedmem.abi import kvm
from restrictedmem.abi.kvm import Cap
from restrictedmem.fd import refuse_fds
from restrictedmem.kvm import debug_requests
from restrictedmem.kvm.checker import Intake
from restrictedmem.kvm.conversions import Conversions
from restrictedmem.kvm.engine import Engine
from restrictedmem.kvm.engine_vcpu import EngineVcpu, EngineVcpus
from restrictedmem.kvm.launch import Launch
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.kvm.report_hypercall import Reporter
from restrictedmem.kvm.serving import hang_up, serve_one
from restrictedmem.kvm.vcpu_socket import VcpuSocket
from restrictedmem.kvm.vm_memory import MAX_SLOTS, VmMemory
from restrictedmem.kvm.whole import whole
from restrictedmem.mm.notifier import Api
from restrictedmem.protocol import trace_events, vm_wire
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.service.wire import MAX_BODY, Channel, Message

#: Capabilities of every engine (KVM_CHECK_EXTENSION); the others depend on posting and engine.
_CAPABILITIES: Final = {
    Cap.USER_MEMORY: 1,
    Cap.NR_MEMSLOTS: MAX_SLOTS,
    Cap.READONLY_MEM: 1,
    Cap.CHECK_EXTENSION_VM: 1,
    Cap.MEMORY_FAULT_INFO: 1,
}


@final
class Machine:
    """A VM's socket, and everything that its messages act on."""

    def __init__(
        self,
        owner: Channel,
        intake: Intake,
        memory: VmMemory,
        engine: Engine,
        vcpus: EngineVcpus,
        creation: vm_wire.Creation,
        reporter: Reporter,
        trace: Trace,
    ) -> None:
        self._owner = owner
        self._intake = intake
        self._memory = memory
        self._engine = engine
        self._vcpus = vcpus
        self._creation = creation
        self._reporter = reporter
        self._trace = trace
        self._conversions = Conversions(
            memory, explicit=bool(creation.policy & vm_wire.POLICY_EXPLICIT)
        )
        self._launch = Launch(creation.policy, self._conversions.launched, reporter.launched)
        self._sockets: list[VcpuSocket] = []
        self._watched = select.epoll()
        #: The vCPUs' sockets that their owner has not closed, by descriptor.
        self._open: dict[int, VcpuSocket] = {}
        self._destroyed = False

    def serve(self) -> None:
        """Serve the VM's socket, until the owner has closed it and every vCPU's socket."""
        dispatch = self._trace.requests(self._dispatch)
        vm_fd = self._owner.fileno()
        self._watched.register(vm_fd, select.EPOLLIN)
        vm_open = True
        while vm_open or self._open:
            for fd, events in self._watched.poll(self._memory.report_due_in()):
                if fd in self._open:
                    # The owner hung up, or sent something while its last call was being answered.
                    self._watched.unregister(fd)
                    self._open.pop(fd).let_go()
                elif fd == vm_fd and (
                    events & select.EPOLLHUP
                    or not serve_one(self._owner, self._intake.receive, dispatch)
                ):
                    # The owner has gone, and nobody waits any more for what it had asked for,
                    # hundreds of requests perhaps.
                    self._watched.unregister(vm_fd)
                    vm_open = False
                    hang_up(self._owner)
                    self._intake.drop_rest()
                    self._intake.close()
            self._memory.report_if_due()

    def _dispatch(self, message: Message) -> None:
        if self._destroyed:
            raise OSError(EBADF, "the VM was destroyed")
        match message.number:
            case vm_wire.SET_USER_MEMORY_REGION.number:
                self._set_user_memory_region(message)
            case vm_wire.CREATE_VM.number:
                self._owner.reply(self._engine.name.encode())
            case vm_wire.CREATE_VCPU.number:
                self._create_vcpu()
            case vm_wire.SET_MEMORY_ATTRIBUTES.number:
                asked = kvm.kvm_memory_attributes.from_buffer_copy(message.body)
                with (
                    self._conversions.converting(
                        asked.address, asked.size, private=bool(asked.attributes)
                    ),
                    whole(),
                ):
                    done = self._memory.set_attributes(
                        Api.V10, asked.address, asked.size, asked.attributes, asked.flags
                    )
                asked.address, asked.size = asked.address + done, asked.size - done
                self._owner.reply(bytes(asked))
            case vm_wire.GET_SUPPORTED_MEMORY_ATTRIBUTES.number:
                self._owner.reply(vm_wire.ATTRIBUTES.pack(self._memory.supported_attributes()))
            case vm_wire.CHECK_EXTENSION.number:
                (cap,) = message.unpack(vm_wire.CAP)
                self._owner.reply(vm_wire.CAP.pack(self._check_extension(cap)))
            case vm_wire.ENCRYPT_REG_REGION.number | vm_wire.ENCRYPT_UNREG_REGION.number:
                region = kvm.kvm_enc_region.from_buffer_copy(message.body)
                private = message.number == vm_wire.ENCRYPT_REG_REGION.number
                with (
                    self._conversions.converting(region.addr, region.size, private=private),
                    whole(),
                ):
                    self._memory.set_attributes(
                        Api.V9,
                        region.addr,
                        region.size,
                        kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0,
                        0,
                    )
                self._owner.reply()
            case _:
                self._dispatch_own(message)

    def _dispatch_own(self, message: Message) -> None:
        """Answer the requests for which KVM has no ioctl of a VM."""
        match message.number:
            case vm_wire.LAUNCH_UPDATE.number:
                self._launch_update(message.body)
            case vm_wire.LAUNCH_FINISH.number:
                self._owner.reply(self._launch.finish())
            case vm_wire.DBG_READ.number:
                debug_requests.check_policy(self._creation.policy)
                gpa, size = message.unpack(vm_wire.DBG)
                self._owner.reply(
                    debug_requests.read_memory(self._memory, self._engine, gpa, min(size, MAX_BODY))
                )
            case vm_wire.DBG_WRITE.number:
                debug_requests.check_policy(self._creation.policy)
                gpa, _ = vm_wire.DBG.unpack_from(message.body)
                with self._vcpus.held():
                    debug_requests.write_memory(
                        self._memory, self._engine, gpa, message.body[vm_wire.DBG.size :]
                    )
                self._owner.reply()
            case vm_wire.INTERRUPT.number:
                self._interrupt(message)
            case vm_wire.INJECT_FAILURE.number:
                (gpa,) = message.unpack(vm_wire.FAILURE)
                self._memory.inject_failure(gpa)
                self._owner.reply()
            case vm_wire.TRACE.number:
                self._trace_to(message)
            case vm_wire.STATISTICS.number:
                self._owner.reply(json.dumps(self.statistics()).encode())
            case vm_wire.DESTROY_VM.number:
                self._destroy()
                self._owner.reply(json.dumps(self._engine.platform_report()).encode())
            case _:
                raise OSError(EPROTO, f"no such call: {message.number:#x}")

    def _destroy(self) -> None:
        """Free what the end of this process would free without telling anybody.

        The service is still there, and is told what goes.
        """
        self._destroyed = True
        for vcpu in self._sockets:
            vcpu.retire()
        with self._vcpus.held():
            self._memory.clear()
            # The trace ends first: an invalidation's end may come late, and the trace would then
            # count pages of slots that are gone.
            self._trace.end()
            self._engine.destroy()

    def _trace_to(self, message: Message) -> None:
        (wanted,) = message.unpack(vm_wire.TRACE_REQUEST)
        if not wanted:
            self._trace.end()
            self._owner.reply()
            return
        self._owner.check_read()
        writer, reader = trace_events.pair()
        with reader, self._trace.starting(writer) as write:
            write(
                "trace",
                {
                    "version": trace_events.VERSION,
                    "side": "engine",
                    "engine": self._engine.name,
                    "policy": self._creation.policy,
                },
            )
            for slot in self._memory.slots:
                for event, fields in _events_of(slot):
                    write(event, fields)
            self._owner.reply(fds=[reader.fileno()])

    def _set_user_memory_region(self, message: Message) -> None:
        region = kvm.kvm_userspace_memory_region_ext.from_buffer_copy(message.body)
        token = message.body[vm_wire.TOKEN_OFFSET : vm_wire.NAMES_OFFSET]
        private = bool(region.memory_size and region.flags & kvm.KVM_MEM_PRIVATE)

        def change() -> None:
            with self._vcpus.held():
                self._memory.set_region(
                    region,
                    token,
                    message.fds[0] if message.fds else None,
                    vm_wire.SlotFiles.of_body(message.body),
                )

        self._conversions.change_slot(region.slot, change, private=private)
        self._owner.reply()

    def _check_extension(self, cap: int) -> int:
        if cap == Cap.MEMORY_ATTRIBUTES:
            return self._memory.supported_attributes() if self._memory.api is Api.V10 else 0
        if cap == kvm.KVM_CAP_PRIVATE_MEM:
            return int(self._memory.api is Api.V9)
        return (
            _CAPABILITIES.get(Cap(cap), 0) or self._engine.check_extension(cap)
            if cap in set(Cap)
            else 0
        )

    def _interrupt(self, message: Message) -> None:
        number: int = message.unpack(vm_wire.VCPU)[0]
        if number >= len(self._sockets):
            raise OSError(EINVAL, f"no vCPU {number}")
        self._sockets[number].vcpu.interrupt()
        self._owner.reply()

    def _launch_update(self, body: bytes) -> None:
        (gpa,) = vm_wire.LAUNCH.unpack_from(body)
        content = body[vm_wire.LAUNCH.size :]
        with self._launch.opened() as measurement:
            # What needs memory comes first: content is measured if and only if it was put in.
            extended = measurement.extended(gpa, content)
            # On the kernel engine a vCPU copies the content. Nobody else may set that vCPU's
            # registers meanwhile.
            with self._vcpus.held(), whole(), self._conversions.putting_in(gpa):
                self._memory.launch_update(gpa, content)
                measurement.extend(extended)
        self._owner.reply()

    def _create_vcpu(self) -> None:
        number = len(self._sockets)
        most = self._engine.check_extension(Cap.MAX_VCPUS)
        if number >= most:
            raise OSError(EINVAL, f"a VM of this engine has {most} vCPUs at most")
        self._owner.check_read()
        with self._launch.opened() as measurement, ExitStack() as undo:
            channel, theirs = Channel.pair("owner")
            undo.callback(channel.close)
            # The owner has no use for descriptors from a vCPU's socket.
            refuse_fds(theirs)
            with theirs:
                made = VcpuSocket(
                    number,
                    channel,
                    self._watched,
                    self._creation.policy,
                    self._launch,
                    self._conversions,
                    self._reporter,
                    self._trace,
                )
                # From here on the thread of the VcpuSocket closes the channel.
                undo.pop_all()
                undo.callback(made.abandon)
                vcpu = EngineVcpu(self._engine.create_vcpu(number))
                self._watched.register(channel.fileno(), select.EPOLLRDHUP)
                undo.callback(self._watched.unregister, channel.fileno())
                self._owner.reply(vm_wire.VCPU.pack(number), [theirs.fileno()])
                undo.pop_all()
            self._vcpus.all = (*self._vcpus.all, vcpu)
            measurement.set_registers(number, kvm.kvm_regs())
            self._sockets.append(made)
            self._open[channel.fileno()] = made
            made.begin(vcpu)

    def statistics(self) -> dict[str, object]:
        """Return the statistics that ``run`` shows at the end."""
        exit_counts: Counter[str] = Counter()
        for vcpu in self._sockets:
            exit_counts.update(vcpu.exits)
        return {
            "engine": self._engine.name,
            **self._memory.statistics(),
            **self._engine.statistics(),
            "exits": dict(exit_counts),
            "time_in_guest_ns": sum(vcpu.time_in_guest for vcpu in self._vcpus.all),
        }


def _events_of(slot: Memslot) -> Iterator[tuple[str, trace_events.Fields]]:
    """Yield the events that would make a slot as it is, for a trace that begins later."""
    flags = kvm.KVM_MEM_PRIVATE if slot.private is not None else 0
    yield (
        "slot",
        {"slot": slot.number, "flags": flags, "gfn": slot.base_gfn, "npages": len(slot.attributes)},
    )
    start = 0
    while start < len(slot.attributes):
        private = slot.attributes[start]
        change = slot.attributes.find(1 - private, start)
        end = len(slot.attributes) if change < 0 else change
        if private:
            yield (
                "attributes",
                {"gfn": slot.base_gfn + start, "npages": end - start, "private": True},
            )
        start = end
