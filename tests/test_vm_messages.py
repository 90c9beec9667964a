"""What an owner may send to a VM's and a vCPU's socket beside proper requests, and that it harms nobody but itself."""

import mmap
import os
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from mute_server import mute_file
from processes import children, descriptors, family, process, queued, stopped, wait_gone
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
from restrictedmem.service.wire import MAX_MESSAGE, Call, Channel, Message
from restrictedmem.vmm.vm import Vcpu, Vm
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse")

GPA = 0x4000_0000
PAGE = 4096
EPERM, EAGAIN, ENOMEM, EINVAL, ETIMEDOUT, EPROTO, EMSGSIZE = 1, 11, 12, 22, 110, 71, 90
OUT_LOOP = bytes.fromhex("e642 ebfc")  # out %al, $0x42; jmp back
SPIN = bytes.fromhex("ebfe")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start() as found:
        yield found


@pytest.fixture
def vm(service: Service) -> Iterator[Vm]:
    with Vm(service, engine="software") as found:
        found._channel.sock.settimeout(10)
        yield found


def started(service: Service, vm: Vm, code: bytes) -> Vcpu:
    fd = service.memfd_restricted()
    os.ftruncate(fd, PAGE)
    vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=PAGE, restricted_fd=fd)
    os.close(fd)
    vm.set_memory_attributes(GPA, PAGE, private=True)
    vm.launch_update(GPA, code.ljust(PAGE, b"\0"))
    vcpu = vm.create_vcpu()
    vcpu._channel.sock.settimeout(10)
    vcpu.set_regs(rip=GPA)
    return vcpu


def request(number: int, body: bytes = b"") -> bytes:
    return struct.pack("=II", number, 0) + body


Send = Callable[[socket.socket], object]
STATISTICS = request(vm_wire.STATISTICS.number)


def with_fds(count: int, data: bytes = STATISTICS) -> Send:
    return lambda sock: socket.send_fds(sock, [data], [0] * count)


#: By name: how it is sent, and the errno. An empty message is the end of the stream.
MALFORMED: dict[str, tuple[Send, int | None]] = {
    "nothing": (lambda sock: sock.send(b""), None),
    "one byte": (lambda sock: sock.send(b"1"), EPROTO),
    "seven bytes": (lambda sock: sock.send(b"1234567"), EPROTO),
    "too long": (lambda sock: sock.send(bytes(MAX_MESSAGE + 1)), EMSGSIZE),
    "two descriptors": (with_fds(2), EMSGSIZE),
    "five descriptors": (with_fds(5), EMSGSIZE),
    "253 descriptors": (with_fds(253), EMSGSIZE),
}


def errno_of_reply(sock: socket.socket) -> int:
    (errno,) = struct.unpack_from("=I", sock.recv(MAX_MESSAGE))
    return int(errno)


def checker_of(vm: Vm) -> int:
    (found,) = children(int(vm.statistics()["pid"]))
    wait_until(
        lambda: (now := process(found.pid)) is not None and now.name == "rmem-checker",
        "the checker to say its name",
    )
    return found.pid


@pytest.mark.parametrize("malformed", [*MALFORMED, "seven bytes and a descriptor"])
@pytest.mark.parametrize("target", ["vm", "vcpu"])
def test_a_malformed_message_is_answered_and_ends_the_connection(
    service: Service, vm: Vm, target: str, malformed: str
) -> None:
    pipe = os.pipe()
    send, errno = MALFORMED.get(
        malformed, (lambda sock: socket.send_fds(sock, [b"1234567"], [pipe[1]]), EPROTO)
    )
    with Vm(service, engine="software") as bad, bad.create_vcpu() as vcpu:
        channel, other = (
            (bad._channel, vcpu._channel) if target == "vm" else (vcpu._channel, bad._channel)
        )
        channel.sock.settimeout(10)
        engine = process(int(bad.statistics()["pid"]))
        assert engine is not None
        try:
            send(channel.sock)
        except PermissionError:
            # The kernel refuses descriptors on a vCPU's socket (Linux 6.16).
            assert target == "vcpu"
            assert "descriptor" in malformed
        else:
            if errno is not None:
                assert errno_of_reply(channel.sock) == (
                    EPROTO if target == "vcpu" and "descriptor" in malformed else errno
                )
            assert channel.sock.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                channel.sock.send(STATISTICS)
        # The other socket goes on, and so does every other VM.
        other.sock.settimeout(10)
        other.sock.send(request(0xDEAD))
        assert errno_of_reply(other.sock) == EPROTO
        assert vm.statistics()["pid"] != engine.pid
    for end in pipe:
        os.close(end)
    wait_gone([engine])


