"""Slots of the kernel's VM, and how each page of an owner's slot comes to show one half or the other."""

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from errno import EINVAL
from typing import Final, Protocol, final

from restrictedmem.abi import memory
from restrictedmem.abi.kvm import KVM_MEMORY_ATTRIBUTE_PRIVATE
from restrictedmem.devkvm import VmFd
from restrictedmem.kvm.kernel import guest_system
from restrictedmem.kvm.kernel.page_tables import USER, WRITABLE, PageTables, entries, no_entries
from restrictedmem.kvm.kernel.private import GuestMemfdHalf
from restrictedmem.kvm.memslot import WRITE, Memslot
from restrictedmem.kvm.whole import begun
from restrictedmem.units import PAGE_SHIFT, gfn_t

#: The owner's halves lie from here on in guest physical memory: past the engine's own slot, and
#: past the APIC's page.
_HALVES: Final = 1 << 32
_ENGINE_SLOT: Final = 0


@final
class KernelSlots:
    """The slots of a VM, each at the first free guest physical address; the guest never sees these, its page tables lead there."""

    def __init__(self, vm: VmFd, own: guest_system.System) -> None:
        """Make the engine's own slot."""
        self._vm = vm
        # In the order of their addresses: where each begins and ends; and below which address there
        # is no gap.
        self._bases: list[int] = []
        self._ends: list[int] = []
        self._full_below = _HALVES
        self._numbers: dict[int, int] = {}
        self._free_numbers: list[int] = []
        vm.set_user_memory_region(_ENGINE_SLOT, 0, guest_system.SIZE, own.address)

    def add(self, size: int, address: int, private: GuestMemfdHalf | None) -> int:
        """Make a slot on memory of this process, on a guest_memfd, or both; returns its guest physical address.

        Raises:
            OSError: EINVAL for a range of a file that another slot shows, or without a free slot;
                ENOMEM.
        """
        base = self._full_below
        place = bisect_left(self._bases, base)
        while place < len(self._bases) and self._bases[place] - base < size:
            base = self._ends[place]
            place += 1
        number = (
            self._free_numbers[-1] if self._free_numbers else _ENGINE_SLOT + 1 + len(self._numbers)
        )
        if private is None:
            self._vm.set_user_memory_region(number, base, size, address)
        else:
            try:
                self._vm.set_user_memory_region2(
                    number,
                    base,
                    size,
                    address,
                    private.file.memfd,
                    private.window.start << PAGE_SHIFT,
                )
            except FileExistsError as error:
                # The word of Linux 7.2 and later for a range that is bound; no slot lies at an
                # address that was chosen here.
                raise OSError(EINVAL, error.strerror) from error
        if self._free_numbers:
            self._free_numbers.pop()
        self._numbers[base] = number
        self._bases.insert(place, base)
        self._ends.insert(place, base + size)
        if base == self._full_below:
            self._full_below = base + size
        return base

    def remove(self, base: int) -> None:
        """Delete the slot at an address."""
        number = self._numbers[base]
        self._vm.delete_memory_region(number)
        del self._numbers[base]
        self._free_numbers.append(number)
        place = bisect_left(self._bases, base)
        del self._bases[place], self._ends[place]
        self._full_below = min(self._full_below, base)

    def base_below(self, gpa: int) -> int:
        """Return where the last slot begins that does so at an address or before it; 0 without one."""
        place = bisect_right(self._bases, gpa)
        return self._bases[place - 1] if place else 0


