"""The text of /proc.

Anybody can name threads, files and cgroups, with characters that Python takes for a line's end.
"""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal

import pytest

from outcomes import in_child
from restrictedmem.abi import process
from restrictedmem.audit import reading as audit_memory
from restrictedmem.kvm import vm_memory
from restrictedmem.machine import finding
from restrictedmem.machine import memory_kinds as memory_probes
from restrictedmem.machine.finding import State
from restrictedmem.service import cgroup, ending, oom
from restrictedmem.syscall import scout

#: Characters that end a line for ``open`` or ``str.splitlines``, and not for the kernel.
ENDS = "\r\v\f\x1c\x85\u2028"


def named(name: str, look: Callable[[], object]) -> str:
    """Return what a thread of a name finds."""

    def body() -> object:
        process.set_name(name)
        return look()

    return in_child(body)


@pytest.mark.parametrize("end", ["\r", "\n", "\\\n"], ids=repr)
def test_a_threads_name_is_no_line_of_its_status(end: str) -> None:
    assert named(f"{end}TracerPid: 7", process.tracer_pid) == "0"
    # The bit of SIGKILL.
    assert named(f"{end}SigPnd: 100", lambda: process.is_dying(os.getpid())) == "False"
    assert named(f"{end}SigPnd: x", lambda: process.is_dying(os.getpid())) == "False"


def test_a_line_that_a_kernel_does_not_have() -> None:
    assert process.status("self", b"NoSuch:") == []


@pytest.mark.parametrize("row", ["1000-2000 rwxp 0 0:0 0", "x"])
@pytest.mark.parametrize("end", [*ENDS, "\n"], ids=repr)
def test_a_mapped_files_name_is_no_mapping(end: str, row: str, tmp_path: Path) -> None:
    path = tmp_path / f"{end}{row}"
    path.write_bytes(b"x")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ):
        with process.proc() as proc, scout._mappings(proc.fileno(), os.getpid()) as maps:
            assert 0x1000 not in [start for start, _ in scout._spans(maps)]
        assert list(audit_memory.regions(os.getpid()))


def instead(monkeypatch: pytest.MonkeyPatch, module: ModuleType, path: Path) -> None:
    """Have a module open another file in the place of any, as bytes."""

    def opened(_: object, mode: Literal["rb"]) -> BinaryIO:
        return path.open(mode)

    monkeypatch.setattr(module, "open", opened, raising=False)


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_a_cgroups_name_is_one(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has a cgroup can make others in it, with any name without "\\n" and "/"."""
    name = f"/a{end}b:c".encode() + b"\xff"
    table = tmp_path / "cgroup"
    table.write_bytes(b"4:cpu:%b\n3:memory:%b\n0::/\n" % (name, name))
    instead(monkeypatch, process, table)
    assert process.cgroups() == [(b"cpu", name), (b"memory", name), (b"", b"/")]
    shown = name.decode(errors="replace")
    assert vm_memory.cgroup() == shown
    # Its files are found by the name's own bytes.
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(
        b"1 1 0:1 / %b rw - cgroup cgroup rw,memory\n" % os.fsencode(tmp_path / "memory")
    )
    instead(monkeypatch, cgroup, mounts)
    directory = tmp_path / "memory" / os.fsdecode(name[1:])
    assert ending._counter() == (shown, str(directory / "memory.oom_control"))
    directory.mkdir(parents=True)
    (directory / "memory.limit_in_bytes").write_text("4096\n", encoding="ascii")
    assert oom._memory() == 4096


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_a_swap_files_name_is_one(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel escapes blanks, "\\n" and "\\\\" in it."""
    table = tmp_path / "swaps"
    table.write_bytes(
        b"Filename Type Size Used Priority\n"
        + f"/a{end}b".encode()
        + b" file\t\t2097148\t0\t\t-2\n"
    )
    instead(monkeypatch, vm_memory, table)
    assert vm_memory.swap_exists()

    def looked_up(path: str) -> str | None:
        return finding.setting(str(table)) if path == "/proc/swaps" else None

    monkeypatch.setattr(memory_probes, "setting", looked_up)
    said = memory_probes.no_swap()
    assert (said.state, said.detail.endswith("b 2 GiB")) == (State.NO, True), said.detail
