"""A VM of /dev/kvm under test, with guest_memfds of one kind."""

import mmap
import re
import struct
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, final

from restrictedmem.abi import kvm
from restrictedmem.abi.kvm import Cap, ExitReason
from restrictedmem.abi.kvm_x86 import kvm_segment
from restrictedmem.conformance import guest
from restrictedmem.conformance.machines import (
    DATA,
    DATA_SIZE,
    GUEST_SLOT,
    PRIVATE,
    SLOT,
    Machine,
    spell_exit,
)
from restrictedmem.conformance.outcome import Errno
from restrictedmem.conformance.steps import Steps
from restrictedmem.devkvm import Kvm, VcpuFd, address_of
from restrictedmem.protocol import exits
from restrictedmem.units import PAGE_SIZE, U64_MAX

# Guest physical addresses in the guest's slot.
_PML4, _PDPT, _LOW, _HIGH = 0x1000, 0x2000, 0x3000, 0x4000
_CODE: Final = 0x8000
_SLOT_SIZE: Final = 0x10000

_PRESENT_WRITE_USER, _LARGE = 7, 1 << 7
_LARGE_SIZE: Final = 2 << 20
_CR0_PE_MP_ET_NE_WP_PG: Final = 0x8001_0033
_CR4_PAE_OSFXSR: Final = 0x220
_EFER_LME_LMA: Final = 0x500
_RFLAGS: Final = 2
_IOPL3: Final = 3 << 12
#: The least that KVM_SET_NR_MMU_PAGES takes.
_MMU_PAGES: Final = 64


def processor_flags() -> set[str]:
    """Return the features of the processor that /proc/cpuinfo names."""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(found[1].split()) if found else set()


