"""One VM on the software engine: its private memory is the restricted file's memfd.

The MMU is ours.
"""

import mmap
from collections.abc import Iterator
from errno import ESTALE
from functools import partial
from typing import Final, final

from restrictedmem.abi.kvm import Cap
from restrictedmem.abi.memory import mincore
from restrictedmem.consumer import Bound
from restrictedmem.consumer.memfd_file import MemfdFile
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine import Binder
from restrictedmem.kvm.engine_vcpu import EngineVcpus
from restrictedmem.kvm.lpage import Level
from restrictedmem.kvm.memslot import MemfdHalf, Memslot
from restrictedmem.kvm.mmu import Mmu
from restrictedmem.kvm.software.code import CodePages
from restrictedmem.kvm.software.software_vcpu import HYPERCALL, SoftwareVcpu
from restrictedmem.kvm.software.turns import Turns
from restrictedmem.kvm.whole import begun
from restrictedmem.platform.platform import NoPlatform, Platform
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, gfn_t, pgoff_t

#: Each vCPU is an emulator of its own, of some 4 MiB, and vCPUs take turns.
_CAPABILITIES: Final = {
    Cap.NR_VCPUS: 1,
    Cap.MAX_VCPUS: 64,
    Cap.MAX_VCPU_ID: 64,
    Cap.PRE_FAULT_MEMORY: 1,
}


