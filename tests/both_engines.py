"""A VM on either engine, for the contract that both keep, and the differences between the engines.

Each difference has a key in ``DIFFERENCES`` and a row in docs/reference/engines.md.
"""

import contextlib
import mmap
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from restrictedmem.abi import memory
from restrictedmem.abi.kvm import ExitReason
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.protocol.exits import (
    Exit,
    Hypercall,
    MemoryFault,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Shutdown,
)
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vcpu, Vm

ENGINES_MD: Final = Path(__file__).parent.parent / "docs" / "reference" / "engines.md"
PAGE: Final = 4096
MIB: Final = 1 << 20
PRIVATE: Final = guest_abi.PRIVATE_BASE
SHARED: Final = guest_abi.SHARED_BASE
NOWHERE: Final = 0xD000_0000
CODE: Final = PRIVATE
DATA: Final = PRIVATE + 8 * PAGE
STACK: Final = PRIVATE + 8 * PAGE
EACCES, EFAULT, EINVAL, ENOMEM, ENOSPC, EOPNOTSUPP = 13, 14, 22, 12, 28, 95
DEADLINE: Final = 20.0


def assembled(*instructions: str) -> bytes:
    return bytes.fromhex("".join(instructions))


#: mov eax, 99; mov ecx, HYPERCALL_PAGE; call rcx: a number of no meaning, so that all four
#: arguments come through.
NUMBER: Final = 99
CALL: Final = "b863000000b900001000ffd1"


#: Differences, by key: the software engine's answers and the kernel engine's.
DIFFERENCES: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "mmio": {
        "software": (MmioRead(NOWHERE + 8, 4), MmioWrite(NOWHERE + 8, 4, 0x1234)),
        "kernel": (MemoryFault(0, NOWHERE, PAGE, EFAULT), MemoryFault(0, NOWHERE, PAGE, EFAULT)),
    },
    "readonly-store": {
        "software": (
            MmioWrite(SHARED + MIB, 4, 0x1234),
            MmioWrite(guest_abi.HYPERCALL_PAGE, 4, 0x1234),
        ),
        "kernel": (
            MemoryFault(0, SHARED + MIB, PAGE, EACCES),
            MemoryFault(0, guest_abi.HYPERCALL_PAGE, PAGE, EACCES),
        ),
    },
    "port-in-private-code": {
        "software": ({PortIn(0x80, 1)}, {PortOut(0x80, 1, 0)}),
        "kernel": ({Shutdown(6), PortIn(0x80, 1)}, {Shutdown(6), PortOut(0x80, 1, 0)}),
    },
    "port-to-private-memory": {
        "software": ({Hypercall(NUMBER, (DATA + 1, DATA, 0x80, 0)), PortOut(0x80, 1, 0)},),
        "kernel": ({exits.Unknown(ExitReason.INTERNAL_ERROR)},),
    },
    "general-protection": {"software": ({13},), "kernel": ({6, 13},)},
    "interrupt-number": {"software": ({0x80},), "kernel": ({6, 0x80},)},
    "shared-code": {"software": (exits.Interrupted(),), "kernel": (Shutdown(6),)},
    "overlap": {"software": (0,), "kernel": (EINVAL,)},
    "huge-shared": {"software": (0,), "kernel": (EINVAL,)},
    "memory-max": {"software": (0,), "kernel": (ENOSPC,)},
    "blocks": {"software": (True,), "kernel": (False,)},
    "fault-counts": {"software": (True,), "kernel": (False,)},
    "page-tables": {"software": (0,), "kernel": (ENOMEM,)},
    "held-until-end": {"software": (True,), "kernel": (False,)},
    "prefault": {"software": (PAGE,), "kernel": (EOPNOTSUPP,)},
    "memory-failure": {"software": (0,), "kernel": (EOPNOTSUPP,)},
}


