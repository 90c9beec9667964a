"""Attacks on others' service.

One owner must neither end, nor block, nor slow down another's.
"""

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from errno import (
    E2BIG,
    EACCES,
    EAGAIN,
    EINVAL,
    EMFILE,
    EMSGSIZE,
    ENOMEM,
    ENOSYS,
    EOPNOTSUPP,
    EPROTO,
    ETIMEDOUT,
)
from functools import partial
from pathlib import Path
from typing import Final

from field import SIZE, Attack, Field, knock, started, with_private_memory
from outcomes import Errno, outcome
from processes import family, process, stop, wait_gone
from restrictedmem.abi import memory, userfaultfd
from restrictedmem.audit.attacker import parent_of
from restrictedmem.fd import send_with_fds
from restrictedmem.protocol import vm_wire as kvm_wire
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vm
from users import forbid
from waiting import PATIENCE, wait_until

#: jmp to itself
_SPIN: Final = bytes.fromhex("ebfe")
#: Seconds that a consumer may take in attacks that stop processes for longer.
_DEADLINE: Final = 0.4


def request(number: int, body: bytes = b"") -> bytes:
    return number.to_bytes(4, "little") + bytes(4) + body


def long_spawn(field: Field) -> Iterator[None]:
    service, _ = field.start()
    yield
    for size in (wire.MAX_BODY, wire.MAX_BODY - 7):
        assert outcome(partial(service.spawn, "kvm", "x" * (size - 4))) == Errno(E2BIG)
    # One that the engine refuses.
    with closing(service.spawn("kvm", "x" * (wire.MAX_BODY - 12))) as sock:
        assert outcome(lambda: wire.Channel(sock, "engine").call(kvm_wire.CREATE_VM)) == Errno(
            EINVAL
        )


def limits(field: Field) -> Iterator[None]:
    service, party = field.start()
    yield
    for victim in family(service)[:2]:
        for kind, values in ((resource.RLIMIT_NOFILE, range(30)), (resource.RLIMIT_NPROC, (1,))):
            before = resource.prlimit(victim.pid, kind)
            for value in values:
                resource.prlimit(victim.pid, kind, (value, before[1]))
                came = outcome(lambda: Vm(service).close())
                assert came in (None, Errno(EMFILE), Errno(EAGAIN)), (victim.name, value, came)
            resource.prlimit(victim.pid, kind, before)
            party.goes_on()


#: Message, and errno; what ends the connection comes before what does not.
_MALFORMED: Final = {
    "one byte": (b"x", EPROTO),
    "half a head": (bytes(7), EPROTO),
    "too long": (bytes(wire.MAX_MESSAGE + 1), EMSGSIZE),
    "number 0": (request(0), EPROTO),
    "another's call": (request(wire.BIND.number, bytes(16)), EPROTO),
    "largest number": (request(0xFFFF_FFFF), EPROTO),
}


def malformed_messages(field: Field) -> Iterator[None]:
    service, party = field.start()
    yield
    for name, (message, errno) in _MALFORMED.items():
        ends = len(message) < 8 or errno == EMSGSIZE
        with ExitStack() as stack:
            vm = stack.enter_context(Vm(service))
            vcpu = stack.enter_context(vm.create_vcpu())
            inside, outside = service._connect(), knock(service)
            stack.callback(inside.close)
            stack.callback(outside.close)
            for channel in (inside, outside, vcpu._channel, vm._channel):
                channel.sock.settimeout(10)
                channel.sock.send(message)
                said = int.from_bytes(channel.sock.recv(wire.MAX_MESSAGE)[:4], "little")
                assert said == (EACCES if channel is outside and not ends else errno), name
                if ends:
                    assert channel.sock.recv(1) == b"", name
        party.goes_on()


def _foreign_to_service(field: Field) -> Iterator[None]:
    mute = field.mute()
    service, party = field.start()
    yield
    file = mute.open()
    for connect in (service._connect, partial(knock, service)):
        for count in (1, 5, 200):
            with closing(connect()) as channel, suppress(PermissionError):
                # The kernel refuses it to the sender (Linux 6.16), or the service does.
                send_with_fds(channel.sock, request(wire.STATUS.number), [file] * count)
                assert int.from_bytes(channel.sock.recv(8)[:4], "little") == EPROTO
    party.goes_on()


