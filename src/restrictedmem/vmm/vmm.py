"""A small VMM: the one behind ``restrictedmem run``, and an example for other VMMs.

The VMM is a plain owner. It makes a restricted descriptor, gives it to the VM, loads the guest
before the first run, and then only answers exits. Input and output pass through the shared window.
The VMM never sees private memory, except pages that the guest makes shared.
"""

import mmap
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EINVAL, EIO, ENOSYS
from typing import Any, BinaryIO, Final, Self, final

from restrictedmem.abi import memory
from restrictedmem.failure import failed, named
from restrictedmem.fd import readable
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service.client import Service, default_service
from restrictedmem.threads import begin
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT
from restrictedmem.vmm import elf
from restrictedmem.vmm.boot import SHARED_SIZE, launch_pages, launch_regs
from restrictedmem.vmm.vm import Vcpu, Vm

_PRIVATE_SLOT: Final = 0
_SHARED_SLOT: Final = 1


@dataclass(frozen=True, slots=True)
class Ended:
    """How a guest ended: its exit status, or the exit that the VMM cannot answer."""

    status: int
    fatal: exits.Exit | None = None

    @property
    def interrupted(self) -> bool:
        """Say whether ``Vmm.stop`` stopped the guest before it ended by itself."""
        return isinstance(self.fatal, exits.Interrupted)


@dataclass(frozen=True, slots=True)
class _Streams:
    """The guest's input and output, and a poll object for input and the guest's end."""

    stdin: BinaryIO
    outputs: dict[int, BinaryIO]
    poll: select.poll


