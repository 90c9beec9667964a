"""A command's output is there when the command says so.

It checks each write and each close, and reports an error.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest

from foreign_fuse import foreign
from restrictedmem import guests
from restrictedmem.abi.fuse import Opcode
from restrictedmem.paths import NewFile
from restrictedmem.service.client import Service
from restrictedmem.vmm import elf, perfetto
from restrictedmem.vmm.recording import record
from restrictedmem.vmm.vmm import Ended, Vmm
from waiting import wait_until

COMMAND = [sys.executable, "-m", "restrictedmem"]
NO_SPACE = os.strerror(ENOSPC)
MIB = 1 << 20


def run(*arguments: str, stdout: str | None = None) -> tuple[int, str, str]:
    """Run a command; return its status, stderr and stdout, unless stdout goes to a file."""
    with open(stdout or os.devnull, "wb") as file:
        done = subprocess.run(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file if stdout else subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
        with suppress(OSError):
            file.close()
    return done.returncode, done.stderr.decode(), (done.stdout or b"").decode()


@pytest.fixture(scope="module")
def lossy() -> Iterator[str]:
    """A file whose system takes what is written, and says at close that there was no space."""
    with foreign(failing={Opcode.FLUSH: ENOSPC}) as server:
        yield f"/proc/{os.getpid()}/fd/{server.root}/file"


# Files that fail at close, as with a quota, or on a network's file system.


@pytest.mark.requires("fuse", "root")
def test_a_file_that_fails_at_close(lossy: str) -> None:
    file = NewFile(lossy)
    file.write(b"data")
    with pytest.raises(OSError, match=f"close: {NO_SPACE}") as caught:
        file.close()
    assert (caught.value.errno, caught.value.filename) == (ENOSPC, lossy)
    file.close()


@pytest.mark.requires("fuse", "root", "seccomp")
@pytest.mark.parametrize(("came", "status"), [(0, 1), (7, 7)])
def test_the_report_of_exec_that_fails_at_close(lossy: str, came: int, status: int) -> None:
    found = run("exec", "--json", lossy, "--", "sh", "-c", f"exit {came}")
    assert found == (status, f"error: --json: {lossy}: close: {NO_SPACE}\n", "")


@pytest.mark.requires("seccomp", "fuse")
@pytest.mark.parametrize(("came", "status"), [("exit 0", 1), ("exit 7", 7), ("kill -TERM $$", -15)])
def test_the_report_of_exec_on_a_full_disk(came: str, status: int) -> None:
    found = run("exec", "--json", "/dev/full", "--", "sh", "-c", came)
    assert found == (status, f"error: --json: /dev/full: write: {NO_SPACE}\n", "")


@pytest.mark.requires("fuse", "root")
def test_a_trace_that_fails_at_close(lossy: str) -> None:
    found = run(
        "run",
        "--quiet",
        "--engine",
        "software",
        "--memory",
        "4M",
        "--trace",
        lossy,
        "spin",
        "exit",
        "0",
    )
    assert found == (1, f"error: {lossy}: close: {NO_SPACE}\n", "")


@pytest.mark.requires("fuse")
def test_a_trace_on_a_full_disk_leaves_the_guests_status() -> None:
    found = run(
        "run",
        "--quiet",
        "--engine",
        "software",
        "--memory",
        "4M",
        "--trace",
        "/dev/full",
        "spin",
        "exit",
        "7",
    )
    assert found == (7, f"error: /dev/full: write: {NO_SPACE}\n", "")


@pytest.mark.requires("fuse", "root")
@pytest.mark.parametrize(
    "arguments", [["check", "--list"], ["--help"], ["run", "--quiet", "--memory", "4M", "sha256"]]
)
def test_stdout_that_fails_at_close(lossy: str, arguments: list[str]) -> None:
    assert run(*arguments, stdout=lossy)[:2] == (1, f"error: stdout: close: {NO_SPACE}\n")


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "--list"],
        ["--help"],
        ["--version"],
        ["run", "--quiet", "--memory", "4M", "sha256"],
    ],
)
def test_a_full_stdout(arguments: list[str]) -> None:
    assert run(*arguments, stdout="/dev/full")[:2] == (1, f"error: stdout: write: {NO_SPACE}\n")


# Traces that are not all there.


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the lines of a whole trace."""
    path = tmp_path_factory.mktemp("trace") / "run.jsonl"
    lost: list[int] = []
    with Service.start() as service, Vmm(4 * MIB, service) as vmm, record(vmm, path, lost.append):
        vmm.load(elf.parse(guests.path("spin").read_bytes()), ["exit", "0"])
        with open(os.devnull, "r+b") as null:
            assert vmm.run(null, null, null) == Ended(0)
    assert not lost
    return path.read_text(encoding="ascii").splitlines(keepends=True)


