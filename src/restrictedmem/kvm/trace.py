"""Events of a run as JSON lines (docs/trace.md): one schema for owner and engine, and for both engines.

Owner and engine write to one pipe, each line by one write, so that lines of both stay whole; the owner carries them on to a file
(``recording``). What is in them is metadata that a host has of every guest: numbers of pages, kinds of exits, times; no content, no
register, no argument of a hypercall.
"""

import fcntl
import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from errno import EINVAL, EIO
from typing import Final, final

from restrictedmem import sync
from restrictedmem.abi import kvm
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm import exits, wire
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.service.wire import Message
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT

#: Of the schema; whoever reads another one cannot rely on it.
VERSION: Final = 1
#: <linux/fs.h>: fail rather than wait for room in a pipe.
_RWF_NOWAIT: Final = 8

Value = int | str | bool
Fields = dict[str, Value]


def now() -> int:
    """Return the time of an event: CLOCK_MONOTONIC in nanoseconds, the same in every process."""
    return time.monotonic_ns()


@final
class Trace:
    """Where a process writes its events, if anywhere; for any thread."""

    __slots__ = ("_fd", "_lock", "_lost", "on")

    def __init__(self) -> None:
        self._lock = sync.mutex()
        self._fd: OwnedFd | None = None
        self._lost = 0
        #: Whether anybody wants events; to be asked before one is put together.
        self.on = False

    def start(self, fd: OwnedFd) -> None:
        """Write events to ``fd`` from now on, and own it.

        A pipe alone, for a write to a file may wait for its file system as long as that likes.

        Raises:
            OSError: EINVAL unless it is a pipe that can be written to.
        """
        try:
            # Asks no file system, other than fstat(2).
            fcntl.fcntl(fd.fileno(), fcntl.F_GETPIPE_SZ)
            writable = fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        except OSError:
            writable = False
        if not writable:
            raise OSError(EINVAL, "events go to a pipe")
        self.stop()
        with self._lock:
            self._fd, self._lost = fd, 0
            self.on = True

    def fileno(self) -> int:
        """Return where events go, -1 when nowhere."""
        return -1 if self._fd is None else self._fd.fileno()

    def stop(self) -> None:
        """Write no more."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        self.on = False
        if self._fd is not None:
            self._fd.close()
            self._fd = None

    def emit(self, event: str, **fields: Value) -> None:
        """Write an event. One that finds its pipe full is lost, and counted in the next; one that nobody reads ends the trace."""
        with self._lock:
            # An engine that waited for its owner here could not answer the service either.
            self._write(event, fields, _RWF_NOWAIT)

    def end(self, **fields: Value) -> None:
        """Write the last event, and wait until the pipe has room for it; then write no more.

        For who is sure of a reader: behind it comes no event that could say what was lost.
        """
        with self._lock:
            self._write("end", fields, 0)
            self._close()

    def _write(self, event: str, fields: Fields, flags: int) -> None:
        if self._fd is None:
            return
        line = f'{{"ts":{now()},"pid":{os.getpid()},"tid":{threading.get_native_id()},"event":"{event}"'
        if self._lost:
            fields["lost"] = self._lost
        for name, value in fields.items():
            line += f',"{name}":{value if type(value) is int else json.dumps(value)}'
        data = (line + "}\n").encode()
        try:
            os.pwritev(self._fd.fileno(), [data], -1, flags)
            self._lost = 0
        except BlockingIOError:
            self._lost += 1
        except OSError:
            self._close()

    def requests(self, dispatch: Callable[[Message], None]) -> Callable[[Message], None]:
        """Return ``dispatch`` with an event for each request of the owner that the schema knows, errno and duration in it."""

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
            case wire.SET_USER_MEMORY_REGION.number:
                region = kvm.kvm_userspace_memory_region_ext.from_buffer_copy(message.body)
                return "slot", {"slot": region.slot, "flags": region.flags, **_pages(region.guest_phys_addr, region.memory_size)}
            case wire.SET_MEMORY_ATTRIBUTES.number:
                asked = kvm.kvm_memory_attributes.from_buffer_copy(message.body)
                return "attributes", {**_pages(asked.address, asked.size), "private": bool(asked.attributes)}
            case wire.ENCRYPT_REG_REGION.number | wire.ENCRYPT_UNREG_REGION.number as number:
                encrypted = kvm.kvm_enc_region.from_buffer_copy(message.body)
                return "attributes", {**_pages(encrypted.addr, encrypted.size), "private": number == wire.ENCRYPT_REG_REGION.number}
            case wire.LAUNCH_UPDATE.number:
                (gpa,) = wire.LAUNCH.unpack_from(message.body)
                return "launch_update", _pages(gpa, len(message.body) - wire.LAUNCH.size)
            case wire.LAUNCH_FINISH.number:
                return "launch_finish", {}
            case wire.CREATE_VCPU.number:
                return "vcpu", {}
            case wire.INTERRUPT.number:
                (number,) = wire.VCPU.unpack(message.body)
                return "interrupt", {"vcpu": number}
            case _:
                return "", {}
    except (ValueError, struct.error):
        # Not as long as its struct, so the request failed too.
        return "", {}


def _pages(address: int, size: int) -> Fields:
    return {"gfn": address >> PAGE_SHIFT, "npages": (size + PAGE_MASK) >> PAGE_SHIFT}


def of_slot(slot: Memslot) -> Iterator[tuple[str, Fields]]:
    """Return the events that would make a slot as it is, for a trace that begins later."""
    flags = kvm.KVM_MEM_PRIVATE if slot.private is not None else 0
    yield "slot", {"slot": slot.number, "flags": flags, "gfn": slot.base_gfn, "npages": len(slot.attributes)}
    start = 0
    while start < len(slot.attributes):
        private = slot.attributes[start]
        change = slot.attributes.find(1 - private, start)
        end = len(slot.attributes) if change < 0 else change
        if private:
            yield "attributes", {"gfn": slot.base_gfn + start, "npages": end - start, "private": True}
        start = end


def of_exit(exit_: exits.Exit) -> Fields:
    """Return what an exit is, without what the guest passed with it."""
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
