"""All findings together, and what of restrictedmem a machine can carry."""

import os
from dataclasses import dataclass
from enum import Enum
from typing import Final

from restrictedmem.abi import memory
from restrictedmem.child import in_child
from restrictedmem.fs.mount import DEVICE
from restrictedmem.machine import descriptor, guests, host, laboratory, syscall
from restrictedmem.machine import memory as memory_probes
from restrictedmem.machine.finding import Finding, State, reason
from restrictedmem.service import client
from restrictedmem.units import PAGE_SIZE


class Group(Enum):
    """What a finding is about."""

    HOST = "Host"
    DESCRIPTOR = "Descriptor"
    GUESTS = "Guests"
    MEMORY = "Memory"
    SYSCALL = "System call"
    LABORATORY = "Laboratory"


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The parts of restrictedmem, and whether this machine has what each needs."""

    descriptor: Finding
    software_engine: Finding
    kernel_engine: Finding
    exec: Finding

    @property
    def usable(self) -> bool:
        """Whether guests can run in restricted memory: the descriptor and the software engine are enough."""
        return self.descriptor.state is State.YES and self.software_engine.state in (State.YES, State.PARTLY)

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
    """What ``examine`` found."""

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
    """Try everything, which takes about a second, and draw the conclusion."""
    groups = {group: tuple(probe()) for group, probe in _PROBES.items()}
    return Examination(groups, conclude({finding.name: finding for findings in groups.values() for finding in findings}, make_descriptor()))


def make_descriptor() -> Finding:
    """Start a service in a child, and create, size, allocate and close a descriptor: the service ends with the child."""
    name = "descriptor"
    try:
        way = in_child(_make_descriptor, client.START_DEADLINE + 2)
    except OSError as error:
        return Finding(name, State.NO, reason(error))
    return Finding(name, State.YES, f"one was created, sized, allocated and closed; way to mount: {way}")


def _make_descriptor() -> str:
    service = client.default_service()
    fd = service.memfd_restricted()
    os.ftruncate(fd, PAGE_SIZE)
    memory.fallocate(fd, 0, 0, PAGE_SIZE)
    os.close(fd)
    return str(service.info["way"])


def conclude(found: dict[str, Finding], made: Finding) -> Conclusion:
    """Draw the conclusion from the findings by name, and from the attempt to make a descriptor."""
    return Conclusion(
        descriptor=_descriptor(found, made),
        software_engine=_software_engine(found),
        kernel_engine=_kernel_engine(found),
        exec=_exec(found, made),
    )


def _descriptor(found: dict[str, Finding], made: Finding) -> Finding:
    if made.state is State.YES:
        return made
    consequence = "nothing of restrictedmem works without it"
    closed = not any(found[way].state is State.YES for way in ("own mount", "user namespace mount", "fusermount3"))
    ways = ("fusermount3", "user namespaces") if closed else ()
    suspects = (found[name] for name in (DEVICE, *ways, "FUSE protocol", "descriptors at once"))
    remedy = next((suspect.remedy for suspect in suspects if suspect.state in (State.NO, State.PARTLY)), "")
    return Finding(made.name, made.state, made.detail, consequence, remedy)


def _software_engine(found: dict[str, Finding]) -> Finding:
    unicorn = found["Unicorn"]
    return Finding("software engine", unicorn.state, f"Unicorn {unicorn.detail}", unicorn.consequence, unicorn.remedy)


def _kernel_engine(found: dict[str, Finding]) -> Finding:
    name = "kernel engine"
    mappable, attributes = found["guest_memfd, MMAP"], found["memory attributes"]
    for needed in (found["/dev/kvm"], found["KVM capabilities"], found["guest_memfd"]):
        if needed.state is not State.YES:
            return Finding(name, State.NO, f"{needed.name}: {needed.detail}", needed.consequence, needed.remedy)
    if attributes.state is State.YES:
        return Finding(name, State.YES, "guest_memfd, with memory attributes kept by the kernel")
    if mappable.state is State.YES:
        return Finding(name, State.YES, "guest_memfd on a default VM")
    return Finding(name, State.NO, f"{mappable.name}: {mappable.detail}", mappable.consequence, mappable.remedy)


def _exec(found: dict[str, Finding], made: Finding) -> Finding:
    name = "exec"
    answered = found["answered call"]
    if answered.state is not State.YES:
        return Finding(name, State.NO, answered.detail, answered.consequence, answered.remedy)
    if made.state is not State.YES:
        return Finding(name, State.NO, "a call can be answered, but there is no descriptor to answer it with")
    return Finding(name, State.YES, "seccomp lets another process answer memfd_restricted(2)")
