"""The place where attacks run: an attacker without capabilities, and another party's service.

It also checks what has to be gone afterwards.
"""

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, final

from mute_server import MuteServer
from processes import Process, children, descriptors, end_after
from restrictedmem.abi import memory
from restrictedmem.abi.process import PR_SET_CHILD_SUBREAPER, prctl
from restrictedmem.audit.attacker import drop_capabilities
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service.address import address
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vcpu, Vm
from users import as_user
from waiting import wait_until

SIZE: Final = 16 * PAGE
#: out %al, $0x42; jmp back
OUT_LOOP: Final = bytes.fromhex("e642 ebfc")


def knock(service: Service) -> Channel:
    """Connect without the key."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.settimeout(10)
    sock.connect(address(service.info["socket"]))
    return Channel(sock, "service", takes_fds=True)


def works(service: Service) -> bool:
    """Make a file, allocate a page of it, and prove that one is held."""
    fd = service.memfd_restricted()
    os.posix_fallocate(fd, 0, PAGE)
    os.close(fd)
    with OwnedFd(service.memfd_restricted()) as other:
        return bool(service.token_for(other.fileno()))


def with_private_memory(service: Service, vm: Vm) -> int:
    """Give a VM private memory at its usual place; return the descriptor, which the caller owns."""
    fd = service.memfd_restricted()
    os.ftruncate(fd, SIZE)
    vm.set_user_memory_region(
        slot=0, guest_phys_addr=guest_abi.PRIVATE_BASE, memory_size=SIZE, restricted_fd=fd
    )
    vm.set_memory_attributes(guest_abi.PRIVATE_BASE, SIZE, private=True)
    return fd


def started(vm: Vm, code: bytes) -> Vcpu:
    """Put code into a VM's private memory, and make a vCPU that begins there."""
    vm.launch_update(guest_abi.PRIVATE_BASE, code.ljust(PAGE, b"\0"))
    vcpu = vm.create_vcpu()
    vcpu.set_regs(rip=guest_abi.PRIVATE_BASE, rsp=guest_abi.PRIVATE_BASE + SIZE)
    return vcpu


@final
class Party:
    """An owner who does no harm: its VM, whose guest exits whenever it runs, and its descriptor."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.vm = Vm(service)
        self.fd = with_private_memory(service, self.vm)
        self.vcpu = started(self.vm, OUT_LOOP)
        # Silence is a failure that says so.
        for channel in (self.vm._channel, self.vcpu._channel):
            channel.sock.settimeout(30)
        self.goes_on()

    def goes_on(self) -> None:
        assert self.vcpu.run() == exits.PortOut(0x42, 1, 0)
        # Its engine hears of it.
        memory.fallocate(self.fd, memory.PUNCH, SIZE - PAGE, PAGE)
        assert works(self.service)
        with Vm(self.service) as another:
            assert another.statistics()["engine"] == "software"
        assert self.vm.statistics()["private_bytes"] == SIZE
        assert (said := self.service.status()["last_error"]) == "", said

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()
        os.close(self.fd)


@final
class Field:
    """The attacker's process, and the objects that it may use."""

    def __init__(self, place: Path) -> None:
        #: A directory that anybody may write to. It contains only the attack's own files.
        self.place = place
        self.stack = ExitStack()
        self._parties: list[Party] = []
        self._mutes: list[MuteServer] = []

    def start(self, options: Options | None = None) -> tuple[Service, Party]:
        """Start a service of the attacker's; another party has a VM there."""
        service = self.service(options)
        party = Party(service)
        self.stack.callback(party.close)
        self._parties.append(party)
        return service, party

    def service(self, options: Options | None = None) -> Service:
        """Start a service that is the attacker's alone."""
        return self.stack.enter_context(Service.start(options))

    def mute(self) -> MuteServer:
        """Start a FUSE server that does not answer.

        Call this first: its child inherits all that is open.
        """
        self._mutes.append(MuteServer())
        return self._mutes[-1]

    def until_over(self) -> Iterator[None]:
        """Attack again and again, from here on, until whoever is attacked has seen enough."""
        (self.place / "ready").touch()
        while not (self.place / "over").exists():
            yield

    def goes_on(self) -> None:
        for party in self._parties:
            party.goes_on()

    def end_mutes(self) -> None:
        while self._mutes:
            self._mutes.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A process that closes their files may wait for them.
        self.end_mutes()
        self.stack.close()


@dataclass(frozen=True)
class Attack:
    """One attack in two parts.

    It prepares, and after a ``yield`` it acts without any capability.
    """

    right: str
    run: Callable[[Field], Iterator[None]]
    #: A function that runs as root meanwhile: the attacked action.
    beside: Callable[[Path], None] | None = None
    seconds: int = 60
    #: Why no other test may run meanwhile, where none may.
    alone: str = ""


def carry_out(attack: Attack, uid: int, bystander: Party) -> None:
    """Run an attack as a user, and check that a bystander goes on and that nothing is left."""
    pids = [bystander.service.info["pid"], bystander.vm.statistics()["pid"]]
    wait_until(
        lambda: len(bystander.service.status()["consumers"]) == 1,
        "the bystander's other engines to end",
    )
    before = [len(descriptors(pid)) for pid in pids]
    with _place() as place:
        attacker = _Thread(lambda: as_user(lambda: _attack(attack, place), uid))
        attacker.start()
        try:
            if attack.beside is not None:
                wait_until((place / "ready").exists, "the attack to begin", attack.seconds)
                attack.beside(place)
        finally:
            (place / "over").touch()
            attacker.join()
    attacker.tell()
    bystander.goes_on()
    wait_until(
        lambda: [len(descriptors(pid)) for pid in pids] == before,
        "descriptors of the bystander's service to be closed",
    )
    assert "restrictedmem" not in Path("/proc/self/mountinfo").read_text(
        encoding="utf-8", errors="replace"
    )


def _attack(attack: Attack, place: Path) -> None:
    """Run an attack in this process; what it started is below it whoever else ends."""
    end_after(attack.seconds)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    opened = len(os.listdir("/proc/self/fd"))
    with Field(place) as field:
        doing = attack.run(field)
        next(doing)
        drop_capabilities()
        for _ in doing:
            raise AssertionError("an attack has two parts")
        field.goes_on()
    wait_until(lambda: not _below(os.getpid()), "the end of what the attack started")
    assert len(os.listdir("/proc/self/fd")) == opened
    assert Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace") == mounts


def _below(pid: int) -> list[Process]:
    found = children(pid)
    return [*found, *(other for child in found for other in _below(child.pid))]


@final
class _Thread(threading.Thread):
    """A thread whose exception is its starter's."""

    def __init__(self, body: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._body = body
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._body()
        except BaseException as error:
            self._error = error

    def tell(self) -> None:
        if self._error is not None:
            raise self._error


@contextmanager
def _place() -> Generator[Path]:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)