def _foreign_to_vm(field: Field) -> Iterator[None]:
    mute = field.mute()
    service, party = field.start()
    vm = Vm(service)
    engine = process(vm.statistics()["pid"])
    assert engine is not None
    yield
    file = mute.open()
    vm._channel.sock.settimeout(30)
    for errno in (EINVAL, ETIMEDOUT):
        assert outcome(lambda: vm._channel.call(kvm_wire.TRACE, fds=[file])) == Errno(errno)
    assert vm.statistics()
    party.goes_on()
    vm.close()
    # While the file's server lives.
    wait_gone([engine])


def _foreign_to_vcpu(field: Field) -> Iterator[None]:
    mute = field.mute()
    service, party = field.start()
    vm = Vm(service)
    os.close(with_private_memory(service, vm))
    vcpu = started(vm, _SPIN)
    engine = process(vm.statistics()["pid"])
    assert engine is not None
    yield
    file = mute.open()
    vcpu._channel.sock.send(request(kvm_wire.RUN.number, kvm_wire.COMPLETION.pack(0)))
    with suppress(PermissionError):
        send_with_fds(vcpu._channel.sock, request(kvm_wire.RUN.number), [file])
    party.goes_on()
    vcpu.close()
    vm.close()
    wait_gone([engine])


def own_peer_in_a_vcpu_socket(field: Field) -> Iterator[None]:
    """The owner is killed: nothing but its end tells the engine."""
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:
        try:
            _hold_own_peer(writer)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, encoding="ascii") as pipe:
        everybody = family(int(pipe.readline()))
        yield
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        wait_gone(everybody)


def _hold_own_peer(ready: int) -> None:
    with Service.start() as service, Vm(service) as vm:
        os.close(with_private_memory(service, vm))
        sock = started(vm, _SPIN)._channel.sock
        sock.send(request(kvm_wire.RUN.number, kvm_wire.COMPLETION.pack(0)))
        # A refusal is as good.
        for end in (vm._channel.sock, sock):
            for through in (sock, vm._channel.sock):
                with suppress(PermissionError):
                    send_with_fds(through, request(kvm_wire.STATISTICS.number), [end.fileno()])
        os.write(ready, f"{service.info['pid']}\n".encode())
        signal.pause()


def refused_slots(field: Field) -> Iterator[None]:
    service, _ = field.start()
    yield
    fd = service.memfd_restricted()
    os.ftruncate(fd, SIZE)
    with Vm(service) as vm:
        region = partial(
            vm.set_user_memory_region, slot=0, guest_phys_addr=0, memory_size=PAGE, restricted_fd=fd
        )
        for _ in range(64):
            assert outcome(lambda: region(restricted_offset=1)) == Errno(EINVAL)
        region()
    os.close(fd)


def no_memory_for_a_vcpu(field: Field) -> Iterator[None]:
    service, _ = field.start()
    yield
    with Vm(service) as vm:
        engine: int = vm.statistics()["pid"]
        pages = int(Path(f"/proc/{engine}/statm").read_text(encoding="ascii").split()[0])
        before = resource.prlimit(engine, resource.RLIMIT_AS)
        resource.prlimit(engine, resource.RLIMIT_AS, (pages * PAGE + (32 << 20), before[1]))
        for _ in range(3):
            assert outcome(vm.create_vcpu) == Errno(ENOMEM)
        resource.prlimit(engine, resource.RLIMIT_AS, before)
        os.close(with_private_memory(service, vm))
        with started(vm, bytes.fromhex("e642")) as vcpu:
            assert vcpu.run()


def a_thousand_slots(field: Field) -> Iterator[None]:
    service, party = field.start()
    yield
    with Vm(service) as vm, memory.memfd_create("window") as window:
        os.ftruncate(window.fileno(), PAGE)
        region = partial(vm.set_user_memory_region, shared_fd=window.fileno())
        for number in range(1000):
            region(slot=number, guest_phys_addr=0x1_0000_0000 + 2 * number * PAGE, memory_size=PAGE)
            if number % 250 == 0:
                party.goes_on()
        for number in range(1000):
            vm.set_user_memory_region(slot=number, guest_phys_addr=0, memory_size=0)


