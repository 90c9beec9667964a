"""What the machine offers: each probe tells the truth, says what to do, and leaves nothing behind."""

import argparse
import ctypes
import errno
import hashlib
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from outcomes import Errno, outcome
from outcomes import in_child as apart
from processes import children
from restrictedmem.abi import fuse, kvm, memory, pagemap, process, seccomp
from restrictedmem.cli import doctor
from restrictedmem.fd import OwnedFd, readable
from restrictedmem.fs.mount_ways import Way
from restrictedmem.fs.mounter import enter_user_namespace
from restrictedmem.machine import (
    descriptor,
    examination,
    finding,
    guests,
    host,
    laboratory,
    syscall,
)
from restrictedmem.machine import memory_kinds as memory_probes
from restrictedmem.machine.examination import Conclusion, Examination, Group, conclude
from restrictedmem.machine.finding import Finding, State
from restrictedmem.probe import in_child
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.vmm import Vmm

T = TypeVar("T")


def always(answer: T) -> Callable[[object], T]:
    """Make a function that gives the same answer to everything."""
    return lambda _: answer


def do_nothing(*_: object) -> None:
    """Take anything, and do nothing."""


def without_capabilities(probe: Callable[[], T]) -> T:
    def attempt() -> T:
        process.set_capabilities(0)
        return probe()

    return in_child(attempt)


def say(monkeypatch: pytest.MonkeyPatch, module: object, **texts: str | None) -> None:
    """Let a module read made-up settings; the key is the last part of the path."""

    def setting(path: str) -> str | None:
        return texts.get(path.rpartition("/")[2])

    monkeypatch.setattr(module, "setting", setting)


# A probe in a child.


def test_in_child_returns_what_the_probe_returns() -> None:
    assert in_child(lambda: (os.getppid(), {"a": 1})) == (os.getpid(), {"a": 1})


def test_in_child_raises_what_the_probe_raises() -> None:
    def probe() -> None:
        raise OSError(errno.EXDEV, "name: said")

    with pytest.raises(OSError) as caught:
        in_child(probe)
    assert (caught.value.errno, caught.value.strerror) == (errno.EXDEV, "name: said")


def test_in_child_says_which_signal_ended_the_probe() -> None:
    with pytest.raises(OSError, match="SIGKILL") as caught:
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert caught.value.errno == errno.ECHILD


def test_in_child_does_not_wait_for_a_probe_that_hangs() -> None:
    def body() -> tuple[object, bool, int]:
        began = time.monotonic()
        came = outcome(lambda: in_child(signal.pause, deadline=0.1))
        return came, time.monotonic() - began < 5, os.waitpid(-1, 0)[1]

    # Of all children it is to be the only one.
    assert apart(body) == repr((Errno(errno.ETIMEDOUT), True, 9))


def test_in_child_does_not_wait_for_a_child_that_hangs_once_it_has_answered() -> None:
    def probe() -> str:
        os._exit = lambda status: signal.pause()  # type: ignore[assignment,return-value]
        return "answer"

    came = apart(lambda: (outcome(lambda: in_child(probe, deadline=0.1)), os.waitpid(-1, 0)[1]))
    assert came == repr((Errno(errno.ETIMEDOUT), 9))


