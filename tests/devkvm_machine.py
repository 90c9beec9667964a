"""A guest on /dev/kvm for tests, in memory of this process.

It is 64-bit code at CPL3, which runs natively everywhere. Page tables and code are in slot 0, from
guest physical address 0 on. A test's slots are at ``DATA``, where 2 MiB are mapped. An OUT ends a
step. It stands in slot 0, because KVM may have to read the instruction itself.
"""

import mmap
import struct
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pytest

from restrictedmem.abi.kvm import ExitReason, kvm_regs
from restrictedmem.abi.kvm_x86 import kvm_segment
from restrictedmem.devkvm import Kvm, VcpuFd, VmFd, address_of

DATA: Final = 4 << 30
CODE: Final = 0x8000
SIZE: Final = 0x10000
DONE: Final = 0x10

#: mov rax, [rdi]; out DONE, al
LOAD: Final = bytes.fromhex("488b07 e610")
#: mov [rdi], rax; out DONE, al
STORE: Final = bytes.fromhex("488907 e610")
#: jmp to itself
SPIN: Final = bytes.fromhex("ebfe")
#: out DONE, al, for ever
OUTS: Final = bytes.fromhex("e610 ebfc")
_PML4, _PDPT, _LOW, _HIGH = 0x1000, 0x2000, 0x3000, 0x4000
_PRESENT_WRITE_USER, _LARGE = 7, 1 << 7
_CODE_SEGMENT = kvm_segment(
    limit=0xFFFF_FFFF, selector=0x33, type=11, present=1, dpl=3, s=1, l=1, g=1
)
_DATA_SEGMENT = kvm_segment(
    limit=0xFFFF_FFFF, selector=0x2B, type=3, present=1, dpl=3, db=1, s=1, g=1
)
_CR0_PE_MP_ET_NE_WP_PG = 0x8001_0033
_CR4_PAE_OSFXSR = 0x220
_EFER_LME_LMA = 0x500
_RFLAGS_IOPL3 = 0x3002


@dataclass(frozen=True, slots=True)
class Machine:
    """A VM with one vCPU at CPL3."""

    kvm: Kvm
    vm: VmFd
    vcpu: VcpuFd
    memory: mmap.mmap

    def start(self, code: bytes, *, rdi: int = DATA, rax: int = 0) -> None:
        """Put code in place and the vCPU at its start."""
        self.memory[CODE : CODE + len(code)] = code
        self.vcpu.set_regs(kvm_regs(rip=CODE, rflags=_RFLAGS_IOPL3, rdi=rdi, rax=rax))

    def port(self) -> int:
        """Run to the next port and return it."""
        assert self.vcpu.run() == ExitReason.IO
        return self.vcpu.kvm_run.exit.io.port

    def load(self, address: int = DATA) -> int:
        """Let the guest read 8 bytes."""
        self.start(LOAD, rdi=address)
        assert self.port() == DONE
        return self.vcpu.get_regs().rax

    def store(self, value: int, address: int = DATA) -> None:
        """Let the guest write 8 bytes."""
        self.start(STORE, rdi=address, rax=value)
        assert self.port() == DONE


@contextmanager
def machine() -> Generator[Machine]:
    with Kvm.open() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        memory = mmap.mmap(-1, SIZE)
        _page_tables(memory)
        vm.set_user_memory_region(0, 0, SIZE, address_of(memory))
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        sregs = vcpu.get_sregs()
        sregs.cs, sregs.ss = _CODE_SEGMENT, _DATA_SEGMENT
        sregs.ds = sregs.es = sregs.fs = sregs.gs = _DATA_SEGMENT
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = (
            _CR0_PE_MP_ET_NE_WP_PG,
            _PML4,
            _CR4_PAE_OSFXSR,
            _EFER_LME_LMA,
        )
        vcpu.set_sregs(sregs)
        yield Machine(kvm, vm, vcpu, memory)


def _page_tables(memory: mmap.mmap) -> None:
    for table, entry, value in (
        (_PML4, 0, _PDPT),
        (_PDPT, 0, _LOW),
        (_PDPT, DATA >> 30, _HIGH),
        (_LOW, 0, _LARGE),
        (_HIGH, 0, DATA | _LARGE),
    ):
        struct.pack_into("=Q", memory, table + 8 * entry, value | _PRESENT_WRITE_USER)


@pytest.fixture
def kvm() -> Generator[Kvm]:
    with Kvm.open() as opened:
        yield opened


@pytest.fixture
def guest() -> Generator[Machine]:
    with machine() as made:
        yield made
