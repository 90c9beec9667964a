"""Kernels that QEMU emulates, and the suite under one of them.

RESTRICTEDMEM_KERNEL names the image of the kernel.
"""

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import pytest

from processes import Process, children, wait_gone
from restrictedmem.conformance import emulated_run
from restrictedmem.conformance.cases import SUBJECTS
from restrictedmem.conformance.columns import column_of
from restrictedmem.conformance.emulated_run import EmulatedRun
from restrictedmem.conformance.result import Result, Verdict
from restrictedmem.emulated import emulated_machine
from restrictedmem.emulated.emulated_machine import (
    EmulatedMachine,
    EmulationError,
    Kernel,
    initramfs,
)
from restrictedmem.emulated.initramfs import archive
from restrictedmem.fd import readable
from waiting import wait_until

IMAGE: Final = Path(os.environ.get("RESTRICTEDMEM_KERNEL", ""))
UNDER_KERNEL: Final = Path(__file__).parent.parent / "scripts" / "under-kernel"
HERE: Final = (sys.executable, "-m", "restrictedmem", "conformance")
UNDER: Final = (*HERE, "--kernel", str(IMAGE))
#: Seconds until an emulated kernel has done something, on a busy machine.
PATIENCE: Final = 100.0
emulated: Final = pytest.mark.requires("emulated-kernel")


def release_of(image: Path) -> str:
    """Return the release that an image says it has (Documentation/arch/x86/boot.rst)."""
    data = image.read_bytes()
    at = 0x200 + int.from_bytes(data[0x20E:0x210], "little")
    return data[at : data.index(b"\0", at)].decode().split()[0]


@contextmanager
def booted(program: str) -> Generator[EmulatedMachine]:
    kernel = Kernel(IMAGE, memory="512M")
    with EmulatedMachine(kernel, initramfs(kernel, program)) as running:
        yield running


@emulated
def test_a_program_says_lines_and_ends() -> None:
    program = "printf '%s\\n' one '{two}' >/dev/ttyS1; echo end 7 >/dev/ttyS1; sleep 1000"
    with booted(program.replace("sleep", "/bin/busybox sleep")) as running:
        assert [*running.lines(PATIENCE)] == ["one", "{two}"]
        assert running.status == 7
        assert running.release == release_of(IMAGE)
        (qemu,) = (each for each in children(os.getpid()) if each.name.startswith("qemu"))
    wait_gone([qemu])


@emulated
@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("echo 'lacks 9p' >/dev/ttyS1; exec /bin/busybox sleep 1000", "has no 9p"),
        ("/bin/busybox poweroff -f", "ended before its program did"),
        ("exit 3", "panicked: Attempted to kill init! exitcode=0x00000300"),
        ("exec /bin/busybox sleep 1000", "has said nothing for 1 s"),
    ],
)
def test_a_kernel_that_does_not_go_on(program: str, error: str) -> None:
    with booted(program) as running, pytest.raises(EmulationError, match=error) as caught:
        list(running.lines(1.0))
    assert str(caught.value).startswith(f"Linux {release_of(IMAGE)} ")


@emulated
def test_a_kernel_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(IMAGE, memory="512M")
    # It finds no program to begin with.
    first = b"".join(archive([("nothing", b"")]))
    with EmulatedMachine(kernel, first) as running:
        with pytest.raises(EmulationError, match="the kernel panicked: ") as caught:
            list(running.lines(PATIENCE))
        assert "CONFIG_BLK_DEV_INITRD" in caught.value.hint
    monkeypatch.setattr(emulated_machine, "BOOT_DEADLINE", 0.1)
    with (
        EmulatedMachine(kernel, first) as running,
        pytest.raises(EmulationError, match=r"the kernel has said nothing for 0\.1 s"),
    ):
        list(running.lines(PATIENCE))


@emulated
def test_qemu_says_why_it_does_not_run() -> None:
    kernel = Kernel(IMAGE, memory="nonsense")
    with (
        EmulatedMachine(kernel, initramfs(kernel, "")) as running,
        pytest.raises(EmulationError, match=r"^qemu-system-x86_64: .*nonsense"),
    ):
        list(running.lines(PATIENCE))


