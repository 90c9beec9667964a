"""One VM in its engine process: what each message of its owner does."""

import json
import select
import threading
from collections import Counter
from errno import EINVAL, EPERM, EPROTO
from typing import Final, final

from restrictedmem.abi import kvm
from restrictedmem.kvm import wire
from restrictedmem.kvm.engine import Engine
from restrictedmem.kvm.serving import serve_one
from restrictedmem.kvm.vcpu import Vcpu, Vcpus
from restrictedmem.kvm.vcpu_socket import VcpuSocket
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.mm.notifier import Api
from restrictedmem.service.wire import Channel, Message

_MAX_VCPUS: Final = 1


@final
class Machine:
    """A VM's socket, and what hangs on it."""

    def __init__(self, owner: Channel, memory: VmMemory, engine: Engine, vcpus: Vcpus, creation: wire.Creation) -> None:
        self._owner = owner
        self._memory = memory
        self._engine = engine
        self._vcpus = vcpus
        self._creation = creation
        self._sockets: list[VcpuSocket] = []

    def serve(self) -> None:
        """Serve the VM's socket until it and every vCPU's socket are closed by the owner."""
        poll = select.poll()
        poll.register(self._owner.fileno(), select.POLLIN)
        open_sockets = {self._owner.fileno()}
        while open_sockets:
            for fd, _ in poll.poll():
                if fd == self._owner.fileno() and serve_one(self._owner, self._dispatch):
                    for vcpu in self._sockets:
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
                self._memory.set_attributes(Api.V10, asked.address, asked.size, asked.attributes, asked.flags)
                asked.address, asked.size = asked.address + asked.size, 0
                self._owner.reply(bytes(asked))
            case wire.ENCRYPT_REG_REGION.number | wire.ENCRYPT_UNREG_REGION.number:
                region = kvm.kvm_enc_region.from_buffer_copy(message.body)
                private = message.number == wire.ENCRYPT_REG_REGION.number
                self._memory.set_attributes(Api.V9, region.addr, region.size, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0, 0)
                self._owner.reply()
            case wire.LAUNCH_UPDATE.number:
                self._launch_update(message.body)
            case wire.STATISTICS.number:
                self._owner.reply(json.dumps(self.statistics()).encode())
            case _:
                raise OSError(EPROTO, f"no such call: {message.number:#x}")

    def _set_user_memory_region(self, message: Message) -> None:
        region = kvm.kvm_userspace_memory_region_ext.from_buffer_copy(message.body)
        token = message.body[wire.TOKEN_OFFSET :]
        with self._vcpus.held():
            if region.memory_size:
                self._memory.create_slot(region, token, message.fds[0] if message.fds else None)
            else:
                self._memory.delete_slot(region.slot)
        self._owner.reply()

    def _launch_update(self, body: bytes) -> None:
        if any(vcpu.started for vcpu in self._sockets):
            raise OSError(EPERM, "the guest has run: its memory is its own")
        (gpa,) = wire.LAUNCH.unpack_from(body)
        self._memory.launch_update(gpa, body[wire.LAUNCH.size :])
        self._owner.reply()

    def _create_vcpu(self) -> None:
        number = len(self._sockets)
        if number >= _MAX_VCPUS:
            raise OSError(EINVAL, f"a VM has {_MAX_VCPUS} vCPU here")
        channel, theirs = Channel.pair("owner")
        with theirs:
            vcpu = Vcpu(self._engine.create_vcpu(number))
            self._vcpus.all = (*self._vcpus.all, vcpu)
            self._sockets.append(VcpuSocket(vcpu, channel))
            self._owner.reply(fds=[theirs.fileno()])
        threading.Thread(target=self._sockets[-1].serve, name=f"vcpu-{number}", daemon=True).start()

    def statistics(self) -> dict[str, object]:
        """Return what ``run`` shows at the end."""
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
