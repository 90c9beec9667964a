"""The owner in a round of ``killing``.

It uses a service until the service fails or the round is over. Then it tries every call it can.
"""

import fcntl
import json
import os
import random
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from errno import (
    EACCES,
    ECONNABORTED,
    ECONNREFUSED,
    ECONNRESET,
    EINVAL,
    EIO,
    ENOTCONN,
    EPERM,
    EPIPE,
    EPROTO,
    ETIMEDOUT,
    errorcode,
)
from functools import partial
from typing import Any, Final, NoReturn

from killing import LIMIT, Act, Round
from mute_server import MuteServer
from restrictedmem import guests
from restrictedmem.abi import memory
from restrictedmem.abi.memory import FallocMode
from restrictedmem.abi.process import PR_SET_CHILD_SUBREAPER, prctl
from restrictedmem.fd import send_with_fds
from restrictedmem.fs.owner_abi import PROVE, TOKEN_BYTES
from restrictedmem.protocol import vm_wire
from restrictedmem.service.address import address
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Call, Channel
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm import elf
from restrictedmem.vmm.vm import Vm
from restrictedmem.vmm.vmm import Vmm

#: Private memory of the guest, all of which it touches.
GUEST_SIZE: Final = 4 << 20
_HELD: Final = 6
# Errors of a call that waits while the service dies. The call is aborted with the connection. Or it
# is EIO, if the kernel was just copying the request into the dying process (fuse_dev_do_read).
_DYING: Final = (ECONNABORTED, EIO)
#: Errors for the sender of a foreign descriptor: the kernel's or the receiver's refusal, or the
#: error when the receiver was killed.
_FOREIGN: Final = (
    EPERM,
    EINVAL,
    EPROTO,
    EACCES,
    ETIMEDOUT,
    ENOTCONN,
    ECONNREFUSED,
    ECONNRESET,
    EPIPE,
)