@emulated
def test_a_command_on_this_machines_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    script = 'cat file; echo "$0"; touch file 2>/dev/null || echo read-only; exit 5'
    done = subprocess.run(
        [sys.executable, UNDER_KERNEL, IMAGE, "--", "sh", "-c", script, "a 'word'"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (5, "")
    assert done.stdout == "contenta 'word'\nread-only\n"


# The suite.


#: The first case of each subject. All cases take minutes (scripts/test --long).
PART: Final = tuple(cases[0] for cases in SUBJECTS.values())


def results(*columns: str) -> list[Result]:
    suite = EmulatedRun(Kernel(IMAGE))
    chosen = [column_of(name) for name in columns]
    with closing(suite.run(chosen, PART, 2)) as found:
        every = list(found)
    assert suite.release == release_of(IMAGE)
    return every


@emulated
@pytest.mark.timeout(300)
def test_a_part_of_the_suite() -> None:
    ours = ("descriptor/v10", "software/v10", "memfd")
    names = ("kernel/flags=3", "kernel-sw-protected/flags=0", *ours)
    every = results(*names)
    asked = sorted(
        (case.id, name)
        for name in names
        for case in PART
        if case.family in column_of(name).families
    )
    assert sorted((each.case, each.column) for each in every) == asked
    assert not [each for each in every if each.verdict is Verdict.FAIL]
    ran = {each.column for each in every if each.verdict is Verdict.PASS}
    assert ran >= {*ours}


@contextmanager
def running_suite(directory: Path) -> Generator[tuple[int, int, list[Process]]]:
    """Run the command on a terminal until QEMU runs; yield its pid, the terminal, and children."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, UNDER, os.environ | {"TMPDIR": str(directory)})
    try:
        wait_until(
            lambda: any(each.name.startswith("qemu") for each in children(pid)), "QEMU", PATIENCE
        )
        yield pid, terminal, children(pid)
    finally:
        os.close(terminal)


@emulated
def test_an_interrupt_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    with running_suite(tmp_path) as (pid, terminal, others):
        os.write(terminal, b"\x03")
        said = b""
        while readable([terminal], PATIENCE):
            try:
                said += os.read(terminal, 1000)
            except OSError:
                break
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT
        assert b"Traceback" not in said
        wait_gone(others)
    assert not [*tmp_path.iterdir()]


@emulated
def test_the_end_of_the_command_ends_qemu(tmp_path: Path) -> None:
    with running_suite(tmp_path) as (pid, _, others):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        wait_gone(others)
    assert not [*tmp_path.iterdir()]


@emulated
@pytest.mark.parametrize("line", ["words", "d29yZHM=", "eJw="])
def test_a_line_that_is_no_result(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = f'raise SystemExit(print("{line}", flush=True))'
    monkeypatch.setattr(emulated_run, "_START", start)
    with pytest.raises(EmulationError, match=f"^under the kernel: {line}$"):
        results("memfd")


@emulated
def test_what_the_suite_says_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated_run, "_START", 'raise SystemExit("broken")')
    with pytest.raises(EmulationError, match=r"ended with 1 \(broken\)"):
        results("memfd")


# What a person can do wrong.


def complaint(*arguments: str, path: Path | None = None) -> str:
    environment = os.environ if path is None else os.environ | {"PATH": str(path)}
    done = subprocess.run(
        [*HERE, *arguments], check=False, capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def test_programs_that_are_missing_are_named(tmp_path: Path) -> None:
    said = complaint("--kernel", "bzImage", path=tmp_path)
    assert said == (
        "error: qemu-system-x86_64 is not installed\n"
        "hint: apt-get install qemu-system-x86 busybox-static\n"
    )
    (tmp_path / "qemu-system-x86_64").symlink_to("/bin/true")
    said = complaint("--kernel", "bzImage", path=tmp_path)
    assert said.startswith("error: busybox is not installed\n")


def test_a_busybox_that_needs_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(sys.executable, tmp_path / "busybox")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmulationError, match="busybox needs shared libraries"):
        initramfs(Kernel(IMAGE), "")


@pytest.mark.requires("qemu", "busybox")
def test_an_image_that_is_none(tmp_path: Path) -> None:
    image = tmp_path / "image"
    assert complaint("--kernel", str(image)).startswith(f"error: {image}: no such file\n")
    image.write_bytes(bytes(0x400))
    assert complaint("--kernel", str(image)) == (
        f"error: {image}: no kernel image for x86-64\nhint: name a bzImage or a vmlinuz\n"
    )
    image.write_bytes((bytes(0x1FE) + b"\x55\xaa" + b"\0\0HdrS").ljust(0x400))
    said = complaint("--kernel", str(image), "--modules", str(tmp_path / "none"))
    assert said == f"error: {tmp_path}/none: no such directory\n"
