"""The doctor's probes for the laboratory and the host."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from planting import always, stub
from probing import say, without_capabilities
from restrictedmem.abi import process, userfaultfd
from restrictedmem.machine import finding, host, laboratory
from restrictedmem.machine.finding import State


@pytest.mark.parametrize(
    ("scope", "state", "detail"),
    [
        (None, State.YES, "no Yama: any process of the same user"),
        ("0", State.YES, "Yama ptrace_scope 0: any process of the same user"),
        ("1", State.PARTLY, "Yama ptrace_scope 1: children only"),
        ("2", State.PARTLY, "Yama ptrace_scope 2: root only"),
        ("3", State.PARTLY, "Yama ptrace_scope 3: nobody"),
    ],
)
def test_yama_is_read(
    monkeypatch: pytest.MonkeyPatch, scope: str | None, state: State, detail: str
) -> None:
    say(monkeypatch, laboratory, ptrace_scope=scope)
    found = laboratory.ptrace()
    assert (found.state, found.detail) == (state, detail)


@pytest.mark.parametrize(
    ("events", "state", "detail"),
    [
        (["sched"], State.NO, "without events of KVM"),
        (["sched", "kvm"], State.YES, "with kvm"),
        (["kvmmmu", "kvm"], State.YES, "with kvm and kvmmmu"),
    ],
)
def test_kvms_events_are_looked_for(
    events: list[str], state: State, detail: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in events:
        (tmp_path / "events" / name).mkdir(parents=True)
    monkeypatch.setattr(laboratory, "_TRACEFS", tmp_path)
    found = laboratory.tracefs()
    assert (found.state, found.detail) == (state, f"in {tmp_path}, {detail}")


@pytest.mark.requires("root")
def test_tracefs_is_mounted_for_a_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(laboratory, "_TRACEFS", tmp_path)
    there = re.search(r"\ttracefs$", Path("/proc/filesystems").read_text(), re.MULTILINE)
    found = laboratory.tracefs()
    assert found.detail.startswith("tracefs can be mounted, " if there else "tracefs: "), found


def test_an_older_kernel_has_rings_and_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise OSError(errno.EPERM, "no ring")

    say(monkeypatch, laboratory)
    monkeypatch.setattr(laboratory, "in_child", always(None))
    found = laboratory.io_uring()
    assert (found.state, found.detail) == (State.YES, "kernel.io_uring_disabled unknown")
    monkeypatch.setattr(laboratory, "in_child", refuse)
    say(monkeypatch, laboratory, io_uring_disabled="2")
    found = laboratory.io_uring()
    assert (found.state, found.detail) == (State.NO, "no ring; kernel.io_uring_disabled 2")


def test_a_missing_compiler_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "apt install gcc" in laboratory.compiler().remedy


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        ("echo 'cc  1.2'; echo more; exit 1", State.YES, "cc 1.2"),
        ("exit 0", State.YES, "PATH"),
        (None, State.PARTLY, "Exec format error"),
    ],
)
def test_a_compiler_says_its_version(
    script: str | None,
    state: State,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = tmp_path / "gcc"
    path.write_bytes(b"\x7fELF" if script is None else f"#!/bin/sh\n{script}\n".encode())
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = laboratory.compiler()
    assert found.state is state
    if state is State.YES:
        assert found.detail == words.replace("PATH", str(path))
    else:
        assert words in found.detail


#: A refusal of each set of flags, or None.
USERFAULTFDS: Final = [
    (None, None, State.YES, [0], "faults of the kernel included"),
    ("kernel", None, State.PARTLY, [0, 1], "faults of user mode only"),
    ("kernel", "user", State.NO, [0, 1], "kernel"),
]


@pytest.mark.parametrize(("kernel", "user", "state", "asked", "words"), USERFAULTFDS)
def test_faults_of_the_kernel_are_asked_for_first(
    kernel: str | None,
    user: str | None,
    state: State,
    asked: list[int],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags_asked = list[int]()

    def make(flags: int) -> object:
        flags_asked.append(flags)
        refused = user if flags else kernel
        if refused is not None:
            raise OSError(errno.EPERM, refused)
        return stub(close=always(None))

    def in_child(probe: Callable[[], object]) -> object:
        return probe()

    monkeypatch.setattr(laboratory, "in_child", in_child)
    monkeypatch.setattr(userfaultfd, "userfaultfd", make)
    found = laboratory.userfaultfd()
    assert (found.state, flags_asked) == (state, asked)
    assert found.detail.startswith(words)


def test_an_ordinary_user_gets_userfaultfd_at_most_for_user_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if finding.setting("/proc/sys/vm/unprivileged_userfaultfd") != "0":
        pytest.skip("vm.unprivileged_userfaultfd is not 0")
    assert without_capabilities(laboratory.userfaultfd).state in (State.PARTLY, State.NO)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (1 << 14, "CAP_IPC_LOCK"),
        (1 << 21, "CAP_SYS_ADMIN"),
        (1 << 14 | 1 << 21, "CAP_SYS_ADMIN and CAP_IPC_LOCK"),
        (~(1 << 14 | 1 << 21), "neither CAP_SYS_ADMIN nor CAP_IPC_LOCK"),
    ],
)
def test_each_capability_that_counts(
    held: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "effective_capabilities", lambda: held)
    assert host.user().detail == f"uid {os.geteuid()}, {words}"


@pytest.mark.parametrize(("machine", "state"), [("x86_64", State.YES), ("arm64", State.PARTLY)])
def test_the_processor_is_one_that_was_tried(
    machine: str, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    uname = stub(sysname="Linux", release="6.1", machine=machine)
    monkeypatch.setattr(os, "uname", lambda: uname)
    assert (host.kernel().state, host.kernel().detail) == (state, f"Linux 6.1, {machine}")


def test_the_user_is_named_with_the_capabilities_that_count() -> None:
    assert "neither" in without_capabilities(host.user).detail
