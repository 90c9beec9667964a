"""The engine's own part of a guest, which the processor needs beside the owner's slots.

It has descriptor tables, exception handlers, hypercall and report page, stacks and page tables. All
of it lies in ordinary memory of this process, in one slot from guest physical address 0 on. So a
guest physical address there is an offset in the slot. A guest at CPL3 can reach the hypercall page
and the report page. The rest is mapped beyond the owner's addresses, for the processor alone
(U/S = 0).

An exception takes the vCPU to CPL0, into a handler. The handler only executes an OUT to the port of
its vector's number. By this exit the engine learns vector, error code and stack frame. No handler
ever returns by itself; the engine puts the vCPU back.
"""

import mmap
import struct
from collections.abc import Iterable
from typing import Final, final

from restrictedmem.abi.kvm_x86 import kvm_cpuid_entry2, kvm_dtable, kvm_segment, kvm_sregs
from restrictedmem.devkvm import address_of
from restrictedmem.kvm.kernel.page_tables import NO_EXECUTE, USER, WRITABLE, PageTables
from restrictedmem.protocol.guest_abi import GPA_BITS, HYPERCALL_PAGE, REPORT_PAGE
from restrictedmem.units import PAGE_SIZE

#: Bytes of the slot. Most of it is room for page tables, each of which serves 2 MiB of guest
#: addresses. Memory is taken only when it is used.
SIZE: Final = 64 << 20

# Offsets in the slot.
_GDT: Final = 0 * PAGE_SIZE
_IDT: Final = 1 * PAGE_SIZE
_HANDLERS: Final = 2 * PAGE_SIZE
_HYPERCALL: Final = 3 * PAGE_SIZE
_REPORT: Final = 4 * PAGE_SIZE
_COPY: Final = 5 * PAGE_SIZE
_STAGING: Final = 16 * PAGE_SIZE
STAGING_SIZE: Final = 64 * PAGE_SIZE
_VCPUS: Final = 128 * PAGE_SIZE
_TABLES: Final = 2048 * PAGE_SIZE

# For each vCPU: a task state segment with its I/O permission bitmap, and behind them a page of
# stack for exceptions.
_VCPU_SIZE: Final = 4 * PAGE_SIZE
MAX_VCPUS: Final = (_TABLES - _VCPUS) // _VCPU_SIZE
_TSS_SIZE: Final = 0x68
_RSP0: Final = 4
_IO_MAP_BASE: Final = 0x66
_IO_MAP_SIZE: Final = (1 << 16) // 8

# Linear addresses: of the slot at CPL0, and of staging memory while the engine copies from it.
_SYSTEM: Final = 1 << GPA_BITS
STAGING: Final = 1 << GPA_BITS + 1
COPY: Final = STAGING + STAGING_SIZE

#: The code that the guest calls: ``out 0xf4, al; ret``.
HYPERCALL_CODE: Final = bytes.fromhex("e6f4c3")
HYPERCALL_PORT: Final = 0xF4
#: ``rep movsq; out 0xf4, al``: this copies, and exits when it is done.
_COPY_CODE: Final = bytes.fromhex("f348a5e6f4")

_KERNEL_CODE: Final = 0x08
_USER_DATA: Final = 0x1B
_USER_CODE: Final = 0x23
#: Null and 64-bit code. A guest at CPL3 can load no segment from here, so every selector but null
#: is #GP.
_DESCRIPTORS: Final = (0, 0x00AF_9B00_0000_FFFF)
_VECTORS: Final = 256
#: Bytes of a handler: ``out vector, al``, and two to spare.
_HANDLER_SIZE: Final = 4
#: A gate of a 64-bit interrupt, present, DPL 3. So INT n with the vector of an exception counts as
#: that exception.
_GATE: Final = struct.Struct("<HHBBHII")
_GATE_TYPE: Final = 0xEE

#: Where SYSCALL leads on a host that cannot turn it off. CPL3 cannot reach the page, so the guest
#: gets a #PF with this address.
SYSCALL_TARGET: Final = _SYSTEM + _HANDLERS + 6 * _HANDLER_SIZE

# Registers (Intel SDM 2.5, 2.2.1), as Linux has them for its processes. Under PVM a guest is such a
# process, and sees no other values.
_CR0: Final = 0x8005_0033  # PG, AM, WP, NE, ET, MP, PE
_CR4: Final = 0x620  # OSXMMEXCPT, OSFXSR, PAE
_UMIP: Final = 1 << 11
_FSGSBASE: Final = 1 << 16
_EFER: Final = 0xD00  # NXE, LMA, LME
#: RFLAGS of a guest at its start, as of every process: only IF is set. No interrupt ever comes.
USER_FLAGS: Final = 0x202
IOPL_3: Final = 3 << 12


def vector_at(rip: int) -> int | None:
    """Return the vector whose handler contains ``rip``, None if none does."""
    offset = rip - _SYSTEM - _HANDLERS
    return offset // _HANDLER_SIZE if 0 <= offset < _VECTORS * _HANDLER_SIZE else None


