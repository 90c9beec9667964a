"""The doctor's probes for guests, memory, system call and laboratory.

Each probe tells the truth and says what to do.
"""

import ctypes
import errno
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from outcomes import outcome
from probing import always, say, without_capabilities
from restrictedmem.abi import kvm, memory, pagemap, process, seccomp
from restrictedmem.machine import finding, guests, host, laboratory, syscall
from restrictedmem.machine import memory_kinds as memory_probes
from restrictedmem.machine.finding import Finding, State
from restrictedmem.probe import in_child
from restrictedmem.units import PAGE_SIZE

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
            [seccomp.ret(seccomp.SECCOMP_RET_ALLOW)], seccomp.FilterFlag.NEW_LISTENER
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
