"""Guests on restricted memory, beside the same programs on plain Unicorn."""

import ctypes
import importlib
import mmap
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final

from benchmarks.common import BenchError, Figure, Lab, alternate, at_speed, service, within
from restrictedmem import guests
from restrictedmem.abi import memory
from restrictedmem.kvm.memslot import ALL, READ, WRITE
from restrictedmem.kvm.software.unicorn import MEM_FETCH
from restrictedmem.protocol import exits, guest_abi, vm_wire
from restrictedmem.service.client import Service
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT
from restrictedmem.vmm import elf
from restrictedmem.vmm.boot import SHARED_SIZE
from restrictedmem.vmm.vmm import Vmm

SPIN: Final = elf.parse(guests.path("spin").read_bytes())
#: The offset of a guest's heap in its private memory, and all its bytes besides the heap.
HEAP_OFFSET: Final = ((SPIN.end + PAGE_MASK) & ~PAGE_MASK) - guest_abi.PRIVATE_BASE
OVERHEAD: Final = HEAP_OFFSET + guest_abi.STACK_SIZE


@contextmanager
def spin(started: Service, heap: int, *arguments: str) -> Generator[Vmm]:
    """Make a VM, ready to run, whose guest has ``heap`` bytes of heap."""
    with Vmm(heap + OVERHEAD, started) as vmm:
        vmm.load(SPIN, arguments)
        yield vmm


def run_to_hypercall(vmm: Vmm) -> float:
    """Run to the guest's first hypercall; return the seconds.

    Raises:
        BenchError: the guest stops for another reason.
    """
    began = time.perf_counter()
    found = vmm.vcpus[0].run()
    taken = time.perf_counter() - began
    if not isinstance(found, exits.Hypercall):
        raise BenchError(
            f"the guest stopped: {found}",
            "the guest programs may be broken: scripts/test tests/test_guests.py",
        )
    return taken


def plain_to_hypercall(heap: int, *arguments: str, identity: bool = False) -> float:
    """Run the same guest to its first hypercall on Unicorn alone, and return the seconds.

    The guest's memory is one anonymous mapping. There is no hook; with ``identity`` there is one,
    which maps each address that misses in the TLB to itself. Without paging every page is
    executable, so Unicorn checks at each store whether it overwrites code. The hook can say which
    accesses are to data; those are then faster.
    """
    # Unicorn's binding has no types that a strict type checker accepts.
    unicorn: Any = importlib.import_module("unicorn")
    registers: Any = importlib.import_module("unicorn.x86_const")
    size = heap + OVERHEAD
    content = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    boot = guest_abi.boot_info(
        private_size=size,
        shared_size=SHARED_SIZE,
        heap_base=guest_abi.PRIVATE_BASE + HEAP_OFFSET,
        vcpus=1,
        arguments=arguments,
    )
    content[: len(boot)] = boot
    for segment in SPIN.segments:
        start = segment.gpa - guest_abi.PRIVATE_BASE
        content[start : start + len(segment.data)] = segment.data
    emulator = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    first = ctypes.c_char.from_buffer(content)
    emulator.mem_map_ptr(guest_abi.PRIVATE_BASE, size, unicorn.UC_PROT_ALL, ctypes.addressof(first))
    if identity:
        emulator.ctl_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        emulator.hook_add(unicorn.UC_HOOK_TLB_FILL, _fill_identity)
    emulator.mem_map(guest_abi.SHARED_BASE, SHARED_SIZE)
    emulator.mem_map(guest_abi.HYPERCALL_PAGE, 1 << PAGE_SHIFT)
    emulator.reg_write(registers.UC_X86_REG_RSP, guest_abi.PRIVATE_BASE + size)
    emulator.reg_write(registers.UC_X86_REG_RDI, guest_abi.PRIVATE_BASE)
    emulator.reg_write(registers.UC_X86_REG_RSI, 0)
    began = time.perf_counter()
    emulator.emu_start(SPIN.entry, guest_abi.HYPERCALL_PAGE)
    taken = time.perf_counter() - began
    # Free the emulator before the memory that it maps, and the memory before the next measurement.
    del emulator, first
    content.close()
    return taken


