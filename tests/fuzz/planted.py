"""Mistakes to find: for each target three lines of the package, and a wrong version of each."""

import __future__

import importlib
import inspect
import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Final


@dataclass(frozen=True, slots=True)
class Mistake:
    """A part of a function's text, and what stands there instead."""

    where: str
    right: str
    wrong: str

    def __str__(self) -> str:
        return self.where.partition(":")[2]


def _function(where: str) -> FunctionType:
    """Return what ``MODULE:NAME`` names, without what decorates it."""
    module, _, names = where.partition(":")
    found: object = importlib.import_module(f"restrictedmem.{module}")
    for name in names.split("."):
        found = inspect.getattr_static(found, name)
    found = getattr(found, "__func__", found)
    assert isinstance(found, FunctionType)
    return found


@contextmanager
def planted(mistake: Mistake) -> Generator[None]:
    """Make a mistake meanwhile, wherever its function is known already."""
    function = _function(mistake.where)
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(mistake.right) == 1, f"{mistake.where} has not once: {mistake.right}"
    text = text.replace(mistake.right, mistake.wrong)
    made: dict[str, object] = {}
    # Annotations may name what is known to type checkers alone.
    code = compile(
        text,
        f"<{mistake.where}>",
        "exec",
        flags=__future__.annotations.compiler_flag,
        dont_inherit=True,
    )
    exec(code, dict(function.__globals__), made)
    (changed,) = made.values()
    changed = getattr(changed, "__func__", changed)
    assert isinstance(changed, FunctionType)
    right, function.__code__ = function.__code__, changed.__code__
    try:
        yield
    finally:
        function.__code__ = right


MISTAKES: Final[dict[str, tuple[Mistake, ...]]] = {
    "control": (
        Mistake(
            "service.daemon:ControlThread._dispatch",
            "if connection.owner:",
            "if connection.owner or message.number == 2:",
        ),
        Mistake("service.daemon:ControlThread._error_page", "0 < end - start", "0 <= end - start"),
        Mistake(
            "service.daemon:ControlThread._reply_status", "start >= len(text)", "start > 1 << 62"
        ),
    ),
    "consumer": (
        Mistake(
            "service.consumer_process:_can_be_shown",
            "return value.isprintable()",
            "return value.isascii()",
        ),
        Mistake(
            "service.consumer_process:_can_be_shown",
            "math.isfinite(value)",
            "not math.isnan(value)",
        ),
        Mistake(
            "service.consumer_process:Binding.page_count",
            "if count > end - start:",
            "if count > end - start + 1:",
        ),
    ),
    "creation": (
        Mistake(
            "protocol.vm_wire:Creation.load",
            "type(found.policy) is not int",
            "not isinstance(found.policy, int)",
        ),
        Mistake(
            "protocol.vm_wire:Creation.load",
            "(RecursionError, TypeError, ValueError)",
            "(TypeError, ValueError)",
        ),
        Mistake(
            "protocol.vm_wire:Creation.load",
            'found.platform not in ("", *platform.NAMES)',
            "found.platform and found.platform not in platform.NAMES",
        ),
    ),
    "vm": (
        Mistake(
            "kvm.vm_memory:VmMemory._check_overlap",
            "end > HYPERCALL_PAGE >> PAGE_SHIFT",
            "end > REPORT_PAGE >> PAGE_SHIFT",
        ),
        Mistake(
            "kvm.machine:Machine._interrupt",
            "number >= len(self._sockets)",
            "number > len(self._sockets)",
        ),
        Mistake(
            "kvm.machine:Machine._dispatch_own",
            "debug_requests.check_policy(self._creation.policy)\n            gpa, size",
            "gpa, size",
        ),
    ),
    "vcpu": (
        Mistake(
            "kvm.vcpu_socket:VcpuSocket._pre_fault",
            "asked.gpa + asked.size >= 1 << 64",
            "asked.gpa + asked.size > 1 << 64",
        ),
        Mistake("kvm.vcpu_socket:VcpuSocket._set_regs", "bytes(rest) != bytes(regs)", "regs.rbx"),
        Mistake(
            "kvm.vcpu_socket:VcpuSocket._dispatch",
            "case vm_wire.GET_REGS.number:\n            debug_requests.check_policy(self._policy)",
            "case vm_wire.GET_REGS.number:",
        ),
    ),
    "fuse": (
        Mistake(
            "fs.filesystem:FileSystem._create",
            "len(self._nodes) >= self._max_files",
            "len(self._nodes) > self._max_files",
        ),
        Mistake(
            "fs.filesystem:_decode",
            "except ValueError:",
            "except IndexError:",
        ),
        Mistake(
            "fs.filesystem:FileSystem._drop",
            "if node is not None and node.open:",
            "if node is not None:",
        ),
    ),
    "guest_memfd": (
        Mistake(
            "mm.guest_memfd_file:GuestMemfdFile.convert",
            "for run in runs if zero",
            "for run in (hull,) if zero",
        ),
        Mistake(
            "mm.guest_memfd_file:GuestMemfdFile.convert",
            "self._leave(hull if private else _NOTHING)",
            "self._leave(_NOTHING)",
        ),
        Mistake(
            "fs.guest_memfd_requests:AttributesRequest.of",
            "or asked.flags == _MODES",
            "",
        ),
    ),
    "elf": (
        Mistake(
            "vmm.elf:_segment", "len(content) != filesz or memsz < filesz", "len(content) != filesz"
        ),
        Mistake("vmm.elf:_segments", "left -= len(segment.data)", "left -= 1"),
        Mistake("vmm.elf:parse", "except struct.error:", "except IndexError:"),
    ),
    "rsp": (
        Mistake(
            "vmm.gdb.rsp:Parser._packet", "if end < 0 or len(self._data) < whole:", "if end < 0:"
        ),
        Mistake("vmm.gdb.stub:Stub._memory", "address + size > 1 << 64", "address > 1 << 64"),
        Mistake("vmm.gdb.stub:Stub._breakpoint", "0 <= entry[1] < 1 << 64", "0 <= entry[1]"),
    ),
    "report": (
        Mistake(
            "service.report:Report.unpack", "len(data) != REPORT_BYTES", "len(data) < REPORT_BYTES"
        ),
        Mistake("service.report:Report.unpack", '.decode("ascii")', '.decode("latin-1")'),
        Mistake("service.report:signed_by_its_key", "return False", "return True"),
    ),
    "trace": (
        Mistake("vmm.perfetto:_is_number", "0 <= value < 1 << 63", "value < 1 << 63"),
        Mistake(
            "vmm.perfetto:_parse",
            "(ValueError, AttributeError, RecursionError)",
            "(ValueError, AttributeError)",
        ),
        Mistake(
            "vmm.perfetto:_slices",
            "    while open_slices:\n        yield",
            "    if open_slices:\n        yield",
        ),
    ),
    "supervisor": (
        Mistake(
            "syscall.supervisor:Supervisor._hear", "flags = data.arg0 & _U32", "flags = data.arg0"
        ),
        Mistake(
            "syscall.supervisor:Supervisor._tell_file_system",
            "data.arg1 & _U32 != _STATFS64_I386.size",
            "not data.arg1",
        ),
        Mistake("syscall.scout:_Looks.write", '_spans(maps, b"w")', "_spans(maps)"),
    ),
}
