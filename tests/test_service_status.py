"""The status of services in ``ps``: all of it is true, and only those concerned see it."""

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from errno import EACCES, ESRCH

import pytest

from outcomes import Errno, outcome
from restrictedmem.abi import memory
from restrictedmem.protocol import guest_abi
from restrictedmem.service import discover
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vm
from users import as_user
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse")


@pytest.fixture
def service() -> Iterator[Service]:
    with Service.start() as service:
        yield service


def test_status_is_truthful(service: Service) -> None:
    first, second = service.memfd_restricted(), service.memfd_restricted()
    os.ftruncate(first, 8 * PAGE)
    os.posix_fallocate(first, 0, 3 * PAGE)
    with Vm(service) as vm:
        vm.set_user_memory_region(
            slot=0,
            guest_phys_addr=guest_abi.PRIVATE_BASE,
            memory_size=8 * PAGE,
            restricted_fd=first,
        )
        memory.fallocate(first, memory.PUNCH, 0, PAGE)
        found = discover.status_of(service.info["pid"])
        engine = vm.statistics()["pid"]
    assert service.info["pid"] in discover.pids()
    inodes = [os.fstat(fd).st_ino for fd in (first, second)]
    assert found["descriptors"] == [
        {"ino": inodes[0], "size": 8 * PAGE, "resident": 2 * PAGE, "notifiers": 1},
        {"ino": inodes[1], "size": 0, "resident": 0, "notifiers": 0},
    ]
    consumer = found["consumers"][0]
    assert (consumer["name"], consumer["number"], consumer["files"], consumer["invalidations"]) == (
        "kvm",
        1,
        [inodes[0]],
        1,
    )
    assert consumer["report"]["pid"] == engine
    assert consumer["report"]["private_bytes"] == 8 * PAGE
    assert (found["pid"], found["owner_pid"], found["owner_uid"], found["uid"]) == (
        service.info["pid"], os.getpid(), os.getuid(), os.getuid(),
    )  # fmt: skip
    assert (found["api"], found["memory_max"], found["last_error"]) == ("v10", None, "")
    os.close(first)
    os.close(second)
    wait_until(lambda: service.status()["descriptors"] == [], "the files' end")


def test_ps_hears_of_the_last_of_many_slots(service: Service) -> None:
    fd, base, count = service.memfd_restricted(), guest_abi.PRIVATE_BASE, 50

    def told() -> int:
        (consumer,) = service.status()["consumers"]
        return int(consumer["report"]["private_bytes"])

    with Vm(service) as vm:
        for number in range(count):
            vm.set_user_memory_region(
                slot=number,
                guest_phys_addr=base + number * PAGE,
                memory_size=PAGE,
                restricted_fd=fd,
            )
        wait_until(lambda: told() == count * PAGE, "the last slot to be told of")
        for number in range(count):
            vm.set_user_memory_region(slot=number, guest_phys_addr=base, memory_size=0)
        wait_until(lambda: told() == 0, "the last deletion to be told of")
    os.close(fd)


def test_status_while_descriptors_come_and_go(service: Service) -> None:
    def come_and_go() -> None:
        for _ in range(10):
            fds = [service.memfd_restricted() for _ in range(40)]
            for fd in fds:
                os.posix_fallocate(fd, 0, PAGE)
            for fd in fds:
                os.close(fd)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    while thread.is_alive():
        assert service.status()["last_error"] == ""
    thread.join()


@pytest.mark.requires("root")
def test_another_user_learns_nothing(service: Service) -> None:
    pid = service.info["pid"]
    assert as_user(lambda: (pid in discover.pids(), outcome(lambda: discover.status_of(pid)))) == (
        True,
        Errno(EACCES),
    )


@pytest.mark.requires("root")
def test_root_can_ask_an_ordinary_users_service() -> None:
    ours, theirs = socket.socketpair()

    def owner() -> None:
        service = Service.start()
        theirs.send(str(service.info["pid"]).encode())
        theirs.recv(1)

    thread = threading.Thread(target=lambda: as_user(owner))
    thread.start()
    with ours:
        pid = int(ours.recv(20))
        found = discover.status_of(pid)
        ours.send(b".")
    thread.join()
    theirs.close()
    assert (found["pid"], found["owner_uid"], found["uid"]) == (pid, 65534, 65534)


def test_a_borrowed_name_is_noticed() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as squatter:
        # No process has such a number, and no other run this one.
        number = (1 << 22) + secrets.randbelow(1 << 30)
        squatter.bind(f"\0restrictedmem/{number}/0123456789abcdef")
        squatter.listen()
        assert number in discover.pids()
        assert outcome(lambda: discover.status_of(number)) == Errno(ESRCH)
