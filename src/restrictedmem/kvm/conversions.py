"""Pages are converted at the guest's word alone (``POLICY_EXPLICIT``).

KVM lets an owner make any page shared at any time. On hardware that does no harm: a bit of the address or of the guest's own page tables
says which half an access means, and where the attribute says otherwise, it exits. Guests here have no such bit. An owner who made a page
shared behind a guest's back would read what the guest puts there next, or have it run the owner's code; one who deleted its slot would have
it store to MMIO; one who showed private pages at another address, say in the shared window, would have it overwrite or tell them. So under
this policy a page becomes what the guest asked for by MAP_GPA_RANGE, and private memory lies where it was at the launch.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from errno import EIO, EPERM
from typing import Final, final

from restrictedmem import sync
from restrictedmem.abi.kvm import KVM_MEM_READONLY
from restrictedmem.kvm.guest_abi import MAP_GPA_RANGE_ENCRYPTED
from restrictedmem.kvm.launch import Run
from restrictedmem.kvm.memslot import WRITE, Memslot
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, gfn_t

_WORD: Final = (1 << 64) - 1
_FAILED: Final = -EIO & _WORD


@final
class Conversions:
    """What of its memory a guest holds to be private, and what its owner may therefore not do; used by the VM's and the vCPUs' threads."""

    def __init__(self, memory: VmMemory, *, explicit: bool) -> None:
        self._memory = memory
        self._explicit = explicit
        self._mutex = sync.mutex()
        #: From the launch on, under the mutex: a byte a page of each slot with a private half, 1 where the guest holds it to be private.
        self._held: dict[Memslot, bytearray] = {}
        self._launched = False
        #: Slots that content was put into: showing other pages, they would make the measurement untrue.
        self._filled: set[int] = set()

    def launched(self) -> list[Run]:
        """Take what is private now for what the guest holds to be; returns its runs."""
        with self._mutex:
            slots = [slot for slot in self._memory.slots if slot.private is not None]
            if self._explicit:
                self._launched = True
                self._held = {slot: bytearray(slot.attributes) for slot in slots}
            return [run for slot in slots for run in _private_runs(slot)]

    def put_in(self, gpa: int) -> None:
        """Note that content was put into the slot of a guest address (launch_update)."""
        slot = self._memory.slot_of(gpa >> PAGE_SHIFT)
        if self._explicit and slot is not None:
            self._filled.add(slot.number)

    @contextmanager
    def converting(self, address: int, size: int, *, private: bool) -> Generator[None]:
        """Let the owner convert a range meanwhile.

        Raises:
            OSError: EPERM, once launched, for pages of which the guest has asked for something else.
        """
        with self._mutex:
            if any(held.count(not private, first, last) for held, first, last in self._parts(address, size)):
                raise OSError(EPERM, f"the guest has not asked for pages to be {'private' if private else 'shared'}")
            yield

    @contextmanager
    def changing_slot(self, number: int, *, private: bool) -> Generator[None]:
        """Let the owner create, delete or change a slot meanwhile, into one with a private half or without.

        Raises:
            OSError: EPERM for one with a private half, once launched or with content that was measured.
        """
        with self._mutex:
            if private and self._launched:
                raise OSError(EPERM, "the guest was launched: it gets no other private memory")
            if number in self._filled:
                raise OSError(EPERM, "what was put in there has been measured where it is")
            if any(slot.number == number for slot in self._held):
                raise OSError(EPERM, "the guest was launched with private memory there")
            yield

    def asked(self, gpa: int, npages: int, attributes: int) -> None:
        """Take the guest's word (MAP_GPA_RANGE), before its owner hears it: nothing can be made shared any more that is to be private."""
        if gpa & PAGE_MASK:
            return
        with self._mutex:
            for held, first, last in self._parts(gpa, npages << PAGE_SHIFT):
                held[first:last] = bytes([bool(attributes & MAP_GPA_RANGE_ENCRYPTED)]) * (last - first)

    def answered(self, gpa: int, npages: int, attributes: int, result: int) -> int:
        """Return what the guest is told: that pages are private only if they are."""
        if result == 0 and attributes & MAP_GPA_RANGE_ENCRYPTED:
            start, end = gfn_t(gpa >> PAGE_SHIFT), gfn_t((gpa >> PAGE_SHIFT) + npages)
            with self._mutex:
                for slot in self._held:
                    first, last = slot.clip(start, end)
                    if slot.attributes.count(0, first - slot.base_gfn, last - slot.base_gfn):
                        return _FAILED
        return result

    def _parts(self, address: int, size: int) -> Iterator[tuple[bytearray, int, int]]:
        start, end = gfn_t(address >> PAGE_SHIFT), gfn_t((address + size + PAGE_MASK) >> PAGE_SHIFT)
        for slot, held in self._held.items():
            first, last = slot.clip(start, end)
            yield held, first - slot.base_gfn, last - slot.base_gfn


def _private_runs(slot: Memslot) -> Iterator[Run]:
    first = slot.attributes.find(1)
    while first >= 0:
        found = slot.attributes.find(0, first)
        last = len(slot.attributes) if found < 0 else found
        gfn = slot.base_gfn + first
        yield (
            gfn << PAGE_SHIFT,
            (last - first) << PAGE_SHIFT,
            slot.pgoff_of(gfn) << PAGE_SHIFT,
            0 if slot.rights & WRITE else KVM_MEM_READONLY,
        )
        first = slot.attributes.find(1, last)