def _fill_identity(_uc: object, address: int, access: int, result: Any, _data: object) -> bool:
    result.paddr = address
    result.perms = ALL if access == MEM_FETCH else READ | WRITE
    return True


def first_touch(lab: Lab) -> Iterator[Figure]:
    """Let a guest write to each page of its heap for the first time."""
    heap = lab.amount(1 << 30, 16 << 20)
    pages = heap >> PAGE_SHIFT
    counted: dict[str, Any] = {}
    with service() as started:

        def ours() -> float:
            with spin(started, heap, "touch") as vmm:
                taken = run_to_hypercall(vmm)
                counted.update(vmm.vm.statistics())
                return taken * 1e6 / pages

        pairs = alternate(
            lambda: plain_to_hypercall(heap, "touch") * 1e6 / pages, ours, lab.rounds(5)
        )
    note = (
        f"{counted['pages_taken']} pages taken at {counted['faults_private']} faults, "
        f"{counted['tlb_fills']} TLB fills"
    )
    yield pairs.figure(
        f"guest's first touch of {heap >> 20} MiB of private memory; a page",
        "µs",
        within(2.5),
        note,
    )


def digest(lab: Lab) -> Iterator[Figure]:
    """Let a guest hash its heap (SHA-256), over and over."""
    heap, amount = 8 << 20, lab.amount(64, 1)
    counted: dict[str, Any] = {}
    with service() as started:

        def ours() -> float:
            with spin(started, heap, "hash", str(amount)) as vmm:
                taken = run_to_hypercall(vmm)
                counted.update(vmm.vm.statistics())
                return taken * 1e3 / amount

        def floor(*, identity: bool) -> float:
            return plain_to_hypercall(heap, "hash", str(amount), identity=identity) * 1e3 / amount

        plain = alternate(lambda: floor(identity=False), ours, lab.rounds(5))
        hooked = alternate(lambda: floor(identity=True), ours, lab.rounds(5))
    note = f"{counted['tlb_fills']} TLB fills over {amount} MiB"
    yield plain.figure("sha256 on warm private memory; a MiB", "ms", at_speed(0.95), note)
    yield hooked.figure("  the same, floor with a hook that fills the TLB", "ms", at_speed(0.95))


def punch_mapped(lab: Lab) -> Iterator[Figure]:
    """Punch all memory that a guest has mapped."""
    heap = lab.amount(1 << 30, 16 << 20)
    with service() as started:

        def ours() -> float:
            with spin(started, heap, "touch") as vmm:
                run_to_hypercall(vmm)
                began = time.perf_counter()
                memory.fallocate(vmm.restricted_fd, memory.PUNCH, HEAP_OFFSET, heap)
                return (time.perf_counter() - began) * 1e3

        pairs = alternate(lambda: lab.run("punch", heap)[0] / 1e6, ours, lab.rounds(5))
    yield pairs.figure(f"punch of {heap >> 20} MiB that a guest has mapped", "ms", within(1.5))


def round_trip(lab: Lab) -> Iterator[Figure]:
    """Exit for a hypercall, answer it, and enter the guest again."""
    count = lab.amount(2000, 50)
    ours_end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reply = 8 + exits.LAYOUT.size
    with theirs:
        echo = subprocess.Popen(
            [lab.program("echo"), str(theirs.fileno()), str(reply)], pass_fds=[theirs.fileno()]
        )
    channel = Channel(ours_end, "echo")
    body = vm_wire.COMPLETION.pack(1)

    def floor() -> float:
        began = time.perf_counter()
        for _ in range(count):
            channel.call(vm_wire.RUN, body)
        return (time.perf_counter() - began) * 1e6 / count

    with service() as started, spin(started, 1 << 20, "echo") as vmm:

        def ours() -> float:
            began = time.perf_counter()
            for _ in range(count):
                # The guest echo reads one byte and writes one, with a hypercall for each.
                vmm.vcpus[0].run(1)
            return (time.perf_counter() - began) * 1e6 / count

        pairs = alternate(floor, ours, lab.rounds(9))
    channel.close()
    echo.wait()
    yield pairs.figure("exit to the owner and back (floor: a socket's round trip)", "µs", within(2))


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {
    "first-touch": first_touch,
    "digest": digest,
    "punch-mapped": punch_mapped,
    "exit": round_trip,
}