def folios_without_cachestat(field: Field) -> Iterator[None]:
    forbid(ENOSYS, [memory.SYS_cachestat, userfaultfd.SYS_userfaultfd[os.uname().machine]])
    services = [
        field.service(Options(design=design)) for design in ("folio", "folio-poc", "folio+teardown")
    ]
    yield
    for service in services:
        others = service.memfd_restricted()
        with Vm(service) as vm:
            fd = with_private_memory(service, vm)
            assert outcome(partial(memory.fallocate, fd, memory.PUNCH, 0, PAGE)) == Errno(
                EOPNOTSUPP
            )
            # The mount still has the operation.
            os.posix_fallocate(others, 0, PAGE)
            memory.fallocate(others, memory.PUNCH, 0, PAGE)
        wait_until(lambda: not service.status()["consumers"], "the engine's end")  # noqa: B023
        # The file is the next VM's.
        with Vm(service) as vm:
            vm.set_user_memory_region(slot=0, guest_phys_addr=0, memory_size=SIZE, restricted_fd=fd)
        for each in (fd, others):
            os.close(each)
        assert service.status()["last_error"] == ""


def stopped_for_long(field: Field) -> Iterator[None]:
    service, party = field.start(Options(deadline=_DEADLINE))
    yield
    pid, engine = service.info["pid"], party.vm.statistics()["pid"]
    # An engine alone is ended for that.
    for pids in ([pid], [parent_of(pid)], [engine, pid], [engine, parent_of(pid), pid]):
        punch = threading.Thread(
            target=memory.fallocate, args=(party.fd, memory.PUNCH, SIZE - PAGE, PAGE)
        )
        if engine in pids:
            # The service waits for its answer when it is stopped itself.
            stop(engine)
            punch.start()
            wait_until(
                lambda: any(one["in_progress"] for one in service.status()["consumers"]),
                "a punch to wait for the engine",
            )
        for victim in pids:
            stop(victim)
        if engine not in pids:
            punch.start()
        over = time.monotonic() + 2 * _DEADLINE
        wait_until(lambda: time.monotonic() > over, "twice the deadline to pass")  # noqa: B023
        # The service first, which looks at the clock.
        for victim in reversed(pids):
            os.kill(victim, signal.SIGCONT)
        punch.join(PATIENCE)
        assert not punch.is_alive(), "waited for a punch to return"
        party.goes_on()


def eight_silent_consumers(field: Field) -> Iterator[None]:
    service, party = field.start(Options(deadline=30.0))
    yield
    with ExitStack() as stack:
        vms = [stack.enter_context(Vm(service)) for _ in range(8)]
        fds = [with_private_memory(service, vm) for vm in vms]
        engines: list[int] = [vm.statistics()["pid"] for vm in vms]
        for engine in engines:
            stop(engine)
        punches = [
            threading.Thread(target=memory.fallocate, args=(fd, memory.PUNCH, 0, PAGE))
            for fd in fds
        ]
        for punch in punches:
            punch.start()
        wait_until(
            lambda: sum(bool(one["in_progress"]) for one in service.status()["consumers"]) == 8,
            "the punches to be told",
        )
        for _ in range(5):
            party.goes_on()
        # None of that waited for them.
        assert all(punch.is_alive() for punch in punches)
        for engine in engines:
            os.kill(engine, signal.SIGCONT)
        for punch in punches:
            punch.join(PATIENCE)
            assert not punch.is_alive(), "waited for a punch to return"
        for fd in fds:
            os.close(fd)


ATTACKS: Final = {
    "a long SPAWN": Attack("E2BIG", long_spawn),
    "limits of the spawner and the service": Attack(
        "a VM that cannot be made is EMFILE or EAGAIN", limits, seconds=120
    ),
    "malformed messages": Attack(
        "each gets an errno, and ends its connection where it was no message",
        malformed_messages,
        seconds=120,
    ),
    "a foreign descriptor for the service": Attack(
        "EPERM, or EPROTO, and nobody is held", _foreign_to_service
    ),
    "a foreign descriptor for a VM": Attack(
        "EINVAL, and the engine ends all the same", _foreign_to_vm
    ),
    "a foreign descriptor for a vCPU": Attack(
        "EPERM, or the vCPU's end, and the engine ends all the same", _foreign_to_vcpu
    ),
    "its own peer in a vCPU's socket": Attack(
        "the engine ends with its owner", own_peer_in_a_vcpu_socket
    ),
    "64 refused slots": Attack("the next one is granted", refused_slots),
    "no memory for a vCPU": Attack("ENOMEM, and the VM goes on", no_memory_for_a_vcpu),
    "a thousand slots": Attack("they come and go, and delay nobody", a_thousand_slots),
    "folios without cachestat": Attack(
        "EOPNOTSUPP, and no other file loses an operation", folios_without_cachestat
    ),
    "stopped for longer than the deadline": Attack(
        "all go on", stopped_for_long, alone="nobody else may be late by 0.4 seconds"
    ),
    "eight silent consumers": Attack("others' calls return before theirs", eight_silent_consumers),
}