@final
class SoftwareVm:
    """Slots and vCPUs of one VM on Unicorn (``Engine``)."""

    def __init__(
        self,
        binder: Binder,
        vcpus: EngineVcpus,
        attributes: Attributes,
        trace: Trace,
        platform: Platform,
        not_kernel: str = "",
    ) -> None:
        """Make a VM without slots.

        ``vcpus`` are the vCPUs to stop when memory goes away. Faults go to ``trace``.
        ``not_kernel`` is why ``auto`` did not take the kernel engine, for the statistics.
        """
        self._not_kernel = not_kernel
        self.mmu = Mmu(attributes, trace, platform)
        self._platform = platform
        self._turns = Turns()
        self._code = CodePages()
        self._report_page = mmap.mmap(-1, PAGE_SIZE)
        self._binder = binder
        self._vcpus = vcpus
        self._engines: list[SoftwareVcpu] = []
        #: The files that slots show, by inode number; a file that is closed may stay.
        self._files: dict[int, MemfdFile] = {}
        #: By binding, from BIND until UNBIND has been answered: longer than there is a slot.
        self._halves: dict[int, MemfdHalf] = {}
        #: The bindings of each file, by its inode number.
        self._bindings: dict[int, set[int]] = {}

    @property
    def name(self) -> str:
        """The name that ``--engine`` has for the engine (``Engine``)."""
        return "software"

    @property
    def hypercall_code(self) -> bytes:
        """The code that is on the hypercall page (``Engine``)."""
        return HYPERCALL

    @property
    def report_page(self) -> memoryview:
        """The report page that every vCPU can reach (``Engine``)."""
        return memoryview(self._report_page)

    def bind(self, token: bytes, window: PageRange) -> MemfdHalf:
        """Map a window of the file's memfd (``Engine``)."""
        return self._binder.bind(token, window, partial(self._take_over, window))

    def bind_again(self, ino: int, window: PageRange) -> MemfdHalf:
        """Map another window of a file's memfd (``Engine``)."""
        bindings = self._bindings.get(ino)
        if not bindings:
            raise OSError(ESTALE, "no slot shows that restricted file: a token has to say which")
        binding = next(iter(bindings))
        return self._binder.bind_again(
            binding, window, partial(self._show, self._halves[binding].file, window)
        )

    def _take_over(self, window: PageRange, bound: Bound) -> MemfdHalf:
        file = self._files.get(bound.ino)
        if file is None or file.closed or file.pinned:
            file = MemfdFile(bound)
        else:
            bound.memfd.close()
            bound.sequence.close()
        return self._show(file, window, bound.number)

    def _show(self, file: MemfdFile, window: PageRange, binding: int) -> MemfdHalf:
        if file.pinned and file.used:
            file = file.copy()
        file.get()
        try:
            half = MemfdHalf(file, binding, window, unbind=partial(self._unbind, binding))
        finally:
            # By now the half has its own references.
            file.put()
        self._files[file.ino] = file
        half.half.lock()
        self._halves[binding] = half
        self._bindings.setdefault(file.ino, set()).add(binding)
        return half

    def _unbind(self, binding: int) -> None:
        half = self._halves[binding]
        self._find_freed(half, half.window)
        # If the design invalidates at teardown, invalidations come meanwhile.
        self._binder.unbind(binding)
        del self._halves[binding]
        self._bindings[half.ino].remove(binding)
        if not self._bindings[half.ino]:
            del self._bindings[half.ino]

    def add_slot(self, slot: Memslot) -> None:
        """Let every vCPU reach a slot (``Engine``)."""
        self.mmu.add_slot(slot)
        try:
            for engine in self._engines:
                engine.add_slot(slot)
        except BaseException:
            self.remove_slot(slot)
            raise

    def remove_slot(self, slot: Memslot) -> None:
        """Make every vCPU forget a slot (``Engine``)."""
        self.mmu.remove_slot(slot)
        for engine in self._engines:
            engine.remove_slot(slot)

    def destroy(self) -> None:
        """Do nothing: a file is unbound with its slots (``Engine``)."""

    def set_attributes(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Write attributes and zap (``Engine``)."""
        zapped = self.mmu.set_attributes(slot, start, end, private=private)
        with begun():
            self._vcpus.drop(*zapped)

    def invalidate_start(self, binding: int, span: PageRange, order: int | None) -> None:
        """Zap what shows a range of the file, then return it to the platform (``Engine``)."""
        half = self._halves[binding]
        self.mmu.expect_end(half)
        shown = half.window.clip(span)
        self._find_freed(half, shown)
        self._vcpus.drop(*self.mmu.invalidate_start(half, span))
        self._platform.invalidate(half.ino, shown, order)
        # This does not wait for the end: a moment before the end is heard, faults work again, and
        # what they map is the guest's.
        self._platform.freed(half.ino, shown)

    def invalidate_end(self, binding: int, span: PageRange, order: int | None) -> None:
        """Let faults on a range work again (``Engine``)."""
        half = self._halves.get(binding)
        # The service does not wait for the answer to an end, so the binding may be gone already.
        if half is not None:
            self.mmu.invalidate_end(half, span)

    def convert(self, binding: int, span: PageRange, *, private: bool) -> None:
        """Show another half of a guest_memfd's pages."""
        half = self._halves.get(binding)
        if half is not None:
            self._vcpus.drop(*self.mmu.convert(half, span, private=private))

    def _find_freed(self, half: MemfdHalf, span: PageRange) -> None:
        """Tell the platform of pages that were freed without telling the engine."""
        if not isinstance(self._platform, NoPlatform):
            for gone in _gone(half, span):
                self._platform.freed(half.ino, gone)
                half.pages.forget(gone)

    def error(self, binding: int, span: PageRange) -> None:
        """Zap pages in the slot that shows them, and refuse them (``Engine``).

        The file's other bindings get calls of their own.
        """
        half = self._halves.get(binding)
        if half is not None:
            self._vcpus.drop(*self.mmu.lose(half, span))

    def page_count(self, binding: int, span: PageRange) -> int:
        """Count the pages of a range that are taken (``Engine``)."""
        slot = self.mmu.slot_of_binding(binding)
        return 0 if slot is None else slot.memfd_half.pages.count(span)

    def launch_update(self, slot: Memslot, gpa: int, data: bytes) -> None:
        """Take pages of the memfd and write them (``Engine``)."""
        private = slot.memfd_half
        start = slot.pgoff_of(gpa >> PAGE_SHIFT)
        span = PageRange(start, pgoff_t(start + (len(data) >> PAGE_SHIFT)))
        # What can fail comes first: the content of a call that failed would not be measured.
        self._take(private, span)
        # The order is 0 whatever the folio's is, because SNP_LAUNCH_UPDATE works by 4 KiB.
        self._platform.prepare(private.ino, span, gfn_t(gpa >> PAGE_SHIFT), 0)
        private.half.write(gpa - (slot.base_gfn << PAGE_SHIFT), data)

    def read_private(self, slot: Memslot, gpa: int, size: int) -> bytes:
        """Read the memfd, where a hole reads as zero (``Engine``)."""
        return slot.memfd_half.read(gpa - (slot.base_gfn << PAGE_SHIFT), size)

    def write_private(self, slot: Memslot, gpa: int, data: bytes) -> None:
        """Take pages of the memfd and write them (``Engine``).

        Also drop what was translated from them.
        """
        private = slot.memfd_half
        first, last = gfn_t(gpa >> PAGE_SHIFT), gfn_t((gpa + len(data) - 1 >> PAGE_SHIFT) + 1)
        self._take(private, PageRange(slot.pgoff_of(first), slot.pgoff_of(last)))
        private.half.write(gpa - (slot.base_gfn << PAGE_SHIFT), data)
        self._vcpus.drop(first, last)

    def inject_failure(self, slot: Memslot, gfn: gfn_t) -> None:
        """Zap a page in every slot that shows it, and refuse it (``Engine``)."""
        pgoff = slot.pgoff_of(gfn)
        span = PageRange(pgoff, pgoff_t(pgoff + 1))
        self._take(slot.memfd_half, span)
        for half in list(self._halves.values()):
            if half.ino == slot.memfd_half.ino:
                self._vcpus.drop(*self.mmu.lose(half, span))

    def _take(self, half: MemfdHalf, span: PageRange) -> None:
        """Take pages for the owner.

        The owner waits for a punch as it would for the file's lock (filemap_invalidate_lock).
        """
        while True:
            try:
                half.pages.get_pages(span)
            except BlockingIOError:
                self.mmu.wait_settled(unless=lambda: False)
            else:
                return

    def check_extension(self, cap: int) -> int:
        """Answer for this engine (``Engine``)."""
        return _CAPABILITIES.get(Cap(cap), 0) if cap in set(Cap) else 0

    def create_vcpu(self, number: int) -> SoftwareVcpu:
        """Make a vCPU (``Engine``)."""
        if number == len(self._engines):
            engine = SoftwareVcpu(self.mmu, self._report_page, self._turns, self._code)
            try:
                for slot in self.mmu.slots:
                    engine.add_slot(slot)
            except BaseException:
                engine.close()
                raise
            self._engines.append(engine)
        return self._engines[number]

    def platform_report(self) -> dict[str, object]:
        """Return what the platform reports (``Engine``)."""
        return self._platform.report()

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
            "mapped_4k": self.mmu.mapped(Level.PAGE),
            "mapped_2m": self.mmu.mapped(Level.PMD),
            "mapped_1g": self.mmu.mapped(Level.PUD),
            "splits": counters.splits,
            "pages_freed": counters.freed,
            "tlb_fills": sum(engine.fills for engine in self._engines),
            **({"not_kernel": self._not_kernel} if self._not_kernel else {}),
        }


def _gone(half: MemfdHalf, span: PageRange) -> Iterator[PageRange]:
    """Yield pages of a range that were taken and never given up, and are gone from the file.

    A page that was swapped out looks the same to mincore(2). ``lock`` keeps pages in memory; where
    it could not, it says so.
    """
    start, pages = half.window.start, half.pages
    present = mincore(
        half.half.address + (span.start - start << PAGE_SHIFT), len(span) << PAGE_SHIFT
    )
    first = present.find(0)
    while first >= 0:
        end = present.find(1, first)
        last = len(span) if end < 0 else end
        hole = PageRange(pgoff_t(span.start + first), pgoff_t(span.start + last))
        if pages.count(hole):
            yield from _taken(half, hole)
        first = present.find(0, last)


def _taken(half: MemfdHalf, span: PageRange) -> Iterator[PageRange]:
    """Yield the runs of pages of a range that are taken."""
    start = span.start
    for pgoff in (*range(span.start, span.end), None):
        if pgoff is None or not half.pages.count(PageRange(pgoff_t(pgoff), pgoff_t(pgoff + 1))):
            end = span.end if pgoff is None else pgoff_t(pgoff)
            if start < end:
                yield PageRange(start, end)
            start = pgoff_t(end + 1)
