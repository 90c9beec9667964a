"""The measurement of a launch: a chain of SHA-384 over the guest's initial state.

The chain is computed over each page in the order of updates, with its guest physical address and
its content. After the pages follow the initial registers of each vCPU, and then the ranges of
private memory. A person who knows this state can compute the measurement (``measure``) and compare
it with the one in a report.
"""

import struct
from collections.abc import Iterable, Sequence
from hashlib import sha384
from typing import Final, final

from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.units import PAGE_SIZE

#: Bytes of a measurement.
MEASUREMENT_BYTES: Final = 48

_BEGIN: Final = struct.Struct("<23sII")
_NAME: Final = b"restrictedmem launch 1\0"
#: Type, 0, and the guest physical address of a page or a run, or a vCPU's number. The digest of the
#: content follows.
_RECORD: Final = struct.Struct("<IIQ")
_PAGE: Final = 1
_REGISTERS: Final = 2
_PRIVATE: Final = 3
#: The content of a ``Run``'s record: all but its address.
_RUN: Final = struct.Struct("<QQQ")

#: A run of private memory: guest physical address, size, and offset in the restricted file, all in
#: bytes; then KVM_MEM_READONLY or 0.
Run = tuple[int, int, int, int]


@final
class Measurement:
    """A measurement that is being computed."""

    __slots__ = ("_registers", "_value")

    def __init__(self, policy: int) -> None:
        """Begin the chain with a VM's policy."""
        self._value = sha384(_BEGIN.pack(_NAME, policy, 0)).digest()
        self._registers: dict[int, bytes] = {}

    def extended(self, gpa: int, content: bytes) -> bytes:
        """Return the chain with whole pages at a guest physical address, for ``extend``."""
        value = self._value
        for offset in range(0, len(content), PAGE_SIZE):
            value = _extended(value, _PAGE, gpa + offset, content[offset : offset + PAGE_SIZE])
        return value

    def extend(self, value: bytes) -> None:
        """Go on from the result of ``extended``, after the pages were put in."""
        self._value = value

    def add_pages(self, gpa: int, content: bytes) -> None:
        """Extend the chain by whole pages that were put in at a guest physical address."""
        self.extend(self.extended(gpa, content))

    def set_registers(self, vcpu: int, regs: kvm_regs) -> None:
        """Set a vCPU's initial registers; the last call for a vCPU counts."""
        self._registers[vcpu] = bytes(regs)

    def finish(self, private: Iterable[Run]) -> bytes:
        """Return the measurement: the chain, each vCPU's registers, and the private memory.

        vCPUs are taken in the order of their numbers, and runs in the order of their addresses.
        """
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
    """Return the measurement of a launch.

    ``pages`` are whole pages at their guest physical addresses, and ``registers`` those of vCPU 0,
    1, and so on.
    """
    measurement = Measurement(policy)
    for gpa, content in pages:
        measurement.add_pages(gpa, content)
    for vcpu, regs in enumerate(registers):
        measurement.set_registers(vcpu, regs)
    return measurement.finish(private)
