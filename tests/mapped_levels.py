"""A software VM over memory whose folios a test makes: which level maps a page shows."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from restrictedmem.abi.memory import PUNCH
from restrictedmem.consumer import Bound
from restrictedmem.consumer.memfd_file import MemfdFile
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.lpage import Level
from restrictedmem.kvm.memslot import LEVEL_SHIFT, MemfdHalf, Memslot
from restrictedmem.kvm.mmu import Fault, Mmu
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.units import PAGE_SHIFT, PageRange, gfn_t, pgoff_t

EFAULT, ENOSPC = 14, 28
PMD, PUD = Level.PMD.pages, Level.PUD.pages
BASE: Final = 1 << 20


@dataclass
class Folios:
    """Pages without memory (``Allocator``).

    If a whole block is allocated that had no page, it becomes a folio of ``order``, unless
    ``order`` is 0.
    """

    order: int
    pages: int
    room: int = 1 << 40
    meanwhile: Callable[[], None] = lambda: None
    #: By order, the folios there are, by their numbers.
    folios: dict[int, set[int]] = field(default_factory=lambda: {9: set[int](), 18: set[int]()})

    def __post_init__(self) -> None:
        self.present = bytearray(self.pages)

    def allocate(self, offset: int, length: int) -> None:
        start, end = offset >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT
        if end - start > self.room:
            raise OSError(ENOSPC, "no room")
        if self.order:
            size = 1 << self.order
            for number in range(-(-start // size), end // size):
                if not any(self.present[number * size : (number + 1) * size]):
                    self.folios[self.order].add(number)
        self.present[start:end] = b"\1" * (end - start)
        self.meanwhile()

    def order_of(self, pgoff: pgoff_t) -> int:
        return next((order for order in (18, 9) if pgoff >> order in self.folios[order]), 0)

    def release(self, offset: int, length: int) -> None:
        pass

    def punch(self, span: PageRange) -> None:
        """As shmem does it: a folio that loses a part is none any more."""
        for order, folios in self.folios.items():
            folios -= set(range(span.start >> order, (span.end - 1 >> order) + 1))
        self.present[span.start : span.end] = bytes(len(span))

    def close(self) -> None:
        pass


@dataclass
class Host:
    """A platform that takes note of what is about to be mapped, or refuses it (``Platform``)."""

    refuses: bool = False
    prepared: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])

    def prepare(self, ino: int, span: PageRange, gfn: gfn_t, order: int) -> None:
        assert (ino, (gfn - span.start) % (1 << order), span.start % (1 << order)) == (1, 0, 0)
        if self.refuses:
            raise OSError(EFAULT, "a rule forbids it")
        self.prepared.append((span.start, span.end, order))

    def invalidate(self, ino: int, span: PageRange, order: int | None) -> None:
        raise AssertionError("the MMU does not call it")

    def freed(self, ino: int, span: PageRange) -> None:
        raise AssertionError("the MMU does not call it")

    def report(self) -> dict[str, object]:
        return {}


@dataclass
class Vm:
    """One private slot without a guest.

    ``tlb`` stands for a vCPU's cached translations, a byte a page, and drops pages when told to.
    """

    file: RestrictedFile
    folios: Folios
    host: Host
    mmu: Mmu
    slot: Memslot

    def __post_init__(self) -> None:
        self.base = self.slot.base_gfn
        self.tlb = bytearray(len(self.slot.entries))

    @property
    def half(self) -> MemfdHalf:
        return self.slot.memfd_half

    def touch(self, index: int) -> Fault:
        """Access a page as a vCPU does, which caches all of a large translation."""
        fault = (
            Fault.MAPPED
            if self.slot.entries[index]
            else self.mmu.fault(self.slot, self.base + index)
        )
        if fault is Fault.MAPPED:
            first, last = self.slot.leaf(index)
            self.tlb[first:last] = b"\1" * (last - first)
        return fault

    def fetch(self, index: int) -> None:
        self.touch(index)
        self.mmu.protect_code(self.slot, self.base + index)

    def drop(self, start: int, end: int) -> None:
        self.tlb[start - self.base : end - self.base] = bytes(end - start)

    def convert(self, first: int, last: int, *, private: bool) -> None:
        start, end = gfn_t(self.base + first), gfn_t(self.base + last)
        self.drop(*self.mmu.set_attributes(self.slot, start, end, private=private))
        self.slot.lpage.update(start, end)

    def lose(self, index: int) -> None:
        pgoff = self.slot.pgoff_of(self.base + index)
        self.drop(*self.mmu.lose(self.half, PageRange(pgoff, pgoff_t(pgoff + 1))))

    def punch(self, first: int, last: int) -> None:
        span = self.slot.span_of(first, last)
        self.file.fallocate(PUNCH, span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        del order
        self.mmu.expect_end(self.half)
        self.drop(*self.mmu.invalidate_start(self.half, PageRange(start, end)))
        self.folios.punch(PageRange(start, end))

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        del order
        self.mmu.invalidate_end(self.half, PageRange(start, end))

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("losses are told to the MMU here")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0

    def level(self, index: int) -> Level | None:
        entry = self.slot.entries[index]
        return Level((entry >> LEVEL_SHIFT) + 1) if entry else None

    def mapped(self) -> tuple[int, int, int]:
        """Return how many translations there are of 4 KiB, 2 MiB and 1 GiB."""
        return self.mmu.mapped(Level.PAGE), self.mmu.mapped(Level.PMD), self.mmu.mapped(Level.PUD)


@contextmanager
def made(
    pages: int = 2 * PMD,
    *,
    order: int = 9,
    first: int = 0,
    shift: int = 0,
    offered: int | None = None,
    trace: Trace | None = None,
) -> Generator[Vm, None, None]:
    """Make a VM whose slot begins ``first`` pages after an aligned page.

    The slot shows the file from page ``first + shift`` on. Pages come as folios of ``order``, or as
    ``offered`` if that differs.
    """
    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    fd, sequence = (
        OwnedFd(os.dup(fd)) for fd in (file.backing.fileno(), file.sequence().fd.fileno())
    )
    window = PageRange(pgoff_t(first + shift), pgoff_t(first + shift + pages))
    bound = Bound(1, 1, None, fd, sequence, flags=0, order=order)
    half = MemfdHalf(MemfdFile(bound), 1, window, unbind=lambda: None)
    folios = Folios(order if offered is None else offered, window.end)
    half.pages.close()
    half.pages = Pages(folios, window)
    slot = Memslot(0, gfn_t(BASE + first), pages, private=half, shared=None)
    slot.attributes[:] = b"\1" * pages
    host = Host()
    mmu = Mmu(Attributes(Api.V10), trace, host)
    mmu.add_slot(slot)
    vm = Vm(file, folios, host, mmu, slot)
    file.register_notifier(vm)
    try:
        yield vm
    finally:
        file.unregister_notifier(vm)
        slot.close()
        file.put()
