"""A VM before its launch, on either engine and with both postings, and code for its guest."""

import os
from collections.abc import Callable, Iterator

import pytest

from restrictedmem.abi import memory
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vcpu, Vm

GPA = 0x4000_0000
STACK = GPA + 0x8000
MIB = 1 << 20
PAGE = 4096


@pytest.fixture(scope="module", params=["v10", "v9"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with Service.start(Options(api=request.param)) as found:
        yield found


@pytest.fixture(params=["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))])
def engine(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def errno_of(call: Callable[..., object], *args: object, **kwargs: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)
    assert caught.value.errno is not None
    return caught.value.errno


def private_slot(vm: Vm, service: Service, fd: int) -> None:
    vm.set_user_memory_region(slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd)
    if service.info["api"] == "v10":
        vm.set_memory_attributes(GPA, MIB, private=True)


@pytest.fixture
def fd(service: Service) -> Iterator[int]:
    found = service.memfd_restricted()
    os.ftruncate(found, MIB)
    yield found
    os.close(found)


@pytest.fixture
def vm(service: Service, fd: int, engine: str) -> Iterator[Vm]:
    with Vm(service, engine=engine) as found:
        private_slot(found, service, fd)
        yield found


@pytest.fixture
def explicit(service: Service, fd: int, engine: str) -> Iterator[Vm]:
    """A VM whose pages become shared only when its guest asks, with a shared half."""
    with Vm(service, engine=engine, explicit=True) as found, memory.memfd_create("half") as half:
        os.ftruncate(half.fileno(), MIB)
        found.set_user_memory_region(
            slot=0, guest_phys_addr=GPA, memory_size=MIB, restricted_fd=fd, shared_fd=half.fileno()
        )
        if service.info["api"] == "v10":
            found.set_memory_attributes(GPA, MIB, private=True)
        yield found


# movl $0, %eax; out %al, $0xf4 on the hypercall page is reached by: mov $0x100000,%ecx; call *%rcx
CALL = "b900001000 ffd1"


def mov(register: int, value: int) -> str:
    """Return ``movabs $value, register``, by the register's number."""
    return (
        bytes([0x48 | register >> 3, 0xB8 | register & 7]).hex()
        + (value & (1 << 64) - 1).to_bytes(8, "little").hex()
    )


RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R10 = 10


def hypercall(number: int, *arguments: int) -> str:
    return (
        "".join(
            mov(register, value)
            for register, value in zip(
                (RAX, RDI, RSI, RDX, R10), (number, *arguments), strict=False
            )
        )
        + CALL
    )


def code(*instructions: str) -> bytes:
    found = bytes.fromhex("".join(instructions))
    return found.ljust(-(-len(found) // PAGE) * PAGE, b"\xf4")


def start(vm: Vm, content: bytes) -> Vcpu:
    vm.launch_update(GPA, content)
    vcpu = vm.create_vcpu()
    vcpu.set_regs(rip=GPA, rsp=STACK)
    return vcpu
