"""The bindings of /dev/kvm beside the same calls in C; the guest writes to a port for ever."""

import mmap
import time
from collections.abc import Callable, Iterator
from typing import Final

from benchmarks.common import BenchError, Figure, Lab, alternate, below, one_core, within
from restrictedmem.abi.kvm import Cap, ExitReason, kvm_regs
from restrictedmem.devkvm import Kvm, VcpuFd, address_of
from restrictedmem.units import PAGE_SIZE

_ROUNDS: Final = 15
_EXITS: Final = 20_000
_MACHINES: Final = 100
_CODE: Final = 0x1000
_PRIVATE_BASE: Final = 1 << 32
_PRIVATE_SIZE: Final = 1 << 20
#: out 0x42, al; jmp back to it
_GUEST: Final = bytes.fromhex("e642 ebfc")


def _to_first_exit(then: Callable[[VcpuFd], float]) -> float:
    """Make the VM that ``kvm_guest.c`` makes, run to the first exit, and call ``then``."""
    with mmap.mmap(-1, PAGE_SIZE) as memory, Kvm.open() as kvm, kvm.create_vm() as vm:
        memory[: len(_GUEST)] = _GUEST
        vm.set_user_memory_region(0, _CODE, PAGE_SIZE, address_of(memory))
        with vm.create_guest_memfd(_PRIVATE_SIZE) as memfd:
            vm.set_user_memory_region2(1, _PRIVATE_BASE, _PRIVATE_SIZE, 0, memfd)
            with vm.create_vcpu() as vcpu:
                sregs = vcpu.get_sregs()
                sregs.cs.base = sregs.cs.selector = 0
                vcpu.set_sregs(sregs)
                vcpu.set_regs(kvm_regs(rip=_CODE, rflags=2))
                _expect_io(vcpu.run())
                return then(vcpu)


def _expect_io(reason: int) -> None:
    if reason != ExitReason.IO:
        raise BenchError(
            f"the guest exits with reason {reason}",
            "restrictedmem doctor says what KVM can do here",
        )


def _need_guest_memfd() -> None:
    try:
        with Kvm.open() as kvm, kvm.create_vm() as vm:
            found = vm.check_extension(Cap.GUEST_MEMFD)
    except OSError as error:
        raise BenchError(
            f"no VM can be made: {error.strerror}", "restrictedmem doctor says what is missing"
        ) from None
    if not found:
        raise BenchError("KVM has no guest_memfd", "Linux 6.8 or later")


def exits(lab: Lab) -> Iterator[Figure]:
    """Time exits and re-entries, in microseconds each."""
    _need_guest_memfd()
    count = lab.amount(_EXITS, 200)

    def ours(vcpu: VcpuFd) -> float:
        began = time.perf_counter()
        for _ in range(count):
            if vcpu.run() != ExitReason.IO:
                _expect_io(vcpu.kvm_run.exit_reason)
        return (time.perf_counter() - began) / count * 1e6

    with one_core():
        pairs = alternate(
            lambda: lab.run("kvm_guest", "exits", count)[0] / count / 1e3,
            lambda: _to_first_exit(ours),
            lab.rounds(_ROUNDS),
        )
    figure = pairs.figure("exit and re-entry, /dev/kvm", "us", within(3))
    yield figure
    above = figure.ours - (figure.floor or 0)
    yield Figure(
        "exit and re-entry, /dev/kvm, above C", "us", None, above, None, below(12, "under 12 us")
    )


def machines(lab: Lab) -> Iterator[Figure]:
    """Time whole VMs from open to close, in microseconds each."""
    _need_guest_memfd()
    count = lab.amount(_MACHINES, 2)

    def ours() -> float:
        began = time.perf_counter()
        for _ in range(count):
            _to_first_exit(lambda _: 0)
        return (time.perf_counter() - began) / count * 1e6

    with one_core():
        pairs = alternate(
            lambda: lab.run("kvm_guest", "machines", count)[0] / count / 1e3,
            ours,
            lab.rounds(_ROUNDS),
        )
    yield pairs.figure("VM, slots, vCPU, first exit, tear down, /dev/kvm", "us", within(3))


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {
    "kvm-exit": exits,
    "kvm-machine": machines,
}
