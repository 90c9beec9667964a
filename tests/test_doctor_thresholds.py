"""The thresholds at which a finding of the doctor changes: the last value on each side."""

import importlib.util
import resource
from collections.abc import Callable
from errno import EACCES, EBUSY, EINVAL, ENODEV, ENOENT, ENOSYS, ENXIO, EPERM
from pathlib import Path
from typing import Any, Final

import pytest

from planting import always, stub
from restrictedmem.abi import kvm, process, seccomp
from restrictedmem.abi.seccomp import FilterFlag
from restrictedmem.machine import descriptor, guests, memory_kinds, syscall
from restrictedmem.machine.finding import Finding, State
from restrictedmem.units import PAGE_SIZE

YES, NO, PARTLY, UNKNOWN = State.YES, State.NO, State.PARTLY, State.UNKNOWN
INIT_SHARED: Final = kvm.GUEST_MEMFD_FLAG_MMAP | kvm.GUEST_MEMFD_FLAG_INIT_SHARED


def answering(answer: object) -> Callable[..., object]:
    """Make a child that answers so, or fails."""

    def in_child(*_: object) -> object:
        if isinstance(answer, OSError):
            raise answer
        return answer

    return in_child


@pytest.mark.parametrize(
    ("hard", "state"), [(256, PARTLY), (9_999, PARTLY), (10_000, YES), (1 << 20, YES)]
)
def test_descriptors_at_once(hard: int, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", always((256, hard)))
    assert descriptor.descriptors_at_once().state is state


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ((2, 1, 2), PARTLY),
        ((2, 1, 3), YES),
        ((2, 1, 255), YES),
        ((2, 2, 0), PARTLY),
        ((1, 9, 9), PARTLY),
    ],
)
def test_unicorns_version(
    version: tuple[int, int, int], state: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libunicorn.so.2").touch()
    spec = stub(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", always(spec))
    monkeypatch.setattr(guests, "in_child", answering(version))
    assert guests.unicorn().state is state


@pytest.mark.parametrize(("version", "state"), [(11, NO), (12, YES), (13, NO)])
def test_kvms_version(version: int, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guests, "_KVM", "/dev/null")
    monkeypatch.setattr(kvm, "KVM_GET_API_VERSION", always(version))
    assert guests.kvm_device().state is state


@pytest.mark.parametrize(
    ("attributes", "types", "state"), [(0, 0, NO), (0, 1, NO), (0, 2, YES), (8, 1, YES)]
)
def test_memory_attributes(attributes: int, types: int, state: State) -> None:
    found = {"MEMORY_ATTRIBUTES": attributes, "VM_TYPES": types}
    assert guests.memory_attributes(found).state is state


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_every_capability_that_is_needed(missing: int) -> None:
    names = ["USER_MEMORY2", "MEMORY_FAULT_INFO", "GUEST_MEMFD"]
    found = dict.fromkeys(names, 1)
    assert guests.kvm_capabilities(found).state is YES
    lacking = guests.kvm_capabilities(found | {names[missing]: 0})
    assert (lacking.state, lacking.consequence.split()[-1]) == (NO, names[missing])


def test_each_set_of_flags_is_tried() -> None:
    """<linux/kvm.h>: MMAP is bit 0, INIT_SHARED bit 1."""
    assert [*guests._FLAGS.values()] == [0, 1, 3]


@pytest.mark.parametrize(
    ("flags", "consequence", "since"),
    [
        (0, "no kernel engine", "6.8"),
        (kvm.GUEST_MEMFD_FLAG_MMAP, "no private memory on a default VM", "6.18"),
        (INIT_SHARED, "no guest_memfd that its owner can fill before the guest runs", "6.18"),
    ],
)
def test_what_a_guest_memfd_is_needed_for(
    flags: int, consequence: str, since: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "in_child", answering(OSError(EINVAL, "refused")))
    found = guests.guest_memfd("guest_memfd", flags)
    assert (found.state, found.consequence) == (NO, consequence)
    assert found.remedy == f"Linux {since} or later"


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("capable", [True, False])
def test_cap_ipc_lock_is_bit_14(
    capable: bool, locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """<linux/capability.h>; its neighbours say nothing."""
    held = 1 << 14 if capable else ~(1 << 14)
    monkeypatch.setattr(process, "effective_capabilities", lambda: held)
    monkeypatch.setattr(resource, "getrlimit", always((PAGE_SIZE, PAGE_SIZE)))
    monkeypatch.setattr(
        memory_kinds, "in_child", answering(None if locked else OSError(EPERM, "refused"))
    )
    found = memory_kinds.lockable(harmless=True)
    assert found.state is (YES if locked else PARTLY)
    assert ("with CAP_IPC_LOCK" in found.detail) is capable
    assert found.detail.startswith("any size") is (locked and capable)


@pytest.mark.parametrize("capable", [True, False])
def test_cap_sys_admin_is_bit_21(capable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = 1 << 21 if capable else ~(1 << 21)
    monkeypatch.setattr(process, "effective_capabilities", lambda: held)
    found = descriptor.own_mount(OSError(EPERM, "refused"))
    assert ("no CAP_SYS_ADMIN" in found.detail) is not capable


@pytest.mark.parametrize(("pages", "words"), [(0, "counts 0"), (1, "without"), (2, "counts 2")])
def test_cachestat_counts_one(pages: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_kinds, "in_child", answering(pages))
    found = memory_kinds.cachestat()
    assert found.state is YES
    assert words in found.detail


@pytest.mark.parametrize(
    ("size", "state"), [(0, PARTLY), (PAGE_SIZE, YES), (2 * PAGE_SIZE, PARTLY)]
)
def test_a_scan_finds_one_page(size: int, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_kinds, "in_child", answering(size))
    assert memory_kinds.pagemap_scan().state is state


@pytest.mark.parametrize("name", ["populate", "cachestat", "memfd_secret", "pagemap_scan"])
def test_a_call_that_is_refused_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_kinds, "in_child", answering(OSError(ENOSYS, "refused")))
    found = getattr(memory_kinds, name)()
    assert (found.state, found.detail) == (NO, "refused")


@pytest.mark.parametrize(("frame", "state"), [(0, NO), (1, YES), (OSError(EPERM, "no"), NO)])
def test_a_frame_has_a_number(frame: object, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_kinds, "in_child", answering(frame))
    assert memory_kinds.frame_numbers().state is state


@pytest.mark.parametrize(
    ("huge", "state"), [(True, YES), (None, YES), (False, PARTLY), (OSError(EINVAL, "no"), NO)]
)
def test_a_collapse_is_looked_at(
    huge: object, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_kinds, "setting", always("2097152"))
    monkeypatch.setattr(memory_kinds, "in_child", answering(huge))
    assert memory_kinds.collapse().state is state
    for none in ("0", None):
        monkeypatch.setattr(memory_kinds, "setting", always(none))
        assert memory_kinds.collapse().detail == "no transparent huge pages"


@pytest.mark.parametrize(
    ("error", "state"), [(ENOSYS, YES), (EINVAL, UNKNOWN), (EPERM, UNKNOWN), (None, PARTLY)]
)
def test_number_451(error: int | None, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = None if error is None else OSError(error, "refused")
    monkeypatch.setattr(syscall, "in_child", answering(answer))
    found = syscall.number()
    assert found.state is state
    assert (found.detail == "taken by something else") is (error == EINVAL)


@pytest.mark.parametrize(("error", "state"), [(EBUSY, UNKNOWN), (EINVAL, NO), (None, YES)])
def test_an_answered_call(error: int | None, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = None if error is None else OSError(error, "refused")
    monkeypatch.setattr(syscall, "in_child", answering(answer))
    assert syscall.answered_call().state is state


DEVICES: Final[dict[str, tuple[Any, str, Callable[[], Finding]]]] = {
    "/dev/fuse": (descriptor, "modprobe fuse", descriptor.fuse_device),
    "/dev/kvm": (guests, "modprobe kvm", guests.kvm_device),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (ENOENT, "modprobe"),
        (ENODEV, "modprobe"),
        (ENXIO, "modprobe"),
        (EACCES, "chmod"),
        (EPERM, "--device"),
    ],
)
def test_each_refusal_of_a_device_has_its_remedy(
    device: str, number: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, modprobe, probe = DEVICES[device]

    def refuse(*_: object) -> int:
        raise OSError(number, "refused")

    monkeypatch.setattr(module, "device_mode", always("mode"))
    monkeypatch.setattr(guests, "_kvm_permission", lambda: "sudo chmod")
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "open", refuse)
        found = probe()
    assert found.state is NO
    assert (modprobe if remedy == "modprobe" else remedy) in found.remedy
    assert (modprobe in found.remedy) is (remedy == "modprobe")


@pytest.mark.parametrize(
    ("mode", "who"),
    [
        (0o600, "for root"),
        (0o640, "for root"),
        (0o620, "for root"),
        (0o660, "for root and group g"),
        (0o664, "for root and group g"),
        (0o662, "for root and group g"),
        (0o661, "for root and group g"),
        (0o666, "for everyone"),
        (0o667, "for everyone"),
    ],
)
def test_a_device_is_for_who_may_read_and_write(
    mode: int, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = stub(st_mode=0o20000 | mode, st_uid=0, st_gid=1)
    monkeypatch.setattr(descriptor, "os", stub(stat=always(status)))
    monkeypatch.setattr(descriptor, "_user_name", always("root"))
    monkeypatch.setattr(descriptor, "_group_name", always("g"))
    assert descriptor.device_mode("device") == f"mode {mode:04o}, {who}"


@pytest.mark.parametrize(
    ("group", "remedy"), [(0o661, "usermod"), (0o640, "chmod"), (0o620, "chmod"), (0, "chmod")]
)
def test_kvms_group_is_the_remedy_where_it_may(
    group: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "os", stub(stat=always(stub(st_mode=0o20600 | group))))
    assert guests._kvm_permission().startswith(f"sudo {remedy}")


@pytest.mark.parametrize(
    ("general", "of_size", "state"),
    [
        ("never", "never", PARTLY),
        ("deny", "inherit", PARTLY),
        ("deny", "always", PARTLY),
        ("never", "always", YES),
        ("always", "inherit", YES),
        ("advise", "inherit", YES),
        (None, "always", NO),
    ],
)
def test_huge_pages(
    general: str | None,
    of_size: str,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "hugepages-64kB").mkdir()
    (tmp_path / "hugepages-64kB" / "shmem_enabled").write_text(f"other [{of_size}]\n")
    if general is not None:
        (tmp_path / "shmem_enabled").write_text(f"other [{general}]\n")
    monkeypatch.setattr(memory_kinds, "_THP", tmp_path)
    assert memory_kinds.transparent_huge_pages().state is state


@pytest.mark.parametrize(
    ("total", "free", "state"), [(None, 0, NO), (0, 0, PARTLY), (4, 0, PARTLY), (4, 1, YES)]
)
def test_pools(
    total: int | None, free: int, state: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if total is not None:
        pool = tmp_path / "hugepages-2048kB"
        pool.mkdir()
        (pool / "nr_hugepages").write_text(str(total))
        (pool / "free_hugepages").write_text(str(free))
    monkeypatch.setattr(memory_kinds, "_HUGETLB", tmp_path)
    assert memory_kinds.hugetlb().state is state


@pytest.mark.parametrize(
    ("flags", "name", "words"),
    [
        (FilterFlag.NEW_LISTENER, "NEW_LISTENER", "cannot have memfd_restricted(2)"),
        (
            FilterFlag.NEW_LISTENER | FilterFlag.WAIT_KILLABLE_RECV,
            "WAIT_KILLABLE_RECV",
            "repeat a call",
        ),
    ],
    ids=["needed", "optional"],
)
def test_what_a_kernel_without_a_flag_lacks(
    flags: FilterFlag, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seccomp, "flags_known", always(False))
    found = syscall.flag(flags, "Linux 5.19")
    assert (found.name, found.remedy) == (name, "Linux 5.19")
    assert words in found.consequence