def test_the_child_ends_with_who_asked() -> None:
    code = (
        "import os, signal; from restrictedmem.probe import in_child; "
        "in_child(lambda: (print(os.getpid(), flush=True), signal.pause()), 100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as asking:
        assert asking.stdout is not None
        with OwnedFd(os.pidfd_open(int(asking.stdout.readline()))) as child:
            asking.kill()
            assert readable([child], 10), "waited 10 s for the child to end"


def test_a_bug_in_a_probe_stays_in_its_child(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError) as caught:
        in_child(lambda: 1 // 0)
    assert caught.value.errno == errno.ECHILD
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_missing_setting_is_none(tmp_path: Path) -> None:
    (tmp_path / "there").write_text(" 1\n")
    assert (finding.setting(str(tmp_path / "there")), finding.setting(str(tmp_path / "not"))) == (
        "1",
        None,
    )


# Descriptor.


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


# Guests.


def test_unicorn_is_found_without_being_imported() -> None:
    code = (
        "import sys; from restrictedmem.machine import guests; found = guests.unicorn(); "
        "assert 'unicorn' not in sys.modules; print(found.state.value, found.detail)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("yes version 2.1.")


def test_a_missing_unicorn_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", always(None))
    found = guests.unicorn()
    assert (found.state, found.detail) == (State.NO, "not installed")
    assert "pip install" in found.remedy


def test_another_unicorn_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guests, "_unicorn_version", always((2, 2, 0)))
    assert guests.unicorn().state is State.PARTLY


def test_hardware_is_read_from_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, guests, cpuinfo="processor : 0\nflags\t\t: fpu svm hypervisor\n")
    assert guests.hardware().detail == "AMD SVM, itself inside a virtual machine"
    say(monkeypatch, guests, cpuinfo="flags\t\t: fpu\n")
    assert guests.hardware().state is State.NO


@pytest.mark.requires("kvm")
def test_guest_memfd_without_mmap_refuses_it() -> None:
    found = {one.name: one for one in guests.probe()}
    assert found["/dev/kvm"].state is State.YES
    if found["guest_memfd"].state is not State.YES:
        pytest.skip(f"guest_memfd: {found['guest_memfd'].detail}")
    assert os.strerror(errno.ENODEV) in found["guest_memfd"].detail
    if found["guest_memfd, MMAP"].state is State.YES:
        assert found["guest_memfd, MMAP"].detail.endswith("a touch is SIGBUS")


def test_without_kvm_the_rest_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(guests, "_KVM", str(tmp_path / "kvm"))
    found = list(guests.probe())
    assert found[2].state is State.NO
    assert {one.state for one in found[3:]} == {State.UNKNOWN}


def test_kvm_capabilities_name_what_is_missing() -> None:
    found = guests.kvm_capabilities(
        {**dict.fromkeys((cap.name for cap in kvm.Cap), 1), "GUEST_MEMFD": 0}
    )
    assert found.state is State.NO
    assert "GUEST_MEMFD" in found.consequence


# Memory.


def test_a_slot_over_the_limit_is_not_promised() -> None:
    def limited(*, harmless: bool) -> Finding:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        return without_capabilities(lambda: memory_probes.lockable(harmless=harmless))

    found = in_child(lambda: limited(harmless=False))
    assert (found.state, "1 MiB" in found.detail, os.strerror(errno.ENOMEM) in found.detail) == (
        State.PARTLY,
        True,
        True,
    )
    assert "swapped out" in found.consequence
    assert "no swap" in in_child(lambda: limited(harmless=True)).consequence


def test_swap_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    head = "Filename Type Size Used Priority"
    say(monkeypatch, memory_probes, swaps=head)
    assert memory_probes.no_swap().state is State.YES
    say(monkeypatch, memory_probes, swaps=f"{head}\n/dev/sda2 partition 2097152 0 -2", enabled="Y")
    assert (memory_probes.no_swap().state, memory_probes.no_swap().detail) == (
        State.NO,
        "/dev/sda2 2 GiB, zswap on",
    )


def test_a_size_may_differ_from_the_policy_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_probes, "_THP", tmp_path)
    assert memory_probes.transparent_huge_pages().state is State.NO
    (tmp_path / "shmem_enabled").write_text("always within_size advise [never] deny force\n")
    for size, policy in ((64, "always [advise] never"), (2048, "always [inherit] never")):
        (tmp_path / f"hugepages-{size}kB").mkdir()
        (tmp_path / f"hugepages-{size}kB" / "shmem_enabled").write_text(policy)
    found = memory_probes.transparent_huge_pages()
    assert (found.state, found.detail) == (State.YES, "shmem_enabled never; 64 KiB advise")


def test_hugetlb_pools_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_probes, "_HUGETLB", tmp_path)
    for size, free in ((1048576, 0), (2048, 3)):
        (tmp_path / f"hugepages-{size}kB").mkdir()
        (tmp_path / f"hugepages-{size}kB" / "nr_hugepages").write_text("4\n")
        (tmp_path / f"hugepages-{size}kB" / "free_hugepages").write_text(f"{free}\n")
    found = memory_probes.hugetlb()
    assert (found.state, found.detail) == (State.YES, "2 MiB: 3 free of 4; 1 GiB: 0 free of 4")


def test_the_kernel_counts_the_one_page() -> None:
    try:
        assert in_child(memory_probes.allocated_pages) == 1
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise


def test_frame_numbers_are_hidden_from_those_without_capabilities() -> None:
    found = without_capabilities(memory_probes.frame_numbers)
    assert found.state is State.NO


