"""The engine process: one VM, its memory and its vCPUs, driven by the owner's messages.

It is forked by the service's spawner, so it is undumpable from its first instruction, and it gets the memory behind restricted
descriptors from the service, never the descriptors. Three kinds of threads, each waiting in a system call when it has nothing to do: the
main one for the VM's socket, one for each vCPU, and one that answers the service's invalidations and nothing else, so that an owner's punch
never waits for anything but the guest's exit.
"""

import os
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, final

from restrictedmem.kvm.engine import Bound, Engine
from restrictedmem.kvm.machine import Machine
from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.vm import SoftwareVm
from restrictedmem.kvm.vcpu import Vcpus
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.kvm.wire import Creation
from restrictedmem.mm.notifier import Api
from restrictedmem.service import wire
from restrictedmem.service.wire import Channel
from restrictedmem.units import PageRange, pgoff_t

if TYPE_CHECKING:
    from restrictedmem.service.start import Options


def preload() -> None:
    """Read from files what ``serve`` needs later, for a process that is about to become a user who may not."""
    with suppress(RuntimeError, OSError):
        # Missing, it is the owner's first vCPU that says so.
        unicorn.library()


def serve(owner: socket.socket, service: socket.socket, notify: socket.socket, options: "Options", arguments: str) -> NoReturn:
    """Be the engine of one VM until its owner lets go of it or the service ends."""
    requests = Channel(service, "service")
    vcpus = Vcpus()
    channel = Channel(owner, "owner")
    try:
        creation = Creation.load(arguments)
        engine = make_engine(creation, Binding(requests), vcpus)
    except OSError as error:
        channel.receive()
        channel.reply_error(error)
        os._exit(1)
    machine = Machine(channel, VmMemory(engine, requests, Api(options.api)), engine, vcpus, creation)
    threading.Thread(target=answer_invalidations, args=(Channel(notify, "service"), engine), name="notify", daemon=True).start()
    machine.serve()
    # Threads may be inside the guest; the kernel ends them and frees everything.
    os._exit(0)


def make_engine(creation: Creation, binder: "Binding", vcpus: Vcpus) -> Engine:
    """Make the engine that the owner asked for; ``auto`` is the kernel's where it works, else the software's.

    Raises:
        OSError: why /dev/kvm cannot be used, when it was asked for by name.
    """
    return SoftwareVm(binder, vcpus)


@final
class Binding:
    """The service's BIND and UNBIND (``Binder``)."""

    def __init__(self, service: Channel) -> None:
        self._service = service

    def bind(self, token: bytes) -> Bound:
        """Register a notifier (``Binder``)."""
        body, fds = self._service.call(wire.BIND, token)
        number, ino, limit = wire.BINDING.unpack(body)
        return Bound(number, ino, limit or None, fds[0], fds[1])

    def unbind(self, number: int) -> None:
        """Unregister it (``Binder``)."""
        self._service.call(wire.UNBIND, number.to_bytes(8, "little"))


def answer_invalidations(notify: Channel, engine: Engine) -> None:
    """Serve the service's notifications; when the service is gone, so is the memory, and this process ends."""
    while True:
        message = notify.receive()
        if message is None:
            os._exit(0)
        binding, start, end = message.unpack(wire.INVALIDATION)
        span = PageRange(pgoff_t(start), pgoff_t(end))
        if message.number == wire.INVALIDATE_START.number:
            engine.invalidate_start(binding, span)
        else:
            engine.invalidate_end(binding, span)
        notify.reply()
