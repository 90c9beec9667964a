"""The doctor's probes for guests, memory and system call.

Each probe tells the truth and says what to do.
"""

import ctypes
import errno
import mmap
import os
import resource
import subprocess
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest

from outcomes import Errno, outcome
from planting import always, stub
from probing import say, without_capabilities
from restrictedmem.abi import kvm, memory, pagemap, process, seccomp
from restrictedmem.fd import OwnedFd
from restrictedmem.machine import guests, syscall
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


def test_a_unicorn_without_its_library_is_told_from_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = stub(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", always(spec))
    found = guests.unicorn()
    assert (found.state, found.detail) == (State.NO, "its library is missing")


def test_unicorn_has_to_open_an_engine_and_says_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [0, 1]
    opened = list[tuple[object, ...]]()

    def uc_open(*arguments: object) -> int:
        opened.append(arguments[:2])
        return answers.pop(0)

    library = stub(uc_open=uc_open, uc_version=always(0x12_34_56_FF))
    monkeypatch.setattr(ctypes, "CDLL", always(library))
    assert guests._unicorn_version("library") == (0x12, 0x34, 0x56)
    # UC_ARCH_X86 and UC_MODE_64 of <unicorn/unicorn.h>.
    assert opened == [(4, 8)]
    assert outcome(lambda: guests._unicorn_version("library")) == Errno(errno.EIO)


def test_another_unicorn_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guests, "_unicorn_version", always((2, 2, 0)))
    assert guests.unicorn().state is State.PARTLY


def test_hardware_is_read_from_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, guests, cpuinfo="processor : 0\nflags\t\t: fpu svm hypervisor\n")
    assert guests.hardware().detail == "AMD SVM, itself inside a virtual machine"
    say(monkeypatch, guests, cpuinfo="flags\t\t: fpu\n")
    assert guests.hardware().state is State.NO
    say(monkeypatch, guests, cpuinfo="flags\t\t: fpu vmx\n")
    assert guests.hardware().detail == "Intel VMX, on bare metal"


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


def test_without_a_vm_the_rest_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise OSError(errno.ENOMEM, "no room")

    monkeypatch.setattr(guests, "kvm_device", lambda: Finding("/dev/kvm", State.YES, ""))
    monkeypatch.setattr(guests, "in_child", refuse)
    found = {one.name: one for one in list(guests.probe())[3:]}
    assert found.keys() == {"KVM capabilities", "memory attributes", *guests._FLAGS}
    assert {(one.state, one.detail) for one in found.values()} == {
        (State.UNKNOWN, "a VM could not be made: no room")
    }


def test_a_touch_that_would_be_sigbus_is_no_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "planted")

    with memory.memfd_create("touched") as file:
        os.ftruncate(file.fileno(), PAGE_SIZE)
        with mmap.mmap(file.fileno(), PAGE_SIZE) as mapping:
            assert guests._readable(mapping)
            os.ftruncate(file.fileno(), 0)
            assert not guests._readable(mapping)
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", refuse)
                assert outcome(lambda: guests._readable(mapping)) == Errno(errno.EIO)


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
    assert "a slot of 64 MiB: " in found.detail
    assert "swapped out" in found.consequence
    assert "no swap" in in_child(lambda: limited(harmless=True)).consequence


def test_the_limit_matters_where_there_is_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[bool]()

    def lockable(*, harmless: bool) -> Finding:
        asked.append(harmless)
        return Finding("locked memory", State.YES, "")

    monkeypatch.setattr(memory_probes, "lockable", lockable)
    for state in (State.YES, State.NO, State.UNKNOWN):
        swapless = Finding("no swap", state, "")
        monkeypatch.setattr(memory_probes, "no_swap", lambda found=swapless: found)
        first, second = islice(memory_probes.probe(), 2)
        assert (first.name, second) == ("locked memory", swapless)
    assert asked == [True, False, False]


