"""The kernel engine with a service: when it is chosen, and what it counts."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Final, cast

import pytest

from outcomes import Errno, outcome
from restrictedmem import guests
from restrictedmem.abi import memory
from restrictedmem.devkvm import Kvm
from restrictedmem.kvm import engine_process
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine_vcpu import EngineVcpus
from restrictedmem.kvm.kernel.kernel_vm import KernelVm
from restrictedmem.mm.notifier import Api
from restrictedmem.protocol import guest_abi
from restrictedmem.protocol.exits import Hypercall
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.protocol.vm_wire import Creation
from restrictedmem.service import SERVER_VARIABLE, client
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm import elf
from restrictedmem.vmm.vm import Vm as VmOfOwner
from restrictedmem.vmm.vmm import Vmm
from users import ORDINARY, as_user

PAGE: Final = 4096
MIB: Final = 1 << 20
BASE: Final = guest_abi.PRIVATE_BASE

ENOENT, EACCES, ENOSPC = 2, 13, 28


# Which engine.


class Nobody:
    """Stands for a service that is not asked."""


def test_without_the_device_auto_is_software_and_the_name_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> Kvm:
        raise OSError(ENOENT, "open: No such file or directory: '/dev/kvm'")

    monkeypatch.setattr(Kvm, "open", missing)
    binder = cast("engine_process.EngineBinder", Nobody())
    assert (
        engine_process.make_engine(
            Creation("auto"), binder, EngineVcpus(), Attributes(Api.V10), Trace()
        ).name
        == "software"
    )
    with pytest.raises(OSError, match="/dev/kvm") as caught:
        engine_process.make_engine(
            Creation("kernel"), binder, EngineVcpus(), Attributes(Api.V10), Trace()
        )
    assert caught.value.errno == ENOENT


@pytest.mark.requires("kvm")
def test_with_the_device_auto_is_the_kernel() -> None:
    binder = cast("engine_process.EngineBinder", Nobody())
    made = engine_process.make_engine(
        Creation("auto"), binder, EngineVcpus(), Attributes(Api.V10), Trace()
    )
    assert isinstance(made, KernelVm)
    made.close()
    assert made.name == "kernel"
    assert (
        engine_process.make_engine(
            Creation("software"), binder, EngineVcpus(), Attributes(Api.V10), Trace()
        ).name
        == "software"
    )


# With a service.


@pytest.mark.requires("fuse", "kvm")
def test_what_a_slot_has_left_counts_for_the_limit() -> None:
    with (
        Service.start(Options(memory_max=4 * PAGE)) as limited,
        VmOfOwner(limited, engine="kernel") as vm,
    ):
        fd = limited.memfd_restricted()
        os.ftruncate(fd, 16 * PAGE)

        def show(slot: int, first: int, count: int) -> object:
            at, size = BASE + slot * MIB, count * PAGE
            make = partial(
                vm.set_user_memory_region, slot=slot, guest_phys_addr=at, memory_size=size
            )
            return outcome(lambda: make(restricted_fd=fd, restricted_offset=first * PAGE))

        assert show(0, 0, 4) is None
        vm.set_memory_attributes(BASE, 4 * PAGE, private=True)
        vm.launch_update(BASE, bytes(4 * PAGE))
        vm.set_user_memory_region(slot=0, guest_phys_addr=0, memory_size=0)
        assert show(1, 4, 1) == Errno(ENOSPC), "four pages are left"
        assert show(1, 0, 2) is None, "two of them are shown again"
        assert show(2, 4, 1) == Errno(ENOSPC)
        memory.fallocate(fd, memory.PUNCH, 2 * PAGE, 2 * PAGE)
        assert show(2, 4, 2) is None
        assert show(3, 1, 1) == Errno(ENOSPC), "a page shown twice counts twice"
        os.close(fd)


@pytest.mark.requires("fuse", "kvm")
def test_a_trace_counts_pages_while_files_come_and_go() -> None:
    with ExitStack() as held:
        service = held.enter_context(Service.start())
        vm = held.enter_context(VmOfOwner(service, engine="kernel"))
        fds = [service.memfd_restricted() for _ in range(8)]
        for fd in fds:
            held.callback(os.close, fd)
            os.ftruncate(fd, PAGE)
        vm.set_user_memory_region(
            slot=0, guest_phys_addr=BASE, memory_size=PAGE, restricted_fd=fds[0]
        )
        # Nobody reads it: what is lost has been counted as well.
        held.enter_context(vm.start_trace())
        punch, done = partial(memory.fallocate, fds[0], memory.PUNCH, 0, PAGE), threading.Event()
        puncher = threading.Thread(target=lambda: [punch() for _ in iter(done.is_set, True)])
        puncher.start()
        try:
            for _ in range(40):
                for number, fd in enumerate(fds[1:], 1):
                    vm.set_user_memory_region(
                        slot=number,
                        guest_phys_addr=BASE + number * MIB,
                        memory_size=PAGE,
                        restricted_fd=fd,
                    )
                for number in range(1, 8):
                    vm.set_user_memory_region(slot=number, guest_phys_addr=0, memory_size=0)
        finally:
            done.set()
            puncher.join()


@pytest.fixture
def place() -> Iterator[str]:
    """Name a directory that every user can enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield directory


@pytest.mark.requires("fuse", "kvm", "root")
def test_an_owner_that_may_not_open_the_device_gets_the_kernel_by_serve(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{place}/socket"
    monkeypatch.setattr(client, "_default", None)
    monkeypatch.setenv(SERVER_VARIABLE, path)
    server = subprocess.Popen(
        [sys.executable, "-m", "restrictedmem", "serve", "--socket", path, "--user", "nobody"],
        stderr=subprocess.PIPE,
        text=True,
    )

    def body() -> str:
        with pytest.raises(OSError) as caught:
            Kvm.open()
        assert caught.value.errno == EACCES
        with Vmm(MIB, engine="auto") as vmm:
            vmm.load(elf.parse(guests.path("spin").read_bytes()), ["exit", "7"])
            assert isinstance(vmm.vcpus[0].run(), Hypercall)
            return str(vmm.statistics()["engine"])

    try:
        assert server.stderr is not None
        assert server.stderr.readline() == f"listening on {path}\n"
        assert as_user(body, ORDINARY - 1, fuse=False) == "kernel"
    finally:
        server.terminate()
        server.communicate(timeout=20)
