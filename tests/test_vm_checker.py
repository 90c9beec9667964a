"""The checker, which looks at memfds for an engine: a VM goes on whatever becomes of it."""

import mmap
import os
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mute_server import mute_file
from processes import descriptors, family, process, wait_gone
from restrictedmem.abi import kvm, memory
from restrictedmem.abi import userfaultfd as uffd
from restrictedmem.devkvm import address_of
from restrictedmem.fd import OwnedFd, readable
from restrictedmem.kvm import checker
from restrictedmem.kvm import engine_process as kvm_process
from restrictedmem.kvm.half import is_memfd
from restrictedmem.kvm.serving import serve_one
from restrictedmem.protocol import exits, vm_wire
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Call, Channel
from restrictedmem.vmm.vm import Vm
from vm_sockets import GPA, checker_of, errno_of_reply, request, service, started, with_fds

__all__ = ["service"]

pytestmark = pytest.mark.requires("fuse")

PAGE = 4096
EINVAL, ETIMEDOUT = 22, 110
OUT_LOOP = bytes.fromhex("e642 ebfc")  # out %al, $0x42; jmp back


@pytest.mark.requires("root")
def test_the_checker_holds_one_socket_and_ends_with_its_engine(service: Service) -> None:
    with Vm(service, engine="software") as vm:
        pid = checker_of(vm)
        held = descriptors(pid)
        assert sorted(link.partition(":")[0] for link in held) == [os.devnull] * 3 + ["socket"]
        checker = process(pid)
        assert checker is not None
    wait_gone([checker])


def test_a_vm_goes_on_without_its_checker(service: Service) -> None:
    with Vm(service, engine="software") as vm, started(service, vm, OUT_LOOP) as vcpu:
        vm._channel.sock.settimeout(10)
        os.kill(checker_of(vm), 9)
        ends = os.pipe()
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                vm._channel.call(vm_wire.TRACE, fds=[ends[1]])
            assert caught.value.errno == ETIMEDOUT
        assert vcpu.run() == exits.PortOut(0x42, 1, 0)
        vm.set_memory_attributes(GPA, PAGE, private=False)
        for end in ends:
            os.close(end)


def test_a_request_that_the_checker_dies_with_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone from the queue, and its owner waits."""

    def die(*_: object) -> None:
        os._exit(0)

    monkeypatch.setattr(checker, "_answer", die)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        engine = Channel(theirs, "owner")
        intake = checker.start(engine, [ours])
        try:
            with_fds(1)(ours)
            ours.settimeout(10)
            assert serve_one(engine, intake.receive, lambda _: None)
            assert errno_of_reply(ours) == ETIMEDOUT
        finally:
            intake.close()


def test_a_vm_goes_on_without_a_checker_that_is_late(service: Service) -> None:
    with Vm(service, engine="software") as vm:
        vm._channel.sock.settimeout(30)
        os.kill(checker_of(vm), 19)
        ends = os.pipe()
        # The next message is answered in its turn.
        socket.send_fds(vm._channel.sock, [request(vm_wire.TRACE.number)], [ends[1]])
        vm._channel.sock.send(request(vm_wire.CHECK_EXTENSION.number, vm_wire.CAP.pack(0)))
        assert errno_of_reply(vm._channel.sock) == ETIMEDOUT
        assert errno_of_reply(vm._channel.sock) == 0
        for end in ends:
            os.close(end)


@pytest.mark.requires("root")
@pytest.mark.parametrize(
    "call",
    [vm_wire.TRACE, vm_wire.SET_USER_MEMORY_REGION, vm_wire.STATISTICS],
    ids=lambda call: call.name,
)
def test_a_file_that_cannot_be_closed_holds_no_engine(call: Call) -> None:
    region = kvm.kvm_userspace_memory_region_ext(
        slot=1, flags=0, guest_phys_addr=0x1000_0000, memory_size=PAGE, userspace_addr=0
    )
    body = bytes(region) if call is vm_wire.SET_USER_MEMORY_REGION else b""
    # No program can be started while it is open: exec would close it there.
    with Service.start() as own, mute_file() as file:
        vm = Vm(own, engine="software")
        vm._channel.sock.settimeout(30)
        with started(own, vm, OUT_LOOP) as vcpu:
            with pytest.raises(OSError) as caught:
                vm._channel.call(call, body, [file])
            assert caught.value.errno == EINVAL
            # Its checker is held from now on, and nobody else is.
            with pytest.raises(OSError) as caught:
                vm._channel.call(call, body, [file])
            assert caught.value.errno == ETIMEDOUT
            assert vcpu.run() == exits.PortOut(0x42, 1, 0)
        with Vm(own, engine="software") as other, memory.memfd_create("half") as memfd:
            os.ftruncate(memfd.fileno(), PAGE)
            other.set_user_memory_region(
                slot=0, guest_phys_addr=GPA, memory_size=PAGE, shared_fd=memfd.fileno()
            )
        found = family(own)
        vm.close()
        wait_gone([one for one in found if one.name == "rmem-kvm"])
    wait_gone(found)


@pytest.mark.requires("root")
@pytest.mark.parametrize("asked", [1, 2])
def test_a_checker_that_is_held_keeps_no_owner_waiting(asked: int) -> None:
    """The checker's descriptors of the VM would stay open after the engine has ended."""
    with Service.start() as own, mute_file() as file, Vm(own, engine="software") as vm:
        vm._channel.sock.settimeout(30)
        engine = int(vm.statistics()["pid"])
        for errno in (EINVAL, ETIMEDOUT)[:asked]:
            with pytest.raises(OSError) as caught:
                vm._channel.call(vm_wire.TRACE, fds=[file])
            assert caught.value.errno == errno
        os.kill(engine, 9)
        assert vm._channel.sock.recv(1) == b""


