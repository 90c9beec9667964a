"""The engine process: one VM, its memory and its vCPUs, driven by the owner's messages.

The service's spawner forks it, so it is undumpable from its first instruction. It gets the memory
behind restricted descriptors from the service, and never gets the descriptors.

It has three kinds of threads. Each waits in a system call when it has nothing to do:

- The main thread serves the VM's socket.
- Each vCPU has a thread.
- One thread answers the service's invalidations and does nothing else. So an owner's punch waits
  only for the guest's exit.
"""

import gc
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Generic, NoReturn, TypeVar, final

from restrictedmem.consumer import Bound, Consumer
from restrictedmem.devkvm import Kvm
from restrictedmem.failure import status_of
from restrictedmem.fd import brings_fds
from restrictedmem.kvm import checker, trial
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine import Engine
from restrictedmem.kvm.engine_vcpu import EngineVcpus
from restrictedmem.kvm.kernel.kernel_vm import KernelVm
from restrictedmem.kvm.machine import Machine
from restrictedmem.kvm.report_hypercall import Reporter
from restrictedmem.kvm.software import unicorn
from restrictedmem.kvm.software.software_vm import SoftwareVm
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.mm.notifier import Api
from restrictedmem.platform import platform
from restrictedmem.probe import in_child
from restrictedmem.protocol.trace_events import Trace, now
from restrictedmem.protocol.vm_wire import POLICY_DEBUG, Creation
from restrictedmem.service import sealing
from restrictedmem.service.wire import Channel
from restrictedmem.units import PageRange, pgoff_t

if TYPE_CHECKING:
    from restrictedmem.service.options import Options


_T = TypeVar("_T")

#: Seconds after which a thread has to let others run Python. By default it is 5 ms, and a vCPU that
#: faults all the time would delay a stop request by as much.
_SWITCH_INTERVAL: Final = 0.0002

#: New objects until Python looks for cycles among them, and how often it does so until it looks at
#: older ones, too. A VM has tens of thousands of slot objects, and all of them stay. With a look
#: each 700 objects, as is usual, the looks take a tenth of the time in which slots are made.
_YOUNG: Final = 20_000
_YOUNGER: Final = 20

#: Seconds that a trial guest may take; it needs some milliseconds. A KVM that hangs delays the
#: owner's VM by as much.
_TRIAL_DEADLINE: Final = 5.0

#: /dev/kvm, if it had to be opened early.
_preloaded: Kvm | None = None


def preload(*, devices: bool) -> None:
    """Load what ``serve`` needs later, and open /dev/kvm if ``devices`` says so."""
    global _preloaded
    # The owner's first VM or vCPU reports what is missing.
    with suppress(RuntimeError, OSError):
        unicorn.library()
    if devices:
        with suppress(OSError):
            _preloaded = Kvm.open()


def serve(
    owner: socket.socket,
    service: socket.socket,
    notify: socket.socket,
    options: "Options",
    arguments: str,
) -> NoReturn:
    """Run the engine of one VM until its owner closes it or the service ends."""
    channel = Channel(owner, "owner")
    # A hook of the emulator may raise an exception that gets lost, for want of memory. Then this
    # process has to end, or the guest would go on behind it.
    sealing.end_when_lost()
    try:
        # This comes first: the checker must have nothing that this process is about to get.
        intake = checker.start(channel, (service, notify))
        sys.setswitchinterval(_SWITCH_INTERVAL)
        gc.set_threshold(_YOUNG, _YOUNGER)
        vcpus = EngineVcpus()
        trace = Trace()
        creation = Creation.load(arguments)
        # This forks, so it comes while this process has no other thread.
        refusal = refuse_kernel(creation, owner, service, notify)
        consumer = Consumer(service, notify)
        if options.guest_memfd:
            intake.device = consumer.device()
        api = Api(options.api)
        attributes = Attributes(api)
        binder = EngineBinder(consumer, trace)
        binder.engine = engine = make_engine(creation, binder, vcpus, attributes, trace, refusal)
    except OSError as error:
        with suppress(OSError):
            # The content of the owner's first message does not matter, but there has to be one.
            # Descriptors stay in the queue, because to drop them may take for ever.
            if not brings_fds(owner):
                channel.receive()
        channel.reply_error(error)
        os._exit(status_of(error))
    reporter = Reporter(consumer.requests, engine.report_page, creation.policy, engine.name)
    memory = VmMemory(engine, consumer.requests, api, attributes, intake.forbid_shrinking)
    machine = Machine(channel, intake, memory, engine, vcpus, creation, reporter, trace)
    machine.serve()
    with vcpus.held():
        consumer.close()
        trace.end()
        # The kernel ends the other threads, which are outside the guest, and frees everything.
        os._exit(0)