@final
class KernelMachine(Machine):
    """A VM of one type, whose guest_memfds have the flags of a column.

    The guest runs in long mode. Without virtualisation in hardware, KVM emulates CPL 0 and does not
    use private memory for it, so the guest is at CPL 3 there.
    """

    def __init__(self, steps: Steps, device: Kvm, kind: int, flags: int) -> None:
        super().__init__(steps, mmap.mmap(-1, DATA_SIZE), flags)
        self._device, self._kind = device, kind
        self._vm = device.create_vm(kind)
        self._stack = ExitStack()
        self._stack.callback(self._vm.close)
        self._vcpu: VcpuFd | None = None
        self._space = mmap.mmap(-1, _SLOT_SIZE)
        processor = processor_flags()
        self._user = not processor & {"svm", "vmx"}
        self._vmcall = guest.VMMCALL if "svm" in processor else guest.VMCALL

    def lacks(self, need: str) -> str:
        """Say what the machine lacks of a need of a case."""
        mapped = bool(self.flags & kvm.GUEST_MEMFD_FLAG_MMAP)
        shared = mapped and bool(self.flags & kvm.GUEST_MEMFD_FLAG_INIT_SHARED)
        attributes = bool(self._vm.check_extension(Cap.MEMORY_ATTRIBUTES) & PRIVATE)
        if need == "in-place":
            return self._lacks_conversion()
        missing = {
            "attributes": (not attributes, "KVM_CAP_MEMORY_ATTRIBUTES is 0 for this VM"),
            "halves": (
                not attributes or mapped,
                "with MMAP every access reaches the guest_memfd"
                if mapped
                else "KVM_CAP_MEMORY_ATTRIBUTES is 0 for this VM",
            ),
            "private-memory": (
                not attributes and not mapped,
                "without MMAP and without attributes no access reaches the guest_memfd",
            ),
            "mapping": (not shared, "the host cannot touch this guest_memfd"),
            "pre-fault": (
                not self._vm.check_extension(Cap.PRE_FAULT_MEMORY),
                "KVM_CAP_PRE_FAULT_MEMORY is 0",
            ),
            "hypercall": (self._user, "the guest is at CPL 3, where KVM refuses hypercalls"),
        }
        lacking, why = missing[need]
        return why if lacking else ""

    def _lacks_conversion(self) -> str:
        """Say why a page of a file cannot be converted in place, "" if it can."""
        try:
            with self._vm.create_guest_memfd(PAGE_SIZE, self.flags) as file:
                wanted = kvm.kvm_memory_attributes2(offset=0, size=PAGE_SIZE, attributes=PRIVATE)
                kvm.KVM_SET_MEMORY_ATTRIBUTES2(file, wanted)
        except OSError as error:
            return error.strerror or ""
        return ""

    def another(self) -> "KernelMachine":
        """Make another VM of the kind."""
        return KernelMachine(self.steps, self._device, self._kind, self.flags)

    def close(self) -> None:
        """End the VM and close its files."""
        if self._vcpu is not None:
            self._vcpu.close()
        self._close_files()
        self._stack.close()

    def descriptor(self, kind: str) -> int:
        """Return the descriptor of the device or of the VM."""
        return {"device": self._device, "vm": self._vm}[kind].fileno()

    def _create(self, size: int, flags: int) -> int:
        return self._vm.create_guest_memfd(size, flags).detach()

    def _creation(self, size: int, flags: int) -> str:
        return f"ioctl(vm, KVM_CREATE_GUEST_MEMFD, {{size={size:#x}, flags={flags:#x}}})"

    def end(self) -> None:
        """Close vCPU and VM."""
        self.steps.note("close(vcpu), close(vm)")
        if self._vcpu is not None:
            self._vcpu.close()
        self._vm.close()

    def at(self, address: int) -> int:
        """Return the place in ``memory`` that an address would have."""
        return address - address_of(self.memory)

    def set_region(
        self,
        slot: int = SLOT,
        gpa: int = DATA,
        size: int = 0,
        *,
        shared: int | None = None,
        private: int | None = None,
        offset: int = 0,
        flags: int | None = None,
        old: bool = False,
    ) -> None:
        """Call KVM_SET_USER_MEMORY_REGION, or its second version for a private half."""
        bits = (kvm.KVM_MEM_GUEST_MEMFD if private is not None else 0) if flags is None else flags
        address = 0 if shared is None else address_of(self.memory) + shared
        first = old or private is None
        name = "KVM_SET_USER_MEMORY_REGION" + ("" if first else "2")
        text = (
            f"ioctl(vm, {name}, {{slot={slot}, flags={bits:#x}, gpa={gpa:#x}, size={size:#x},"
            f" userspace_addr={_place(shared)}"
        )
        if first:
            self.steps.call(
                text + "})",
                lambda: self._vm.set_user_memory_region(slot, gpa, size, address & U64_MAX, bits),
            )
            return
        fd = -1 if private is None else private
        self.steps.call(
            f"{text}, guest_memfd={self._name(fd)}, offset={offset:#x}}})",
            lambda: self._vm.set_user_memory_region2(
                slot, gpa, size, address & U64_MAX, fd, offset, bits
            ),
        )

    def _set_attributes(self, request: kvm.kvm_memory_attributes) -> None:
        kvm.KVM_SET_MEMORY_ATTRIBUTES(self._vm, request)

    def _check_extension(self, capability: int) -> int:
        return self._vm.check_extension(capability)

    def _pre_fault(self, request: kvm.kvm_pre_fault_memory) -> int:
        kvm.KVM_PRE_FAULT_MEMORY(self._running, request)
        return request.size

    # The guest.

    @property
    def _running(self) -> VcpuFd:
        if self._vcpu is None:
            self._vcpu = self._vm.create_vcpu()
        return self._vcpu

    @property
    def _code(self) -> memoryview:
        return memoryview(self._space)[_CODE:]

    @property
    def _base(self) -> int:
        return _CODE

    @property
    def _call(self) -> bytes:
        return self._vmcall

    def _boot(self) -> None:
        self._vm.set_user_memory_region(GUEST_SLOT, 0, _SLOT_SIZE, address_of(self._space))
        large = DATA_SIZE // _LARGE_SIZE
        for table, entry, value in (
            (_PML4, 0, _PDPT),
            (_PDPT, 0, _LOW),
            (_PDPT, DATA >> 30, _HIGH),
            (_LOW, 0, _LARGE),
            *((_HIGH, index, DATA + index * _LARGE_SIZE | _LARGE) for index in range(large)),
        ):
            struct.pack_into("=Q", self._space, table + 8 * entry, value | _PRESENT_WRITE_USER)
        if not self._user:
            self._vm.enable_cap(Cap.EXIT_HYPERCALL, 1 << kvm.KVM_HC_MAP_GPA_RANGE)
        vcpu = self._running
        vcpu.set_cpuid2(self._device.get_supported_cpuid())
        sregs = vcpu.get_sregs()
        level = 3 if self._user else 0
        code = kvm_segment(
            limit=0xFFFF_FFFF, selector=0x30 | level, type=11, present=1, dpl=level, s=1, l=1, g=1
        )
        data = kvm_segment(
            limit=0xFFFF_FFFF, selector=0x28 | level, type=3, present=1, dpl=level, db=1, s=1, g=1
        )
        sregs.cs = code
        sregs.ss = sregs.ds = sregs.es = sregs.fs = sregs.gs = data
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = (
            _CR0_PE_MP_ET_NE_WP_PG,
            _PML4,
            _CR4_PAE_OSFXSR,
            _EFER_LME_LMA,
        )
        vcpu.set_sregs(sregs)
        vcpu.set_regs(
            kvm.kvm_regs(rip=_CODE + guest.START, rflags=_RFLAGS | (_IOPL3 if self._user else 0))
        )

    def _run_bare(self) -> str:
        self._vm.set_nr_mmu_pages(_MMU_PAGES)
        return self._enter(0)

    def _enter(self, value: int) -> str:
        vcpu = self._running
        run = vcpu.kvm_run
        match run.exit_reason:
            case ExitReason.MMIO if not run.exit.mmio.is_write:
                run.exit.mmio.data[:] = list(value.to_bytes(8, "little"))
            case ExitReason.HYPERCALL:
                run.exit.hypercall.ret = value
            case _:
                pass
        while True:
            try:
                vcpu.run()
                return _exit_of(vcpu)
            except InterruptedError:
                # A guest that cannot even fetch its code gets the same exception for ever.
                pending = vcpu.get_vcpu_events().exception
                if pending.injected:
                    return f"EXCEPTION {pending.nr}"
            except OSError as error:
                # The kernel has said nothing but the errno.
                return str(Errno(error.errno or 0))

    def _accept_kicks(self) -> None:
        self._running.accept_kicks()

    def _kick(self) -> None:
        # The thread may have ended, or not begun.
        with suppress(OSError):
            self._running.kick()


