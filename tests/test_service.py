"""The service: when it starts, who it serves, when it ends, and what it holds."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from errno import EACCES, ECONNRESET, ENOTCONN, EPERM, ETIMEDOUT
from pathlib import Path

import pytest

from owned_service import in_fork, service, works
from processes import descriptors, exists, family, process, room_for, wait_gone
from restrictedmem.protocol import guest_abi
from restrictedmem.service import exec_service
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vm
from users import ORDINARY, as_user
from waiting import wait_until

__all__ = ["service"]

pytestmark = pytest.mark.requires("fuse")


def error_of(operation: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        operation()
    return caught.value.errno


# The service's start and its users.


def test_it_starts_at_the_first_use_and_serves_all_later_ones() -> None:
    script = (
        "import os, restrictedmem; from restrictedmem.service import client\n"
        "assert client._default is None\n"
        "try: restrictedmem.memfd_restricted(1)\n"
        "except OSError as error: assert error.errno == 22\n"
        "assert client._default is None\n"
        "fds = [restrictedmem.memfd_restricted() for _ in range(3)]\n"
        "assert all(not os.get_inheritable(fd) for fd in fds)\n"
        "print(client.default_service().info['pid'], "
        "len(client.default_service().status()['descriptors']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    pid, count = map(int, done.stdout.split())
    assert count == 3
    assert done.stderr == ""
    wait_until(lambda: process(pid) is None, "the end of the service after its owner's")


def test_each_owner_has_its_own(service: Service) -> None:
    with Service.start() as other:
        assert other.info["pid"] != service.info["pid"]
        fd = other.memfd_restricted()
        assert service.status()["descriptors"] == []
        assert [file["size"] for file in other.status()["descriptors"]] == [0]
        os.close(fd)


def test_an_owner_may_have_thousands_of_descriptors_open() -> None:
    # select(2) takes no number from 1,024 on.
    with room_for(2048), ExitStack() as held:
        for _ in range(1100):
            held.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        with Service.start() as service:
            fd = service.memfd_restricted()
            assert fd > 1024
            assert works(fd)
            os.close(fd)


def test_an_owner_may_ignore_its_children() -> None:
    # SIG_IGN is inherited by exec, and takes away what wait(2) would return.
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        service = Service.start()
    finally:
        signal.signal(signal.SIGCHLD, before)
    with Vm(service) as vm:
        assert vm.statistics()
        engine = family(service)[2]
    wait_gone([engine])
    fd = service.memfd_restricted()
    assert works(fd)
    os.close(fd)
    service.close()


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=repr)
def test_an_owner_may_have_closed_its_standard_descriptors(closed: tuple[int, ...]) -> None:
    def start() -> bool:
        for fd in closed:
            os.close(fd)
        with Service.start() as service:
            return works(service.memfd_restricted())

    assert in_fork(start)() is True


# When it ends.


def test_an_owner_may_have_blocked_signals() -> None:
    def body() -> list[str]:
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGCHLD, signal.SIGTERM})
        with Service.start() as service, Vm(service):
            texts = [Path(f"/proc/{found.pid}/status").read_text() for found in family(service)]
        return [line for text in texts for line in text.splitlines() if line.startswith("SigBlk:")]

    assert in_fork(body)() == ["SigBlk:\t0000000000000000"] * 3


def test_gone_with_the_owners_hold() -> None:
    service = Service.start()
    relatives = family(service)
    assert [found.name for found in relatives] == ["rmem-spawner", "rmem-service"]
    service.close()
    wait_gone(relatives)


def test_a_descriptor_keeps_it() -> None:
    service = Service.start()
    fd, relatives = service.memfd_restricted(), family(service)
    service.close()
    assert works(fd)
    assert all(map(exists, relatives))
    os.close(fd)
    wait_gone(relatives)


def test_a_vm_keeps_it() -> None:
    service = Service.start()
    vm = Vm(service)
    engine = vm.statistics()["pid"]
    relatives = family(service)
    assert [found.name for found in relatives] == ["rmem-spawner", "rmem-service", "rmem-kvm"]
    assert relatives[2].pid == engine
    service.close()
    assert vm.statistics()["pid"] == engine
    assert all(map(exists, relatives))
    vm.close()
    wait_gone(relatives)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_gone_with_a_killed_owner(number: signal.Signals) -> None:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            service = Service.start()
            service.memfd_restricted()
            vm = Vm(service)
            assert vm.statistics()
            theirs.send(str(service.info["pid"]).encode())
            signal.pause()
        finally:
            os._exit(1)
    with ours, theirs:
        relatives = family(int(ours.recv(20)))
    assert len(relatives) == 3
    os.kill(child, number)
    os.waitpid(child, 0)
    wait_gone(relatives)


def test_a_terminals_interrupt_does_not_reach_it(service: Service) -> None:
    spawner = family(service)[0].pid
    assert {os.getpgid(found.pid) for found in family(service)} == {spawner}
    # The session stays the owner's: with it goes the scheduling group, and a call must not wait
    # behind other sessions' work.
    assert {os.getsid(found.pid) for found in family(service)} == {os.getsid(0)}


def test_an_engine_has_a_session_of_its_own(service: Service) -> None:
    with Vm(service) as vm:
        engine = vm.statistics()["pid"]
        assert os.getsid(engine) == engine


# The service's visible traces, and its descriptors.


@pytest.mark.requires("root")
def test_no_mount_point_anywhere(service: Service) -> None:
    fd = service.memfd_restricted()
    for pid in ("self", "1", *(str(found.pid) for found in family(service))):
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            assert "restrictedmem" not in table.read(), pid
    os.close(fd)


_HOLDS = {
    "rmem-spawner": r"/dev/null|(socket|pipe):\[\d+\]|anon_inode:\[(pidfd|eventpoll)\]|pidfd:.*",
    "rmem-service": r"/dev/null|/dev/fuse|anon_inode:\[(eventpoll|pidfd)\]|pidfd:.*|socket:\[\d+\]"
    r"|/memfd:restrictedmem(-sequence)? \(deleted\)",
    "rmem-kvm": r"/dev/null|socket:\[\d+\]|anon_inode:(\[eventpoll\]|.?kvm-.*)|"
    r"/memfd:(restrictedmem|restrictedmem-sequence|shared-window) \(deleted\)",
}


@pytest.mark.requires("root")
@pytest.mark.parametrize("uid", [0, ORDINARY])
def test_it_stays_in_its_owners_namespaces(uid: int) -> None:
    """Only what mounts, and has ended, was in the user namespace of the mount."""
    reader, writer = os.pipe()

    def body() -> None:
        with Service.start() as service, Vm(service):
            os.write(
                writer, f"{os.getpid()} {service.info['pid']} {service.info['way']}\n".encode()
            )
            os.read(hold, 1)

    def own() -> None:
        try:
            as_user(body) if uid else body()
        finally:
            # An owner that fails says nothing, and nobody waits for it.
            os.close(writer)

    hold, release = os.pipe()
    owner = threading.Thread(target=own)
    owner.start()
    with open(reader, encoding="ascii") as said:
        mine, pid, way = said.readline().rstrip().split(" ", 2)
    everybody = {found.name: namespaces(found.pid) for found in family(int(pid))}
    expected = namespaces(int(mine))
    os.write(release, b".")
    owner.join()
    for fd in (hold, release):
        os.close(fd)
    assert everybody.keys() == {"rmem-spawner", "rmem-service", "rmem-kvm"}
    assert everybody == dict.fromkeys(everybody, expected)
    assert way == ("user namespace" if uid else "own mount")


def namespaces(pid: int) -> dict[str, str]:
    # A small kernel may lack some kinds.
    kinds = {"user", "mnt", "pid", "net", "ipc", "uts", "cgroup"} & {*os.listdir("/proc/self/ns")}
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in sorted(kinds)}


@pytest.mark.requires("root")
def test_it_holds_no_file_of_its_own_mount(service: Service) -> None:
    fd = service.memfd_restricted()
    os.ftruncate(fd, 64 * PAGE)
    with Vm(service) as vm:
        vm.set_user_memory_region(
            slot=0, guest_phys_addr=guest_abi.PRIVATE_BASE, memory_size=64 * PAGE, restricted_fd=fd
        )
        assert works(fd)
        held = {found.name: descriptors(found.pid) for found in family(service)}
        assert held.keys() == _HOLDS.keys()
        for name, links in held.items():
            assert [link for link in links if not re.fullmatch(_HOLDS[name], link)] == [], name
        assert held["rmem-service"].count("/dev/fuse") == 1
    os.close(fd)


@pytest.mark.requires("root")
def test_descriptors_and_vms_leave_nothing_in_it(service: Service) -> None:
    def use() -> None:
        fd = service.memfd_restricted()
        with Vm(service) as vm:
            vm.set_user_memory_region(
                slot=0, guest_phys_addr=guest_abi.PRIVATE_BASE, memory_size=PAGE, restricted_fd=fd
            )
            engine = family(service)[2]
        os.close(fd)
        wait_gone([engine])
        wait_until(
            lambda: not service.status()["consumers"] and not service.status()["descriptors"],
            "the end of VM and file",
        )

    def held() -> int:
        return len(descriptors(service.info["pid"])) + len(descriptors(family(service)[0].pid))

    # The service may still be closing the connection of the question that was just answered.
    use()
    fewest = min(held() for _ in range(20))
    for _ in range(4):
        use()
        wait_until(lambda: held() <= fewest, "the descriptors of a VM and a file to be closed")


# Errors of the start.


@pytest.mark.requires("root")
def test_without_a_way_to_mount_it_says_what_is_missing() -> None:
    def body() -> tuple[int | None, str]:
        with pytest.raises(OSError) as caught:
            Service.start()
        return caught.value.errno, str(caught.value)

    number, words = as_user(body, fuse=False)
    assert number in (EACCES, EPERM)
    assert "the service cannot start" in words
    assert "/dev/fuse: Permission denied" in words


def test_a_service_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_service, "START_DEADLINE", 0.2)
    monkeypatch.setattr(exec_service, "_START", "import time; time.sleep(60)")
    began = time.monotonic()
    assert error_of(Service.start) == ETIMEDOUT
    assert time.monotonic() - began < 5


def test_a_service_that_dies_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_service, "_START", "raise SystemExit")
    assert error_of(Service.start) == ECONNRESET


def test_connecting_to_nobody() -> None:
    with pytest.raises(FileNotFoundError, match=r"connect: .*/nonexistent"):
        Service.connect("/nonexistent")


def test_calls_on_a_service_that_is_gone_say_so(service: Service) -> None:
    relatives = family(service)
    os.kill(service.info["pid"], signal.SIGKILL)
    wait_gone(relatives)
    calls: list[Callable[[], object]] = [
        service.status,
        lambda: service.spawn("kvm"),
        service.memfd_restricted,
    ]
    assert [error_of(call) for call in calls * 2] == [ENOTCONN] * 6
