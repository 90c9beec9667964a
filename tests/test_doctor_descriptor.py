"""The doctor's probes for the descriptor: each tells the truth and says what to do."""

import errno
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest

from outcomes import Errno, outcome
from planting import always, stub
from probing import say, without_capabilities
from restrictedmem.abi import fuse, process
from restrictedmem.abi.process import CLONE_NEWNS
from restrictedmem.fd import OwnedFd
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


@pytest.mark.parametrize("way", Way)
def test_each_way_is_tried_with_what_it_needs(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()

    def mounted() -> tuple[OwnedFd, OwnedFd]:
        device, kernel = map(OwnedFd, os.pipe())
        # fuse_in_header, and the version in fuse_init_in.
        os.write(kernel.fileno(), bytes(40) + struct.pack("=IIII", 7, 45, 0, 0))
        return device, kernel

    def detached(*, allow_other: bool) -> tuple[OwnedFd, OwnedFd]:
        asked.append(allow_other)
        return mounted()

    monkeypatch.setattr(descriptor, "mount_detached", detached)
    monkeypatch.setattr(descriptor, "mount_fusermount", mounted)
    monkeypatch.setattr(descriptor, "enter_user_namespace", asked.append)
    before = os.listdir("/proc/self/fd")
    assert descriptor._offered_minor(way) == 45
    assert asked == {Way.OWN: [True], Way.USERNS: [CLONE_NEWNS, False], Way.FUSERMOUNT: []}[way]
    monkeypatch.setattr(descriptor, "readable", always(False))
    assert outcome(lambda: descriptor._offered_minor(way)) == Errno(errno.EAGAIN)
    assert os.listdir("/proc/self/fd") == before


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


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ("user_allow_other", "set"),
        ("# user_allow_other", "not set"),
        (None, "not set"),
    ],
)
def test_fusermounts_settings_are_said(
    conf: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, descriptor, **{"fuse.conf": conf})
    monkeypatch.setattr(shutil, "which", always("/helper"))
    monkeypatch.setattr(descriptor, "_version_of", always("version 3"))
    for tried, state in ((None, State.UNKNOWN), (45, State.YES)):
        found = descriptor.fusermount(tried)
        assert found.state is state
        assert f"version 3, user_allow_other {words} in" in found.detail


def test_a_fusermount_that_is_broken_has_no_version(tmp_path: Path) -> None:
    helper = tmp_path / "helper"
    for script, words in (("echo v 3.16.2; exit 1", "version 3.16.2"), ("exit 1", "installed")):
        helper.write_text(f"#!/bin/sh\n{script}\n")
        helper.chmod(0o755)
        assert descriptor._version_of(str(helper)) == words


@pytest.mark.parametrize(
    ("mode", "uid", "closed", "number", "remedy"),
    [
        (0o755, 0, 0, errno.EPERM, "set-uid"),
        (0o4755, 1, 0, errno.EPERM, "set-uid"),
        (0o4755, 0, 1, errno.EPERM, "NoNewPrivileges"),
        (0o4755, 0, 0, errno.EPERM, "CAP_SYS_ADMIN"),
        (0o755, 0, 0, errno.ENODEV, ""),
    ],
)
def test_what_a_fusermount_lacks(
    mode: int, uid: int, closed: int, number: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", always("/helper"))
    monkeypatch.setattr(descriptor, "_version_of", always("version 3"))
    monkeypatch.setattr(descriptor, "os", stub(stat=always(stub(st_mode=mode, st_uid=uid))))
    monkeypatch.setattr(process, "prctl", always(closed))
    found = descriptor.fusermount(OSError(number, "refused"))
    assert found.state is State.NO
    assert remedy in found.remedy
    assert bool(found.remedy) is bool(remedy)


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


@pytest.mark.parametrize(
    ("apparmor", "clone", "privileged", "state", "remedy"),
    [
        (None, None, True, State.YES, ""),
        ("0", "1", True, State.YES, ""),
        ("1", None, False, State.YES, ""),
        (None, "0", False, State.YES, ""),
        ("1", None, True, State.PARTLY, "apt install fuse3"),
        (None, "0", True, State.PARTLY, "unprivileged_userns_clone=1"),
    ],
)
def test_an_ordinary_user_may_have_no_namespace_where_root_has_one(
    apparmor: str | None,
    clone: str | None,
    privileged: bool,
    state: State,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    say(
        monkeypatch,
        descriptor,
        apparmor_restrict_unprivileged_userns=apparmor,
        unprivileged_userns_clone=clone,
    )
    monkeypatch.setattr(descriptor, "in_child", always(None))
    monkeypatch.setattr(descriptor, "_privileged", lambda: privileged)
    found = descriptor.user_namespaces()
    assert found.state is state
    assert remedy in found.remedy
    assert bool(found.remedy) is bool(remedy)


@pytest.mark.parametrize(
    ("limit", "restricts", "enabled", "detail"),
    [
        (None, None, None, "no limit known; no AppArmor"),
        ("7", None, "N", "at most 7; no AppArmor"),
        ("7", None, "Y", "at most 7; AppArmor is on and does not restrict them"),
        ("7", "0", "Y", "at most 7; AppArmor restricts them: no"),
        ("7", "1", "Y", "at most 7; AppArmor restricts them: yes"),
    ],
)
def test_what_limits_user_namespaces_is_said(
    limit: str | None,
    restricts: str | None,
    enabled: str | None,
    detail: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    say(
        monkeypatch,
        descriptor,
        max_user_namespaces=limit,
        apparmor_restrict_unprivileged_userns=restricts,
        enabled=enabled,
    )
    monkeypatch.setattr(descriptor, "in_child", always(None))
    monkeypatch.setattr(descriptor, "_privileged", lambda: False)
    assert descriptor.user_namespaces().detail == detail


@pytest.mark.parametrize(
    ("number", "limit", "apparmor", "clone", "remedy"),
    [
        (errno.ENOSPC, "0", "1", "0", "max_user_namespaces=10000"),
        (errno.EPERM, "1", "1", "0", "unprivileged_userns_clone=1"),
        (errno.EPERM, None, "1", "1", "kernel.apparmor_restrict_unprivileged_userns=0"),
        (errno.EACCES, None, "1", None, "kernel.apparmor_restrict_unprivileged_userns=0"),
        (errno.ENOSPC, None, "1", None, "seccomp"),
        (errno.EPERM, None, "0", None, "seccomp"),
        (errno.EPERM, None, None, None, "seccomp"),
    ],
)
def test_each_refusal_of_a_namespace_has_its_remedy(
    number: int,
    limit: str | None,
    apparmor: str | None,
    clone: str | None,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> None:
        raise OSError(number, "refused")

    say(
        monkeypatch,
        descriptor,
        max_user_namespaces=limit,
        apparmor_restrict_unprivileged_userns=apparmor,
        unprivileged_userns_clone=clone,
    )
    monkeypatch.setattr(descriptor, "in_child", refuse)
    found = descriptor.user_namespaces()
    assert found.state is State.NO
    assert remedy in found.remedy


def test_few_descriptors_are_said() -> None:
    def limited() -> Finding:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024))
        return descriptor.descriptors_at_once()

    found = in_child(limited)
    assert (found.state, "1,024" in found.detail) == (State.PARTLY, True)