@pytest.mark.requires("root")
def test_no_descriptor_of_any_message_stays(service: Service) -> None:
    with Vm(service, engine="software") as vm:
        engine = int(vm.statistics()["pid"])
        both = (engine, checker_of(vm))
        before = [len(descriptors(pid)) for pid in both]
        with tempfile.TemporaryFile() as file, ExitStack() as held:
            ends = os.pipe()
            for end in ends:
                held.callback(os.close, end)
            for fd in (file.fileno(), vm._channel.fileno(), *ends):
                with suppress(OSError):
                    vm._channel.call(vm_wire.TRACE, fds=[fd])
                with suppress(OSError):
                    vm._channel.call(vm_wire.STATISTICS, fds=[fd])
        wait_until(
            lambda: [len(descriptors(pid)) for pid in both] == before, "descriptors to be closed"
        )


def test_messages_sent_at_once_are_answered_in_turn(vm: Vm) -> None:
    sock, end = vm._channel.sock, request(vm_wire.TRACE.number, vm_wire.TRACE_REQUEST.pack(0))
    with memory.memfd_create("memfd") as memfd:
        for number in range(3):
            socket.send_fds(sock, [end], [memfd.fileno()])
            sock.send(request(vm_wire.CHECK_EXTENSION.number, vm_wire.CAP.pack(number)))
            socket.send_fds(sock, [end], [0])
    for _ in range(3):
        assert [len(sock.recv(100)), len(sock.recv(100))] == [8, 16]
        assert errno_of_reply(sock) == EINVAL


@pytest.mark.requires("root")
def test_a_message_while_the_vcpu_runs_ends_the_connection(service: Service, vm: Vm) -> None:
    with started(service, vm, SPIN) as vcpu:
        sock = vcpu._channel.sock
        engine = int(vm.statistics()["pid"])
        before = len(descriptors(engine))
        sock.send(request(vm_wire.RUN.number, vm_wire.COMPLETION.pack(0)))
        sock.send(request(vm_wire.GET_REGS.number))
        assert errno_of_reply(sock) == EPROTO
        assert sock.recv(1) == b""
        # The VM goes on, and the vCPU is no more: it has let go of its socket, unread messages and
        # all.
        wait_until(lambda: len(descriptors(engine)) == before - 1, "the vCPU's socket to be closed")
        assert vm.statistics()["exits"] == {"Interrupted": 1}


def test_a_vcpu_whose_owner_hangs_up_stops(service: Service, vm: Vm) -> None:
    with started(service, vm, SPIN) as vcpu:
        vcpu._channel.sock.send(request(vm_wire.RUN.number, vm_wire.COMPLETION.pack(0)))
        wait_until(
            lambda: vm.statistics()["private_bytes"] and vm.statistics()["tlb_fills"],
            "the guest to run",
        )
    wait_until(lambda: vm.statistics()["exits"] == {"Interrupted": 1}, "the guest to stop")


