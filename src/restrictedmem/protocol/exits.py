"""The exits of a vCPU as values, and their form on the wire (after ``struct kvm_run``)."""

import struct
from dataclasses import dataclass
from typing import Final

from restrictedmem.abi.kvm import ExitReason

#: exit_reason, flags, and six words; the reason gives the words their meaning.
LAYOUT: Final = struct.Struct("=II6Q")


@dataclass(frozen=True, slots=True)
class PortIn:
    """The guest reads a port; the next run passes the value."""

    port: int
    size: int


@dataclass(frozen=True, slots=True)
class PortOut:
    """The guest wrote ``size`` bytes to a port."""

    port: int
    size: int
    data: int


@dataclass(frozen=True, slots=True)
class MmioRead:
    """The guest reads an address that no slot covers; the next run passes the value."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class MmioWrite:
    """The guest wrote to an address that no slot covers."""

    gpa: int
    size: int
    data: int


@dataclass(frozen=True, slots=True)
class Hypercall:
    """The guest called the hypercall page; the next run passes the result.

    Only these registers leave the engine.
    """

    number: int
    arguments: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class MemoryFault:
    """A page could not be mapped (``KVM_EXIT_MEMORY_FAULT``).

    ``flags`` are ``KVM_MEMORY_EXIT_FLAG_*``; ``gpa`` and ``size`` name the page. v9 and v10 would
    retry for ever when get_page fails. Here the errno is reported instead, as guest_memfd does.
    """

    flags: int
    gpa: int
    size: int
    errno: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The guest stopped for good, at an exception for which it has no handler.

    ``vector`` is the exception. The address (``rip``) can be read only if the VM may be debugged.
    """

    vector: int


@dataclass(frozen=True, slots=True)
class Debug:
    """KVM_SET_GUEST_DEBUG stopped the guest before the instruction at ``pc``.

    The fields are those of ``kvm_debug_exit_arch``. A breakpoint is #BP (3), and a single step is
    #DB (1) with ``DR6_BS``.
    """

    exception: int
    pc: int
    dr6: int = 0


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The owner interrupted the vCPU (``Vcpu.interrupt``, KVM_EXIT_INTR).

    The guest has lost nothing, and goes on at the next run.
    """


@dataclass(frozen=True, slots=True)
class Unknown:
    """A reason that this version does not know."""

    reason: int


Exit = (
    PortIn
    | PortOut
    | MmioRead
    | MmioWrite
    | Hypercall
    | MemoryFault
    | Shutdown
    | Debug
    | Interrupted
    | Unknown
)

#: The bit of ``Debug.dr6`` for a single step.
DR6_BS: Final = 1 << 14
BREAKPOINT: Final = 3
SINGLE_STEP: Final = 1

_IN: Final = 0
_OUT: Final = 1


def pack(exit_: Exit) -> bytes:
    """Encode an exit."""
    match exit_:
        case PortIn(port, size):
            return LAYOUT.pack(ExitReason.IO, _IN, port, size, 0, 0, 0, 0)
        case PortOut(port, size, data):
            return LAYOUT.pack(ExitReason.IO, _OUT, port, size, data, 0, 0, 0)
        case MmioRead(gpa, size):
            return LAYOUT.pack(ExitReason.MMIO, _IN, gpa, size, 0, 0, 0, 0)
        case MmioWrite(gpa, size, data):
            return LAYOUT.pack(ExitReason.MMIO, _OUT, gpa, size, data, 0, 0, 0)
        case Hypercall(number, arguments):
            return LAYOUT.pack(ExitReason.HYPERCALL, 0, number, *arguments, 0)
        case MemoryFault(flags, gpa, size, errno):
            return LAYOUT.pack(ExitReason.MEMORY_FAULT, 0, flags, gpa, size, errno, 0, 0)
        case Shutdown(vector):
            return LAYOUT.pack(ExitReason.SHUTDOWN, 0, vector, 0, 0, 0, 0, 0)
        case Debug(exception, pc, dr6):
            return LAYOUT.pack(ExitReason.DEBUG, 0, exception, pc, dr6, 0, 0, 0)
        case Interrupted():
            return LAYOUT.pack(ExitReason.INTR, 0, 0, 0, 0, 0, 0, 0)
        case Unknown(reason):
            return LAYOUT.pack(ExitReason.UNKNOWN, 0, reason, 0, 0, 0, 0, 0)


def unpack(data: bytes) -> Exit:
    """Decode an exit; a reason that this version does not know becomes ``Unknown``."""
    reason, flags, a, b, c, d, e, _ = LAYOUT.unpack(data)
    match reason, flags:
        case ExitReason.IO, 0:
            return PortIn(a, b)
        case ExitReason.IO, 1:
            return PortOut(a, b, c)
        case ExitReason.MMIO, 0:
            return MmioRead(a, b)
        case ExitReason.MMIO, 1:
            return MmioWrite(a, b, c)
        case ExitReason.HYPERCALL, _:
            return Hypercall(a, (b, c, d, e))
        case ExitReason.MEMORY_FAULT, _:
            return MemoryFault(a, b, c, d)
        case ExitReason.SHUTDOWN, _:
            return Shutdown(a)
        case ExitReason.DEBUG, _:
            return Debug(a, b, c)
        case ExitReason.INTR, _:
            return Interrupted()
        case ExitReason.UNKNOWN, _:
            return Unknown(a)
        case _:
            return Unknown(reason)
