"""The owner's part of a trace: the file, and what only the owner knows (docs/trace.md)."""

import fcntl
import os
import re
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, final

from restrictedmem.fd import OwnedFd
from restrictedmem.kvm import exits, guest_abi, trace
from restrictedmem.kvm.trace import Fields, Trace, now
from restrictedmem.kvm.vm import Vcpu
from restrictedmem.kvm.vmm import Ended, Vmm
from restrictedmem.paths import NewFile
from restrictedmem.threads import begin
from restrictedmem.units import PAGE_SHIFT

#: The most that an ordinary user gets (/proc/sys/fs/pipe-max-size).
_PIPE_BYTES: Final = 1 << 20
#: What no event has in it.
_END: Final = b"\0"
#: Of the bytes of events: how many before one were lost; each writer's first, and its last.
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
def record(vmm: Vmm, path: str | Path, lost: Callable[[int], object] | None = None) -> Generator[None]:
    """Write the events of a VMM, its VM and its vCPUs to a file, made anew; to be entered before the guest is loaded and run.

    The owner's ``end`` is the file's last line: without it, the file is not all. ``lost`` is told at the end how many events found
    the pipe full, if any did.

    Raises:
        OSError: as ``paths.create``; at the end, what the file could not be written or closed with.
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
    finally:
        vmm.enter = before
        with suppress(OSError):
            # The engine may be gone, and its last words with it.
            vmm.vm.trace(None)
        mine.end(**_how(vmm.outcome))
        pump.end()
    pump.check()
    if lost is not None and pump.lost:
        lost(pump.lost)


@final
class _Pump:
    """A pipe, and the thread that carries what comes out of it to a file: an engine writes to no file, which might keep it waiting."""

    def __init__(self, path: str | Path) -> None:
        self._failure: OSError | None = None
        #: Events that found the pipe full.
        self.lost = 0
        with ExitStack() as undo:
            self._file = undo.enter_context(NewFile(os.fspath(path)))
            self._reader, self._writer = (undo.enter_context(OwnedFd(end)) for end in os.pipe())
            with suppress(OSError):
                # Room for thousands of events, so that few are lost while this process waits for a processor.
                fcntl.fcntl(self._writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            self._thread = threading.Thread(target=self._carry, name="trace", daemon=True)
            begin(self._thread)
            undo.pop_all()

    def writer(self) -> OwnedFd:
        """Return the end to write to, which the caller then owns."""
        return OwnedFd(os.dup(self._writer.fileno()))

    def _carry(self) -> None:
        rest = b""
        with self._reader:
            while _END not in rest:
                whole, newline, rest = (rest + os.read(self._reader.fileno(), _PIPE_BYTES)).rpartition(b"\n")
                self.lost += sum(map(int, _LOST.findall(whole)))
                # An engine's end may be among what is lost.
                self.lost += whole.count(_FIRST) - whole.count(_LAST)
                self._try(partial(self._file.write, whole + newline))
        self._try(self._file.close)

    def _try(self, act: Callable[[], None]) -> None:
        # After a failure the pipe is still read: writers would count as lost what finds it full.
        try:
            if self._failure is None:
                act()
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
            OSError: as write(2) and close(2).
        """
        if self._failure is not None:
            raise self._failure


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
