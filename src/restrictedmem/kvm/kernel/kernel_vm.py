"""One VM on /dev/kvm: its slots, its private memory and its vCPUs (``Engine``)."""

from contextlib import ExitStack, suppress
from errno import EINVAL, ENODEV, EOPNOTSUPP
from typing import Final, final

from restrictedmem.abi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    KVM_X86_SW_PROTECTED_VM,
    Cap,
)
from restrictedmem.abi.kvm_x86 import KVM_X86_QUIRK_SLOT_ZAP_ALL
from restrictedmem.devkvm import Kvm, VcpuFd, VmFd
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine import Binder
from restrictedmem.kvm.engine_vcpu import EngineVcpus
from restrictedmem.kvm.kernel.guest_system import (
    HYPERCALL_CODE,
    IOPL_3,
    MAX_VCPUS,
    STAGING_SIZE,
    System,
)
from restrictedmem.kvm.kernel.kernel_vcpu import KernelVcpu
from restrictedmem.kvm.kernel.private import GuestMemfdHalf, PrivateFiles
from restrictedmem.kvm.kernel.slots import (
    ByAddress,
    ByAttribute,
    Conversion,
    KernelSlots,
    guest_memfd_half,
)
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.kvm.memslots import Memslots
from restrictedmem.kvm.whole import begun
from restrictedmem.units import PAGE_SHIFT, PageRange, gfn_t

#: Capabilities that every VM here needs.
_NEEDED: Final = (Cap.USER_MEMORY2, Cap.MEMORY_FAULT_INFO, Cap.GUEST_MEMFD, Cap.SYNC_REGS)


