"""The owner's part of a trace: the file, and what only the owner knows (docs/trace.md)."""

import fcntl
import os
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from errno import EIO, EPIPE
from pathlib import Path
from typing import Final, final

from restrictedmem import paths
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm import exits, guest_abi, trace
from restrictedmem.kvm.trace import Fields, Trace, now
from restrictedmem.kvm.vm import Vcpu
from restrictedmem.kvm.vmm import Ended, Vmm
from restrictedmem.units import PAGE_SHIFT

#: The most that an ordinary user gets (/proc/sys/fs/pipe-max-size).
_PIPE_BYTES: Final = 1 << 20
#: What no event has in it.
_END: Final = b"\0"
_NAMES: Final = {
    guest_abi.EXIT: "exit",
    guest_abi.READ: "read",
    guest_abi.WRITE: "write",
    guest_abi.PARK: "park",
    guest_abi.CHECK: "check",
    guest_abi.MAP_GPA_RANGE: "map_gpa_range",
}


@contextmanager
def record(vmm: Vmm, path: str | Path) -> Generator[None]:
    """Write the events of a VMM, its VM and its vCPUs to a file, made anew; to be entered before the guest is loaded and run.

    Raises:
        OSError: as ``paths.create``; at the end, what the file could not be written with.
    """
    pump = _Pump(path)
    mine = Trace()
    before = vmm.enter
    try:
        mine.start(pump.writer())
        mine.emit("trace", version=trace.VERSION, side="owner")
        vmm.vm.trace(mine.fileno())
        vmm.enter = _answering(mine, vmm)
        yield
        mine.emit("end", **_how(vmm.outcome))
    finally:
        vmm.enter = before
        with suppress(OSError):
            # The engine may be gone, and its last words with it.
            vmm.vm.trace(None)
        mine.stop()
        pump.end()
    pump.check()


@final
class _Pump:
    """A pipe, and the thread that carries what comes out of it to a file: an engine writes to no file, which might keep it waiting."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._failure: OSError | None = None
        with ExitStack() as undo:
            self._file = undo.enter_context(paths.create(os.fspath(path)))
            self._reader, self._writer = (undo.enter_context(OwnedFd(end)) for end in os.pipe())
            with suppress(OSError):
                # Room for thousands of events, so that few are lost while this process waits for a processor.
                fcntl.fcntl(self._writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            self._thread = threading.Thread(target=self._carry, name="trace", daemon=True)
            self._thread.start()
            undo.pop_all()

    def writer(self) -> OwnedFd:
        """Return the end to write to, which the caller then owns."""
        return OwnedFd(os.dup(self._writer.fileno()))

    def _carry(self) -> None:
        rest = b""
        with self._reader, self._file:
            while _END not in rest:
                whole, newline, rest = (rest + os.read(self._reader.fileno(), _PIPE_BYTES)).rpartition(b"\n")
                self._write(whole + newline)

    def _write(self, lines: bytes) -> None:
        # After a failure the pipe is still read: writers would count as lost what finds it full.
        try:
            while lines and self._failure is None:
                lines = lines[os.write(self._file.fileno(), lines) :]
        except OSError as error:
            self._failure = error

    def end(self) -> None:
        """Return when all is written that came; who still has the other end, a child for one, is not waited for."""
        with self._writer:
            os.write(self._writer.fileno(), _END)
        self._thread.join()

    def check(self) -> None:
        """Raise what the file failed with.

        Raises:
            OSError: as write(2), but EIO for EPIPE, which commands take for the end of their own output.
        """
        if self._failure is not None:
            errno = EIO if self._failure.errno == EPIPE else self._failure.errno
            raise OSError(errno, f"{self._path}: the trace could not be written: {self._failure.strerror}")


def _answering(mine: Trace, vmm: Vmm) -> Callable[[Vcpu, int], exits.Exit]:
    """Return ``Vmm.enter`` with an event for each exit that was answered."""
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
        return "conversion", {"gfn": gpa >> PAGE_SHIFT, "npages": npages, "private": bool(attributes & guest_abi.MAP_GPA_RANGE_ENCRYPTED)}
    return "answer", {"call": _NAMES.get(call.number, str(call.number))}


def _how(outcome: Ended | BaseException | None) -> Fields:
    match outcome:
        case Ended(status, None):
            return {"status": status}
        case Ended(status, fatal):
            return {"status": status, "fatal": type(fatal).__name__}
        case _:
            return {"fatal": type(outcome).__name__}
