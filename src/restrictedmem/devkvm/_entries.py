"""KVM's structs that end in an array of variable length.

Each has room for as many entries as the kernel ever takes.
"""

import ctypes
from collections.abc import Iterable, Mapping
from errno import E2BIG
from typing import TYPE_CHECKING, Final, TypeVar

from restrictedmem.abi.kvm import kvm_signal_mask
from restrictedmem.abi.kvm_x86 import kvm_cpuid2, kvm_cpuid_entry2, kvm_msr_entry, kvm_msrs
from restrictedmem.failure import failed

#: KVM_MAX_CPUID_ENTRIES and MAX_IO_MSRS in the kernel's source.
MOST: Final = 256

E = TypeVar("E")


class CpuidEntries(kvm_cpuid2):
    """Entries of KVM_GET_CPUID2, KVM_SET_CPUID2 and KVM_GET_SUPPORTED_CPUID."""

    if TYPE_CHECKING:
        entries: ctypes.Array[kvm_cpuid_entry2]
    else:
        _fields_ = (("entries", kvm_cpuid_entry2 * MOST),)

    @classmethod
    def room(cls) -> "CpuidEntries":
        """Return a struct for the kernel to fill."""
        return cls(nent=MOST)

    @classmethod
    def of(cls, given: Iterable[kvm_cpuid_entry2]) -> "CpuidEntries":
        """Return a struct with these entries.

        Raises:
            OSError: E2BIG for too many entries, like the kernel.
        """
        entries = fitting(list(given), "KVM_SET_CPUID2")
        made = cls(nent=len(entries))
        made.entries[: len(entries)] = entries
        return made

    def listed(self) -> list[kvm_cpuid_entry2]:
        """Return the entries, each a struct of its own."""
        return [kvm_cpuid_entry2.from_buffer_copy(entry) for entry in self.entries[: self.nent]]


class MsrEntries(kvm_msrs):
    """Entries of KVM_GET_MSRS and KVM_SET_MSRS."""

    if TYPE_CHECKING:
        entries: ctypes.Array[kvm_msr_entry]
    else:
        _fields_ = (("entries", kvm_msr_entry * MOST),)

    @classmethod
    def of(cls, values: Mapping[int, int], call: str) -> "MsrEntries":
        """Return a struct with these registers.

        Raises:
            OSError: E2BIG for too many entries, like the kernel.
        """
        entries = fitting(
            [kvm_msr_entry(index=index, data=data) for index, data in values.items()], call
        )
        made = cls(nmsrs=len(entries))
        made.entries[: len(entries)] = entries
        return made

    def values(self) -> dict[int, int]:
        """Return the registers by their number."""
        return {entry.index: entry.data for entry in self.entries[: self.nmsrs]}


class SignalSet(kvm_signal_mask):
    """The set of KVM_SET_SIGNAL_MASK: signal N is bit N - 1."""

    if TYPE_CHECKING:
        sigset: ctypes.Array[ctypes.c_uint8]
    else:
        _fields_ = (("sigset", ctypes.c_uint8 * 8),)

    @classmethod
    def of(cls, signals: Iterable[int]) -> "SignalSet":
        """Return a struct with these signals."""
        made = cls(len=8)
        made.sigset[:] = list(sum(1 << number - 1 for number in set(signals)).to_bytes(8, "little"))
        return made


def fitting(entries: list[E], call: str) -> list[E]:
    """Return ``entries`` if they are not too many for the kernel.

    Raises:
        OSError: E2BIG for too many entries, like the kernel.
    """
    if len(entries) > MOST:
        raise failed(call, E2BIG)
    return entries