def test_a_scan_counts_the_pages_that_are_there() -> None:
    if memory_probes.pagemap_scan().state is not State.YES:
        pytest.skip("the kernel has no PAGEMAP_SCAN")

    def scan() -> int:
        with memory.memfd_create("scan") as file:
            memory.fallocate(file.fileno(), 0, 0, 4 * PAGE_SIZE)
            room = mmap.mmap(file.fileno(), 4 * PAGE_SIZE)
            room[PAGE_SIZE] = room[3 * PAGE_SIZE] = 1
            address = ctypes.addressof(ctypes.c_char.from_buffer(room))
            return pagemap.bytes_in(pagemap.Category.PRESENT, address, 2 * PAGE_SIZE)

    # Fault-around may bring in neighbours for reads; a write brings its own page alone.
    assert in_child(scan) == PAGE_SIZE


def test_the_kernel_collapses_for_the_probe_what_it_does_for_others() -> None:
    def by_hand() -> None:
        with memory.memfd_create("collapsed") as file:
            os.ftruncate(file.fileno(), memory.PMD_SIZE)
            mapping = memory.Mapping(file.fileno(), 0, memory.PMD_SIZE, memory.PMD_SIZE)
            mapping.madvise(memory.MADV_POPULATE_WRITE, 0, memory.PMD_SIZE)
            mapping.madvise(memory.MADV_COLLAPSE, 0, memory.PMD_SIZE)

    refused = outcome(lambda: in_child(by_hand))
    found = memory_probes.collapse()
    assert (found.state is State.NO) == (refused is not None), found.detail


def test_requests_have_the_numbers_of_the_headers() -> None:
    assert seccomp.SECCOMP_IOCTL_NOTIF_RECV.request == 0xC050_2100
    assert seccomp.SECCOMP_IOCTL_NOTIF_ADDFD.request == 0x4018_2103
    assert pagemap.PAGEMAP_SCAN.request == 0xC060_6610


# System call.


def test_an_unknown_action_and_flag_are_not_there() -> None:
    assert not seccomp.action_available(0x1234_0000)
    assert not seccomp.flags_known(seccomp.FilterFlag(1 << 30))


def test_a_call_is_answered_unless_a_listener_is_above() -> None:
    if syscall.answered_call().state is not State.YES:
        pytest.skip(syscall.answered_call().detail)

    def under_a_listener() -> Finding:
        process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
        with seccomp.install(
            [seccomp.answer(seccomp.SECCOMP_RET_ALLOW)], seccomp.FilterFlag.NEW_LISTENER
        ):
            return syscall.answered_call()

    found = in_child(under_a_listener)
    assert (found.state, "has a listener already" in found.detail) == (State.UNKNOWN, True)


def test_the_call_is_there_if_it_gives_a_descriptor() -> None:
    tried = outcome(lambda: memory.memfd_restricted().close())
    assert syscall.presence().state is (State.YES if tried is None else State.NO)