def test_swap_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    head = "Filename Type Size Used Priority"
    say(monkeypatch, memory_probes, swaps=head)
    assert memory_probes.no_swap().state is State.YES
    say(monkeypatch, memory_probes, swaps=f"{head}\n/dev/sda2 partition 2097152 0 -2", enabled="Y")
    assert (memory_probes.no_swap().state, memory_probes.no_swap().detail) == (
        State.NO,
        "/dev/sda2 2 GiB, zswap on",
    )
    # A name may have spaces.
    say(monkeypatch, memory_probes, swaps=f"{head}\n/a b partition 1024 0 -2\n/c file 2048 0 -3")
    assert memory_probes.no_swap().detail == "/a b 1 MiB; /c 2 MiB"
    say(monkeypatch, memory_probes, swaps=head, enabled="Y")
    assert "/proc/swaps is empty, zswap on: " in memory_probes.no_swap().detail
    say(monkeypatch, memory_probes)
    assert memory_probes.no_swap().state is State.UNKNOWN


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
    for name in ("nr_hugepages", "free_hugepages"):
        (tmp_path / "hugepages-2048kB" / name).unlink()
    found = memory_probes.hugetlb()
    assert (found.state, found.detail) == (State.PARTLY, "2 MiB: 0 free of 0; 1 GiB: 0 free of 4")


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
    def scan() -> int:
        with memory.memfd_create("scan") as file:
            memory.fallocate(file.fileno(), 0, 0, 4 * PAGE_SIZE)
            room = mmap.mmap(file.fileno(), 4 * PAGE_SIZE)
            room[PAGE_SIZE] = room[3 * PAGE_SIZE] = 1
            address = ctypes.addressof(ctypes.c_char.from_buffer(room))
            return pagemap.bytes_in(pagemap.Category.PRESENT, address, 2 * PAGE_SIZE)

    # Fault-around may bring in neighbours for reads; a write brings its own page alone.
    found = outcome(lambda: in_child(scan))
    assert found in (PAGE_SIZE, Errno(errno.ENOTTY))
    assert memory_probes.pagemap_scan().state is (State.YES if found == PAGE_SIZE else State.NO)


@pytest.mark.requires("root")
def test_root_sees_frame_numbers() -> None:
    assert memory_probes.frame_numbers().state is State.YES


def test_the_kernel_collapses_for_the_probe_what_it_does_for_others() -> None:
    def by_hand() -> str:
        with memory.memfd_create("collapsed") as file:
            os.ftruncate(file.fileno(), memory.PMD_SIZE)
            mapping = memory.Mapping(file.fileno(), 0, memory.PMD_SIZE, memory.PMD_SIZE)
            mapping.madvise(memory.MADV_POPULATE_WRITE, 0, memory.PMD_SIZE)
            mapping.madvise(memory.MADV_COLLAPSE, 0, memory.PMD_SIZE)
            try:
                huge = pagemap.bytes_in(pagemap.Category.HUGE, mapping.address, memory.PMD_SIZE)
            except OSError:
                return "not checked, because PAGEMAP_SCAN is missing"
            return f"{'and' if huge else 'but not'} seen to be mapped as one"

    said = outcome(lambda: in_child(by_hand))
    found = memory_probes.collapse()
    assert (found.state is State.NO) == isinstance(said, Errno), found.detail
    if found.state is not State.NO:
        assert found.detail == f"2 MiB of a memfd collapsed into one page, {said}"


def test_small_pages_are_there_before_they_are_collapsed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int, int]]()

    def madvise(_: memory.Mapping, *asks: int) -> None:
        asked.append((asks[0], asks[1], asks[2]))

    monkeypatch.setattr(memory.Mapping, "madvise", madvise)
    with suppress(OSError):
        # Nothing is mapped.
        assert memory_probes._collapse(memory.PMD_SIZE) is False
    assert asked == [
        (memory.MADV_POPULATE_WRITE, 0, memory.PMD_SIZE),
        (memory.MADV_COLLAPSE, 0, memory.PMD_SIZE),
    ]