_CALLS: Final[dict[str, Callable[[int], object]]] = {
    "fstat": os.fstat,
    "ftruncate": lambda fd: os.ftruncate(fd, PAGE),
    "fallocate": lambda fd: memory.fallocate(fd, FallocMode.KEEP_SIZE, GUEST_SIZE // 2, PAGE),
    "punch": lambda fd: memory.fallocate(fd, memory.PUNCH, GUEST_SIZE // 2, PAGE),
    "ioctl": lambda fd: fcntl.ioctl(fd, PROVE, bytes(TOKEN_BYTES)),
}


def live(round: Round, sock: socket.socket) -> NoReturn:
    """Be the owner, until it is killed."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    owner = _Owner(round, sock)
    if round.kind.act is Act.LAUNCH:
        owner.launch()
    else:
        owner.live()
    while True:
        signal.pause()


def _errno(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def _create(service: Service) -> None:
    os.close(service.memfd_restricted())


class _Owner:
    def __init__(self, round: Round, sock: socket.socket) -> None:
        self._round = round
        self._sock = sock
        self._dice = random.Random(round.seed + 1)
        self._service: Service | None = None
        self._vmm: Vmm | None = None
        self._guest: threading.Thread | None = None
        self._fds: list[int] = []
        self._faults: list[str] = []
        self._calls = 0
        self._done: Counter[str] = Counter()
        # The mute server must have no descriptor of the service.
        self._mute = MuteServer() if round.kind.act is Act.FOREIGN else None
        #: Sockets for foreign descriptors: one message to each, or many where the kernel refuses
        #: them.
        self._foreign: dict[str, Callable[[int], object]] = {}
        self._foreign_file = -1

    def live(self) -> None:
        try:
            self._use()
        except OSError as error:
            returned = time.monotonic()
            if error.errno not in (ENOTCONN, *_DYING) and not (
                error.errno == ECONNRESET and self._service is None
            ):
                self._faults.append(f"a call failed with {error!r}")
            self._check(ENOTCONN)
        else:
            returned = time.monotonic()
            # The kill may take a moment to arrive where it may hit anything.
            unknown = self._round.kind.act is Act.KILL and self._round.kind.victim == "start"
            self._check(None if unknown else 0)
            if not unknown:
                self._check_going_on()
        if self._guest is not None and (self._round.fatal or self._round.kind.victim == "engine"):
            self._guest.join(LIMIT)
            if self._guest.is_alive() and not self._engine_lives():
                self._faults.append("KVM_RUN did not return")
        report = {
            "faults": self._faults,
            "returned": returned,
            "calls": self._calls,
            "done": self._done,
        }
        self._sock.send(json.dumps(report).encode())
        self._sock.recv(10)
        self._close()
        self._sock.send(b"closed")

    def launch(self) -> None:
        """Launch a VM, and die a moment after the call that the round names has begun."""
        # Any thread may set the timer of its end, and only this one a handler. Pytest's would
        # raise an exception.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._service = Service.start()
        step = self._round.kind.victim
        honest = Channel.call

        def call(channel: Channel, what: Call, *rest: Any, **more: Any) -> object:
            if what.name == step and what is not vm_wire.CREATE_VM:
                self._die_soon()
            return honest(channel, what, *rest, **more)

        setattr(Channel, "call", call)  # noqa: B010  a method of a final class
        if step == vm_wire.CREATE_VM.name:
            # With the fork of its engine.
            self._die_soon()
        self._start_guest(self._service)

    def _die_soon(self) -> None:
        self._sock.send(b"ready")
        self._sock.recv(10)
        signal.setitimer(signal.ITIMER_REAL, self._round.delay)

    # The owner's calls while the service lives.

    def _use(self) -> None:
        deadline = self._round.deadline
        self._service = Service.start(None if deadline is None else Options(deadline=deadline))
        if self._round.kind.guest:
            self._start_guest(self._service)
        if self._mute is not None:
            self._prepare_foreign(self._service)
        if self._round.kind.victim != "start":
            self._sock.send(b"ready")
        while not self._told_to_stop():
            self._calls += 1
            if self._foreign and self._dice.random() < 0.3:
                self._send_foreign()
            elif not self._fds or (len(self._fds) < _HELD and self._dice.random() < 0.3):
                self._fds.append(self._service.memfd_restricted())
            else:
                self._touch(self._dice.choice(self._fds))

    def _touch(self, fd: int) -> None:
        assert self._service is not None
        # Beyond the guest's image and below its stack.
        offset, length = (
            GUEST_SIZE // 2 + self._dice.randrange(64) * PAGE,
            self._dice.randint(1, 64) * PAGE,
        )
        match self._dice.randrange(6):
            case 0:
                os.fstat(fd)
            case 1:
                memory.fallocate(fd, FallocMode.KEEP_SIZE, offset, length)
            case 2 | 3:
                memory.fallocate(fd, memory.PUNCH, offset, length)
            case 4 if fd != self._fds[0]:
                self._fds.remove(fd)
                os.close(fd)
            case _:
                self._service.status()

    def _start_guest(self, service: Service) -> None:
        self._vmm = vmm = Vmm(GUEST_SIZE, service)
        self._fds.append(os.dup(vmm.restricted_fd))
        vmm.load(elf.parse(guests.path("spin").read_bytes()), ["loop"])

        def run() -> None:
            with suppress(OSError):
                vmm.vcpus[0].run()

        self._guest = threading.Thread(target=run, daemon=True)
        self._guest.start()

    def _told_to_stop(self) -> bool:
        with suppress(BlockingIOError):
            return self._sock.recv(10, socket.MSG_DONTWAIT) == b"stop"
        return False

    # Foreign descriptors.

    def _prepare_foreign(self, service: Service) -> None:
        assert self._mute is not None
        assert self._vmm is not None
        # No program is started any more: exec would close it, and wait for ever.
        self._foreign_file = self._mute.open()
        vm, vcpu = self._vmm.vm._channel, self._vmm.vcpus[0]._channel
        self._foreign = {
            "service": lambda file: _to_service(service, [file]),
            "service, with the key": lambda file: _to_service(
                service, [file], bytes.fromhex(service.info["key"])
            ),
            "VM": lambda file: vm.call(vm_wire.STATISTICS, fds=[file]),
            # Nobody else reads there but the thread that runs the guest.
            "vCPU": lambda file: send_with_fds(
                vcpu.sock, _request(vm_wire.RUN, vm_wire.COMPLETION.pack(0)), [file]
            ),
        }

    def _send_foreign(self) -> None:
        to = self._dice.choice(sorted(self._foreign))
        number = _errno(partial(self._foreign[to], self._foreign_file))
        self._done[f"foreign descriptor to {to}: {errorcode.get(number, 'sent')}"] += 1
        if number != EPERM:
            del self._foreign[to]
        if number not in (0, *_FOREIGN):
            self._faults.append(f"foreign descriptor to {to}: {errorcode.get(number, number)}")

    # The owner's calls after the service's end.

    def _check(self, expected: int | None) -> None:
        """Make every call on every descriptor, and expect one errno (0: success; None: either)."""
        for fd in self._fds:
            for name, call in _CALLS.items():
                self._expect(f"{name} on {fd}", partial(call, fd), expected)
        if self._service is not None:
            self._expect("create", partial(_create, self._service), expected)
            self._expect("status", self._service.status, expected)

    def _expect(self, name: str, call: Callable[[], object], expected: int | None) -> None:
        began = time.monotonic()
        found = _errno(call)
        while expected and found in _DYING and time.monotonic() - began < LIMIT:
            found = _errno(call)
        if time.monotonic() - began > LIMIT:
            self._faults.append(f"{name} took {time.monotonic() - began:.2f} s")
        # A working service may refuse a call, because the moment or the token is wrong.
        if found in (EPERM, EACCES):
            found = 0
        if expected is not None and found != expected:
            self._faults.append(
                f"{name}: {errorcode.get(found, 'worked')}, "
                f"expected {errorcode.get(expected, 'to work')}"
            )

    def _check_going_on(self) -> None:
        """Check that the service makes VMs.

        The old VM has to work, unless only its engine was the victim.
        """
        assert self._service is not None
        self._expect("another VM", Vm(self._service).close, 0)
        said = self._service.status()["last_error"]
        if self._round.kind.victim != "engine":
            if self._vmm is not None and not self._engine_lives():
                self._faults.append("the engine has ended")
            if said:
                self._faults.append(f"the service says {said!r}")
        elif self._round.kind.act is Act.STOP and not self._engine_lives():
            self._done["an engine that alone was stopped was ended"] += 1
            if not said.startswith("kvm 1 did not answer"):
                self._faults.append(f"an engine was ended, and the service says {said!r}")

    def _engine_lives(self) -> bool:
        assert self._vmm is not None
        # The VM's socket may wait for a descriptor that was sent there; the vCPU's tells as well.
        return (
            bool(self._guest and self._guest.is_alive())
            if self._mute
            else not _errno(self._vmm.vm.statistics)
        )

    def _close(self) -> None:
        if self._mute is not None:
            self._mute.close()
        for fd in self._fds:
            os.close(fd)
        if self._vmm is not None and self._guest is not None:
            # To close it would not wake the thread that waits there for the guest's exit, nor tell
            # the engine.
            with suppress(OSError):
                self._vmm.vcpus[0]._channel.sock.shutdown(socket.SHUT_RDWR)
            self._guest.join(LIMIT)
            self._vmm.close()
        if self._service is not None:
            self._service.close()


def _request(call: Call, body: bytes = b"") -> bytes:
    return struct.pack("=II", call.number, 0) + body


def _to_service(service: Service, fds: Sequence[int], key: bytes = b"") -> None:
    """Send descriptors to the listening socket on a new connection; with a key, as an owner's."""
    from restrictedmem.service import wire as services

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.settimeout(30)
    with closing(Channel(sock, "service")) as channel:
        sock.connect(address(service.info["socket"]))
        if key:
            channel.call(services.CONNECT, key)
        channel.call(services.STATUS, fds=fds)