@final
class KernelVm:
    """Slots and vCPUs of one VM on /dev/kvm (``Engine``)."""

    def __init__(
        self, binder: Binder, vcpus: EngineVcpus, attributes: Attributes, kvm: Kvm, *, debug: bool
    ) -> None:
        """Make a VM without slots; the caller keeps ``kvm``.

        ``vcpus`` are the vCPUs to hold while pages change halves.

        Raises:
            OSError: ENODEV for a capability that the kernel lacks; the errnos of KVM_CREATE_VM.
        """
        self._vcpus = vcpus
        self._attributes = attributes
        self._slots = Memslots()
        self._invalidations = 0
        self._cpuid = kvm.get_supported_cpuid()
        self._system = System()
        self._system.use(self._cpuid)
        with ExitStack() as stack:
            self._vm, flags = new_vm(kvm, debug=debug)
            stack.enter_context(self._vm)
            self._conversion = _conversion(self._vm, self._system, flags)
            self._files = PrivateFiles(self._vm, binder, flags)
            stack.callback(self._files.close)
            self._made = stack.enter_context(ExitStack())
            self._numbers: dict[int, VcpuFd] = {}
            # This vCPU copies the owner's content in, before ``create_vcpu`` hands it out.
            self._first = self._make_vcpu(0)
            if self._first.needs_iopl():
                self._system.user_flags |= IOPL_3
            self._engines = [self._first]
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Close every descriptor; for a process that outlives its VM."""
        self._resources.close()

    @property
    def name(self) -> str:
        """The name that ``--engine`` has for the engine (``Engine``)."""
        return "kernel"

    @property
    def hypercall_code(self) -> bytes:
        """The code that is on the hypercall page (``Engine``)."""
        return HYPERCALL_CODE

    @property
    def report_page(self) -> memoryview:
        """The report page that every vCPU can reach (``Engine``)."""
        return self._system.report_page

    def _make_vcpu(self, number: int) -> KernelVcpu:
        # KVM gives out each number once, even if the vCPU then could not be made here.
        if number not in self._numbers:
            self._numbers[number] = self._made.enter_context(self._vm.create_vcpu(number))
        return KernelVcpu(
            number,
            self._numbers[number],
            self._system,
            cpuid=self._cpuid,
            find=self._conversion.find,
            flags_of=self._flags_of,
            read=self._read,
        )

    def _read(self, gpa: int, size: int) -> bytes:
        """Return a piece of what a guest page shows; nothing if the engine cannot see it."""
        gfn = gpa >> PAGE_SHIFT
        slot = self._slots.at(gfn)
        if slot is None:
            return b""
        start = gpa - (slot.base_gfn << PAGE_SHIFT)
        if not slot.attributes[gfn - slot.base_gfn]:
            return (
                b""
                if slot.shared is None
                else bytes(slot.shared.mapping.memory[start : start + size])
            )
        with suppress(OSError):
            return b"" if slot.private is None else guest_memfd_half(slot).read(start, size)
        return b""

    def _flags_of(self, gpa: int) -> int:
        """Return the flags of a memory fault at an owner's address."""
        gfn = gpa >> PAGE_SHIFT
        slot = self._slots.at(gfn)
        private = (
            self._attributes.forbids_mmio(gfn)
            if slot is None
            else slot.attributes[gfn - slot.base_gfn]
        )
        return KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0

    def bind(self, token: bytes, window: PageRange) -> GuestMemfdHalf:
        """Show a window of the file's guest_memfd (``Engine``)."""
        return self._files.bind(token, window)

    def bind_again(self, ino: int, window: PageRange) -> GuestMemfdHalf:
        """Show another window of a file's guest_memfd (``Engine``)."""
        return self._files.bind_again(ino, window)

    def add_slot(self, slot: Memslot) -> None:
        """Let the guest's page tables lead to a slot (``Engine``).

        Raises:
            OSError: EINVAL for a shared half of huge pages. KVM's translations are dropped by
                MADV_DONTNEED, which does nothing to a part of a huge page. The guest could still
                reach shared pages that were made private.
        """
        if slot.shared is not None and slot.shared.file.hugetlb:
            raise OSError(
                EINVAL, "the shared half must not be of huge pages (hugetlbfs) on the kernel engine"
            )
        self._conversion.add(slot)
        try:
            self._slots.add(slot)
        except BaseException:
            self._conversion.remove(slot)
            raise

    def remove_slot(self, slot: Memslot) -> None:
        """Delete a slot (``Engine``)."""
        self._conversion.remove(slot)
        self._slots.remove(slot)

    def destroy(self) -> None:
        """Let go of the files, and of what the VM had in them (``Engine``)."""
        self._files.unbind()

    def set_attributes(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Let pages change halves, while every vCPU is kept out of the guest (``Engine``)."""
        first, last = start - slot.base_gfn, end - slot.base_gfn
        if slot.attributes.count(private, first, last) == last - first:
            return
        with self._vcpus.held():
            self._conversion.convert(slot, start, end, private=private)

    def invalidate_start(self, binding: int, span: PageRange, order: int | None) -> None:
        """Free the range in the guest_memfd, which takes it from every vCPU (``Engine``)."""
        self._invalidations += self._files.punch(binding, span)

    def invalidate_end(self, binding: int, span: PageRange, order: int | None) -> None:
        """Do nothing: a page touched after it was freed is a new one already (``Engine``)."""

    def error(self, binding: int, span: PageRange) -> None:
        """Do nothing: only the machine loses pages of a guest_memfd (``Engine``)."""

    def page_count(self, binding: int, span: PageRange) -> int:
        """Count the pages that the guest_memfd holds (``Engine``)."""
        return self._files.resident(binding, span)

    def launch_update(self, slot: Memslot, gpa: int, data: bytes) -> None:
        """Let a vCPU copy pages in, because nobody else can write them (``Engine``)."""
        # What can fail comes first: content that is there only in part would not be measured.
        guest_memfd_half(slot).allocate(gpa - (slot.base_gfn << PAGE_SHIFT), len(data))
        for start in range(0, len(data), STAGING_SIZE):
            part = data[start : start + STAGING_SIZE]
            self._system.stage(part)
            first = gpa + start >> PAGE_SHIFT
            with (
                begun(),
                self._conversion.open_for_copy(
                    slot, gfn_t(first), gfn_t(first + (len(part) >> PAGE_SHIFT))
                ),
            ):
                self._first.copy(gpa + start, len(part) // 8)

    def read_private(self, slot: Memslot, gpa: int, size: int) -> bytes:
        """Read the mapping, if it can be read (``Engine``)."""
        return guest_memfd_half(slot).read(gpa - (slot.base_gfn << PAGE_SHIFT), size)

    def write_private(self, slot: Memslot, gpa: int, data: bytes) -> None:
        """Write the mapping, if it can be written (``Engine``)."""
        guest_memfd_half(slot).write(gpa - (slot.base_gfn << PAGE_SHIFT), data)

    def inject_failure(self, slot: Memslot, gfn: gfn_t) -> None:
        """Refuse: the kernel has no such call for guest_memfd (``Engine``)."""
        raise OSError(EOPNOTSUPP, "memory failure cannot be injected into guest_memfd")

    def check_extension(self, cap: int) -> int:
        """Answer for this engine (``Engine``)."""
        match cap:
            case Cap.NR_VCPUS:
                return min(self._vm.check_extension(cap), MAX_VCPUS)
            case Cap.MAX_VCPUS | Cap.MAX_VCPU_ID:
                return MAX_VCPUS
            case _:
                return 0

    def create_vcpu(self, number: int) -> KernelVcpu:
        """Make a vCPU (``Engine``)."""
        if number == len(self._engines):
            self._engines.append(self._make_vcpu(number))
        return self._engines[number]

    def platform_report(self) -> dict[str, object]:
        """Return nothing: KVM does not tell what it maps (``Engine``)."""
        return {}

    def statistics(self) -> dict[str, object]:
        """Return the kernel's counts; it does not count faults for us (``Engine``)."""
        freed = self._files.freed_pages
        return {
            "pages_taken": self._files.resident_pages() + freed,
            "pages_freed": freed,
            "invalidations": self._invalidations,
        }


def _conversion(vm: VmFd, own: System, flags: int) -> Conversion:
    slots = KernelSlots(vm, own)
    return (
        ByAddress(slots, own.tables)
        if flags & GUEST_MEMFD_FLAG_MMAP
        else ByAttribute(vm, slots, own.tables)
    )


def new_vm(kvm: Kvm, *, debug: bool) -> tuple[VmFd, int]:
    """Make a VM, and choose the flags of its guest_memfds.

    The flags are 0 if the kernel has memory attributes. A VM that may be debugged has no
    attributes, because only without them can its memory be read.

    Raises:
        OSError: ENODEV when KVM lacks anything that the engine needs.
    """
    if not debug and kvm.check_extension(Cap.VM_TYPES) >> KVM_X86_SW_PROTECTED_VM & 1:
        vm = kvm.create_vm(KVM_X86_SW_PROTECTED_VM)
        if vm.check_extension(Cap.MEMORY_ATTRIBUTES) & KVM_MEMORY_ATTRIBUTE_PRIVATE:
            return vm, 0
        vm.close()
    vm = kvm.create_vm()
    flags = GUEST_MEMFD_FLAG_MMAP | (GUEST_MEMFD_FLAG_INIT_SHARED if debug else 0)
    missing = [cap.name for cap in _NEEDED if not vm.check_extension(cap)]
    if vm.check_extension(Cap.GUEST_MEMFD_FLAGS) & flags != flags:
        missing.append(Cap.GUEST_MEMFD_FLAGS.name)
    if missing:
        vm.close()
        raise OSError(
            ENODEV,
            f"/dev/kvm: KVM_CAP_{', KVM_CAP_'.join(missing)} missing (Linux 6.18), "
            "and no memory attributes",
        )
    if vm.check_extension(Cap.DISABLE_QUIRKS2) & KVM_X86_QUIRK_SLOT_ZAP_ALL:
        vm.enable_cap(Cap.DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL)
    return vm, flags
