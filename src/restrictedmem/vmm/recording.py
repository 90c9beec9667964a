"""The owner's part of a trace: the file and the owner's own events (docs/use/trace.md)."""

import os
import re
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, final

from restrictedmem import sync
from restrictedmem.paths import NewFile
from restrictedmem.protocol import exits, guest_abi, trace_events
from restrictedmem.protocol.trace_events import Fields, Trace, now
from restrictedmem.threads import begin
from restrictedmem.units import PAGE_SHIFT
from restrictedmem.vmm.vm import Vcpu, Vm
from restrictedmem.vmm.vmm import Ended, Vmm

#: Bytes to read at a time.
_PIECE: Final = 1 << 20
#: Bytes to find in events: the count of lost events, a process's first event, and its last one.
_LOST: Final = re.compile(rb',"lost":(\d+)')
_FIRST: Final = b',"event":"trace"'
_LAST: Final = b',"event":"end"'
_NAMES: Final = {
    guest_abi.EXIT: "exit",
    guest_abi.READ: "read",
    guest_abi.WRITE: "write",
    guest_abi.PARK: "park",
    guest_abi.CHECK: "check",
    guest_abi.MAP_GPA_RANGE: "map_gpa_range",
}


@contextmanager
def record(
    vmm: Vmm, path: str | Path, lost: Callable[[int], object] | None = None
) -> Generator[None]:
    """Write the events of a VMM, its VM and its vCPUs to a new file.

    Enter this context before the guest is loaded and run. The owner's ``end`` is the file's last
    line; without it, the file is incomplete. ``lost`` is called at the end with the number of
    events that were dropped because a socket was full, if there were any.

    Raises:
        OSError: as ``paths.create`` and ``Vm.start_trace``; at the end, the error of writing or
            closing the file.
    """
    file = _EventFile(path)
    mine = Trace()
    before = vmm.enter
    try:
        writer, reader = trace_events.pair()
        mine.start(writer)
        mine.emit("trace", version=trace_events.VERSION, side="owner")
        with _carried(reader, file):
            try:
                with _carried_of_engine(vmm.vm, file):
                    vmm.enter = _answering(mine, vmm)
                    yield
            finally:
                vmm.enter = before
                # No later event could report that this one was lost.
                writer.setblocking(True)
                mine.end(**_how(vmm.outcome))
    finally:
        file.close()
    file.check()
    if lost is not None and file.lost:
        lost(file.lost)


@final
class _EventFile:
    """The file of events; neither the engine nor the owner's vCPUs wait for writes to it."""

    def __init__(self, path: str | Path) -> None:
        self._file = NewFile(os.fspath(path))
        self._mutex = sync.mutex()
        self._failure: OSError | None = None
        #: Events that were dropped because a socket was full.
        self.lost = 0

    def write(self, lines: bytes) -> None:
        """Write lines; after a failure drop them.

        The caller must go on reading the socket after a failure: events that nobody reads would
        count as lost.
        """
        with self._mutex:
            self.lost += sum(map(int, _LOST.findall(lines)))
            # The engine's last event may itself be lost.
            self.lost += lines.count(_FIRST) - lines.count(_LAST)
        self._try(partial(self._file.write, lines))

    def close(self) -> None:
        """Close the file."""
        self._try(self._file.close)

    def _try(self, act: Callable[[], None]) -> None:
        with self._mutex:
            try:
                if self._failure is None:
                    act()
            except OSError as error:
                self._failure = error
                with suppress(OSError):
                    self._file.close()

    def check(self) -> None:
        """Raise the error of the first failed write or close.

        Raises:
            OSError: as write(2) and close(2).
        """
        if self._failure is not None:
            raise self._failure


@contextmanager
def _carried_of_engine(vm: Vm, file: _EventFile) -> Generator[None]:
    with _carried(vm.start_trace(), file):
        try:
            yield
        finally:
            with suppress(OSError):
                # The engine may be gone, and its last event with it.
                vm.end_trace()


@contextmanager
def _carried(reader: socket.socket, file: _EventFile) -> Generator[None]:
    """Copy events to a file in a thread within the context, and close ``reader`` after it."""
    with reader:
        thread = threading.Thread(target=_carry, args=(reader, file), name="trace", daemon=True)
        begin(thread)
        try:
            yield
        finally:
            # Copy only the events that have arrived. The engine may have been unreachable, or a
            # child may hold the other end, so the end of the stream may never come.
            reader.shutdown(socket.SHUT_RD)
            thread.join()


def _carry(reader: socket.socket, file: _EventFile) -> None:
    rest = b""
    while data := reader.recv(_PIECE):
        whole, newline, rest = (rest + data).rpartition(b"\n")
        file.write(whole + newline)


def _answering(mine: Trace, vmm: Vmm) -> Callable[[Vcpu, int], exits.Exit]:
    """Return ``Vmm.enter`` with an event for each exit that the owner has answered."""
    numbers = {vcpu: index for index, vcpu in enumerate(vmm.vcpus)}
    asked: dict[Vcpu, tuple[int, exits.Hypercall]] = {}
    enter = vmm.enter

    def traced(vcpu: Vcpu, value: int) -> exits.Exit:
        if vcpu in asked:
            started, call = asked.pop(vcpu)
            event, fields = _of_answer(call)
            mine.emit(event, vcpu=numbers[vcpu], **fields, result=value, ns=now() - started)
        exit_ = enter(vcpu, value)
        if isinstance(exit_, exits.Hypercall):
            asked[vcpu] = now(), exit_
        return exit_

    return traced


def _of_answer(call: exits.Hypercall) -> tuple[str, Fields]:
    if call.number == guest_abi.MAP_GPA_RANGE:
        gpa, npages, attributes, _ = call.arguments
        return "conversion", {
            "gfn": gpa >> PAGE_SHIFT,
            "npages": npages,
            "private": bool(attributes & guest_abi.MAP_GPA_RANGE_ENCRYPTED),
        }
    return "answer", {"call": _NAMES.get(call.number, str(call.number))}


def _how(outcome: Ended | BaseException | None) -> Fields:
    match outcome:
        case Ended(status, None):
            return {"status": status}
        case Ended(status, fatal):
            return {"status": status, "fatal": type(fatal).__name__}
        case _:
            return {"fatal": type(outcome).__name__}
