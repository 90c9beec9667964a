"""One VM on the software engine: private memory is the restricted file's own memfd, and the MMU is ours."""

from typing import Final, final

from restrictedmem.kvm.engine import Binder
from restrictedmem.kvm.memslot import MemfdHalf, Memslot
from restrictedmem.kvm.mmu import Mmu
from restrictedmem.kvm.software.vcpu import SoftwareVcpu
from restrictedmem.kvm.vcpu import Vcpus
from restrictedmem.units import PAGE_SHIFT, PageRange, gfn_t, pgoff_t


@final
class SoftwareVm:
    """Slots and vCPUs of one VM on Unicorn (``Engine``)."""

    name: Final = "software"

    def __init__(self, binder: Binder, vcpus: Vcpus) -> None:
        """Make a VM without slots; ``vcpus`` is what to stop when memory goes away."""
        self.mmu = Mmu()
        self._binder = binder
        self._vcpus = vcpus
        self._engines: list[SoftwareVcpu] = []

    def bind(self, token: bytes, window: PageRange) -> MemfdHalf:
        """Map a window of the file's memfd (``Engine``)."""
        bound = self._binder.bind(token)
        try:
            half = MemfdHalf(bound, window, unbind=lambda: self._binder.unbind(bound.number))
        except BaseException:
            bound.memfd.close()
            bound.sequence.close()
            self._binder.unbind(bound.number)
            raise
        half.half.lock()
        return half

    def add_slot(self, slot: Memslot) -> None:
        """Let every vCPU reach a slot (``Engine``)."""
        self.mmu.slots = (*self.mmu.slots, slot)
        for engine in self._engines:
            engine.add_slot(slot)

    def remove_slot(self, slot: Memslot) -> None:
        """Make every vCPU forget a slot (``Engine``)."""
        self.mmu.slots = tuple(other for other in self.mmu.slots if other is not slot)
        for engine in self._engines:
            engine.remove_slot(slot)

    def set_attributes(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Write attributes and zap (``Engine``)."""
        self.mmu.set_attributes(slot, start, end, private=private)
        self._vcpus.drop(start, end)

    def invalidate_start(self, binding: int, span: PageRange) -> None:
        """Zap what shows a range of the file (``Engine``)."""
        slot = self._slot_of(binding)
        if slot is not None:
            self._vcpus.drop(*self.mmu.invalidate_start(slot, span))

    def invalidate_end(self, binding: int, span: PageRange) -> None:
        """Let faults work again (``Engine``)."""
        slot = self._slot_of(binding)
        if slot is not None:
            self.mmu.invalidate_end(slot, span)

    def _slot_of(self, binding: int) -> Memslot | None:
        """Return the slot that a binding belongs to; None while the slot is being made or after it was deleted: it has no entries then."""
        return next((slot for slot in self.mmu.slots if slot.private is not None and slot.private.binding == binding), None)

    def launch_update(self, slot: Memslot, gpa: int, data: bytes) -> None:
        """Take pages of the memfd and write them (``Engine``)."""
        private = slot.memfd_half
        start = slot.pgoff_of(gpa >> PAGE_SHIFT)
        private.pages.get_pages(PageRange(start, pgoff_t(start + (len(data) >> PAGE_SHIFT))))
        private.half.write(gpa - (slot.base_gfn << PAGE_SHIFT), data)

    def create_vcpu(self, number: int) -> SoftwareVcpu:
        """Make a vCPU (``Engine``)."""
        del number
        engine = SoftwareVcpu(self.mmu)
        for slot in self.mmu.slots:
            engine.add_slot(slot)
        self._engines.append(engine)
        return engine

    def statistics(self) -> dict[str, object]:
        """Return counts of pages, faults and invalidations (``Engine``)."""
        counters = self.mmu.counters
        halves = [slot.memfd_half for slot in self.mmu.slots if slot.private is not None]
        return {
            "pages_taken": sum(half.pages.taken for half in halves),
            "faults_private": counters.faults_private,
            "faults_shared": counters.faults_shared,
            "fault_retries": counters.retries,
            "invalidations": counters.invalidations,
            "entries_zapped": counters.zapped,
            "pages_freed": counters.freed,
            "tlb_fills": sum(engine.fills for engine in self._engines),
        }
