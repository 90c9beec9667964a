"""The engine process: one VM, its memory and its vCPU, driven by the owner's messages.

It is forked by the service's spawner, so it is undumpable from its first instruction, and it gets the memory behind restricted
descriptors from the service, never the descriptors. Three kinds of threads, each waiting in a system call when it has nothing to do: the
main one for the VM's socket, one for each vCPU, and one that answers the service's invalidations and nothing else, so that an owner's punch
never waits for anything but the guest's exit.
"""

import json
import os
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from errno import EINVAL, EIO, EPERM, EPROTO
from typing import TYPE_CHECKING, Final, NoReturn, final

from restrictedmem.abi import kvm
from restrictedmem.fd import close_all
from restrictedmem.kvm import exits, wire
from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.vcpu import SoftwareVcpu
from restrictedmem.kvm.vcpu import Vcpu
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.mm.notifier import Api
from restrictedmem.service import wire as service_wire
from restrictedmem.service.wire import Channel, Message
from restrictedmem.units import PageRange, pgoff_t

if TYPE_CHECKING:
    from restrictedmem.service.start import Options

_MAX_VCPUS: Final = 1


def preload() -> None:
    """Read from files what ``serve`` needs later, for a process that is about to become a user who may not."""
    with suppress(RuntimeError, OSError):
        # Missing, it is the owner's first vCPU that says so.
        unicorn.library()


def serve(owner: socket.socket, service: socket.socket, notify: socket.socket, options: "Options") -> NoReturn:
    """Be the engine of one VM until its owner lets go of it or the service ends."""
    requests = Channel(service, "service")
    machine = Machine(Channel(owner, "owner"), VmMemory(requests, Api(options.api)))
    threading.Thread(target=machine.answer_invalidations, args=(Channel(notify, "service"),), name="notify", daemon=True).start()
    machine.serve()
    # Threads may be inside the guest; the kernel ends them and frees everything.
    os._exit(0)


def _serve_one(channel: Channel, dispatch: Callable[[Message], None]) -> bool:
    """Receive one request and have it answered, whatever goes wrong, so that nobody waits for ever; false when the owner is gone."""
    try:
        message = channel.receive()
    except OSError as error:
        channel.reply_error(error)
        return False
    if message is None:
        return False
    try:
        dispatch(message)
    except OSError as error:
        channel.reply_error(error)
    except (struct.error, ValueError) as error:
        channel.reply_error(OSError(EPROTO, str(error)))
    except Exception as error:  # noqa: BLE001 - the owner gets it.
        channel.reply_error(OSError(EIO, f"{type(error).__name__}: {error}"))
    finally:
        close_all(message.fds)
    return True