@final
class System:
    """The slot's memory, and the page tables in it."""

    def __init__(self) -> None:
        """Allocate the slot and fill it."""
        self.memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        #: Address of the memory in this process.
        self.address = address_of(self.memory)
        #: The page that the guest finds at REPORT_PAGE.
        self.report_page = memoryview(self.memory)[_REPORT : _REPORT + PAGE_SIZE]
        self.tables = PageTables(self.memory, _TABLES, SIZE)
        #: RFLAGS and CR4 that a guest starts with.
        self.user_flags = USER_FLAGS
        self.cr4 = _CR4
        self._fill()
        for page, rights in ((_GDT, 0), (_IDT, 0), (_HANDLERS, 0)):
            self._map(_SYSTEM + page, page, 1, rights)
        self._map(HYPERCALL_PAGE, _HYPERCALL, 1, USER)
        self._map(REPORT_PAGE, _REPORT, 1, USER | WRITABLE | NO_EXECUTE)
        # The vCPU that copies has page tables of its own. Their root leads to the guest's, too.
        self._copy_tables = PageTables(self.memory, _VCPUS - 8 * PAGE_SIZE, _VCPUS)
        self._copy_tables.reserve(STAGING, 1)
        self._copy_tables.map(STAGING, _STAGING, STAGING_SIZE // PAGE_SIZE, USER)
        self._copy_tables.map(COPY, _COPY, 1, USER)

    def _map(self, linear: int, page: int, npages: int, rights: int) -> None:
        self.tables.reserve(linear, npages)
        self.tables.map(linear, page, npages, rights)

    def _fill(self) -> None:
        for index, descriptor in enumerate(_DESCRIPTORS):
            struct.pack_into("<Q", self.memory, _GDT + 8 * index, descriptor)
        for vector in range(_VECTORS):
            handler = _HANDLERS + _HANDLER_SIZE * vector
            self.memory[handler : handler + 2] = bytes((0xE6, vector))
            to = _SYSTEM + handler
            gate = _IDT + _GATE.size * vector
            _GATE.pack_into(
                self.memory,
                gate,
                to & 0xFFFF,
                _KERNEL_CODE,
                0,
                _GATE_TYPE,
                to >> 16 & 0xFFFF,
                to >> 32,
                0,
            )
        self.memory[_HYPERCALL : _HYPERCALL + len(HYPERCALL_CODE)] = HYPERCALL_CODE
        self.memory[_COPY : _COPY + len(_COPY_CODE)] = _COPY_CODE

    def use(self, cpuid: Iterable[kvm_cpuid_entry2]) -> None:
        """Turn on UMIP and FSGSBASE, if the processor has them.

        With UMIP, instructions such as SGDT cannot show the engine's tables.
        """
        for leaf in cpuid:
            if (leaf.function, leaf.index) == (7, 0):
                self.cr4 |= (_UMIP if leaf.ecx >> 2 & 1 else 0) | (_FSGSBASE if leaf.ebx & 1 else 0)

    def stage(self, data: bytes) -> None:
        """Put content into staging memory, and let a copying vCPU reach the guest's memory."""
        self.memory[_STAGING : _STAGING + len(data)] = data
        guest, copy = self.tables.root, self._copy_tables.root
        # The owner's addresses, and those of the descriptor tables.
        used = 8 * ((_SYSTEM >> 39) + 1)
        self.memory[copy : copy + used] = self.memory[guest : guest + used]

    def add_vcpu(self, number: int) -> None:
        """Make a vCPU's task state segment, and map it."""
        tss = _tss(number)
        self._map(_SYSTEM + tss, tss, _VCPU_SIZE // PAGE_SIZE, WRITABLE)
        struct.pack_into("<Q", self.memory, tss + _RSP0, stack_top(number))
        # This allows every port, as IOPL 3 does, which PVM does not give to a guest.
        struct.pack_into("<H", self.memory, tss + _IO_MAP_BASE, _TSS_SIZE)
        self.memory[tss + _TSS_SIZE + _IO_MAP_SIZE] = 0xFF

    def read_stack(self, number: int, rsp: int) -> tuple[int, ...]:
        """Return the words on a vCPU's exception stack."""
        count = (stack_top(number) - rsp) // 8
        return struct.unpack_from(f"<{count}Q", self.memory, rsp - _SYSTEM)

    def sregs(self, base: kvm_sregs, number: int, *, copying: bool = False) -> kvm_sregs:
        """Return the state of a vCPU in long mode at CPL3; the rest is as in ``base``."""
        sregs = kvm_sregs.from_buffer_copy(base)
        enter_user_mode(sregs)
        sregs.ds = sregs.es = sregs.fs = sregs.gs = kvm_segment(type=3, unusable=1)
        sregs.tr = kvm_segment(
            base=_SYSTEM + _tss(number),
            limit=_TSS_SIZE + _IO_MAP_SIZE,
            selector=0x28,
            type=11,
            present=1,
        )
        sregs.ldt = kvm_segment(type=2, unusable=1)
        sregs.gdt = kvm_dtable(base=_SYSTEM + _GDT, limit=8 * len(_DESCRIPTORS) - 1)
        sregs.idt = kvm_dtable(base=_SYSTEM + _IDT, limit=_GATE.size * _VECTORS - 1)
        sregs.cr0, sregs.cr4, sregs.efer = _CR0, self.cr4, _EFER
        sregs.cr3 = self._copy_tables.root if copying else self.tables.root
        return sregs


def enter_user_mode(sregs: kvm_sregs) -> None:
    """Give a vCPU the code and stack segments of CPL3."""
    sregs.cs = kvm_segment(
        limit=0xFFFF_FFFF, selector=_USER_CODE, type=11, present=1, dpl=3, s=1, l=1, g=1
    )
    sregs.ss = kvm_segment(
        limit=0xFFFF_FFFF, selector=_USER_DATA, type=3, present=1, dpl=3, s=1, db=1, g=1
    )


def stack_top(number: int) -> int:
    """Return the linear address at which the exception stack of a vCPU begins."""
    return _SYSTEM + _tss(number) + _VCPU_SIZE


def _tss(number: int) -> int:
    return _VCPUS + _VCPU_SIZE * number
