"""The examination of a machine: all findings, and which parts of restrictedmem work here."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from errno import EIO
from functools import partial
from hashlib import sha256
from typing import Final

from restrictedmem import guests as programs
from restrictedmem.abi import memory
from restrictedmem.fs.mount_ways import DEVICE
from restrictedmem.machine import descriptor, guests, host, laboratory, syscall
from restrictedmem.machine import memory_kinds as memory_probes
from restrictedmem.machine.finding import Finding, State, reason
from restrictedmem.probe import in_child
from restrictedmem.protocol.guest_abi import PRIVATE_SIZE_MIN
from restrictedmem.service import client
from restrictedmem.service.exec_service import START_DEADLINE
from restrictedmem.units import PAGE_SIZE, format_size
from restrictedmem.vmm import elf
from restrictedmem.vmm.vmm import Vmm

_ENGINES: Final = ("software", "kernel")
#: The input of the trial guest, and seconds that it may take, with the service's start.
_INPUT: Final = bytes(range(256)) * 1024
_GUEST_DEADLINE: Final = START_DEADLINE + 20


class Group(Enum):
    """The subject of a finding."""

    HOST = "Host"
    DESCRIPTOR = "Descriptor"
    GUESTS = "Guests"
    MEMORY = "Memory"
    SYSCALL = "System call"
    LABORATORY = "Laboratory"


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The parts of restrictedmem, and whether each works on this machine."""

    descriptor: Finding
    software_engine: Finding
    kernel_engine: Finding
    exec: Finding

    @property
    def usable(self) -> bool:
        """Say whether a guest ran in restricted memory, on either engine."""
        return self.descriptor.state is State.YES and State.YES in (
            self.software_engine.state,
            self.kernel_engine.state,
        )

    def parts(self) -> dict[str, Finding]:
        """Return the parts by stable names."""
        return {
            "descriptor": self.descriptor,
            "software_engine": self.software_engine,
            "kernel_engine": self.kernel_engine,
            "exec": self.exec,
        }


@dataclass(frozen=True, slots=True)
class Examination:
    """The result of ``examine``."""

    groups: dict[Group, tuple[Finding, ...]]
    conclusion: Conclusion


_PROBES: Final = {
    Group.HOST: host.probe,
    Group.DESCRIPTOR: descriptor.probe,
    Group.GUESTS: guests.probe,
    Group.MEMORY: memory_probes.probe,
    Group.SYSCALL: syscall.probe,
    Group.LABORATORY: laboratory.probe,
}


def examine() -> Examination:
    """Make all probes, which takes some seconds, and draw the conclusion."""
    groups = {group: tuple(probe()) for group, probe in _PROBES.items()}
    found = {finding.name: finding for findings in groups.values() for finding in findings}
    made = make_descriptor()
    ran = {engine: run_guest(engine, made) for engine in _ENGINES}
    return Examination(groups, conclude(found, made, ran))


def make_descriptor() -> Finding:
    """Start a service in a child, and create, size, allocate and close a descriptor.

    The service ends with the child.
    """
    name = "descriptor"
    try:
        way = in_child(_make_descriptor, START_DEADLINE + 2)
    except OSError as error:
        return Finding(name, State.NO, reason(error))
    return Finding(
        name, State.YES, f"one was created, sized, allocated and closed; way to mount: {way}"
    )


def _make_descriptor() -> str:
    service = client.default_service()
    fd = service.memfd_restricted()
    os.ftruncate(fd, PAGE_SIZE)
    memory.fallocate(fd, 0, 0, PAGE_SIZE)
    os.close(fd)
    return str(service.info["way"])


def run_guest(engine: str, made: Finding) -> Finding:
    """Run a guest to its end on an engine, as ``run`` does, with a child's service.

    The service ends with the child.
    """
    name = f"{engine} engine"
    if made.state is not State.YES:
        return Finding(name, State.UNKNOWN, "it could not be tried without a descriptor")
    try:
        in_child(partial(_run_guest, engine), _GUEST_DEADLINE)
    except OSError as error:
        return Finding(name, State.NO, f"no guest ran: {reason(error)}")
    return Finding(
        name, State.YES, f"a guest ran to its end and digested {format_size(len(_INPUT))} correctly"
    )


def _run_guest(engine: str) -> None:
    image = elf.parse(programs.path("sha256").read_bytes())
    with (
        open(memory.memfd_create("restrictedmem-doctor-in").detach(), "r+b") as stdin,
        open(memory.memfd_create("restrictedmem-doctor-out").detach(), "r+b") as stdout,
        Vmm(PRIVATE_SIZE_MIN, engine=engine) as vmm,
    ):
        vmm.load(image)
        stdin.write(_INPUT)
        stdin.seek(0)
        ended = vmm.run(stdin, stdout, stdout)
        if ended.fatal is not None or ended.status:
            raise OSError(EIO, f"the guest stopped: {ended.fatal or f'status {ended.status}'}")
        stdout.seek(0)
        if stdout.read().split()[:1] != [sha256(_INPUT).hexdigest().encode()]:
            raise OSError(EIO, "the guest's digest is wrong")


def conclude(found: dict[str, Finding], made: Finding, ran: dict[str, Finding]) -> Conclusion:
    """Draw the conclusion from the findings by name, and from the attempts at each part.

    ``made`` is the attempt to make a descriptor, and ``ran`` has those to run a guest on each
    engine.
    """
    return Conclusion(
        descriptor=_descriptor(found, made),
        software_engine=_engine(ran["software"], [found["Unicorn"]]),
        kernel_engine=_engine(ran["kernel"], _needed_by_kernel_engine(found)),
        exec=_exec(found, made),
    )


def _descriptor(found: dict[str, Finding], made: Finding) -> Finding:
    if made.state is State.YES:
        return made
    consequence = "nothing of restrictedmem works without it"
    closed = not any(
        found[way].state is State.YES
        for way in ("own mount", "user namespace mount", "fusermount3")
    )
    ways = ("fusermount3", "user namespaces") if closed else ()
    suspects = (found[name] for name in (DEVICE, *ways, "FUSE protocol", "descriptors at once"))
    remedy = next(
        (suspect.remedy for suspect in suspects if suspect.state in (State.NO, State.PARTLY)), ""
    )
    return Finding(made.name, made.state, made.detail, consequence, remedy)


def _engine(ran: Finding, needed: Iterable[Finding]) -> Finding:
    """Judge an attempt to run a guest.

    After a failure, the remedy is that of the first missing thing.
    """
    if ran.state is State.YES:
        return ran
    missing = next((one for one in needed if one.state is not State.YES), None)
    remedy = missing.remedy if missing else ""
    return Finding(ran.name, ran.state, ran.detail, f"no guest runs on the {ran.name}", remedy)


def _needed_by_kernel_engine(found: dict[str, Finding]) -> list[Finding]:
    needed = [found["/dev/kvm"], found["KVM capabilities"], found["guest_memfd"]]
    return (
        needed
        if found["memory attributes"].state is State.YES
        else [*needed, found["guest_memfd, MMAP"]]
    )


def _exec(found: dict[str, Finding], made: Finding) -> Finding:
    name = "exec"
    answered = found["answered call"]
    if answered.state is not State.YES:
        return Finding(name, State.NO, answered.detail, answered.consequence, answered.remedy)
    if made.state is not State.YES:
        return Finding(
            name, State.NO, "a call can be answered, but there is no descriptor to answer it with"
        )
    return Finding(name, State.YES, "seccomp lets another process answer memfd_restricted(2)")