def test_a_page_is_there_once_it_is_prefaulted(monkeypatch: pytest.MonkeyPatch) -> None:
    with memory.memfd_create("prefaulted") as file:
        again = OwnedFd(os.dup(file.fileno()))
        monkeypatch.setattr(memory, "memfd_create", always(again))
        refused = outcome(memory_probes._populate)
        blocks = os.fstat(file.fileno()).st_blocks
    # Linux 5.14 has MADV_POPULATE_WRITE.
    assert (refused, blocks) in [(None, PAGE_SIZE // 512), (Errno(errno.EINVAL), 0)]


def test_requests_have_the_numbers_of_the_headers() -> None:
    assert seccomp.SECCOMP_IOCTL_NOTIF_RECV.request == 0xC050_2100
    assert seccomp.SECCOMP_IOCTL_NOTIF_ADDFD.request == 0x4018_2103
    assert pagemap.PAGEMAP_SCAN.request == 0xC060_6610


# System call.


def test_an_unknown_action_and_flag_are_not_there() -> None:
    assert not seccomp.action_available(0x1234_0000)
    assert not seccomp.flags_known(seccomp.FilterFlag(1 << 30))


@pytest.mark.requires("seccomp")
def test_a_call_is_answered_unless_a_listener_is_above() -> None:
    # no_new_privs is enough.
    for found in (syscall.answered_call(), without_capabilities(syscall.answered_call)):
        if found.state is State.UNKNOWN:
            pytest.skip(found.detail)
        assert found.state is State.YES, found.detail

    def under_a_listener() -> Finding:
        process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
        with seccomp.install(
            [seccomp.ret(seccomp.SECCOMP_RET_ALLOW)], seccomp.FilterFlag.NEW_LISTENER
        ):
            return syscall.answered_call()

    found = in_child(under_a_listener)
    assert (found.state, "has a listener already" in found.detail) == (State.UNKNOWN, True)


def test_an_answer_with_another_file_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with memory.memfd_create("one") as one, memory.memfd_create("other") as other:
        expected = os.fstat(one.fileno())
        for file, wanted in ((one, None), (other, Errno(errno.EPROTO))):
            monkeypatch.setattr(
                memory, "memfd_restricted", lambda fd=file: OwnedFd(os.dup(fd.fileno()))
            )
            assert outcome(lambda: syscall._call(expected)) == wanted


@pytest.mark.requires("seccomp")
def test_a_caller_that_fails_after_its_answer_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    if syscall.answered_call().state is State.UNKNOWN:
        pytest.skip(syscall.answered_call().detail)

    def call(_: object) -> None:
        memory.memfd_restricted().close()
        raise OSError(errno.EPROTO, "another file")

    monkeypatch.setattr(syscall, "_call", call)
    found = syscall.answered_call()
    assert (found.state, found.detail) == (State.NO, "the call was answered with something else")


def test_a_kernel_without_seccomp_has_neither_action_nor_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> bool:
        raise OSError(errno.ENOSYS, "seccomp")

    monkeypatch.setattr(seccomp, "flags_known", refuse)
    assert syscall.flag(seccomp.FilterFlag.NEW_LISTENER, "Linux 5.0").state is State.NO
    monkeypatch.setattr(seccomp, "action_available", refuse)
    assert "CONFIG_SECCOMP_FILTER" in syscall.action().remedy
    monkeypatch.setattr(seccomp, "action_available", always(False))
    assert (syscall.action().state, syscall.action().remedy) == (State.NO, "Linux 5.0 or later")


def test_the_kernel_is_asked_for_the_flags_that_the_supervisor_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[seccomp.FilterFlag]()

    def flags_known(flags: seccomp.FilterFlag) -> bool:
        asked.append(flags)
        return True

    monkeypatch.setattr(seccomp, "flags_known", flags_known)
    monkeypatch.setattr(syscall, "in_child", always(None))
    assert {one.state for one in list(syscall.probe())[1:3]} == {State.YES}
    listener = seccomp.FilterFlag.NEW_LISTENER
    assert asked == [listener, listener | seccomp.FilterFlag.WAIT_KILLABLE_RECV]


def test_the_call_is_there_if_it_gives_a_descriptor() -> None:
    tried = outcome(lambda: memory.memfd_restricted().close())
    assert syscall.presence().state is (State.YES if tried is None else State.NO)


def test_number_451_is_free_or_cachestat(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> int:
        raise OSError(errno.ENOSYS, "cachestat")

    assert syscall.number().state in (State.YES, State.PARTLY)
    monkeypatch.setattr(syscall, "allocated_pages", absent)
    assert syscall.number().state is State.YES
