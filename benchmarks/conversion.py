"""Conversions: the cost of converting memory to shared and to private again."""

import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from benchmarks.common import Aim, BenchError, Figure, Lab, Pairs, one_core, service, within
from restrictedmem.abi import memory
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.vm import Vcpu, Vm

#: Bytes that are converted at a time.
STEP: Final = 2 << 20
PAGES: Final = STEP // PAGE_SIZE
#: Bytes for the guest's code and stack, before the memory that is converted.
OWN: Final = 2 << 20
#: The guest physical address from which on memory is converted.
MEMORY: Final = guest_abi.PRIVATE_BASE + OWN
_AIMS: Final = {"kernel": 2, "software": 3}

#: A guest that asks its owner which pages to touch, and touches them, for ever. The answer is an
#: address and, in its low 12 bits, the number of pages less one.
GUEST: Final = bytes.fromhex(
    "bb00001000"  # mov    ebx, HYPERCALL_PAGE
    "b863000000"  # ask:   mov    eax, 99
    "ffd3"  # call   rbx
    "89c1"  # mov    ecx, eax
    "81e1ff0f0000"  # and    ecx, 4095
    "4829c8"  # sub    rax, rcx
    "c60001"  # touch: mov    byte [rax], 1
    "480500100000"  # add    rax, 4096
    "83e901"  # sub    ecx, 1
    "79f2"  # jns    touch
    "ebde"  # jmp    ask
)


def touch(vcpu: Vcpu, offset: int, pages: int) -> None:
    """Let the guest touch pages from ``MEMORY + offset`` on, and exit with its next question."""
    exit_ = vcpu.run(MEMORY + offset + pages - 1)
    if not isinstance(exit_, exits.Hypercall):
        raise BenchError(f"the guest ended: {exit_}", "see docs/reference/engines.md")


def show_halves(vm: Vm, restricted_fd: int, shared_fd: int, size: int) -> None:
    """Size both files, and make a slot of them with ``size`` bytes to convert."""
    for fd in (restricted_fd, shared_fd):
        os.ftruncate(fd, OWN + size)
    vm.set_user_memory_region(
        slot=0,
        guest_phys_addr=guest_abi.PRIVATE_BASE,
        memory_size=OWN + size,
        restricted_fd=restricted_fd,
        shared_fd=shared_fd,
    )


@dataclass
class _Machine:
    """A VM with ``size`` bytes to convert, and the owner's side of it."""

    vm: Vm
    vcpu: Vcpu
    restricted_fd: int
    shared_fd: int
    size: int

    def populate(self) -> None:
        """Let the guest touch every page of the half that it sees."""
        for offset in range(0, self.size, STEP):
            touch(self.vcpu, offset, PAGES)

    def convert(self, offset: int, *, private: bool) -> None:
        """Convert a step, and free its pages in the other half."""
        if not private:
            memory.fallocate(self.restricted_fd, memory.PUNCH, OWN + offset, STEP)
        self.vm.set_memory_attributes(MEMORY + offset, STEP, private=private)
        if private:
            memory.fallocate(self.shared_fd, memory.PUNCH, OWN + offset, STEP)

    def convert_all(self, *, private: bool, touches: int) -> float:
        """Convert step by step, with ``touches`` pages touched after each; return the seconds."""
        began = time.perf_counter()
        for offset in range(0, self.size, STEP):
            self.convert(offset, private=private)
            touch(self.vcpu, offset, touches)
        return time.perf_counter() - began


@contextmanager
def _machine(started: Service, engine: str, size: int) -> Generator[_Machine]:
    restricted_fd = started.memfd_restricted()
    try:
        vm = Vm(started, engine=engine)
    except OSError as error:
        os.close(restricted_fd)
        raise BenchError(
            f"no {engine} engine: {error.strerror}", "restrictedmem doctor says what is missing"
        ) from None
    with vm, memory.memfd_create("shared") as shared:
        show_halves(vm, restricted_fd, shared.fileno(), size)
        vm.set_memory_attributes(guest_abi.PRIVATE_BASE, OWN + size, private=True)
        vm.launch_update(guest_abi.PRIVATE_BASE, GUEST.ljust(PAGE_SIZE, b"\0"))
        with vm.create_vcpu() as vcpu:
            vcpu.set_regs(rip=guest_abi.PRIVATE_BASE, rsp=guest_abi.PRIVATE_BASE + OWN)
            vcpu.run()
            yield _Machine(vm, vcpu, restricted_fd, shared.fileno(), size)
    os.close(restricted_fd)


def _both_ways(lab: Lab, engine: str, size: int, touches: int) -> tuple[Pairs, Pairs, Pairs]:
    """Measure the conversions to shared and to private, floor and ours in turns.

    Returns the pairs of both together, to shared, and to private, in microseconds a step.
    """
    steps = size // STEP
    floors, ours = list[tuple[float, ...]](), list[tuple[float, ...]]()
    with service() as started:
        for _ in range(lab.rounds(3) + 1):
            with (
                _machine(started, engine, size) as machine,
                one_core(started.info["pid"], machine.vm.statistics()["pid"]),
            ):
                floors.append(
                    tuple(
                        value / 1e3 / steps
                        for value in lab.run("conversion", engine, size, touches)
                    )
                )
                taken = list[float]()
                for private in (False, True):
                    machine.populate()
                    taken.append(
                        machine.convert_all(private=private, touches=touches) * 1e6 / steps
                    )
                ours.append(tuple(taken))
    pairs = [(floor, mine) for floor, mine in zip(floors, ours, strict=True)][1:]
    sums = Pairs([sum(floor) for floor, _ in pairs], [sum(mine) for _, mine in pairs])
    to_shared, to_private = (
        Pairs([floor[way] for floor, _ in pairs], [mine[way] for _, mine in pairs])
        for way in range(2)
    )
    return sums, to_shared, to_private


def conversion(lab: Lab) -> Iterator[Figure]:
    """Convert fully populated memory step by step, with one page touched a step, then with all."""
    size = lab.amount(1 << 30, 16 << 20)
    for engine, limit in _AIMS.items():
        yield from _figures(lab, engine, size, 1, within(limit))
        yield from _figures(lab, engine, size, PAGES, None)


def _figures(lab: Lab, engine: str, size: int, touches: int, aim: Aim | None) -> Iterator[Figure]:
    what = "one touch a step" if touches == 1 else "all faulted again"
    both, shared, private = _both_ways(lab, engine, size, touches)
    yield both.figure(
        f"{engine}: {size >> 20} MiB shared and private again, {what}; 2 MiB", "µs", aim
    )
    yield shared.figure("  of that, to shared", "µs")
    yield private.figure("  of that, to private", "µs")


BENCHES: Final = {"conversion": conversion}