def convert(tmp_path: Path, text: str) -> tuple[int, str, str]:
    """Convert a trace; return status and output, with IN in place of the input's name."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text(text, encoding="ascii")
    status, said, _ = run("trace", "to-perfetto", str(source), str(target))
    assert target.read_bytes()
    line, _, hint = said.replace(str(source), "IN").partition("\n")
    return status, line, hint


@pytest.mark.requires("fuse")
def test_a_whole_trace(tmp_path: Path, recorded: list[str]) -> None:
    assert json.loads(recorded[-1]).items() >= {"event": "end", "status": 0}.items()
    assert convert(tmp_path, "".join(recorded)) == (0, f"{len(recorded)} events", "")


@pytest.mark.requires("fuse")
def test_a_trace_that_was_cut_off(tmp_path: Path, recorded: list[str]) -> None:
    owner = json.loads(recorded[-1])["pid"]
    status, line, hint = convert(tmp_path, "".join(recorded)[:-2])
    assert (status, line) == (
        1,
        f"error: IN: the trace is incomplete; missing: the end of its last line, "
        f"the owner's end ({owner})",
    )
    assert hint.startswith("hint: the rest was converted")
    status, line, _ = convert(tmp_path, "".join(recorded[:-1]))
    assert (status, line) == (
        1,
        f"error: IN: the trace is incomplete; missing: the owner's end ({owner})",
    )


@pytest.mark.requires("fuse")
def test_a_trace_that_says_it_has_lost_events(tmp_path: Path, recorded: list[str]) -> None:
    text = (
        "".join(recorded[:-1])
        + recorded[-1].replace("}", ',"lost":3}')
        + recorded[-1].replace("}", ',"lost":4}')
    )
    assert convert(tmp_path, text)[:2] == (
        1,
        "error: IN: the trace is incomplete; missing: 7 events",
    )


def test_a_number_of_lost_events_that_is_none() -> None:
    with pytest.raises(OSError, match="line 1 is not an event"):
        perfetto.read(['{"ts":1,"pid":1,"tid":1,"event":"end","lost":"3"}\n'])


@pytest.mark.requires("fuse")
def test_lost_events_are_told(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    slow = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    told: list[int] = []
    events: list[dict[str, Any]] = []

    def read() -> None:
        with open(slow, encoding="ascii") as file:
            events.extend(json.loads(line) for line in file)

    def says() -> bool:
        vmm.vm.set_memory_attributes(0x4000_0000, 4096, private=True)
        return any("lost" in event for event in events)

    thread = threading.Thread(target=read)
    with Service.start() as service, Vmm(4 * MIB, service) as vmm, record(vmm, fifo, told.append):
        # Until both the engine's socket and the FIFO behind it are full.
        for number in range(9000):
            vmm.vm.set_memory_attributes(0x4000_0000, 4096, private=bool(number % 2))
        os.set_blocking(slow, True)
        thread.start()
        wait_until(says, "an event that says how many were lost before it")
    thread.join()
    # The engine waits for room for none, so its end may be among them.
    ends = sum(event["event"] == "end" for event in events)
    assert told == [sum(event.get("lost", 0) for event in events) + 2 - ends]
    assert events[-1]["event"] == "end"