def test_memfds_are_told_without_their_file_systems(tmp_path: Path) -> None:
    with ExitStack() as held:
        reader, writer = (held.enter_context(OwnedFd(end)).fileno() for end in os.pipe())
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        opened = held.enter_context(OwnedFd(os.open(fifo, os.O_RDWR))).fileno()
        ours, theirs = (held.enter_context(end).fileno() for end in socket.socketpair())
        file = held.enter_context(
            OwnedFd(os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR))
        ).fileno()
        path = held.enter_context(OwnedFd(os.open(tmp_path, os.O_PATH))).fileno()
        assert is_memfd(held.enter_context(memory.memfd_create("m")).fileno())
        assert not any(map(is_memfd, (reader, writer, opened, ours, theirs, path)))
        # A plain file of tmpfs is as good as a memfd; one of another file system is not.
        assert is_memfd(file) is _on_tmpfs(tmp_path)


def test_a_question_to_the_checker_that_was_given_up_is_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours = Channel(sock, "owner")
    with theirs, memory.memfd_create("m", os.MFD_ALLOW_SEALING) as memfd:
        intake = checker.start(ours, ())
        socket.send_fds(theirs, [request(1)], [memfd.fileno()])
        message = intake.receive()
        assert message is not None
        with monkeypatch.context() as patch:
            patch.setattr(checker, "receive_with_fds", no_memory)
            with pytest.raises(MemoryError):
                intake.forbid_shrinking(message.fds[0].fileno())
        socket.send_fds(theirs, [request(2)], [memfd.fileno()])
        with pytest.raises(OSError) as caught:
            intake.receive()
        assert caught.value.errno == ETIMEDOUT
        message.fds[0].close()
        intake.close()
        ours.close()


@contextmanager
def being_written(memfd: int) -> Generator[None]:
    """Let a child write to a memfd from a page that never comes; so it holds the inode's lock."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            # Other processes wait until these are closed.
            kept = sorted((memfd, theirs.fileno()))
            os.closerange(3, kept[0])
            os.closerange(kept[0] + 1, kept[1])
            os.closerange(kept[1] + 1, 1 << 16)
            page = mmap.mmap(-1, PAGE)
            # poll(2) tells only of one that does not block (userfaultfd_poll).
            watch = uffd.userfaultfd(os.O_NONBLOCK)
            uffd.UFFDIO_API(watch, uffd.uffdio_api(api=uffd.UFFD_API, features=0))
            uffd.UFFDIO_REGISTER(
                watch,
                uffd.uffdio_register(
                    start=address_of(page), len=PAGE, mode=uffd.UFFDIO_REGISTER_MODE_MISSING
                ),
            )
            threading.Thread(target=os.write, args=(memfd, page), daemon=True).start()
            assert readable([watch], 30), "the write takes its page"
            theirs.send(b"w")
            theirs.recv(1)
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        try:
            assert ours.recv(1) == b"w"
            yield
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.requires("root")
def test_a_memfd_that_cannot_be_sealed_holds_no_engine(service: Service) -> None:
    vm = Vm(service, engine="software")
    engine = process(int(vm.statistics()["pid"]))
    assert engine is not None
    vm._channel.sock.settimeout(30)
    with (
        memory.memfd_create("half", os.MFD_ALLOW_SEALING) as memfd,
        started(service, vm, OUT_LOOP) as vcpu,
    ):
        os.ftruncate(memfd.fileno(), PAGE)
        with being_written(memfd.fileno()):
            for _ in range(2):
                with pytest.raises(OSError) as caught:
                    vm.set_user_memory_region(
                        slot=5,
                        guest_phys_addr=0x1000_0000,
                        memory_size=PAGE,
                        shared_fd=memfd.fileno(),
                    )
                assert caught.value.errno == ETIMEDOUT
            assert vcpu.run() == exits.PortOut(0x42, 1, 0)
            vm.close()
            vcpu.close()
            wait_gone([engine])


def _on_tmpfs(path: Path) -> bool:
    mounts = [
        line.split()
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    ]
    inside = [fields for fields in mounts if path.is_relative_to(fields[4])]
    return max(inside, key=lambda fields: len(fields[4]))[-3] == "tmpfs"


def test_a_checker_that_cannot_be_forked_is_the_vms_errno() -> None:
    owner, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            owner.close()

            def refuse() -> int:
                raise BlockingIOError(11, "Resource temporarily unavailable")

            os.fork = refuse
            ends = socket.socketpair(), socket.socketpair()
            kvm_process.serve(
                theirs,
                ends[0][0],
                ends[1][0],
                Options(),
                vm_wire.Creation("software", 0, "").dump(),
            )
        finally:
            os._exit(9)
    theirs.close()
    owner.settimeout(10)
    owner.send(request(vm_wire.CREATE_VM.number))
    assert errno_of_reply(owner) == 11
    assert owner.recv(1) == b""
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 11
    owner.close()
