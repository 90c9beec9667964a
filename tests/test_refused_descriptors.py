"""Sockets that receive no descriptors refuse them to the sender (SO_PASSRIGHTS, Linux 6.16)."""

import os
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack, closing, suppress
from errno import EPERM, EPROTO
from pathlib import Path

import dma
import pytest

from lingering import let_linger
from outcomes import Errno, outcome
from processes import Process, descendants, family
from restrictedmem import fd
from restrictedmem.audit.syscalls import pidfd_getfd
from restrictedmem.fd import KERNEL_REFUSES, receive_without_fds, send_with_fds
from restrictedmem.fs import mounter
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Channel
from restrictedmem.vmm.vm import Vm
from waiting import wait_until

DMA = Path(__file__).parent.parent / "clients" / "dma" / "dma.py"
WITH_DMA = Options(consumers=(("dma", str(DMA)),))
on_new_kernels = pytest.mark.skipif(
    not KERNEL_REFUSES, reason="the kernel has no SO_PASSRIGHTS (Linux 6.16)"
)


def taking(pid: int) -> int:
    """Count the sockets of a process to which descriptors can be sent."""
    found = 0
    for number in map(int, os.listdir(f"/proc/{pid}/fd")):
        # Descriptors that it closes meanwhile do not count.
        with suppress(OSError), pidfd_getfd(pid, number) as copy:
            if stat.S_ISSOCK(os.fstat(copy.fileno()).st_mode):
                with socket.socket(fileno=copy.detach()) as sock:
                    found += sock.family == socket.AF_UNIX and not fd.refuses_fds(sock)
    return found


def everybody(service: Service) -> list[Process]:
    spawner = family(service)[0]
    return [spawner, *descendants([spawner.pid])]


@on_new_kernels
@pytest.mark.requires("fuse", "root")
def test_no_socket_takes_descriptors_but_those_that_are_for_them() -> None:
    with ExitStack() as stack:
        service = stack.enter_context(Service.start(WITH_DMA))
        stack.enter_context(stack.enter_context(Vm(service, engine="software")).create_vcpu())
        stack.enter_context(closing(Channel(service.spawn("dma"), "the device"))).call(dma.STATUS)
        wait_until(
            lambda: "rmem-checker" in [one.name for one in everybody(service)],
            "the engine's checker",
        )
        found = {one.name: taking(one.pid) for one in everybody(service)}
    # The spawner: FORK. The service: pidfds of what was forked. Consumers: what they bind. An
    # engine besides: its checker's answers, and the VM's socket, from which the checker takes what
    # comes.
    assert found == {
        "rmem-spawner": 1,
        "rmem-service": 1,
        "rmem-dma": 1,
        "rmem-kvm": 3,
        "rmem-checker": 1,
    }


@on_new_kernels
@pytest.mark.requires("fuse", "root")
def test_no_socket_of_serve_takes_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    serve = subprocess.Popen(
        [sys.executable, "-m", "restrictedmem", "serve", "--socket", path],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert serve.stderr is not None
        assert serve.stderr.readline() == f"listening on {path}\n"
        with Service.connect(str(path)):
            # Both ends of a connection with itself, to which signals are written.
            assert taking(serve.pid) == 2
    finally:
        serve.kill()
        serve.communicate()


@on_new_kernels
@pytest.mark.requires("fuse")
def test_an_owner_sends_no_descriptor_to_a_consumer() -> None:
    with (
        Service.start(WITH_DMA) as service,
        closing(Channel(service.spawn("dma"), "the device")) as device,
    ):
        # Before the program does anything, too.
        assert outcome(lambda: device.call(dma.STATUS, fds=[device.fileno()])) == Errno(EPERM)
        device.call(dma.STATUS)
        assert outcome(lambda: device.call(dma.STATUS, fds=[device.fileno()])) == Errno(EPERM)
        device.call(dma.STATUS)


def test_a_socket_that_refuses_nothing_has_them_left_in_its_queue() -> None:
    """This holds whatever the kernel can do for other sockets."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, let_linger(theirs) as taken:
        assert taken
        for _ in range(2):
            assert outcome(lambda: receive_without_fds(ours, 100)) == Errno(EPROTO)
        fd.refuse_fds(ours)
        assert outcome(lambda: send_with_fds(theirs, b"", [theirs.fileno()])) == (
            Errno(EPERM) if KERNEL_REFUSES else None
        )


@on_new_kernels
def test_who_makes_a_namespace_for_a_mount_can_send_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That process is dumpable, so others of its user may copy its end."""
    sent = list[object]()

    def send_one(sock: socket.socket) -> None:
        sock.send(str(outcome(lambda: send_with_fds(sock, b"", [sock.fileno()]))).encode())

    def hear(sock: socket.socket, _: str, most: int) -> list[object]:
        sent.append((sock.recv(100), most))
        return []

    monkeypatch.setattr(mounter, "_make_namespace", send_one)
    monkeypatch.setattr(mounter, "_hear", hear)
    with suppress(OSError), mounter._user_namespace():
        pass
    assert sent == [(str(Errno(EPERM)).encode(), 0)]
