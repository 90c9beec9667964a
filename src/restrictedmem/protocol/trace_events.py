"""The events of a run as JSON lines (docs/use/trace.md), the same for owner and both engines.

The engine sends its events over a socket to the owner. The owner writes them and its own events to
a file (``recording``). The events are metadata that a host has of every guest: numbers of pages,
kinds of exits, times. They have no content, no register and no argument of a hypercall.
"""

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EIO
from typing import Final, Protocol, final

from restrictedmem import sync
from restrictedmem.abi import kvm
from restrictedmem.protocol import exits, vm_wire
from restrictedmem.service.wire import Message
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT

#: The schema's version; a reader must not rely on another version.
VERSION: Final = 1
#: A socket's room for events in bytes of the kernel's memory; each event takes some 800. An
#: ordinary user gets less (net.core.wmem_max).
_ROOM: Final = 1 << 20

Value = int | str | bool
Fields = dict[str, Value]


def now() -> int:
    """Return the time for an event: CLOCK_MONOTONIC in nanoseconds, alike in every process."""
    return time.monotonic_ns()


class Output(Protocol):
    """The destination of a process's events; it never waits."""

    def send(self, line: bytes, /) -> object:
        """Take a whole line or nothing.

        Raises:
            BlockingIOError: there is no room for the line.
            OSError: nobody takes lines any more.
        """

    def close(self) -> None:
        """Stop taking lines."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Return a socket to send events to, an ``Output``, and a socket to read them from.

    A pipe would not do. Its lock is held while a reader's memory is filled, which a FUSE server of
    the owner may delay for ever. Nobody can send anything to the writing socket.

    Raises:
        OSError: EMFILE.
    """
    writer, reader = socket.socketpair()
    # A line is far shorter than half of the room, so the kernel takes it whole
    # (unix_stream_sendmsg).
    writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
    writer.setblocking(False)
    writer.shutdown(socket.SHUT_RD)
    return writer, reader


@final
class Trace:
    """The trace of a process, which writes events if an output is set; for any thread."""

    __slots__ = ("_lock", "_lost", "_output", "on")

    def __init__(self) -> None:
        self._lock = sync.mutex()
        self._output: Output | None = None
        self._lost = 0
        #: Whether events are wanted; a caller checks this before it builds one.
        self.on = False

    def start(self, output: Output) -> None:
        """Write events to ``output`` from now on, own it, and close the previous output."""
        with self.starting(output):
            pass

    @contextmanager
    def starting(self, output: Output) -> Generator[Callable[[str, Fields], None]]:
        """Do the same as ``start``, but keep the previous output if the block fails.

        Yield a function that writes an event. No other caller writes an event within the block.
        """
        with self._lock:
            before = self._output, self._lost, self.on
            self._output, self._lost, self.on = output, 0, True
            try:
                yield self._write
            except BaseException:
                output.close()
                self._output, self._lost, self.on = before
                raise
            if before[0] is not None:
                before[0].close()

    def _close(self) -> None:
        self.on = False
        if self._output is not None:
            self._output.close()
            self._output = None

    def emit(self, event: str, **fields: Value) -> None:
        """Write an event.

        An event for which there is no room is lost, and counted in the next event. If nobody reads
        events any more, the trace ends.
        """
        with self._lock:
            self._write(event, fields)

    def end(self, **fields: Value) -> None:
        """Write the last event, and close the output."""
        with self._lock:
            self._write("end", fields)
            self._close()

    def _write(self, event: str, fields: Fields) -> None:
        if self._output is None:
            return
        line = (
            f'{{"ts":{now()},"pid":{os.getpid()},"tid":{threading.get_native_id()},'
            f'"event":"{event}"'
        )
        if self._lost:
            fields["lost"] = self._lost
        for name, value in fields.items():
            line += f',"{name}":{value if type(value) is int else json.dumps(value)}'
        try:
            self._output.send((line + "}\n").encode())
            self._lost = 0
        except BlockingIOError:
            self._lost += 1
        except OSError:
            self._close()

    def requests(self, dispatch: Callable[[Message], None]) -> Callable[[Message], None]:
        """Return ``dispatch`` with an event for each of the owner's requests in the schema.

        The event has the request's errno and duration.
        """

        def traced(message: Message) -> None:
            if not self.on:
                dispatch(message)
                return
            started, errno = now(), 0
            try:
                dispatch(message)
            except OSError as error:
                errno = error.errno or EIO
                raise
            finally:
                event, fields = _of_request(message)
                if event:
                    self.emit(event, **fields, errno=errno, ns=now() - started)

        return traced


def _of_request(message: Message) -> tuple[str, Fields]:
    try:
        match message.number:
            case vm_wire.SET_USER_MEMORY_REGION.number:
                region = kvm.kvm_userspace_memory_region_ext.from_buffer_copy(message.body)
                return "slot", {
                    "slot": region.slot,
                    "flags": region.flags,
                    **_pages(region.guest_phys_addr, region.memory_size),
                }
            case vm_wire.SET_MEMORY_ATTRIBUTES.number:
                asked = kvm.kvm_memory_attributes.from_buffer_copy(message.body)
                return "attributes", {
                    **_pages(asked.address, asked.size),
                    "private": bool(asked.attributes),
                }
            case vm_wire.ENCRYPT_REG_REGION.number | vm_wire.ENCRYPT_UNREG_REGION.number as number:
                encrypted = kvm.kvm_enc_region.from_buffer_copy(message.body)
                return "attributes", {
                    **_pages(encrypted.addr, encrypted.size),
                    "private": number == vm_wire.ENCRYPT_REG_REGION.number,
                }
            case vm_wire.LAUNCH_UPDATE.number:
                (gpa,) = vm_wire.LAUNCH.unpack_from(message.body)
                return "launch_update", _pages(gpa, len(message.body) - vm_wire.LAUNCH.size)
            case vm_wire.LAUNCH_FINISH.number:
                return "launch_finish", {}
            case vm_wire.CREATE_VCPU.number:
                return "vcpu", {}
            case vm_wire.INTERRUPT.number:
                (number,) = vm_wire.VCPU.unpack(message.body)
                return "interrupt", {"vcpu": number}
            case _:
                return "", {}
    except (ValueError, struct.error):
        # The body is shorter than its struct, so the request failed too.
        return "", {}


def _pages(address: int, size: int) -> Fields:
    return {"gfn": address >> PAGE_SHIFT, "npages": (size + PAGE_MASK) >> PAGE_SHIFT}


def of_exit(exit_: exits.Exit) -> Fields:
    """Return an exit's fields, without the data that the guest passed with it."""
    fields: Fields = {"reason": type(exit_).__name__}
    match exit_:
        case exits.PortIn(port, size) | exits.PortOut(port, size):
            fields |= {"port": port, "size": size}
        case exits.MmioRead(gpa, size) | exits.MmioWrite(gpa, size):
            fields |= {"gpa": gpa, "size": size}
        case exits.Hypercall(number):
            fields |= {"number": number}
        case exits.MemoryFault(flags, gpa, size, errno):
            fields |= {"flags": flags, "gpa": gpa, "size": size, "errno": errno}
        case exits.Shutdown(vector):
            fields |= {"vector": vector}
        case exits.Unknown(reason):
            fields |= {"number": reason}
        case _:
            pass
    return fields