def refuse_kernel(creation: Creation, *sockets: socket.socket) -> str:
    """Say why ``auto`` does not take the kernel engine; return "" if nothing is against it.

    Nothing is against it when a guest has just run on it (``trial``), or when nobody asked for
    ``auto``. A child runs that guest, and closes its copies of this process's sockets. If the
    kernel holds the child up, it is left behind.
    """
    if creation.engine != "auto" or creation.platform:
        return ""

    def attempt() -> None:
        for sock in sockets:
            sock.close()
        with _preloaded or Kvm.open() as kvm:
            trial.run_guest(kvm, debug=bool(creation.policy & POLICY_DEBUG))

    try:
        in_child(attempt, _TRIAL_DEADLINE)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def make_engine(
    creation: Creation,
    binder: "EngineBinder",
    vcpus: EngineVcpus,
    attributes: Attributes,
    trace: Trace,
    refusal: str = "",
) -> Engine:
    """Make the engine that the owner asked for.

    ``auto`` means the kernel engine, or the software engine if there is a ``refusal``. With a
    platform it means the software engine.

    Raises:
        OSError: why /dev/kvm cannot be used, when the owner asked for the kernel engine by name.
    """
    if creation.engine != "software" and not creation.platform and not refusal:
        try:
            with _preloaded or Kvm.open() as kvm:
                return KernelVm(
                    binder, vcpus, attributes, kvm, debug=bool(creation.policy & POLICY_DEBUG)
                )
        except OSError as error:
            if creation.engine == "kernel":
                raise
            refusal = error.strerror or str(error)
    return SoftwareVm(binder, vcpus, attributes, trace, platform.make(creation.platform), refusal)


@final
class EngineBinder:
    """The engine's bindings (``Binder``).

    It passes on what the service says of a binding, to the engine and to the trace.
    """

    def __init__(self, consumer: Consumer, trace: Trace) -> None:
        self._consumer = consumer
        self._trace = trace
        #: Set after this object is made, and before anything is bound.
        self.engine: Engine

    def bind(self, token: bytes, window: PageRange, take: Callable[[Bound], _T]) -> _T:
        """Register a notifier (``Binder``)."""
        return self._consumer.bind(
            token,
            window,
            lambda bound: _Notifier(bound.number, take(bound), self.engine, self._trace),
        ).taken

    def bind_again(self, binding: int, window: PageRange, take: Callable[[int], _T]) -> _T:
        """Register another notifier (``Binder``)."""
        return self._consumer.bind_again(
            binding,
            window,
            lambda number: _Notifier(number, take(number), self.engine, self._trace),
        ).taken

    def unbind(self, number: int) -> None:
        """Unregister a notifier (``Binder``)."""
        self._consumer.unbind(number)


@final
class _Notifier(Generic[_T]):
    """The callbacks of one binding (``Notifier``), and what the engine made of the binding."""

    def __init__(self, binding: int, taken: _T, engine: Engine, trace: Trace) -> None:
        self.taken = taken
        self._binding = binding
        self._engine = engine
        self._trace = trace

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Let the engine stop using a range."""
        self._tell(
            "invalidate_start",
            PageRange(start, end),
            lambda binding, span: self._engine.invalidate_start(binding, span, order),
        )

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Let the engine use a range again."""
        self._tell(
            "invalidate_end",
            PageRange(start, end),
            lambda binding, span: self._engine.invalidate_end(binding, span, order),
        )

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Let the engine give up pages."""
        self._tell("error", PageRange(start, end), self._engine.error)

    def convert(self, start: pgoff_t, end: pgoff_t, *, private: bool) -> None:
        """Let the engine show another half (``mm.guest_memfd_file.Converts``)."""
        # The kernel engine binds no guest_memfd.
        assert isinstance(self._engine, SoftwareVm)
        self._engine.convert(self._binding, PageRange(start, end), private=private)

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        """Return the engine's count of pages in a range."""
        return self._engine.page_count(self._binding, PageRange(start, end))

    def _tell(self, event: str, span: PageRange, act: Callable[[int, PageRange], None]) -> None:
        started = now()
        act(self._binding, span)
        if self._trace.on:
            private_pages = _private_pages(self._engine)
            self._trace.emit(
                event,
                binding=self._binding,
                pgoff=span.start,
                npages=len(span),
                **private_pages,
                ns=now() - started,
            )


def _private_pages(engine: Engine) -> dict[str, int]:
    """Return the trace's count of private pages, if the engine knows it."""
    match engine.statistics():
        case {"pages_taken": int(taken), "pages_freed": int(freed)}:
            return {"private_pages": taken - freed}
        case _:
            return {}