def _place(shared: int | None) -> str:
    """Return an offset in the owner's memory, in C."""
    return "NULL" if shared is None else f"memory + {shared & U64_MAX:#x}"


def _exit_of(vcpu: VcpuFd) -> str:
    """Spell the exit of a vCPU."""
    run = vcpu.kvm_run
    match run.exit_reason:
        case ExitReason.IO:
            io = run.exit.io
            return spell_exit(exits.PortOut(io.port, io.size, 0))
        case ExitReason.MMIO:
            mmio = run.exit.mmio
            if not mmio.is_write:
                return spell_exit(exits.MmioRead(mmio.phys_addr, mmio.len))
            data = int.from_bytes(bytes(mmio.data[: mmio.len]), "little")
            return spell_exit(exits.MmioWrite(mmio.phys_addr, mmio.len, data))
        case ExitReason.MEMORY_FAULT:
            fault = run.exit.memory_fault
            return spell_exit(exits.MemoryFault(fault.flags, fault.gpa, fault.size, vcpu.run_errno))
        case ExitReason.HYPERCALL:
            call = run.exit.hypercall
            gpa, pages, attributes, *_ = call.args
            return spell_exit(exits.Hypercall(call.nr, (gpa, pages, attributes, 0)))
        case ExitReason.INTERNAL_ERROR:
            return f"INTERNAL_ERROR {run.exit.internal.suberror}"
        case reason:
            return ExitReason(reason).name