class Conversion(Protocol):
    """How pages change from one half of a slot to the other. No vCPU is in the guest."""

    def add(self, slot: Memslot) -> None:
        """Put the halves of a slot where the guest's page tables can lead, and let them.

        Raises:
            OSError: as ``KernelSlots.add``; ENOMEM.
        """
        ...

    def convert(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Let a range of pages show one half, and write ``slot.attributes``.

        Raises:
            OSError: ENOMEM, and nothing was changed; after any other exception anything may have
                been.
        """
        ...

    def open_for_copy(
        self, slot: Memslot, start: gfn_t, end: gfn_t
    ) -> AbstractContextManager[None]:
        """Let a vCPU of the engine's write a range of private pages of a slot, read-only or not, meanwhile."""
        ...

    def remove(self, slot: Memslot) -> None:
        """Take a slot away."""
        ...

    def find(self, gpa: int) -> int | None:
        """Return the owner's address of what lies at a guest physical address."""
        ...


def rights_of(slot: Memslot) -> int:
    """Return what the page tables say of a slot's pages."""
    return USER | (WRITABLE if slot.rights & WRITE else 0)


def runs(slot: Memslot, start: gfn_t, end: gfn_t) -> Iterator[tuple[gfn_t, gfn_t, bool]]:
    """Yield the runs of equal attributes in a range of a slot."""
    base = slot.base_gfn
    while start < end:
        private = slot.attributes[start - base]
        change = slot.attributes.find(1 - private, start - base, end - base)
        stop = end if change < 0 else gfn_t(change + base)
        yield start, stop, bool(private)
        start = stop


@final
class ByAddress:
    """Each half is a slot of its own, and the page tables lead to one of them: for kernels without memory attributes.

    KVM's translation of a page goes with the mapping of that page in this process, which is taken
    away for a moment (MADV_DONTNEED: no content is lost). That works for guest_memfd too, whose
    mapping nobody can touch. So a conversion zaps its own pages and no others.
    """

    def __init__(self, slots: KernelSlots, tables: PageTables) -> None:
        self._slots = slots
        self._tables = tables
        #: Guest physical addresses of the shared and of the private half, and whose each is.
        self._halves: dict[Memslot, tuple[int | None, int | None]] = {}
        self._owners: dict[int, Memslot] = {}

    def add(self, slot: Memslot) -> None:
        """Make a slot for each half (``Conversion``)."""
        npages = slot.end_gfn - slot.base_gfn
        size = npages << PAGE_SHIFT
        private = shared = None
        with ExitStack() as undo:
            if slot.private is not None:
                half = guest_memfd_half(slot)
                private = self._slots.add(size, half.address, half)
                undo.callback(self._slots.remove, private)
            if slot.shared is not None:
                shared = self._slots.add(size, slot.shared.address, None)
                undo.callback(self._slots.remove, shared)
            # Last: a slot that the kernel refuses takes no tables, which are never given back.
            self._tables.reserve(slot.base_gfn << PAGE_SHIFT, npages)
            undo.pop_all()
        self._halves[slot] = shared, private
        self._owners.update({base: slot for base in (shared, private) if base is not None})
        try:
            for start, end, is_private in runs(slot, slot.base_gfn, slot.end_gfn):
                self._tables.write(
                    start << PAGE_SHIFT, self._entries(slot, start, end, private=is_private)
                )
        except BaseException:
            self.remove(slot)
            raise

    def convert(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Lead to the other half, and zap the one that was shown (``Conversion``)."""
        leading, attributes = (
            self._entries(slot, start, end, private=private),
            bytes([private]) * (end - start),
        )
        with begun():
            self._tables.write(start << PAGE_SHIFT, leading)
            self._zap(slot, start, end, private=private)
            slot.attributes[start - slot.base_gfn : end - slot.base_gfn] = attributes

    @contextmanager
    def open_for_copy(self, slot: Memslot, start: gfn_t, end: gfn_t) -> Generator[None]:
        """Change the entries, and zap what KVM made of them (``Conversion``)."""
        if slot.rights & WRITE:
            yield
            return
        leading = self._entries(slot, start, end, private=True, rights=USER | WRITABLE)
        with begun():
            self._tables.write(start << PAGE_SHIFT, leading)
            yield
            self._tables.write(start << PAGE_SHIFT, self._entries(slot, start, end, private=True))
            self._zap(slot, start, end, private=False)

    @staticmethod
    def _zap(slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        first, length = start - slot.base_gfn << PAGE_SHIFT, end - start << PAGE_SHIFT
        if private and slot.shared is not None:
            slot.shared.mapping.madvise(mmap.MADV_DONTNEED, first, length)
        elif not private and slot.private is not None:
            mapping = guest_memfd_half(slot).mapping
            if mapping is not None:
                mapping.madvise(mmap.MADV_DONTNEED, first, length)

    def _entries(
        self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool, rights: int = 0
    ) -> bytes:
        half = self._halves[slot][private]
        if half is None:
            return no_entries(end - start)
        return entries(
            half + (start - slot.base_gfn << PAGE_SHIFT), end - start, rights or rights_of(slot)
        )

    def remove(self, slot: Memslot) -> None:
        """Delete its slots, and with them KVM's translations (``Conversion``)."""
        self._tables.unmap(slot.base_gfn << PAGE_SHIFT, slot.end_gfn - slot.base_gfn)
        for half in self._halves.pop(slot):
            if half is not None:
                self._slots.remove(half)
                del self._owners[half]

    def find(self, gpa: int) -> int | None:
        """Return the owner's address of what lies at a guest physical address (``Conversion``)."""
        return _find(gpa, self._slots.base_below(gpa), self._owners)


@final
class ByAttribute:
    """Both halves are one slot of the kernel's, which picks one by the page's memory attribute (KVM_SET_MEMORY_ATTRIBUTES).

    The page tables only say where there is a half to be seen; the kernel zaps what it converts.
    Where KVM emulates an instruction it reads the shared half even if the page is private: an owner
    could put other instructions there. So that half is out of reach as long.
    """

    def __init__(self, vm: VmFd, slots: KernelSlots, tables: PageTables) -> None:
        self._vm = vm
        self._slots = slots
        self._tables = tables
        self._bases: dict[Memslot, int] = {}
        self._owners: dict[int, Memslot] = {}

    def add(self, slot: Memslot) -> None:
        """Make one slot, and write the attributes of its pages (``Conversion``)."""
        npages = slot.end_gfn - slot.base_gfn
        private = guest_memfd_half(slot) if slot.private is not None else None
        base = self._slots.add(
            npages << PAGE_SHIFT, slot.shared.address if slot.shared else 0, private
        )
        try:
            # Last: a slot that the kernel refuses takes no tables, which are never given back.
            self._tables.reserve(slot.base_gfn << PAGE_SHIFT, npages)
        except BaseException:
            self._slots.remove(base)
            raise
        self._bases[slot], self._owners[base] = base, slot
        try:
            for start, end, is_private in runs(slot, slot.base_gfn, slot.end_gfn):
                self.convert(slot, start, end, private=is_private)
        except BaseException:
            self.remove(slot)
            raise

    def convert(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Write the kernel's attributes (``Conversion``)."""
        gpa, attributes = (
            self._bases[slot] + (start - slot.base_gfn << PAGE_SHIFT),
            bytes([private]) * (end - start),
        )
        missing = (slot.private if private else slot.shared) is None
        leading = no_entries(end - start) if missing else entries(gpa, end - start, rights_of(slot))
        # ENOMEM comes before the kernel changes anything.
        if private:
            _hide(slot, start, end)
        try:
            self._vm.set_memory_attributes(
                gpa, end - start << PAGE_SHIFT, KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
            )
        except OSError:
            for first, last, was_private in runs(slot, start, end):
                if not was_private:
                    _show(slot, first, last)
            raise
        with begun():
            if not private:
                _show(slot, start, end)
            self._tables.write(start << PAGE_SHIFT, leading)
            slot.attributes[start - slot.base_gfn : end - slot.base_gfn] = attributes

    @contextmanager
    def open_for_copy(self, slot: Memslot, start: gfn_t, end: gfn_t) -> Generator[None]:
        """Change the entries, and have the kernel zap what it made of them (``Conversion``)."""
        if slot.rights & WRITE:
            yield
            return
        gpa, size = (
            self._bases[slot] + (start - slot.base_gfn << PAGE_SHIFT),
            end - start << PAGE_SHIFT,
        )
        with begun():
            self._tables.write(start << PAGE_SHIFT, entries(gpa, end - start, USER | WRITABLE))
            yield
            self._tables.write(start << PAGE_SHIFT, entries(gpa, end - start, rights_of(slot)))
            for attribute in (0, KVM_MEMORY_ATTRIBUTE_PRIVATE):
                self._vm.set_memory_attributes(gpa, size, attribute)

    def remove(self, slot: Memslot) -> None:
        """Delete its slot; attributes belong to addresses and would stay (``Conversion``)."""
        npages = slot.end_gfn - slot.base_gfn
        self._tables.unmap(slot.base_gfn << PAGE_SHIFT, npages)
        base = self._bases.pop(slot)
        self._slots.remove(base)
        del self._owners[base]
        self._vm.set_memory_attributes(base, npages << PAGE_SHIFT, 0)
        _show(slot, slot.base_gfn, slot.end_gfn)

    def find(self, gpa: int) -> int | None:
        """Return the owner's address of what lies at a guest physical address (``Conversion``)."""
        return _find(gpa, self._slots.base_below(gpa), self._owners)


def _hide(slot: Memslot, start: gfn_t, end: gfn_t) -> None:
    """Keep this process, and KVM in it, from the shared half of pages; in vain before Linux 6.15.

    Raises:
        OSError: ENOMEM.
    """
    _guard(slot, start, end, memory.MADV_GUARD_INSTALL)


def _show(slot: Memslot, start: gfn_t, end: gfn_t) -> None:
    """Let it reach them again."""
    _guard(slot, start, end, memory.MADV_GUARD_REMOVE)


def _guard(slot: Memslot, start: gfn_t, end: gfn_t, advice: int) -> None:
    if slot.shared is not None:
        try:
            slot.shared.mapping.madvise(
                advice, start - slot.base_gfn << PAGE_SHIFT, end - start << PAGE_SHIFT
            )
        except OSError as error:
            if error.errno != EINVAL:
                raise


def guest_memfd_half(slot: Memslot) -> GuestMemfdHalf:
    """Return the private half of a slot of this engine."""
    assert isinstance(slot.private, GuestMemfdHalf)
    return slot.private


def _find(gpa: int, base: int, owners: dict[int, Memslot]) -> int | None:
    """Return the owner's address of what lies at a guest physical address, at ``base`` or behind it."""
    slot = owners.get(base)
    if slot is None or gpa >= base + (slot.end_gfn - slot.base_gfn << PAGE_SHIFT):
        return None
    return gpa - base + (slot.base_gfn << PAGE_SHIFT)
