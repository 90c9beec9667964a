"""A VM on the software engine, in the test's own process.

Guests are machine code, shown with their disassembly.
"""

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from restrictedmem.abi import memory
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.abi.memory import PUNCH
from restrictedmem.consumer import Bound
from restrictedmem.consumer.memfd_file import MemfdFile
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine_vcpu import EngineVcpu, EngineVcpus
from restrictedmem.kvm.half import SharedFiles, SharedHalf, forbid_shrinking
from restrictedmem.kvm.memslot import MemfdHalf, Memslot
from restrictedmem.kvm.mmu import Mmu
from restrictedmem.kvm.software.code import CodePages
from restrictedmem.kvm.software.software_vcpu import SoftwareVcpu
from restrictedmem.kvm.software.turns import Turns
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.protocol import guest_abi
from restrictedmem.protocol.exits import Exit, Shutdown
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, gfn_t, pgoff_t

PRIVATE: Final = guest_abi.PRIVATE_BASE
SHARED: Final = guest_abi.SHARED_BASE
PAGES: Final = 64
#: The address where guests start, the page that rdi points to, and the end of their stack.
CODE: Final = PRIVATE + 0x1000
DATA: Final = PRIVATE + 0x8000
STACK: Final = PRIVATE + 0x7000
#: An address that no slot covers.
DEVICE: Final = 0xD000_0000
HALTED: Final = Shutdown(13)
DEADLINE: Final = 20.0


def machine_code(*instructions: str) -> bytes:
    return bytes.fromhex("".join(instructions))


@dataclass
class Machine:
    """A VM in this process: private memory in a restricted file, a shared window, and a notifier.

    The notifier connects the file and the vCPUs.
    """

    file: RestrictedFile
    mmu: Mmu
    vcpus: EngineVcpus
    engines: list[SoftwareVcpu]
    private: Memslot
    shared: Memslot

    @property
    def vcpu(self) -> EngineVcpu:
        """Return the first vCPU."""
        return self.vcpus.all[0]

    @property
    def engine(self) -> SoftwareVcpu:
        return self.engines[0]

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.mmu.expect_end(self.private.memfd_half)
        self.vcpus.drop(*self.mmu.invalidate_start(self.private.memfd_half, PageRange(start, end)))

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.mmu.invalidate_end(self.private.memfd_half, PageRange(start, end))

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("no page was lost")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0

    def punch(self, gpa: int, size: int = PAGE_SIZE) -> None:
        self.file.fallocate(PUNCH, gpa - PRIVATE, size)

    def put(self, gpa: int, data: bytes) -> None:
        self.private.memfd_half.half.write(gpa - PRIVATE, data)

    def word(self, gpa: int) -> int:
        slot = self.private if gpa >= PRIVATE else self.shared
        half = slot.memfd_half.half if slot.private else slot.shared
        assert half is not None
        offset = gpa - (slot.base_gfn << PAGE_SHIFT)
        return int.from_bytes(half.mapping.memory[offset : offset + 8], "little")

    def start(self, code: bytes, at: int = CODE, vcpu: int = 0) -> None:
        self.put(at, code)
        # Drop earlier translations of this page: the emulator does not notice the host's stores.
        self.engines[vcpu].drop(gfn_t(at >> PAGE_SHIFT), gfn_t((at >> PAGE_SHIFT) + 1))
        self.engines[vcpu].set_regs(kvm_regs(rip=at, rsp=STACK - vcpu * 256, rdi=DATA, rsi=vcpu))

    def run_once(self) -> Exit | None:
        """Enter the guest once, whatever takes it out."""
        self.engine.settle()
        return self.engine.run()

    def set_attributes(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """As ``SoftwareVm`` does it."""
        zapped = self.mmu.set_attributes(slot, start, end, private=private)
        slot.lpage.update(start, end)
        self.vcpus.drop(*zapped)

    def go_on(self, value: int = 0) -> Exit:
        self.engine.complete(value)
        return self.vcpu.run()

    def run(self, code: bytes) -> Exit:
        self.start(code)
        return self.vcpu.run()


def private_half(file: RestrictedFile, pages: int, limit: int | None = None) -> MemfdHalf:
    """Bind to a file of this process, as a BIND reply lets an engine do."""
    fd, sequence = (
        OwnedFd(os.dup(fd)) for fd in (file.backing.fileno(), file.sequence().fd.fileno())
    )
    bound = Bound(1, 1, limit, fd, sequence, flags=0, order=0)
    window = PageRange(pgoff_t(0), pgoff_t(pages))
    return MemfdHalf(MemfdFile(bound), 1, window, unbind=lambda: None)


def shared_half(pages: int) -> SharedHalf:
    with memory.memfd_create("shared") as fd:
        os.ftruncate(fd.fileno(), pages * PAGE_SIZE)
        return SharedHalf(
            SharedFiles(forbid_shrinking).of_fd(fd.fileno(), pages * PAGE_SIZE),
            0,
            pages * PAGE_SIZE,
        )


@contextlib.contextmanager
def make_machine(
    pages: int = PAGES, limit: int | None = None, vcpus: int = 1
) -> Generator[Machine, None, None]:
    file = RestrictedFile(make("v10"), MemfdBacking(limit=limit), Inode.make(0, 0))
    private = Memslot(
        0,
        gfn_t(PRIVATE >> PAGE_SHIFT),
        pages,
        private=private_half(file, pages, limit),
        shared=None,
    )
    private.attributes[:] = bytes([1]) * pages
    shared = Memslot(1, gfn_t(SHARED >> PAGE_SHIFT), 4, private=None, shared=shared_half(4))
    mmu = Mmu(Attributes(Api.V10))
    mmu.add_slot(private)
    mmu.add_slot(shared)
    turns, code, report_page = Turns(), CodePages(), mmap.mmap(-1, PAGE_SIZE)
    engines = [SoftwareVcpu(mmu, report_page, turns, code) for _ in range(vcpus)]
    for engine in engines:
        engine.add_slot(private)
        engine.add_slot(shared)
    machine = Machine(file, mmu, EngineVcpus(), engines, private, shared)
    machine.vcpus.all = tuple(EngineVcpu(engine) for engine in engines)
    file.register_notifier(machine)
    yield machine
    file.unregister_notifier(machine)
    for engine in engines:
        engine.close()
    private.close()
    shared.close()
    file.put()


@contextlib.contextmanager
def running(machine: Machine) -> Generator[list[Exit], None, None]:
    """Run each vCPU in a thread, to its first exit.

    The exit has to come before the block's end plus the deadline.
    """
    found: list[Exit] = []

    def run(vcpu: EngineVcpu) -> None:
        found.append(vcpu.run())

    threads = [threading.Thread(target=run, args=[vcpu], daemon=True) for vcpu in machine.vcpus.all]
    for thread in threads:
        thread.start()
    yield found
    deadline = time.monotonic() + DEADLINE
    for thread in threads:
        thread.join(deadline - time.monotonic())
        assert not thread.is_alive(), (
            f"a guest did not exit within {DEADLINE:g} s; those that did: {found}"
        )