def test_number_451_is_free_or_cachestat(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> int:
        raise OSError(errno.ENOSYS, "cachestat")

    assert syscall.number().state in (State.YES, State.PARTLY)
    monkeypatch.setattr(syscall, "allocated_pages", absent)
    assert syscall.number().state is State.YES


# Laboratory and host.


@pytest.mark.parametrize(
    ("scope", "state"),
    [(None, State.YES), ("0", State.YES), ("1", State.PARTLY), ("3", State.PARTLY)],
)
def test_yama_is_read(monkeypatch: pytest.MonkeyPatch, scope: str | None, state: State) -> None:
    say(monkeypatch, laboratory, ptrace_scope=scope)
    assert laboratory.ptrace().state is state


def test_a_missing_compiler_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "apt install gcc" in laboratory.compiler().remedy


def test_an_ordinary_user_gets_userfaultfd_at_most_for_user_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if finding.setting("/proc/sys/vm/unprivileged_userfaultfd") != "0":
        pytest.skip("vm.unprivileged_userfaultfd is not 0")
    assert without_capabilities(laboratory.userfaultfd).state in (State.PARTLY, State.NO)


def test_the_user_is_named_with_the_capabilities_that_count() -> None:
    assert "neither" in without_capabilities(host.user).detail


# All together.


@pytest.fixture(scope="module")
def examined() -> Examination:
    return examination.examine()


def test_names_are_unique_and_what_is_missing_says_what_follows(examined: Examination) -> None:
    findings = [one for group in examined.groups.values() for one in group]
    assert len({one.name for one in findings}) == len(findings)
    assert not [one.name for one in findings if one.state is State.NO and not one.consequence]
    assert {one.name for one in findings if one.state is State.NO and not one.remedy} <= {
        "hardware virtualisation"
    }


def test_an_examination_leaves_nothing_behind() -> None:
    def there_is() -> tuple[object, ...]:
        return (
            sorted(os.listdir("/proc/self/fd")),
            Path("/proc/self/mountinfo").read_text(),
            children(os.getpid()),
        )

    def reaped() -> bool:
        try:
            return os.waitpid(-1, os.WNOHANG)[0] > 0
        except ChildProcessError:
            return False

    # Of other tests in this process.
    while reaped():
        pass
    before = there_is()
    examination.examine()
    assert not reaped()
    assert there_is() == before


@pytest.mark.requires("fuse", "root")
def test_root_makes_a_descriptor_by_its_own_mount(examined: Examination) -> None:
    made = examined.conclusion.descriptor
    assert (made.state, made.detail.endswith("own mount")) == (State.YES, True)
    assert examined.conclusion.usable


def everything(**changed: Finding) -> dict[str, Finding]:
    names = [
        *(
            "/dev/fuse",
            "own mount",
            "user namespace mount",
            "fusermount3",
            "user namespaces",
            "FUSE protocol",
            "descriptors at once",
        ),
        *("Unicorn", "/dev/kvm", "KVM capabilities"),
        *("memory attributes", "guest_memfd", "guest_memfd, MMAP", "answered call"),
    ]
    return {name: Finding(name, State.YES, "there") for name in names} | {
        one.name: one for one in changed.values()
    }


MADE = Finding("descriptor", State.YES, "made")
NOT_MADE = Finding("descriptor", State.NO, "refused")
RAN = {engine: Finding(f"{engine} engine", State.YES, "ran") for engine in ("software", "kernel")}
RAN_NOT = {
    engine: Finding(f"{engine} engine", State.NO, "no guest ran: why")
    for engine in ("software", "kernel")
}


def test_everything_there_is_everything_possible() -> None:
    assert {part.state for part in conclude(everything(), MADE, RAN).parts().values()} == {
        State.YES
    }


def test_no_descriptor_names_the_first_obstacle() -> None:
    closed = Finding("/dev/fuse", State.NO, "closed", "nothing", "open it")
    not_tried = {
        engine: examination.run_guest(engine, NOT_MADE) for engine in ("software", "kernel")
    }
    found = conclude(everything(device=closed), NOT_MADE, not_tried)
    assert (found.descriptor.remedy, found.exec.state, found.usable) == ("open it", State.NO, False)
    assert (found.software_engine.state, found.kernel_engine.state) == (
        State.UNKNOWN,
        State.UNKNOWN,
    )


def test_a_way_that_is_not_needed_is_no_obstacle() -> None:
    ways = {
        name: Finding(name, State.NO, "refused", "", f"mend {name}")
        for name in ("own mount", "user namespace mount", "fusermount3")
    }
    few = Finding("descriptors at once", State.PARTLY, "RLIMIT_NOFILE 12", "few", "raise it")
    assert (
        conclude(
            everything(few=few, missing=ways["fusermount3"]), NOT_MADE, RAN_NOT
        ).descriptor.remedy
        == "raise it"
    )
    assert (
        conclude(everything(few=few, **ways), NOT_MADE, RAN_NOT).descriptor.remedy
        == "mend fusermount3"
    )


def test_an_engine_is_believed_in_after_a_guest_has_run_on_it_and_not_before() -> None:
    found = conclude(everything(), MADE, RAN_NOT)
    for part in (found.software_engine, found.kernel_engine):
        assert (part.state, part.detail, part.consequence) == (
            State.NO,
            "no guest ran: why",
            f"no guest runs on the {part.name}",
        )
    assert not found.usable
    assert conclude(everything(), MADE, {**RAN_NOT, "kernel": RAN["kernel"]}).usable
    assert conclude(everything(), MADE, {**RAN_NOT, "software": RAN["software"]}).usable


@pytest.mark.parametrize("name", ["/dev/kvm", "KVM capabilities", "guest_memfd"])
def test_what_the_kernel_engine_lacks_is_its_remedy(name: str) -> None:
    missing = Finding(name, State.UNKNOWN, "not there", "", f"get {name}")
    found = conclude(everything(missing=missing), MADE, {**RAN, "kernel": RAN_NOT["kernel"]})
    assert (found.kernel_engine.state, found.kernel_engine.remedy, found.usable) == (
        State.NO,
        f"get {name}",
        True,
    )


def test_what_the_software_engine_lacks_is_its_remedy() -> None:
    missing = Finding("Unicorn", State.NO, "not installed", "no guest", "install it")
    found = conclude(everything(unicorn=missing), MADE, {**RAN, "software": RAN_NOT["software"]})
    assert (found.software_engine.state, found.software_engine.remedy, found.usable) == (
        State.NO,
        "install it",
        True,
    )


@pytest.mark.parametrize(
    ("attributes", "mappable", "remedy"),
    [("yes", "no", ""), ("no", "yes", ""), ("no", "no", "get it")],
)
def test_the_kernel_engine_needs_attributes_or_mmap(
    attributes: str, mappable: str, remedy: str
) -> None:
    changed = {
        "attributes": Finding("memory attributes", State(attributes), ""),
        "mappable": Finding("guest_memfd, MMAP", State(mappable), "", remedy="get it"),
    }
    assert conclude(everything(**changed), MADE, RAN_NOT).kernel_engine.remedy == remedy


@pytest.mark.requires("fuse")
def test_a_guest_runs_on_the_software_engine(examined: Examination) -> None:
    found = examined.conclusion.software_engine
    assert (found.state, "digested 256 KiB" in found.detail) == (State.YES, True)


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ["software", "kernel"])
def test_a_guest_that_does_not_run_right_is_no_guest_that_ran(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vmm, "load", do_nothing)
    found = examination.run_guest(engine, MADE)
    assert found.state is State.NO
    assert found.detail.startswith("no guest ran: ")


