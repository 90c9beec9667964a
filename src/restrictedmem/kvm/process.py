"""The engine process: one VM, its memory and its vCPUs, driven by the owner's messages.

It is forked by the service's spawner, so it is undumpable from its first instruction, and it gets the memory behind restricted
descriptors from the service, never the descriptors. Three kinds of threads, each waiting in a system call when it has nothing to do: the
main one for the VM's socket, one for each vCPU, and one that answers the service's invalidations and nothing else, so that an owner's punch
never waits for anything but the guest's exit.
"""

import os
import socket
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn, final

from restrictedmem.devkvm import Kvm
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine import Bound, Engine
from restrictedmem.kvm.kernel.vm import KernelVm
from restrictedmem.kvm.machine import Machine
from restrictedmem.kvm.report import Reporter
from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.vm import SoftwareVm
from restrictedmem.kvm.trace import Trace, now
from restrictedmem.kvm.vcpu import Vcpus
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.kvm.wire import POLICY_DEBUG, Creation
from restrictedmem.mm.notifier import Api
from restrictedmem.platform.host import NoPlatform
from restrictedmem.service import wire
from restrictedmem.service.wire import Channel
from restrictedmem.units import PageRange, pgoff_t

if TYPE_CHECKING:
    from restrictedmem.service.start import Options


#: Seconds after which a thread has to let others run Python: a vCPU that faults all the time would keep a stop request waiting for 5 ms.
_SWITCH_INTERVAL: Final = 0.0002

#: /dev/kvm, where it had to be opened early.
_preloaded: Kvm | None = None


def preload() -> None:
    """Open and read what ``serve`` needs later, for a process that is about to become a user who may not."""
    global _preloaded
    # What is missing, the owner's first VM or vCPU says.
    with suppress(RuntimeError, OSError):
        unicorn.library()
    with suppress(OSError):
        _preloaded = Kvm.open()


def serve(owner: socket.socket, service: socket.socket, notify: socket.socket, options: "Options", arguments: str) -> NoReturn:
    """Be the engine of one VM until its owner lets go of it or the service ends."""
    sys.setswitchinterval(_SWITCH_INTERVAL)
    requests = Channel(service, "service")
    vcpus = Vcpus()
    trace = Trace()
    channel = Channel(owner, "owner")
    try:
        creation = Creation.load(arguments)
        api = Api(options.api)
        attributes = Attributes(api)
        engine = make_engine(creation, Binding(requests), vcpus, attributes, trace)
    except OSError as error:
        channel.receive()
        channel.reply_error(error)
        os._exit(1)
    reporter = Reporter(requests, engine.report_page, creation.policy, engine.name)
    machine = Machine(channel, VmMemory(engine, requests, api, attributes), engine, vcpus, creation, reporter, trace)
    threading.Thread(target=answer_invalidations, args=(Channel(notify, "service"), engine, trace), name="notify", daemon=True).start()
    machine.serve()
    trace.emit("end")
    # Threads may be inside the guest; the kernel ends them and frees everything.
    os._exit(0)


def make_engine(creation: Creation, binder: "Binding", vcpus: Vcpus, attributes: Attributes, trace: Trace) -> Engine:
    """Make the engine that the owner asked for; ``auto`` is the kernel's where it works, else the software's.

    Raises:
        OSError: why /dev/kvm cannot be used, when it was asked for by name.
    """
    if creation.engine != "software":
        try:
            with _preloaded or Kvm.open() as kvm:
                return KernelVm(binder, vcpus, attributes, kvm, debug=bool(creation.policy & POLICY_DEBUG))
        except OSError:
            if creation.engine == "kernel":
                raise
    return SoftwareVm(binder, vcpus, attributes, trace, NoPlatform())


@final
class Binding:
    """The service's BIND and UNBIND (``Binder``)."""

    def __init__(self, service: Channel) -> None:
        self._service = service

    def bind(self, token: bytes, window: PageRange) -> Bound:
        """Register a notifier (``Binder``)."""
        body, fds = self._service.call(wire.BIND, wire.BIND_REQUEST.pack(token, window.start, window.end))
        number, ino, limit, _, _ = wire.BINDING.unpack(body)
        return Bound(number, ino, limit or None, fds[0], fds[1])

    def unbind(self, number: int) -> None:
        """Unregister it (``Binder``)."""
        self._service.call(wire.UNBIND, number.to_bytes(8, "little"))


def answer_invalidations(notify: Channel, engine: Engine, trace: Trace) -> None:
    """Serve the service's notifications; when the service is gone, so is the memory, and this process ends."""
    while True:
        message = notify.receive()
        if message is None:
            os._exit(0)
        binding, start, end, order = message.unpack(wire.INVALIDATION)
        span = PageRange(pgoff_t(start), pgoff_t(end))
        started = now()
        event, reply = _answer(message.number, engine, binding, span, None if order == wire.NO_FOLIO else order)
        if trace.on:
            trace.emit(event, binding=binding, pgoff=start, npages=len(span), **_private_pages(engine), ns=now() - started)
        notify.reply(reply)


def _answer(number: int, engine: Engine, binding: int, span: PageRange, order: int | None) -> tuple[str, bytes]:
    """Do what the service says; returns the trace's word for it, and the reply."""
    match number:
        case wire.INVALIDATE_START.number:
            engine.invalidate_start(binding, span, order)
            return "invalidate_start", b""
        case wire.INVALIDATE_END.number:
            engine.invalidate_end(binding, span, order)
            return "invalidate_end", b""
        case wire.ERROR.number:
            engine.error(binding, span)
            return "error", b""
        case _:
            return "page_count", wire.COUNT.pack(engine.page_count(binding, span))


def _private_pages(engine: Engine) -> dict[str, int]:
    """Return the trace's count of private pages, of an engine that can know it."""
    match engine.statistics():
        case {"pages_taken": int(taken), "pages_freed": int(freed)}:
            return {"private_pages": taken - freed}
        case _:
            return {}
