"""The measurement of a launch: a chain of SHA-384 over what its owner put into the guest.

The chain covers each page as it is put in (its guest address and its content), then the registers
that each vCPU starts with, and then which memory is private. A person who knows what went in can
compute the measurement (``measure``) and compare it with the one in a report.
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
