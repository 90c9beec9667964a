"""The launch: what an owner puts into a guest before it runs, and the measurement of it.

The measurement is a chain of SHA-384 over each page as it is put in (its guest address and its
content), then over the registers that each vCPU starts with and over what memory is private. Who
knows what went in can compute it (``measure``) and compare with what a report says.
"""

import struct
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from errno import EPERM
from hashlib import sha384
from typing import Final, final

from restrictedmem import sync
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.units import PAGE_SIZE

#: Bytes of a measurement.
MEASUREMENT_BYTES: Final = 48

_BEGIN: Final = struct.Struct("<23sII")
_NAME: Final = b"restrictedmem launch 1\0"
#: Type, 0, and a page's guest physical address in bytes or a vCPU's number; the digest of the
#: content follows.
_RECORD: Final = struct.Struct("<IIQ")
_PAGE: Final = 1
_REGISTERS: Final = 2
_PRIVATE: Final = 3
#: The rest of a ``Run``.
_RUN: Final = struct.Struct("<QQQ")

#: A run of private memory: guest physical address, size, offset in the restricted file, all in
#: bytes; and KVM_MEM_READONLY or 0.
Run = tuple[int, int, int, int]


@final
class Measurement:
    """A measurement as it grows."""

    __slots__ = ("_registers", "_value")

    def __init__(self, policy: int) -> None:
        """Begin the chain with a VM's policy."""
        self._value = sha384(_BEGIN.pack(_NAME, policy, 0)).digest()
        self._registers: dict[int, bytes] = {}

    def extended(self, gpa: int, content: bytes) -> bytes:
        """Return the chain with whole pages that are to be put in at a guest physical address, for ``extend``."""
        value = self._value
        for offset in range(0, len(content), PAGE_SIZE):
            value = _extended(value, _PAGE, gpa + offset, content[offset : offset + PAGE_SIZE])
        return value

    def extend(self, value: bytes) -> None:
        """Go on from what ``extended`` returned: the pages were put in."""
        self._value = value

    def add_pages(self, gpa: int, content: bytes) -> None:
        """Extend by whole pages that were put in at a guest physical address."""
        self.extend(self.extended(gpa, content))

    def set_registers(self, vcpu: int, regs: kvm_regs) -> None:
        """Note what a vCPU starts with: what was set last counts."""
        self._registers[vcpu] = bytes(regs)

    def finish(self, private: Iterable[Run]) -> bytes:
        """Return what comes of it with the registers of each vCPU, in the order of their numbers, and what is private, by address."""
        value = self._value
        for vcpu, regs in sorted(self._registers.items()):
            value = _extended(value, _REGISTERS, vcpu, regs)
        for gpa, *rest in sorted(private):
            value = _extended(value, _PRIVATE, gpa, _RUN.pack(*rest))
        return value


def _extended(value: bytes, kind: int, where: int, content: bytes) -> bytes:
    return sha384(value + _RECORD.pack(kind, 0, where) + sha384(content).digest()).digest()


def measure(
    policy: int,
    pages: Iterable[tuple[int, bytes]],
    registers: Sequence[kvm_regs],
    private: Iterable[Run],
) -> bytes:
    """Return the measurement of a launch: whole pages at their guest physical addresses, registers of vCPU 0, 1, …, private memory."""
    measurement = Measurement(policy)
    for gpa, content in pages:
        measurement.add_pages(gpa, content)
    for vcpu, regs in enumerate(registers):
        measurement.set_registers(vcpu, regs)
    return measurement.finish(private)


@final
class Launch:
    """A VM's launch: open until its owner finishes it, or runs a vCPU; used by the VM's thread and by those of its vCPUs."""

    def __init__(
        self, policy: int, private: Callable[[], Iterable[Run]], finished: Callable[[bytes], None]
    ) -> None:
        """Open it; before the first vCPU enters the guest ``private`` says what is private, and ``finished`` takes the measurement."""
        self._mutex = sync.mutex()
        self._measurement = Measurement(policy)
        self._private = private
        self._finished = finished
        self._result: bytes | None = None

    @contextmanager
    def opened(self) -> Generator[Measurement]:
        """Keep the launch open meanwhile, to put something in and then extend the measurement by it.

        Raises:
            OSError: EPERM when it is finished.
        """
        with self._mutex:
            if self._result is not None:
                raise OSError(
                    EPERM, "the launch is finished: memory and registers are the guest's own"
                )
            yield self._measurement

    @property
    def finished(self) -> bool:
        """Whether it is closed."""
        return self._result is not None

    def finish(self) -> bytes:
        """Close the launch, if that was not done yet, and return the measurement.

        Raises:
            OSError: what ``finished`` raised; the launch stays open then.
        """
        with self._mutex:
            if self._result is None:
                result = self._measurement.finish(self._private())
                self._finished(result)
                self._result = result
            return self._result
