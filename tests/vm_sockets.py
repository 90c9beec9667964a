"""A VM whose sockets a test writes to by hand."""

import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from processes import children, process
from restrictedmem.protocol import vm_wire
from restrictedmem.service.client import Service
from restrictedmem.service.wire import MAX_MESSAGE
from restrictedmem.vmm.vm import Vcpu, Vm
from waiting import wait_until

GPA = 0x4000_0000
PAGE = 4096


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start() as found:
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