@pytest.mark.requires("fuse")
def test_a_digest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "sha256", always(hashlib.sha256(b"other")))
    assert (
        examination.run_guest("software", MADE).detail
        == "no guest ran: the guest's digest is wrong"
    )


# Output.


def test_json_has_stable_keys_and_the_exit_status_agrees(
    examined: Examination, capsys: pytest.CaptureFixture[str]
) -> None:
    status = doctor.main(argparse.Namespace(json=True))
    said = capsys.readouterr().out
    assert said.endswith("}\n")
    data = json.loads(said)
    assert list(data) == ["findings", "conclusion"]
    assert {tuple(one) for one in data["findings"]} == {
        ("group", "name", "state", "detail", "consequence", "remedy")
    }
    assert list(data["conclusion"]) == [
        "usable",
        "descriptor",
        "software_engine",
        "kernel_engine",
        "exec",
    ]
    assert {one["state"] for one in data["findings"]} <= {"yes", "no", "partly", "unknown"}
    assert status == (0 if data["conclusion"]["usable"] else 1)
    assert [one["name"] for one in data["findings"]] == [
        one.name for group in examined.groups.values() for one in group
    ]


def made_up() -> Examination:
    missing = Finding("thing", State.NO, "word " * 40, "what follows", "sudo get it")
    return Examination(
        {Group.MEMORY: (missing, Finding("other", State.UNKNOWN, "not tried"))},
        Conclusion(NOT_MADE, Finding("software engine", State.YES, "v"), missing, MADE),
    )


def test_lines_are_aligned_and_fit() -> None:
    lines = list(doctor.as_lines(made_up(), 60, colour=False))
    assert max(map(len, lines)) <= 60
    assert lines[0] == "Memory"
    assert lines[1].startswith("  no      thing")
    column = lines[1].index("word")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines[1:3])
    assert "→ what follows" in "\n".join(lines)
    assert "→ sudo get it" in "\n".join(lines)
    assert any(line.startswith("  ?       other") for line in lines)
    assert (
        " ".join(lines[-2:])
        == "No guest can run in restricted memory here: the descriptor will not work."
    )


def test_colour_is_on_marks_and_heads_alone() -> None:
    plain = "\n".join(doctor.as_lines(made_up(), 80, colour=False))
    coloured = "\n".join(doctor.as_lines(made_up(), 80, colour=True))
    assert "\x1b" not in plain
    assert "\x1b[31mno" in coloured
    assert coloured.count("\x1b[0m") == 8


def test_the_command_line_is_light() -> None:
    code = (
        "import sys, restrictedmem.cli.doctor; "
        "print(sorted(name for name in sys.modules if name.startswith(('unicorn', 'rich', 'restrictedmem.machine'))))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.requires("fuse")
def test_plain_output_when_it_is_not_a_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "restrictedmem", "doctor"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    assert [group.value for group in Group] == [
        line for line in done.stdout.splitlines() if line in {group.value for group in Group}
    ]
