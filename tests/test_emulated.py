"""Emulated kernels without QEMU: what a machine says, and a command for it."""

import os
import shlex
import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest

from planting import always, stub
from restrictedmem.abi import memory
from restrictedmem.emulated import command, emulated_machine
from restrictedmem.emulated.emulated_machine import (
    BUSYBOX,
    QEMU,
    EmulatedMachine,
    EmulationError,
    Kernel,
    initramfs,
)


def test_what_a_machine_says_last_is_read_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with memory.memfd_create("channel") as channel:
        asked: list[Sequence[object]] = []

        def readable(ends: Sequence[object], _seconds: float) -> Sequence[object]:
            """Say first that the machine runs, and then that it has ended; it speaks before."""
            asked.append(ends)
            os.write(channel.fileno(), b"line %d\r\nhalf" % len(asked))
            return ends if len(asked) == 2 else []

        monkeypatch.setattr(emulated_machine, "readable", readable)
        machine = stub(_channel=channel, _pidfd="the machine", release="7.3")
        assert list(EmulatedMachine._said(machine, 60)) == ["line 1", "halfline 2"]
        assert asked == [["the machine"]] * 2


def test_a_machine_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated_machine, "readable", always(()))
    monkeypatch.setattr(emulated_machine, "Clock", always(stub(look=always(7.5))))
    with memory.memfd_create("channel") as channel:
        machine = stub(
            _channel=channel,
            _pidfd=0,
            release="7.3",
            _trouble=EmulationError,
        )
        with pytest.raises(EmulationError, match="has said nothing for 7 s"):
            list(EmulatedMachine._said(machine, 7))


@pytest.mark.parametrize(
    ("console", "words", "release", "said", "hint"),
    [
        ("", "qemu: no memory\nmore", "", "qemu: no memory", False),
        ("booting\nlast words", "", "", "the kernel ended (last words)", True),
        ("booting\nlast words", "qemu: a warning", "7.3", "Linux 7.3 ended (last words)", False),
        ("", "", "7.3", "Linux 7.3 ended", False),
        (
            "x\n[ 1.2] Kernel panic - not syncing: no init\r\nthe rest",
            "",
            "",
            "the kernel panicked: no init",
            True,
        ),
    ],
)
def test_the_trouble_of_a_machine(
    console: str, words: str, release: str, said: str, hint: bool
) -> None:
    with memory.memfd_create("console") as one, memory.memfd_create("words") as other:
        os.write(one.fileno(), console.encode())
        os.write(other.fileno(), words.encode())
        machine = stub(_console=one, _words=other, release=release)
        machine._last = partial(EmulatedMachine._last, machine)
        found = EmulatedMachine._trouble(machine, "ended")
    assert (str(found), bool(found.hint)) == (said, hint)


@pytest.mark.parametrize("has_modules", [False, True])
def test_an_initramfs_has_what_its_kernel_needs(
    has_modules: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busybox = tmp_path / BUSYBOX
    busybox.write_bytes(b"a static program")
    monkeypatch.setattr(shutil, "which", {BUSYBOX: str(busybox)}.get)
    monkeypatch.setattr(emulated_machine, "needed_modules", always([("lib/a.ko", b"the module")]))
    kernel = Kernel(Path("image"), modules=tmp_path if has_modules else None)
    found = initramfs(kernel, "the program", [("more", b"the file")])
    for part in (b"a static program", b"the program", b"the file"):
        assert part in found
    assert (b"the module" in found) is (b"lib/a.ko" in found) is has_modules
    busybox.write_bytes(b"\x7fELF /lib64/ld-linux.so")
    with pytest.raises(EmulationError, match="busybox needs shared libraries"):
        initramfs(kernel, "the program")


def test_a_command_runs_attached_in_its_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, machine = Mock(spec=Kernel), Mock(status=5)
    machine.lines.return_value = iter(["a line"])
    made: list[tuple[object, ...]] = []

    @contextmanager
    def start(*arguments: object, **more: object):  # type: ignore[no-untyped-def]
        made.append((*arguments, more))
        yield machine

    monkeypatch.setattr(command, "EmulatedMachine", start)

    def program_of(_: Kernel, program: str) -> str:
        return program

    monkeypatch.setattr(command, "initramfs", program_of)
    monkeypatch.setattr(shutil, "which", "/bin/{}".format)
    assert command.run_command(kernel, ["echo", "it's"], Path("/a place")) == 5
    kernel.check.assert_called_once_with()
    machine.lines.assert_called_once_with(float("inf"))
    machine.wait.assert_called_once_with()
    ((of, program, more),) = made
    assert (of, more) == (kernel, {"attached": True})
    assert isinstance(program, str)
    # The script is one word at the program's end.
    script = shlex.split(program.partition(" /bin/sh -c ")[2])[0]
    assert "cd '/a place' && echo 'it'\"'\"'s'" in script
    assert f"/bin/{BUSYBOX} poweroff -f" in script


@pytest.mark.parametrize("attached", [False, True])
def test_the_command_of_qemu(attached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", "/bin/{}".format)
    kernel = Kernel(Path("/boot/image"), memory="5G", processors=7)
    words = emulated_machine._command(kernel, 11, 12, 13, attached=attached)
    assert words[0] == f"/bin/{QEMU}"
    assert {"-nodefaults", "-no-reboot"} <= set(words)
    pairs = list(pairwise(words))
    for pair in (
        ("-kernel", "/boot/image"),
        ("-initrd", "/dev/fd/13"),
        ("-m", "5G"),
        ("-smp", "7"),
        ("-cpu", "max,+svm"),
        ("-accel", "tcg,thread=multi"),
        ("-display", "none"),
    ):
        assert pair in pairs
    # The first port is the console, the second what the program says.
    ports = [value for name, value in pairs if name == "-serial"]
    assert ports == ["stdio" if attached else "file:/dev/fd/11", "file:/dev/fd/12"]
    shared = [value for name, value in pairs if name == "-virtfs"]
    assert len(shared) == attached
    assert all("readonly=on" in value and "path=/," in value for value in shared)
    # The kernel ends the machine, whatever happens.
    (append,) = (value for name, value in pairs if name == "-append")
    assert {"console=ttyS0", "panic=-1", "oops=panic"} <= set(append.split())


def test_without_qemu_its_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", always(None))
    words = emulated_machine._command(Kernel(Path("/boot/image")), 11, 12, 13, attached=False)
    assert words[0] == QEMU
