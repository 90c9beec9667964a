"""A vCPU's socket in the engine process: its owner's requests, and its thread."""

import select
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from errno import EBADF, EINVAL, EIO, EPROTO
from typing import final

from restrictedmem import threads
from restrictedmem.abi import kvm
from restrictedmem.kvm import debug_requests
from restrictedmem.kvm.conversions import Asked, Conversions
from restrictedmem.kvm.engine_vcpu import EngineVcpu
from restrictedmem.kvm.launch import Launch
from restrictedmem.kvm.report_hypercall import Reporter
from restrictedmem.kvm.serving import hang_up, serve_one
from restrictedmem.kvm.whole import whole
from restrictedmem.protocol import exits, guest_abi, vm_wire
from restrictedmem.protocol.trace_events import Trace, of_exit
from restrictedmem.service.wire import Channel, Message
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, U64_MAX, gfn_t


@final
class VcpuSocket:
    """A vCPU and the thread that serves its socket: first registers, then runs."""

    def __init__(
        self,
        number: int,
        owner: Channel,
        watched: select.epoll,
        policy: int,
        launch: Launch,
        conversions: Conversions,
        reporter: Reporter,
        trace: Trace,
    ) -> None:
        """Serve ``owner`` once there is a vCPU.

        When ``watched`` reports the socket, the thread that waits for it calls ``let_go``.

        Raises:
            OSError: EAGAIN when no thread can be started.
        """
        #: Set by ``begin``, before anybody asks for it.
        self.vcpu: EngineVcpu
        self._trace = trace
        self._number = number
        self._launch = launch
        self._conversions = conversions
        #: The conversion that the guest has asked for.
        self._converting: Asked | None = None
        self._reporter = reporter
        self._owner = owner
        self._watched = watched
        self._policy = policy
        self.started = False
        self._retired = False
        self._ended = False
        self._begun, self._let_go = threading.Event(), threading.Event()
        self.exits: Counter[str] = Counter()
        self._lost = False
        threads.start(self._serve)

    def begin(self, vcpu: EngineVcpu) -> None:
        """Let the owner drive a vCPU from now on."""
        self.vcpu = vcpu
        self._begun.set()

    def abandon(self) -> None:
        """End the thread without a vCPU, in place of ``begin``."""
        self._ended = True
        self._let_go.set()
        self._begun.set()

    def let_go(self) -> None:
        """End, because the owner hung up or did not wait for its answer.

        Preconditions: the socket is not watched any more.
        """
        self._ended = True
        self._let_go.set()
        self.vcpu.interrupt()

    def retire(self) -> None:
        """Make the vCPU leave the guest, and refuse all requests of its owner from now on."""
        self._retired = True
        self.vcpu.interrupt()

    def _serve(self) -> None:
        """Serve the vCPU's socket until the owner closes it."""
        self._begun.wait()
        while not self._ended and serve_one(self._owner, self._owner.receive, self._dispatch):
            pass
        hang_up(self._owner)
        # If the socket were closed earlier, its number could become another's while it is watched.
        self._let_go.wait()
        self._owner.close()

    @contextmanager
    def _listening(self) -> Generator[None]:
        """Have the VM's thread notice meanwhile whether the owner sends anything.

        The owner has to wait for its answer. A message that nobody reads may hold the owner's own
        end of the socket, which then never hangs up.

        Raises:
            OSError: EPROTO when something came.
        """
        self._listen_for(select.EPOLLIN | select.EPOLLRDHUP)
        try:
            yield
        finally:
            # Before the answer goes out: the owner's next message may follow at once.
            self._listen_for(select.EPOLLRDHUP)
        if self._ended:
            raise OSError(EPROTO, "a message came before the last one was answered")

    def _listen_for(self, events: int) -> None:
        with suppress(FileNotFoundError):
            self._watched.modify(self._owner.fileno(), events)

    def _dispatch(self, message: Message) -> None:
        if self._retired:
            raise OSError(EBADF, "the VM was destroyed")
        match message.number:
            case vm_wire.RUN.number:
                (value,) = message.unpack(vm_wire.COMPLETION)
                with self._listening():
                    exit_ = self._run(value)
                self._owner.reply(exits.pack(exit_))
            case vm_wire.PRE_FAULT_MEMORY.number:
                self._pre_fault(kvm.kvm_pre_fault_memory.from_buffer_copy(message.body))
            case vm_wire.SET_REGS.number:
                regs = kvm.kvm_regs.from_buffer_copy(message.body)
                if self._launch.finished and self._policy & vm_wire.POLICY_DEBUG:
                    with self.vcpu.outside():
                        self.vcpu.engine.change_regs(regs)
                else:
                    self._set_regs(regs)
                self._owner.reply()
            case vm_wire.GET_REGS.number:
                debug_requests.check_policy(self._policy)
                with self.vcpu.outside():
                    regs = self.vcpu.engine.get_regs()
                self._owner.reply(bytes(regs))
            case vm_wire.GET_SREGS.number:
                debug_requests.check_policy(self._policy)
                with self.vcpu.outside():
                    sregs = self.vcpu.engine.get_sregs()
                self._owner.reply(bytes(sregs))
            case vm_wire.SET_GUEST_DEBUG.number:
                debug_requests.check_policy(self._policy)
                step, breakpoints = debug_requests.parse(message.body)
                with self.vcpu.outside():
                    self.vcpu.engine.set_guest_debug(step=step, breakpoints=breakpoints)
                self._owner.reply()
            case _:
                raise OSError(EPROTO, f"no such call: {message.number:#x}")

    def _set_regs(self, regs: kvm.kvm_regs) -> None:
        rest = kvm.kvm_regs(rip=regs.rip, rsp=regs.rsp, rdi=regs.rdi, rsi=regs.rsi)
        with self._launch.opened() as measurement:
            if bytes(rest) != bytes(regs):
                raise OSError(EINVAL, "only rip, rsp, rdi and rsi can be set")
            with whole():
                with self.vcpu.outside():
                    self.vcpu.engine.set_regs(regs)
                measurement.set_registers(self._number, regs)

    def _pre_fault(self, asked: kvm.kvm_pre_fault_memory) -> None:
        if (
            asked.flags
            or (asked.gpa | asked.size) & PAGE_MASK
            or not asked.size
            or asked.gpa + asked.size >= 1 << 64
        ):
            raise OSError(EINVAL, "range is empty, unaligned or wraps, or flags are set")
        start, end = gfn_t(asked.gpa >> PAGE_SHIFT), gfn_t((asked.gpa + asked.size) >> PAGE_SHIFT)
        with self._listening():
            done = self.vcpu.prefault(start, end) << PAGE_SHIFT
        asked.gpa, asked.size = asked.gpa + done, asked.size - done
        self._owner.reply(bytes(asked))

    def _run(self, value: int) -> exits.Exit:
        if self._lost:
            raise OSError(EIO, "this vCPU has lost an exit, and with it what the guest may be told")
        try:
            return self._run_guest(value)
        except OSError:
            raise
        except BaseException:
            # An exit may have been taken from the guest without a note of what it asks for.
            self._lost = True
            raise

    def _run_guest(self, value: int) -> exits.Exit:
        if self.started:
            if self._converting is not None:
                value = self._conversions.answered(self._converting, value)
                self._converting = None
            self.vcpu.complete(value)
        else:
            self._launch.finish()
            self.started = True
        if self._trace.on:
            self._trace.emit("enter", vcpu=self._number)
        exit_ = self._run_to_an_exit()
        if self._trace.on:
            self._trace.emit("exit", vcpu=self._number, **of_exit(exit_))
        self.exits[type(exit_).__name__] += 1
        return exit_

    def _run_to_an_exit(self) -> exits.Exit:
        """Run the guest until it needs its owner, who learns nothing else about the guest."""
        while True:
            try:
                exit_ = self.vcpu.run()
            except (OSError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001 - its text may show registers or memory.
                raise RuntimeError(type(error).__name__) from None
            match exit_:
                case exits.Hypercall(guest_abi.REPORT):
                    if self._trace.on:
                        self._trace.emit("report", vcpu=self._number)
                    self.vcpu.complete(self._reporter.answer() & U64_MAX)
                case exits.Hypercall(number, arguments):
                    if number == guest_abi.MAP_GPA_RANGE:
                        self._converting = self._conversions.asked(*arguments[:3])
                    count = guest_abi.ARGUMENTS.get(number, len(arguments))
                    a, b, c, d = (
                        argument if index < count else 0 for index, argument in enumerate(arguments)
                    )
                    return exits.Hypercall(number, (a, b, c, d))
                case _:
                    return exit_
