"""The doctor's probes for the descriptor: each tells the truth and says what to do."""

import errno
import os
import resource
from pathlib import Path

import pytest

from probing import always, say, without_capabilities
from restrictedmem.abi import fuse, process
from restrictedmem.fs.mount_ways import Way
from restrictedmem.fs.mounter import enter_user_namespace
from restrictedmem.machine import descriptor
from restrictedmem.machine.finding import Finding, State
from restrictedmem.probe import in_child


@pytest.mark.parametrize(
    ("mode", "who"), [(0o600, "for root"), (0o660, "for root and group "), (0o666, "for everyone")]
)
def test_device_mode_says_who_may(
    tmp_path: Path, mode: int, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "device"
    device.touch()
    device.chmod(mode)
    monkeypatch.setattr(descriptor, "_user_name", always("root"))
    assert descriptor.device_mode(str(device)).startswith(f"mode {mode:04o}, {who}")


def test_a_missing_fuse_device_asks_for_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptor, "DEVICE", str(tmp_path / "fuse"))
    found = descriptor.fuse_device()
    assert found.state is State.NO
    assert "modprobe fuse" in found.remedy


def test_a_fuse_device_that_is_closed_to_the_user_asks_for_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "fuse"
    device.touch()
    device.chmod(0)
    monkeypatch.setattr(descriptor, "DEVICE", str(device))
    found = without_capabilities(descriptor.fuse_device)
    assert (found.state, found.detail.partition(";")[0]) == (State.NO, os.strerror(errno.EACCES))
    assert "chmod 0666" in found.remedy


def test_nothing_is_mounted_where_the_device_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor, "fuse_device", lambda: Finding("/dev/fuse", State.NO, ""))
    monkeypatch.setattr(descriptor, "try_way", pytest.fail)
    states = {found.name: found.state for found in descriptor.probe()}
    assert (
        states["own mount"]
        is states["user namespace mount"]
        is states["FUSE protocol"]
        is State.UNKNOWN
    )


@pytest.mark.requires("fuse", "root")
def test_the_kernel_says_its_protocol_on_a_mount_that_is_gone_afterwards() -> None:
    before = Path("/proc/self/mountinfo").read_text()
    own, namespaced = descriptor.try_way(Way.OWN), descriptor.try_way(Way.USERNS)
    assert isinstance(own, int)
    assert own == namespaced
    assert own >= fuse.OLDEST_MINOR_VERSION
    assert Path("/proc/self/mountinfo").read_text() == before


@pytest.mark.requires("fuse")
def test_own_mount_without_privilege_is_refused() -> None:
    tried = without_capabilities(lambda: descriptor.try_way(Way.OWN))
    assert isinstance(tried, OSError)
    assert tried.errno == errno.EPERM
    found = without_capabilities(lambda: descriptor.own_mount(tried))
    assert "no CAP_SYS_ADMIN" in found.detail


@pytest.mark.requires("root")
def test_a_refusal_of_root_is_not_laid_to_missing_capabilities() -> None:
    found = descriptor.own_mount(OSError(errno.EPERM, "no"))
    assert found.state is State.NO
    assert "CAP_SYS_ADMIN" not in found.detail


@pytest.mark.requires("fuse", "fusermount")
def test_fusermount_is_tried_for_real() -> None:
    assert descriptor.fusermount(descriptor.try_way(Way.FUSERMOUNT)).state is State.YES
    assert "restrictedmem" not in Path("/proc/self/mountinfo").read_text()


def test_a_missing_fusermount_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = descriptor.fusermount(None)
    assert (found.state, found.remedy) == (State.NO, "sudo apt install fuse3")


def test_a_fusermount_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "fusermount3"
    helper.write_text("#!/bin/sh\necho fusermount3 version: 3.14.0\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = descriptor.fusermount(PermissionError(errno.EPERM, "fusermount3: refused"))
    assert (found.state, "version 3.14.0" in found.detail, "refused" in found.detail) == (
        State.NO,
        True,
        True,
    )
    assert "set-uid" in found.remedy


@pytest.mark.requires("root")
def test_a_fusermount_under_no_new_privs_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "fusermount3"
    helper.write_text("#!/bin/sh\n")
    helper.chmod(0o4755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def fail() -> Finding:
        process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
        return descriptor.fusermount(PermissionError(errno.EPERM, "refused"))

    assert "NoNewPrivileges" in in_child(fail).remedy


@pytest.mark.parametrize(
    ("minors", "state"),
    [([], State.UNKNOWN), ([34], State.NO), ([35], State.YES), ([34, 45], State.YES)],
)
def test_the_protocol_needed_is_7_35(minors: list[int], state: State) -> None:
    assert descriptor.protocol(minors).state is state


@pytest.mark.requires("root")
def test_a_limit_of_no_user_namespaces_is_found_and_named() -> None:
    # The limit belongs to a user namespace, so one of our own can have it without anyone else being
    # touched.
    def limited() -> Finding:
        enter_user_namespace()
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        return descriptor.user_namespaces()

    found = in_child(limited)
    assert found.state is State.NO
    assert os.strerror(errno.ENOSPC) in found.detail
    assert found.remedy == "sudo sysctl user.max_user_namespaces=10000"


def test_what_root_may_is_not_said_of_ordinary_users(monkeypatch: pytest.MonkeyPatch) -> None:
    say(
        monkeypatch,
        descriptor,
        max_user_namespaces="100",
        apparmor_restrict_unprivileged_userns="1",
    )
    monkeypatch.setattr(descriptor, "in_child", always(None))
    monkeypatch.setattr(descriptor, "_privileged", lambda: True)
    found = descriptor.user_namespaces()
    assert found.state is State.PARTLY
    assert "AppArmor restricts them: yes" in found.detail
    assert "apt install fuse3" in found.remedy


def test_few_descriptors_are_said() -> None:
    def limited() -> Finding:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024))
        return descriptor.descriptors_at_once()

    found = in_child(limited)
    assert (found.state, "1,024" in found.detail) == (State.PARTLY, True)
