"""A small VMM: what ``restrictedmem run`` does with a VM, and an example for whoever writes their own.

It is an owner and no more: it makes a restricted descriptor and gives it to the VM, loads the guest before the first run, and then only
answers exits. Input and output pass through the shared window; private memory it never sees.
"""

import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from errno import E2BIG, EINVAL, ENOEXEC, ENOSYS
from types import TracebackType
from typing import Any, BinaryIO, Final, Self, final

from restrictedmem.abi import memory
from restrictedmem.kvm import elf, exits, guest_abi
from restrictedmem.kvm.vm import Vm
from restrictedmem.service.client import Service, default_service
from restrictedmem.units import PAGE_MASK

#: The window that guest and VMM both see, in bytes.
SHARED_SIZE: Final = 1 << 20
_BOOT_INFO: Final = struct.Struct("=QII7Q")
_PRIVATE_SLOT: Final = 0
_SHARED_SLOT: Final = 1


@dataclass(frozen=True, slots=True)
class Ended:
    """How a guest ended: its exit status, or the exit that nobody can answer."""

    status: int
    fatal: exits.Exit | None = None


@final
class Vmm:
    """One guest from descriptor to exit status."""

    def __init__(self, private_size: int, service: Service | None = None) -> None:
        """Make descriptor and VM with ``private_size`` bytes of private memory.

        Raises:
            OSError: EINVAL for a size that is not whole pages or under the guest ABI's minimum; whatever kept the service from starting.
        """
        if private_size & PAGE_MASK or private_size < guest_abi.PRIVATE_SIZE_MIN:
            raise OSError(EINVAL, f"private memory must be whole pages, at least {guest_abi.PRIVATE_SIZE_MIN} bytes")
        self.private_size = private_size
        service = service or default_service()
        self.way: str = service.info["way"]
        self.restricted_fd = service.memfd_restricted()
        os.ftruncate(self.restricted_fd, private_size)
        with memory.memfd_create("shared-window") as window:
            os.ftruncate(window.fileno(), SHARED_SIZE)
            self._shared = mmap.mmap(window.fileno(), SHARED_SIZE)
            self.vm = Vm(service)
            self.vm.set_user_memory_region(
                slot=_PRIVATE_SLOT,
                guest_phys_addr=guest_abi.PRIVATE_BASE,
                memory_size=private_size,
                restricted_fd=self.restricted_fd,
            )
            self.vm.set_user_memory_region(
                slot=_SHARED_SLOT, guest_phys_addr=guest_abi.SHARED_BASE, memory_size=SHARED_SIZE, shared_fd=window.fileno()
            )
        if service.info["api"] == "v10":
            # v9 starts with everything private.
            self.vm.set_memory_attributes(guest_abi.PRIVATE_BASE, private_size, private=True)
        self.vcpu = self.vm.create_vcpu()
        #: Nanoseconds from the first run to the last exit, and bytes read and written meanwhile.
        self.elapsed = 0
        self.bytes_in = 0
        self.bytes_out = 0

    def load(self, image: elf.Image, arguments: Sequence[str] = ()) -> None:
        """Put a guest and its arguments into private memory (launch_update).

        Raises:
            OSError: ENOEXEC for an image linked elsewhere; E2BIG for arguments that do not fit the boot pages; ENOSPC, ENOMEM.
        """
        limit = guest_abi.PRIVATE_BASE + self.private_size - guest_abi.STACK_SIZE
        if any(segment.gpa < guest_abi.IMAGE_BASE or segment.gpa + segment.size > limit for segment in image.segments):
            raise OSError(ENOEXEC, f"the guest does not fit {guest_abi.IMAGE_BASE:#x} to {limit:#x}; give it more --memory?")
        strings = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
        if _BOOT_INFO.size + len(strings) > guest_abi.BOOT_SIZE:
            raise OSError(E2BIG, "arguments are too long")
        boot = _BOOT_INFO.pack(
            guest_abi.BOOT_MAGIC,
            guest_abi.BOOT_VERSION,
            len(arguments),
            guest_abi.PRIVATE_BASE,
            self.private_size,
            guest_abi.SHARED_BASE,
            SHARED_SIZE,
            guest_abi.HYPERCALL_PAGE,
            (image.end + PAGE_MASK) & ~PAGE_MASK,
            guest_abi.PRIVATE_BASE + _BOOT_INFO.size,
        )
        self.vm.launch_update(guest_abi.PRIVATE_BASE, boot + strings)
        for segment in image.segments:
            self.vm.launch_update(segment.gpa, segment.data)
        self.vcpu.set_regs(rip=image.entry, rsp=guest_abi.PRIVATE_BASE + self.private_size, rdi=guest_abi.PRIVATE_BASE)

    def run(self, stdin: BinaryIO, stdout: BinaryIO, stderr: BinaryIO, progress: Callable[[], None] | None = None) -> Ended:
        """Run the guest to its end, with unbuffered streams for its input and output; ``progress`` is called after each exit.

        Raises:
            OSError: what a stream failed with; ENOTCONN when the engine is gone.
        """
        started = time.monotonic_ns()
        value = 0
        try:
            while True:
                exit_ = self.vcpu.run(value)
                match exit_:
                    case exits.Hypercall(guest_abi.EXIT, (status, _, _, _)):
                        return Ended(status & 0xFF)
                    case exits.Hypercall(guest_abi.READ, (offset, length, _, _)):
                        value = self._read(stdin, offset, length)
                    case exits.Hypercall(guest_abi.WRITE, (stream, offset, length, _)):
                        value = self._write({1: stdout, 2: stderr}.get(stream), offset, length)
                    case exits.Hypercall():
                        value = -ENOSYS
                    case _:
                        return Ended(1, exit_)
                if progress is not None:
                    progress()
        finally:
            self.elapsed += time.monotonic_ns() - started

    def _window(self, offset: int, length: int) -> memoryview | None:
        if offset > SHARED_SIZE or length > SHARED_SIZE - offset:
            return None
        return memoryview(self._shared)[offset : offset + length]

    def _read(self, stream: BinaryIO, offset: int, length: int) -> int:
        window = self._window(offset, length)
        if window is None:
            return -EINVAL
        with window:
            count = os.readv(stream.fileno(), [window])
        self.bytes_in += count
        return count

    def _write(self, stream: BinaryIO | None, offset: int, length: int) -> int:
        window = self._window(offset, length)
        if window is None or stream is None:
            return -EINVAL
        with window:
            count = os.writev(stream.fileno(), [window])
        self.bytes_out += count
        return count

    def statistics(self) -> dict[str, Any]:
        """Return the engine's statistics, with what only the owner knows."""
        found = self.vm.statistics()
        outside = self.elapsed - found["time_in_guest_ns"]
        return {
            **found,
            "way": self.way,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "time_total_ns": self.elapsed,
            "time_outside_ns": outside,
        }

    def close(self) -> None:
        """Let go of the VM and the descriptor."""
        self.vcpu.close()
        self.vm.close()
        os.close(self.restricted_fd)
        self._shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
