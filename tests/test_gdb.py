"""The GDB remote stub with the real gdb, in batch mode."""

import re
import signal
import subprocess
from pathlib import Path

import pytest

from gdb_guest import OWN_WATCHPOINTS, STATUS, Host, debugged, guest, host, service, wait_for_more
from restrictedmem.protocol import exits
from restrictedmem.vmm.vmm import Ended

__all__ = ["guest", "host", "service"]


def gdb_command(image: Path, port: int, *commands: str) -> list[str]:
    first = (
        "set debuginfod enabled off",
        "set confirm off",
        OWN_WATCHPOINTS,
        f"target remote 127.0.0.1:{port}",
    )
    words = [word for command in (*first, *commands) for word in ("-ex", command)]
    return ["gdb", "-q", "-nx", "-batch", *words, str(image)]


def gdb(image: Path, port: int, *commands: str) -> str:
    done = subprocess.run(
        gdb_command(image, port, *commands), capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


needs_gdb = pytest.mark.requires("fuse", "cc", "gdb")


@needs_gdb
def test_a_session(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run:
        said = gdb(
            guest,
            run.port,
            "info symbol $pc",
            "break main",
            "continue",
            "print boot->version",
            "print/x $rdi",
            "break twice",
            "continue",
            "print x",
            "backtrace",
            "finish",
            "print counter",
            "stepi",
            "info registers rip eflags cs fs_base",
            "print $st0",
            "delete",
            "info threads",
            "set var counter = 40",
            "next",
            "print counter",
            "set $r15 = 100",
            "print $r15",
            "continue",
        )
        ended = run.ended()
    assert "_start in section .text" in said
    assert re.search(r"Breakpoint 1, main \(boot=0x40000000\)", said)
    assert "= 0x40000000" in said
    assert re.search(r"Breakpoint 2, twice \(x=.*1\)", said)
    assert re.search(r"#1 .* in main \(", said)
    assert "Value returned is" in said
    assert "<unavailable>" in said
    assert re.search(r"\* 1 +Thread 1 \(vCPU 0\)", said)
    assert "exited with code" in said
    assert isinstance(ended, Ended)
    assert ended.fatal is None
    # The value that was set, and the additions of two more turns.
    assert "= 45" in said
    assert "= 100" in said
    assert (tmp_path / "out").read_bytes() == b"hello\n"


@needs_gdb
def test_a_breakpoint_in_a_loop_stops_at_each_turn(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run:
        said = gdb(guest, run.port, "break twice", *["continue", "print x"] * 3, "continue")
        assert run.ended() == Ended(STATUS)
    assert re.findall(r"\$\d = (\d)", said) == ["1", "2", "3"]
    assert f"exited with code {STATUS:03o}" in said


@needs_gdb
def test_a_watchpoint_stops_where_memory_changes(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run:
        said = gdb(
            guest,
            run.port,
            "break main",
            "continue",
            "watch counter",
            "continue",
            "continue",
            "delete",
            "continue",
        )
        assert run.ended() == Ended(STATUS)
    assert re.findall(r"(?:Old|New) value = (\d+)", said) == ["0", "1", "1", "3"], said


@needs_gdb
def test_step_by_step_across_hypercalls_to_the_end(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run:
        said = gdb(guest, run.port, "break main", "continue", "stepi 500")
        assert run.ended() == Ended(STATUS)
    assert f"exited with code {STATUS:03o}" in said
    assert (tmp_path / "out").read_bytes() == b"hello\n"


@needs_gdb
def test_the_hypercall_page_can_be_looked_at_and_stopped_at(
    host: Host, guest: Path, tmp_path: Path
) -> None:
    with debugged(host, guest, tmp_path) as run:
        said = gdb(
            guest,
            run.port,
            "break *0x100000",
            "continue",
            "x/2i $pc",
            "print $rax",
            "stepi",
            "print $rax",
            "delete",
            "continue",
        )
        assert run.ended() == Ended(STATUS)
    assert re.search(r"=> 0x100000:\s+(ud2|out +%al,\$0xf4)", said)
    assert re.search(r"0x100002:\s+ret", said)
    assert re.findall(r"\$\d = (\d+)", said) == ["2", "6"]


@needs_gdb
def test_ctrl_c_stops_an_endless_loop(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path, "s") as run:
        commands = gdb_command(
            guest, run.port, "continue", "print counter > 0", "info symbol $pc", "kill"
        )
        with subprocess.Popen(
            commands, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            wait_for_more(run, guest)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
        ended = run.ended()
    assert "SIGINT" in said
    assert re.search(r"spin (\+ \d+ )?in section .text", said)
    assert "$1 = 1" in said
    assert isinstance(ended, Ended)
    assert ended.interrupted


@needs_gdb
def test_an_exception_is_a_signal_and_then_the_end(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path, "d") as run:
        said = gdb(guest, run.port, "continue", "info symbol $pc", "continue")
        assert run.ended() == Ended(1, exits.Shutdown(0))
    assert "received signal SIGFPE" in said
    assert "main" in said
    assert "terminated with signal SIGFPE" in said


@needs_gdb
def test_several_vcpus_are_threads(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path, vcpus=3) as run:
        said = gdb(
            guest,
            run.port,
            "info threads",
            "break secondary",
            "continue",
            "info threads",
            "print index",
            "delete",
            "thread 1",
            "set scheduler-locking on",
            "stepi",
            "print $_thread",
            "set scheduler-locking off",
            "detach",
        )
        assert run.ended() == Ended(STATUS)
    assert len(re.findall(r"Thread [123] \(vCPU [012]\)", said.split("Breakpoint")[0])) == 3
    assert re.search(r"Thread [23] hit Breakpoint 1, secondary \(", said)
    assert re.search(r"\$\d = [12]\n", said)
    assert (tmp_path / "out").read_bytes() == b"hello\n"