@final
class Machine:
    """One VM: what each message of its owner does."""

    def __init__(self, owner: Channel, memory: VmMemory) -> None:
        self._owner = owner
        self._memory = memory
        self._vcpus: list[VcpuThread] = []

    def serve(self) -> None:
        """Serve the VM's socket until it and every vCPU's socket are closed by the owner."""
        poll = select.poll()
        poll.register(self._owner.fileno(), select.POLLIN)
        open_sockets = {self._owner.fileno()}
        while open_sockets:
            for fd, _ in poll.poll():
                if fd == self._owner.fileno() and _serve_one(self._owner, self._dispatch):
                    for vcpu in self._vcpus:
                        if vcpu.fileno() not in open_sockets:
                            open_sockets.add(vcpu.fileno())
                            # Only the hang-up is of interest here; what is said is the vCPU thread's.
                            poll.register(vcpu.fileno(), select.POLLRDHUP)
                else:
                    poll.unregister(fd)
                    open_sockets.discard(fd)

    def _dispatch(self, message: Message) -> None:
        match message.number:
            case wire.SET_USER_MEMORY_REGION.number:
                self._set_user_memory_region(message)
            case wire.CREATE_VCPU.number:
                self._create_vcpu()
            case wire.SET_MEMORY_ATTRIBUTES.number:
                asked = kvm.kvm_memory_attributes.from_buffer_copy(message.body)
                self._set_attributes(Api.V10, asked.address, asked.size, asked.attributes, asked.flags)
                asked.address, asked.size = asked.address + asked.size, 0
                self._owner.reply(bytes(asked))
            case wire.ENCRYPT_REG_REGION.number | wire.ENCRYPT_UNREG_REGION.number:
                region = kvm.kvm_enc_region.from_buffer_copy(message.body)
                private = message.number == wire.ENCRYPT_REG_REGION.number
                self._set_attributes(Api.V9, region.addr, region.size, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0, 0)
                self._owner.reply()
            case wire.LAUNCH_UPDATE.number:
                self._launch_update(message.body)
            case wire.STATISTICS.number:
                self._owner.reply(json.dumps(self.statistics()).encode())
            case _:
                raise OSError(EPROTO, f"no such call: {message.number:#x}")

    # Slots and attributes.

    def _set_user_memory_region(self, message: Message) -> None:
        region = kvm.kvm_userspace_memory_region_ext.from_buffer_copy(message.body)
        token = message.body[wire.TOKEN_OFFSET :]
        held = [thread.vcpu for thread in self._vcpus]
        for vcpu in held:
            vcpu.hold()
        try:
            if region.memory_size:
                slot = self._memory.create_slot(region, token, message.fds[0] if message.fds else None)
                for vcpu in held:
                    vcpu.engine.add_slot(slot)
            else:
                slot = self._memory.delete_slot(region.slot)
                for vcpu in held:
                    vcpu.engine.remove_slot(slot)
                self._memory.release(slot)
        finally:
            for vcpu in held:
                vcpu.release()
        self._owner.reply()

    def _set_attributes(self, api: Api, address: int, size: int, attributes: int, flags: int) -> None:
        for start, end in self._memory.set_attributes(api, address, size, attributes, flags):
            for thread in self._vcpus:
                thread.vcpu.drop(start, end)

    def _launch_update(self, body: bytes) -> None:
        if self._started():
            raise OSError(EPERM, "the guest has run: its memory is its own")
        (gpa,) = wire.LAUNCH.unpack_from(body)
        self._memory.launch_update(gpa, body[wire.LAUNCH.size :])
        self._owner.reply()

    def _started(self) -> bool:
        return any(thread.started for thread in self._vcpus)

    # vCPUs.

    def _create_vcpu(self) -> None:
        if len(self._vcpus) >= _MAX_VCPUS:
            raise OSError(EINVAL, f"a VM has {_MAX_VCPUS} vCPU here")
        engine = SoftwareVcpu(self._memory.mmu)
        for slot in self._memory.mmu.slots:
            engine.add_slot(slot)
        channel, theirs = Channel.pair("owner")
        with theirs:
            thread = VcpuThread(Vcpu(engine, self._memory.mmu), engine, channel)
            self._vcpus.append(thread)
            self._owner.reply(fds=[theirs.fileno()])
        threading.Thread(target=thread.serve, name="vcpu", daemon=True).start()

    # Invalidations.

    def answer_invalidations(self, notify: Channel) -> None:
        """Serve the service's notifications; when the service is gone, so is the memory, and this process ends."""
        while True:
            message = notify.receive()
            if message is None:
                os._exit(0)
            binding, start, end = message.unpack(service_wire.INVALIDATION)
            span = PageRange(pgoff_t(start), pgoff_t(end))
            slot = self._memory.slot_of_binding(binding)
            if slot is not None and message.number == service_wire.INVALIDATE_START.number:
                first, last = self._memory.mmu.invalidate_start(slot, span)
                for thread in self._vcpus:
                    thread.vcpu.drop(first, last)
            elif slot is not None:
                self._memory.mmu.invalidate_end(slot, span)
            notify.reply()

    def statistics(self) -> dict[str, object]:
        """Return what ``run`` shows at the end."""
        exit_counts: Counter[str] = Counter()
        for thread in self._vcpus:
            exit_counts.update(thread.exits)
        return {
            **self._memory.statistics(),
            "tlb_fills": sum(thread.fills for thread in self._vcpus),
            "exits": dict(exit_counts),
            "time_in_guest_ns": sum(thread.vcpu.time_in_guest for thread in self._vcpus),
        }


@final
class VcpuThread:
    """A vCPU's socket and the thread that serves it: registers before the first run, then runs."""

    def __init__(self, vcpu: Vcpu, engine: SoftwareVcpu, owner: Channel) -> None:
        self.vcpu = vcpu
        self._engine = engine
        self._owner = owner
        self.started = False
        self.exits: Counter[str] = Counter()

    def fileno(self) -> int:
        """Return the descriptor of the vCPU's socket."""
        return self._owner.fileno()

    @property
    def fills(self) -> int:
        """TLB misses that reached the engine."""
        return self._engine.fills

    def serve(self) -> None:
        """Serve the vCPU's socket until the owner closes it."""
        while _serve_one(self._owner, self._dispatch):
            pass

    def _dispatch(self, message: Message) -> None:
        match message.number:
            case wire.RUN.number:
                (value,) = message.unpack(wire.COMPLETION)
                self._owner.reply(exits.pack(self._run(value)))
            case wire.SET_REGS.number:
                if self.started:
                    raise OSError(EPERM, "the guest has run: its registers are its own")
                self._set_regs(kvm.kvm_regs.from_buffer_copy(message.body))
                self._owner.reply()
            case _:
                raise OSError(EPROTO, f"no such call: {message.number:#x}")

    def _set_regs(self, regs: kvm.kvm_regs) -> None:
        rest = kvm.kvm_regs(rip=regs.rip, rsp=regs.rsp, rdi=regs.rdi)
        if bytes(rest) != bytes(regs):
            raise OSError(EINVAL, "only rip, rsp and rdi can be set")
        self._engine.set_entry(regs.rip, regs.rsp, regs.rdi)

    def _run(self, value: int) -> exits.Exit:
        if self.started:
            self._engine.complete(value)
        self.started = True
        exit_ = self.vcpu.run()
        self.exits[type(exit_).__name__] += 1
        return exit_
