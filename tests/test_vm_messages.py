"""Messages to a VM's and a vCPU's socket that are no proper requests.

They do harm to nobody but their sender.
"""

import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from processes import children, descriptors, family, process, queued, stopped, wait_gone
from restrictedmem.abi import kvm, memory
from restrictedmem.kvm.serving import serve_one
from restrictedmem.protocol import vm_wire
from restrictedmem.service.client import Service
from restrictedmem.service.wire import MAX_MESSAGE, Channel, Message
from restrictedmem.vmm.vm import Vm
from vm_sockets import (
    GPA,
    STATISTICS,
    Send,
    checker_of,
    errno_of_reply,
    request,
    service,
    started,
    with_fds,
)
from waiting import wait_until

__all__ = ["service"]

pytestmark = pytest.mark.requires("fuse")

PAGE = 4096
EAGAIN, ENOMEM, EINVAL, EPROTO, EMSGSIZE = 11, 12, 22, 71, 90

SPIN = bytes.fromhex("ebfe")


@pytest.fixture
def vm(service: Service) -> Iterator[Vm]:
    with Vm(service, engine="software") as found:
        found._channel.sock.settimeout(10)
        yield found


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


def test_a_vcpu_is_made_for_who_reads_the_answers(vm: Vm) -> None:
    """Each unread answer has a descriptor in flight.

    The kernel counts these for all engines of a uid together.
    """
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
