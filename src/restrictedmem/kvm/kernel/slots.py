"""The slots of the kernel's VM, and how pages of an owner's slot come to show a half."""

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

#: The owner's halves lie from here on in guest physical memory: behind the engine's own slot, and
#: behind the APIC's page.
_HALVES: Final = 1 << 32
_ENGINE_SLOT: Final = 0


@final
class KernelSlots:
    """The slots of a VM, each at the first free guest physical address.

    The guest never sees these addresses: its page tables lead there.
    """

    def __init__(self, vm: VmFd, own: guest_system.System) -> None:
        """Make the engine's own slot."""
        self._vm = vm
        # In the order of their addresses: where each slot begins, and where it ends. Below
        # ``_full_below`` there is no gap.
        self._bases: list[int] = []
        self._ends: list[int] = []
        self._full_below = _HALVES
        self._numbers: dict[int, int] = {}
        self._free_numbers: list[int] = []
        vm.set_user_memory_region(_ENGINE_SLOT, 0, guest_system.SIZE, own.address)

    def add(self, size: int, address: int, private: GuestMemfdHalf | None) -> int:
        """Make a slot on memory of this process, on a guest_memfd, or both.

        Return its guest physical address.

        Raises:
            OSError: EINVAL for a range of a file that another slot shows, or when no slot is free;
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
                # Linux 7.2 and later use EEXIST for a range that is bound. It cannot be for the
                # address, because the address was chosen here.
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
        """Return where the last slot at or before an address begins; 0 without one."""
        place = bisect_right(self._bases, gpa)
        return self._bases[place - 1] if place else 0


class Conversion(Protocol):
    """The way in which pages change from one half of a slot to the other.

    Preconditions: no vCPU is in the guest.
    """

    def add(self, slot: Memslot) -> None:
        """Put a slot's halves where the guest's page tables can lead, and let them do so.

        Raises:
            OSError: as ``KernelSlots.add``; ENOMEM.
        """
        ...

    def convert(self, slot: Memslot, start: gfn_t, end: gfn_t, *, private: bool) -> None:
        """Let a range of pages show one half, and write ``slot.attributes``.

        Raises:
            OSError: ENOMEM, and nothing was changed. After any other exception the range may have
                been changed in part.
        """
        ...

    def open_for_copy(
        self, slot: Memslot, start: gfn_t, end: gfn_t
    ) -> AbstractContextManager[None]:
        """Let a vCPU of the engine write a range of private pages of a slot meanwhile.

        The slot may be read-only.
        """
        ...

    def remove(self, slot: Memslot) -> None:
        """Remove a slot."""
        ...

    def find(self, gpa: int) -> int | None:
        """Return the owner's address of a guest physical address, None without one."""
        ...


def rights_of(slot: Memslot) -> int:
    """Return the rights that the page tables give to a slot's pages."""
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
    """Conversion for kernels without memory attributes: each half is a slot of its own.

    The page tables lead to one of the two slots. KVM's translation of a page goes with the mapping
    of that page in this process, so that mapping is taken away for a moment (MADV_DONTNEED: no
    content is lost). This works for guest_memfd, too, whose mapping nobody can touch. So a
    conversion zaps its own pages and no others.
    """

    def __init__(self, slots: KernelSlots, tables: PageTables) -> None:
        self._slots = slots
        self._tables = tables
        #: The guest physical addresses of the shared and of the private half of each slot; and the
        #: slot of each such address.
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
            # This comes last: tables are never given back, so a refused slot must not take any.
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
        """Lead to the other half, and zap the half that was shown (``Conversion``)."""
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
        """Delete both halves' slots, and with them KVM's translations (``Conversion``)."""
        self._tables.unmap(slot.base_gfn << PAGE_SHIFT, slot.end_gfn - slot.base_gfn)
        for half in self._halves.pop(slot):
            if half is not None:
                self._slots.remove(half)
                del self._owners[half]

    def find(self, gpa: int) -> int | None:
        """Return the owner's address of a guest physical address (``Conversion``)."""
        return _find(gpa, self._slots.base_below(gpa), self._owners)


@final
class ByAttribute:
    """Conversion by memory attributes: both halves are one slot of the kernel.

    The kernel picks a half by the page's attribute (KVM_SET_MEMORY_ATTRIBUTES), and zaps what it
    converts. The page tables only say where there is a half to see.

    When KVM emulates an instruction, it reads the shared half even if the page is private. An owner
    could put other instructions there. So the shared half is out of reach while a page is private.
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
            # This comes last: tables are never given back, so a refused slot must not take any.
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
        # The kernel fails with ENOMEM before it changes anything.
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
        """Change the entries, and have the kernel zap its translations (``Conversion``)."""
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
        """Delete the slot (``Conversion``).

        Also reset its attributes: they belong to addresses and would stay.
        """
        npages = slot.end_gfn - slot.base_gfn
        self._tables.unmap(slot.base_gfn << PAGE_SHIFT, npages)
        base = self._bases.pop(slot)
        self._slots.remove(base)
        del self._owners[base]
        self._vm.set_memory_attributes(base, npages << PAGE_SHIFT, 0)
        _show(slot, slot.base_gfn, slot.end_gfn)

    def find(self, gpa: int) -> int | None:
        """Return the owner's address of a guest physical address (``Conversion``)."""
        return _find(gpa, self._slots.base_below(gpa), self._owners)


def _hide(slot: Memslot, start: gfn_t, end: gfn_t) -> None:
    """Keep this process, and KVM in it, from the shared half of pages.

    Before Linux 6.15 this has no effect.

    Raises:
        OSError: ENOMEM.
    """
    _guard(slot, start, end, memory.MADV_GUARD_INSTALL)


def _show(slot: Memslot, start: gfn_t, end: gfn_t) -> None:
    """Let this process reach the shared half of pages again."""
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
    """Return the private half of a slot, for this engine."""
    assert isinstance(slot.private, GuestMemfdHalf)
    return slot.private


def _find(gpa: int, base: int, owners: dict[int, Memslot]) -> int | None:
    """Return the owner's address of a guest physical address in a slot at ``base``.

    Return None if the slot does not have it.
    """
    slot = owners.get(base)
    if slot is None or gpa >= base + (slot.end_gfn - slot.base_gfn << PAGE_SHIFT):
        return None
    return gpa - base + (slot.base_gfn << PAGE_SHIFT)