@final
class Vmm:
    """One guest from the making of its descriptor to its exit status."""

    def __init__(
        self,
        private_size: int,
        service: Service | None = None,
        *,
        vcpus: int = 1,
        engine: str = "software",
        debug: bool = False,
        platform: str = "",
    ) -> None:
        """Make a descriptor and a VM with ``private_size`` bytes of private memory.

        ``engine``, ``debug`` and ``platform`` are those of ``Vm``.

        Raises:
            OSError: EINVAL for a size that is not whole pages or is below the guest ABI's minimum,
                or for more vCPUs than a VM can have; the error that kept the service or the engine
                from starting.
        """
        if private_size & PAGE_MASK or private_size < guest_abi.PRIVATE_SIZE_MIN:
            raise failed(
                "Vmm",
                EINVAL,
                f"private memory must be whole pages, at least {guest_abi.PRIVATE_SIZE_MIN} bytes",
            )
        self.private_size = private_size
        service = service or default_service()
        self.way: str = service.info["way"]
        self._design: str = service.info["design"]
        with ExitStack() as stack:
            self.restricted_fd = service.memfd_restricted()
            stack.callback(os.close, self.restricted_fd)
            try:
                os.ftruncate(self.restricted_fd, private_size)
            except OSError as error:
                raise failed(
                    "ftruncate", error.errno, f"{private_size} bytes of private memory"
                ) from None
            # The owner's memory for both ranges that the guest can share: the window, and the
            # shared half of private memory.
            window, self._shared = self._memory(stack, "shared-window", SHARED_SIZE)
            self._half_fd, self._half = self._memory(stack, "shared-half", private_size)
            self.vm = stack.enter_context(
                Vm(service, engine=engine, debug=debug, explicit=True, platform=platform)
            )
            self.vm.set_user_memory_region(
                slot=_PRIVATE_SLOT,
                guest_phys_addr=guest_abi.PRIVATE_BASE,
                memory_size=private_size,
                restricted_fd=self.restricted_fd,
                shared_fd=self._half_fd,
            )
            self.vm.set_user_memory_region(
                slot=_SHARED_SLOT,
                guest_phys_addr=guest_abi.SHARED_BASE,
                memory_size=SHARED_SIZE,
                shared_fd=window,
            )
            if service.info["api"] == "v10":
                # With v9, all memory of a private slot starts as private.
                self.vm.convert(guest_abi.PRIVATE_BASE, private_size, private=True)
            self.vcpus: tuple[Vcpu, ...] = tuple(
                stack.enter_context(self.vm.create_vcpu()) for _ in range(vcpus)
            )
            #: Readable once the guest has ended or has to end.
            self._over = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self._over)
            self._resources = stack.pop_all()
        self._lock = threading.Lock()
        self._driven: set[Vcpu] = set()
        #: The function that runs a vCPU: ``Vcpu.run``, unless a debugger or a trace has replaced
        #: it.
        self.enter: Callable[[Vcpu, int], exits.Exit] = Vcpu.run
        self._outcome: Ended | BaseException | None = None
        #: Nanoseconds from the first run to the last exit, and bytes read and written meanwhile.
        self.elapsed = 0
        self.bytes_in = 0
        self.bytes_out = 0

    @staticmethod
    def _memory(stack: ExitStack, name: str, size: int) -> tuple[int, mmap.mmap]:
        fd = stack.enter_context(memory.memfd_create(name)).fileno()
        try:
            os.ftruncate(fd, size)
            return fd, stack.enter_context(mmap.mmap(fd, size))
        except OSError as error:
            raise failed("mmap", error.errno, f"{size} bytes that owner and guest share") from None

    # Launch.

    def load(self, image: elf.Image, arguments: Sequence[str] = ()) -> None:
        """Put a guest and its arguments into private memory (launch_update); set up its vCPUs.

        Raises:
            OSError: as ``launch_pages``; ENOSPC, ENOMEM.
        """
        for gpa, content in launch_pages(
            image, arguments, private_size=self.private_size, vcpus=len(self.vcpus)
        ):
            self.vm.launch_update(gpa, content)
        for index, vcpu in enumerate(self.vcpus):
            regs = launch_regs(image, private_size=self.private_size, index=index)
            vcpu.set_regs(rip=regs.rip, rsp=regs.rsp, rdi=regs.rdi, rsi=regs.rsi)

    def launch_finish(self) -> bytes:
        """Close the launch and return its measurement, 48 bytes (LAUNCH_FINISH).

        Each call returns the same bytes.

        Raises:
            OSError: ENOTCONN when the engine is gone.
        """
        return self.vm.launch_finish()

    # Running.

    def run(
        self,
        stdin: BinaryIO,
        stdout: BinaryIO,
        stderr: BinaryIO,
        progress: Callable[[], None] | None = None,
    ) -> Ended:
        """Run the guest to its end, once, with a thread for each vCPU.

        The first vCPU runs in the caller's thread, which calls ``progress`` after each exit. The
        VMM reads and writes the streams' descriptors directly, without their buffers.

        Raises:
            OSError: the error of a stream; ENOTCONN when the engine is gone; EAGAIN when no thread
                can be started.
        """
        started = time.monotonic_ns()
        poll = select.poll()
        poll.register(stdin.fileno(), select.POLLIN)
        poll.register(self._over, select.POLLIN)
        streams = _Streams(
            stdin, {guest_abi.STREAM_OUT: stdout, guest_abi.STREAM_ERR: stderr}, poll
        )
        threads = [
            threading.Thread(target=self._drive, args=(vcpu, streams), daemon=True)
            for vcpu in self.vcpus[1:]
        ]
        stopper = threading.Thread(target=self._interrupt_at_the_end, daemon=True)
        try:
            for thread in (stopper, *threads):
                begin(thread)
            self._drive(self.vcpus[0], streams, progress)
            for thread in threads:
                thread.join()
        finally:
            # No vCPU is left that could end the guest by itself.
            self._end(Ended(1, exits.Hypercall(guest_abi.PARK, (0, 0, 0, 0))))
            for thread in (stopper, *threads):
                if thread.ident is not None:
                    thread.join()
            self.elapsed += time.monotonic_ns() - started
        assert self._outcome is not None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    @property
    def outcome(self) -> Ended | BaseException | None:
        """Return how the guest ended; None while it runs and until ``stop`` took effect."""
        return self._outcome

    def fileno(self) -> int:
        """Return a descriptor that is readable once the guest has ended or has to end.

        The VMM keeps the descriptor.
        """
        return self._over

    def stop(self) -> None:
        """End ``run`` early, from any thread or signal handler.

        A run that has not begun ends at once. ``run`` still waits for a reader to take the guest's
        output.
        """
        os.eventfd_write(self._over, 1)

    def _end(self, outcome: Ended | BaseException) -> None:
        with self._lock:
            if self._outcome is None:
                self._outcome = outcome
        os.eventfd_write(self._over, 1)

    def _interrupt_at_the_end(self) -> None:
        # A thread of its own does this, because a signal handler must not wait for the locks that a
        # request takes.
        readable([self._over])
        if self._outcome is None:
            self._end(Ended(1, exits.Interrupted()))
        with self._lock:
            driven = tuple(self._driven)
        for vcpu in driven:
            try:
                vcpu.interrupt()
            except OSError:
                # The engine is gone, so the runs of its vCPUs end too.
                return

    def _drive(
        self, vcpu: Vcpu, streams: _Streams, progress: Callable[[], None] | None = None
    ) -> None:
        with self._lock:
            self._driven.add(vcpu)
        outcome: Ended | BaseException | None
        try:
            outcome = self._run_vcpu(vcpu, streams, progress)
        except BaseException as error:  # noqa: BLE001 - the caller of run gets it, whichever thread it came in.
            outcome = error
        with self._lock:
            self._driven.discard(vcpu)
        if outcome is not None:
            self._end(outcome)

    def _run_vcpu(
        self, vcpu: Vcpu, streams: _Streams, progress: Callable[[], None] | None
    ) -> Ended | None:
        """Run a vCPU until it ends the guest; None if it parks or another one ends it."""
        value = 0
        while self._outcome is None:
            match self.enter(vcpu, value):
                case exits.Hypercall(guest_abi.EXIT, (status, _, _, _)):
                    return Ended(status & 0xFF)
                case exits.Hypercall(guest_abi.PARK):
                    return None
                case exits.Hypercall(number, arguments):
                    value = self._answer(streams, number, *arguments)
                case other:
                    return Ended(1, other)
            if progress is not None:
                progress()
        return None

    def _answer(self, streams: _Streams, number: int, a: int, b: int, c: int, d: int) -> int:
        match number:
            case guest_abi.READ:
                return self._read(streams, a, b)
            case guest_abi.WRITE:
                return self._write(streams.outputs.get(a), b, c)
            case guest_abi.CHECK:
                return self._check(a, b, c, d)
            case guest_abi.MAP_GPA_RANGE:
                return self._map_gpa_range(
                    a, b, private=bool(c & guest_abi.MAP_GPA_RANGE_ENCRYPTED)
                )
            case _:
                return -ENOSYS

    # Input and output.

    def _window(self, offset: int, length: int) -> memoryview | None:
        if offset > SHARED_SIZE or length > SHARED_SIZE - offset:
            return None
        return memoryview(self._shared)[offset : offset + length]

    def _read(self, streams: _Streams, offset: int, length: int) -> int:
        window = self._window(offset, length)
        if window is None:
            return -EINVAL
        with window:
            if self._over in dict(streams.poll.poll()):
                # The guest was stopped, unless an outcome is set already. The thread that sets this
                # outcome may run later than this one.
                self._end(Ended(1, exits.Interrupted()))
                return -EIO
            try:
                count = os.readv(streams.stdin.fileno(), [window])
            except OSError as error:
                raise named("read", error, _name(streams.stdin)) from None
        with self._lock:
            self.bytes_in += count
        return count

    def _write(self, stream: BinaryIO | None, offset: int, length: int) -> int:
        window = self._window(offset, length)
        if window is None or stream is None:
            return -EINVAL
        with window:
            try:
                count = os.writev(stream.fileno(), [window])
            except OSError as error:
                raise named("write", error, _name(stream)) from None
        with self._lock:
            self.bytes_out += count
        return count

    # Conversions.

    def _map_gpa_range(self, gpa: int, npages: int, *, private: bool) -> int:
        """Convert pages, and free their memory in the other half.

        Return 0 or a negative errno for the guest.
        """
        size = npages << PAGE_SHIFT
        if gpa & PAGE_MASK or not npages or gpa + size >= 1 << 64:
            return -EINVAL
        start = max(gpa - guest_abi.PRIVATE_BASE, 0)
        length = min(gpa - guest_abi.PRIVATE_BASE + size, self.private_size) - start
        try:
            # Convert before punching. Otherwise another vCPU could fill the hole again, in the half
            # that is about to be hidden.
            self.vm.convert(gpa, size, private=private)
            if length > 0:
                memory.fallocate(
                    self._half_fd if private else self.restricted_fd, memory.PUNCH, start, length
                )
        except OSError as error:
            return -(error.errno or EIO)
        return 0

    def _check(self, gpa: int, length: int, old: int, new: int) -> int:
        """Answer CHECK: fill a range of the shared half with ``new`` if every byte is ``old``.

        Return 0 or a negative errno for the guest.
        """
        start = gpa - guest_abi.PRIVATE_BASE
        if start < 0 or start + length > self.private_size:
            return -EINVAL
        if self._half[start : start + length] != bytes([old & 0xFF]) * length:
            return -EIO
        self._half[start : start + length] = bytes([new & 0xFF]) * length
        return 0

    def statistics(self) -> dict[str, Any]:
        """Return the engine's statistics, with those that only the owner knows.

        The time outside the guest is the sum over all vCPUs.
        """
        found = self.vm.statistics()
        outside = self.elapsed * len(self.vcpus) - found["time_in_guest_ns"]
        return {
            **found,
            "way": self.way,
            "design": self._design,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "time_total_ns": self.elapsed,
            "time_outside_ns": outside,
        }

    def destroy(self) -> dict[str, Any]:
        """End the VM, keep the descriptor, return the platform's report (``Vm.destroy``)."""
        return self.vm.destroy()

    def close(self) -> None:
        """Close the VM and the descriptor."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _name(stream: BinaryIO) -> str:
    """Return the name of a stream for errors, without the brackets of ``<stdin>``."""
    return str(stream.name).strip("<>")