def test_an_engine_ends_whose_socket_holds_its_own_peer() -> None:
    def owner() -> None:
        # An owner of its own, which is killed and closes nothing.
        service = Service.start()
        vm = Vm(service, engine="software")
        sock = started(service, vm, SPIN)._channel.sock
        sock.send(request(vm_wire.RUN.number, vm_wire.COMPLETION.pack(0)))
        with suppress(PermissionError):
            socket.send_fds(sock, [request(vm_wire.GET_REGS.number)], [sock.fileno()])
        for end in (sock, vm._channel.sock):
            socket.send_fds(vm._channel.sock, [STATISTICS], [end.fileno()])
            assert errno_of_reply(vm._channel.sock) == EINVAL
        for end in (sock, vm._channel.sock):
            socket.send_fds(vm._channel.sock, [STATISTICS], [end.fileno()])
        os.write(result[1], str(service.info["pid"]).encode())
        os.read(os.pipe()[0], 1)

    result = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            owner()
        finally:
            os._exit(0)
    try:
        found = family(int(os.read(result[0], 100)))
        every = [*found, *(child for one in found for child in children(one.pid))]
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        for end in result:
            os.close(end)
    assert {"rmem-kvm", "rmem-checker"} <= {one.name for one in every}, every
    wait_gone(every)


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
        # What came behind it is answered in its turn.
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
    """What it holds of the VM's would stay open when the engine is gone."""
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


def test_what_an_owner_that_has_gone_asked_for_is_not_done(service: Service) -> None:
    vm = Vm(service, engine="software")
    engine = process(int(vm.statistics()["pid"]))
    assert engine is not None
    with vm.start_trace() as reader:
        with stopped(engine.pid):
            asked = bytes(
                kvm.kvm_memory_attributes(
                    address=GPA, size=PAGE, attributes=kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
                )
            )
            for _ in range(20):
                vm._channel.sock.send(request(vm_wire.SET_MEMORY_ATTRIBUTES.number, asked))
            vm.close()
        reader.settimeout(20)
        told = b"".join(iter(lambda: reader.recv(1 << 16), b""))
    assert b'"event":"attributes"' not in told
    wait_gone([engine])


@pytest.mark.parametrize("last", [b"", b"x"], ids=["the owner ended", "a malformed message"])
def test_an_engine_ends_whose_vm_holds_the_owners_end_of_a_vcpu(
    service: Service, last: bytes
) -> None:
    """Nobody reads the VM's socket any more then, and the vCPU's would never hang up."""
    vm = Vm(service, engine="software")
    vcpu = started(service, vm, SPIN)
    engine = process(int(vm.statistics()["pid"]))
    assert engine is not None
    vcpu._channel.sock.send(request(vm_wire.RUN.number, vm_wire.COMPLETION.pack(0)))
    with stopped(engine.pid):
        if last:
            vm._channel.sock.send(last)
        for _ in range(3):
            vm._channel.sock.send(request(vm_wire.STATISTICS.number))
            socket.send_fds(
                vm._channel.sock, [request(vm_wire.STATISTICS.number)], [vcpu._channel.fileno()]
            )
        vcpu.close()
        vm.close()
    wait_gone([engine])


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
    """Have a child write to a memfd from a page that does not come, so that it holds the lock of its inode meanwhile."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            # What others wait for the end of.
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


def test_a_vcpu_is_made_for_who_reads_the_answers(vm: Vm) -> None:
    """Each that is left has a descriptor in flight, and they are counted for all engines of a uid together."""
    sock, ask = vm._channel.sock, struct.pack("=II", vm_wire.CREATE_VCPU.number, 0)
    sock.send(ask)
    wait_until(lambda: queued(sock), "the first answer")
    first = queued(sock)
    sock.send(ask)
    wait_until(lambda: queued(sock) > first, "the second answer")
    assert [errno_of_reply(sock) for _ in range(2)] == [0, EAGAIN]
    sock.send(ask)
    assert errno_of_reply(sock) == 0


def test_a_message_that_memory_was_short_for_is_answered_and_ends_its_socket() -> None:
    def no_memory() -> Message | None:
        raise MemoryError

    dispatched: list[Message] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.settimeout(10)
        assert not serve_one(Channel(ours, "owner"), no_memory, dispatched.append)
        assert dispatched == []
        assert theirs.recv(1000)[0] == ENOMEM
