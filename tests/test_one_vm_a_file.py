"""A page belongs to one VM.

In hardware this is done by the RMP, or a key for each VM. The service does it by its rule for
bindings of a file.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from outcomes import Errno, outcome
from processes import family, process, stop, wait_gone
from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import exits
from restrictedmem.service.client import Service
from restrictedmem.service.consumer_process import Binding, ConsumerProcess
from restrictedmem.service.consumers import Consumers, Troubles
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vm
from waiting import wait_until

if TYPE_CHECKING:
    from restrictedmem.mm.restrictedmem import RestrictedFile
    from restrictedmem.service.signing import Signer
    from restrictedmem.service.tokens import Tokens

pytestmark = pytest.mark.requires("fuse")

GPA = 0x4000_0000
MIB = 1 << 20
PAGE = 4096
EPERM, EINVAL = 1, 22
SECRET = 0x5A
# mov al, 0x5a; mov [0x40001000], al; out 0x42, al
WRITER = bytes.fromhex("b05a 8804 25 00100040 e642")
# mov al, [0x40001000]; out 0x42, al
READER = bytes.fromhex("8a04 25 00100040 e642")


@pytest.fixture
def service() -> Iterator[Service]:
    with Service.start() as found:
        yield found


@pytest.fixture
def fd(service: Service) -> Iterator[int]:
    found = service.memfd_restricted()
    os.ftruncate(found, MIB)
    yield found
    os.close(found)


def bind(vm: Vm, fd: int) -> None:
    vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd)
    vm.set_memory_attributes(GPA, MIB, private=True)


def run(vm: Vm, code: bytes) -> exits.Exit:
    vm.launch_update(GPA, code.ljust(PAGE, b"\0"))
    with vm.create_vcpu() as vcpu:
        vcpu.set_regs(rip=GPA)
        return vcpu.run()


def test_a_second_vm_is_refused_while_the_first_is_there(service: Service, fd: int) -> None:
    with Vm(service, engine="software") as first, Vm(service, engine="software") as second:
        bind(first, fd)
        with pytest.raises(OSError) as caught:
            bind(second, fd)
        assert caught.value.errno == EINVAL
        # The first one lost nothing by it.
        assert run(first, WRITER) == exits.PortOut(0x42, 1, SECRET)


def test_a_later_vm_finds_nothing_of_the_earlier(service: Service, fd: int) -> None:
    with Vm(service, engine="software") as first:
        bind(first, fd)
        assert run(first, WRITER) == exits.PortOut(0x42, 1, SECRET)
    with Vm(service, engine="software") as second:
        bind(second, fd)
        assert run(second, READER) == exits.PortOut(0x42, 1, 0)


def descriptors(vm: Vm, name: str) -> list[int]:
    """Open what the VM's engine has of a name, as a guest that broke out of it would keep it."""
    directory = Path(f"/proc/{vm.statistics()['pid']}/fd")
    return [
        os.open(link, os.O_RDWR)
        for link in directory.iterdir()
        if os.readlink(link) == f"/memfd:{name} (deleted)"
    ]


@pytest.mark.requires("fuse", "root")
def test_what_an_earlier_engine_keeps_reaches_nothing_of_a_later_vm(
    service: Service, fd: int
) -> None:
    with (
        Vm(service, engine="software") as first,
        Vm(service, engine="software") as second,
        ExitStack() as kept,
    ):
        other = service.memfd_restricted()
        os.posix_fallocate(other, 0, PAGE)
        bind(first, fd)
        memfds, sequences = (
            descriptors(first, "restrictedmem"),
            descriptors(first, "restrictedmem-sequence"),
        )
        for number in memfds + sequences:
            kept.callback(os.close, number)
        assert memfds
        assert sequences
        assert outcome(partial(os.pwrite, sequences[0], bytes(32), 0)) == Errno(EPERM)
        first.launch_update(GPA, bytes([SECRET]) * MIB)
        first.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=0)
        os.posix_fallocate(fd, 0, MIB)
        before = os.pread(sequences[0], PAGE, 0)
        # The service has a lower number free, and so none of the new descriptors gets the number of
        # the one that it replaces.
        os.close(other)
        wait_until(
            lambda: len(cast("list[object]", service.status()["descriptors"])) == 1,
            "the other file to be gone",
        )
        bind(second, fd)
        # The first VM's memory is freed, and the machine has it back, whoever keeps the memfd.
        assert (os.fstat(memfds[0]).st_blocks, os.fstat(fd).st_blocks) == (0, 0)
        assert run(second, WRITER) == exits.PortOut(0x42, 1, SECRET)
        assert os.pread(memfds[0], MIB, 0) == bytes(MIB)
        os.pwrite(memfds[0], b"\xff" * MIB, 0)
        assert 0 < os.fstat(fd).st_blocks * 512 < MIB
        memory.fallocate(fd, memory.PUNCH, 0, MIB)
        assert os.pread(sequences[0], PAGE, 0) == before
        assert os.fstat(fd).st_blocks == 0
        # The first VM gets the second VM's content, and not its own old one.
        second.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=0)
        bind(first, fd)
        first.launch_update(GPA, bytes(PAGE))
        assert 0 < os.fstat(fd).st_blocks * 512 < MIB