@dataclass
class Machine:
    """A VM with private memory of both halves and a shared window, and the owner's side of them."""

    service: Service
    engine: str
    vm: Vm
    fd: int
    half: mmap.mmap
    window: mmap.mmap
    vcpu: Vcpu

    def expect(self, key: str) -> tuple[Any, ...]:
        return DIFFERENCES[key][self.engine]

    def start(self, *instructions: str, rsi: int = 0) -> Exit:
        """Run code from private memory, with rdi at DATA, to its first exit."""
        self.vm.launch_update(CODE, assembled(*instructions).ljust(PAGE, b"\xf4"))
        self.vcpu.set_regs(rip=CODE, rsp=STACK, rdi=DATA, rsi=rsi)
        return self.vcpu.run()

    def start_shared(self, *instructions: str) -> Exit:
        """Start the guest from the shared window."""
        code = assembled(*instructions)
        self.window[: len(code)] = code
        self.vcpu.set_regs(rip=SHARED, rsp=STACK, rdi=DATA)
        return self.vcpu.run()

    def punch(self, gpa: int, size: int) -> None:
        memory.fallocate(self.fd, memory.PUNCH, gpa - PRIVATE, size)


@pytest.fixture(scope="module", params=["v10", "v9"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with Service.start(Options(api=request.param)) as found:
        yield found


ENGINES: Final = ("software", pytest.param("kernel", marks=pytest.mark.requires("kvm")))


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@contextlib.contextmanager
def shared_memory(size: int) -> Generator[tuple[int, mmap.mmap]]:
    with memory.memfd_create("shared") as fd:
        os.ftruncate(fd.fileno(), size)
        with mmap.mmap(fd.fileno(), size) as mapping:
            yield fd.fileno(), mapping


@contextlib.contextmanager
def make_machine(service: Service, engine: str, *, debug: bool = False) -> Generator[Machine]:
    fd, size = service.memfd_restricted(), 4 * MIB
    try:
        os.ftruncate(fd, size)
        with (
            shared_memory(size) as (half_fd, half),
            shared_memory(MIB) as (window_fd, window),
            Vm(service, engine=engine, debug=debug) as vm,
        ):
            vm.set_user_memory_region(
                slot=0,
                guest_phys_addr=PRIVATE,
                memory_size=size,
                restricted_fd=fd,
                shared_fd=half_fd,
            )
            vm.set_user_memory_region(
                slot=1, guest_phys_addr=SHARED, memory_size=MIB, shared_fd=window_fd
            )
            with vm.create_vcpu() as vcpu:
                machine = Machine(service, engine, vm, fd, half, window, vcpu)
                machine.vm.convert(PRIVATE, size, private=True)
                machine.vm.convert(SHARED, MIB, private=False)
                yield machine
    finally:
        os.close(fd)


@pytest.fixture
def machine(service: Service, engine: str) -> Iterator[Machine]:
    with make_machine(service, engine) as found:
        yield found


def errno_of(call: object, *args: object, **kwargs: object) -> int:
    assert callable(call)
    try:
        call(*args, **kwargs)
    except OSError as error:
        return error.errno or EINVAL
    return 0


def missing_page(machine: Machine, at: int, content: bytes) -> MemoryFault:
    """Make a slot of one private page, and let the guest touch it; return the exit.

    The page's attribute names the half that the slot lacks.
    """
    fd = machine.service.memfd_restricted()
    machine.vm.set_user_memory_region(
        slot=2, guest_phys_addr=at, memory_size=PAGE, restricted_fd=fd
    )
    os.close(fd)
    machine.vm.convert(at, PAGE, private=True)
    machine.vm.launch_update(at, content.ljust(PAGE, b"\xf4"))
    machine.vm.convert(at, PAGE, private=False)
    return MemoryFault(0, at, PAGE, EFAULT)


def word(exit_: Exit) -> int:
    assert isinstance(exit_, Hypercall)
    return exit_.arguments[1]
