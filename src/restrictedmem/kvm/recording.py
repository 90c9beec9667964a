"""The owner's part of a trace: the file, and what only the owner knows (docs/trace.md)."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from restrictedmem import paths
from restrictedmem.kvm import exits, guest_abi, trace
from restrictedmem.kvm.trace import Fields, Trace, now
from restrictedmem.kvm.vm import Vcpu
from restrictedmem.kvm.vmm import Ended, Vmm
from restrictedmem.units import PAGE_SHIFT

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
        OSError: as ``paths.create``.
    """
    mine = Trace()
    mine.start(paths.create(os.fspath(path)))
    before = vmm.enter
    try:
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