def test_a_slot_of_the_same_vm_finds_what_it_left(service: Service, fd: int) -> None:
    with Vm(service, engine="software") as vm:
        bind(vm, fd)
        vm.launch_update(GPA, READER.ljust(PAGE, b"\0") + bytes([SECRET]) * PAGE)
        vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=0)
        bind(vm, fd)
        with vm.create_vcpu() as vcpu:
            vcpu.set_regs(rip=GPA)
            assert vcpu.run() == exits.PortOut(0x42, 1, SECRET)


def test_what_the_owner_allocated_stays(service: Service, fd: int) -> None:
    os.posix_fallocate(fd, 0, MIB)
    with Vm(service, engine="software") as vm:
        bind(vm, fd)
    assert os.fstat(fd).st_blocks * 512 == MIB


@pytest.mark.requires("fuse", "root")
@pytest.mark.parametrize("spawner_too", [False, True])
def test_a_stopped_engine_keeps_its_file_until_it_is_dead(spawner_too: bool) -> None:
    """The engine does not answer a punch, and is killed.

    If it could continue first, its guest would write to the next VM's memory.
    """
    with (
        Service.start(Options(deadline=0.3)) as service,
        Vm(service) as first,
        Vm(service) as second,
    ):
        fd = service.memfd_restricted()
        first.set_user_memory_region(
            slot=0, guest_phys_addr=GPA, memory_size=PAGE, restricted_fd=fd
        )
        spawner = family(service)[0].pid
        engine = process(int(str(first.statistics()["pid"])))
        assert engine is not None
        if spawner_too:
            stop(spawner)
        stop(engine.pid)
        os.posix_fallocate(fd, 0, PAGE)
        memory.fallocate(fd, memory.PUNCH, 0, PAGE)
        # The kernel kills what is stopped; nobody else has to run for that.
        wait_gone([engine])
        wait_until(lambda: takes(second, fd), "the file to be free")
        if spawner_too:
            os.kill(spawner, signal.SIGCONT)
        os.close(fd)


def takes(vm: Vm, fd: int) -> bool:
    region = partial(
        vm.set_user_memory_region, slot=0, guest_phys_addr=GPA, memory_size=PAGE, restricted_fd=fd
    )
    came = outcome(region)
    assert came in (None, Errno(EINVAL))
    return came is None


@pytest.mark.requires("fuse", "root")
def test_a_file_is_not_free_before_the_process_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the service's own side.

    A consumer that broke the protocol is unbound once its pidfd says that it has ended.
    """
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    failures: list[str] = []
    consumer = ConsumerProcess("kvm", 1, 1.0, lambda _, reason: failures.append(reason))
    consumer.process = OwnedFd(os.pidfd_open(child))
    monkeypatch.setattr(consumer, "kill", lambda: None)
    unbound: list[int] = []
    monkeypatch.setattr(consumer, "unbind", unbound.append)
    consumer.bindings[7] = cast(Binding, None)
    closing = threading.Thread(target=consumer.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    assert unbound == []
    os.kill(child, signal.SIGKILL)
    closing.join(5)
    assert unbound == [7]
    os.waitpid(child, 0)
    for sock in consumer.give_sockets():
        sock.close()


class Looks:
    """A condition that nobody waits for: what would be waited for is told."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait_for(self, predicate: Callable[[], bool], _: float) -> bool:
        self.found.append(predicate())
        return self.found[-1]


@pytest.mark.parametrize(
    ("holder", "notifiers", "waits"), [(None, 0, False), (1, 9, False), (2, 0, False), (2, 9, True)]
)
def test_who_binds_a_file_waits_for_another_holder_alone(
    holder: int | None, notifiers: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumers, looks = (
        Consumers(cast("Tokens", None), Options(), cast("Signer", None), Troubles()),
        Looks(),
    )
    monkeypatch.setattr(consumers, "_idle", looks)
    file = SimpleNamespace(holder=holder, notifier_count=notifiers)
    consumers._let_end(
        cast(ConsumerProcess, SimpleNamespace(number=1)), cast("RestrictedFile", file)
    )
    assert looks.found[0] is not waits
    assert len(looks.found) == (4 if waits else 1)
