"""Devices are opened for reading and writing, close-on-exec.

A descriptor may have any number, 0 too.
"""

import fcntl
import os
from collections.abc import Callable
from errno import EPERM
from typing import Any, Final, NoReturn

import pytest

from outcomes import Errno, in_child, outcome
from restrictedmem.abi import io_uring, memory, mount, userfaultfd
from restrictedmem.audit import syscalls
from restrictedmem.devkvm import system
from restrictedmem.fd import OwnedFd
from restrictedmem.fs import mount_ways
from restrictedmem.machine import descriptor, guests
from restrictedmem.machine.finding import Finding

#: Who opens a device, and where its path is.
OPENERS: Final[dict[str, tuple[Any, str, Callable[[], object]]]] = {
    "Kvm.open": (system, "DEVICE", system.Kvm.open),
    "mount_detached": (
        mount_ways,
        "DEVICE",
        lambda: mount_ways.mount_detached(allow_other=False),
    ),
    "fuse_device": (descriptor, "DEVICE", descriptor.fuse_device),
    "kvm_device": (guests, "_KVM", guests.kvm_device),
    "capabilities": (guests, "_KVM", guests._capabilities),
    "guest_memfd": (guests, "_KVM", lambda: guests._create_and_map(0)),
}


@pytest.mark.parametrize("name", OPENERS)
def test_a_device_is_opened_to_read_and_write(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, path, opener = OPENERS[name]
    asked = list[tuple[str, int]]()

    def refuse(path: str, flags: int) -> NoReturn:
        asked.append((path, flags))
        raise OSError(EPERM, "refused")

    monkeypatch.setattr(module, path, "/dev/null")
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "open", refuse)
        # The doctor makes a finding of it.
        found = outcome(opener)
    assert isinstance(found, Finding) or found == Errno(EPERM)
    assert asked == [("/dev/null", os.O_RDWR | os.O_CLOEXEC)]


def test_a_vm_can_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "DEVICE", os.devnull)
    with system.Kvm.open() as device:
        assert fcntl.fcntl(device.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert fcntl.fcntl(device.fileno(), fcntl.F_GETFD) == fcntl.FD_CLOEXEC


MAKERS: Final[dict[str, Callable[[], OwnedFd]]] = {
    "memfd_create": lambda: memory.memfd_create("first"),
    "userfaultfd": lambda: userfaultfd.userfaultfd(userfaultfd.UFFD_USER_MODE_ONLY),
    "io_uring_setup": lambda: io_uring.io_uring_setup(1),
    "fsopen": lambda: mount.fsopen("tmpfs"),
    "perf_event_open": lambda: syscalls.perf_event_open(0),
    "bpf": syscalls.bpf_prog_load,
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_first_descriptor_of_all_is_one(name: str) -> None:
    def make() -> int:
        os.close(0)
        return MAKERS[name]().detach()

    # Or the errno of a call that is not to be had here.
    assert in_child(make) in ("0", "EPERM", "EACCES", "ENOSYS")
