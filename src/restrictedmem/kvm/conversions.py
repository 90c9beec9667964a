"""Pages are converted at the guest's word alone (``POLICY_EXPLICIT``).

KVM lets an owner make any page shared at any time. On hardware that does no harm: a bit of the
address or of the guest's own page tables says which half an access means, and where the attribute
says otherwise, it exits. Guests here have no such bit. An owner who made a page shared behind a
guest's back would read what the guest puts there next, or have it run the owner's code; one who
deleted its slot would have it store to MMIO; one who showed private pages at another address, say
in the shared window, would have it overwrite or tell them. So under this policy a page becomes what
the guest asked for by MAP_GPA_RANGE, and private memory lies where it was at the launch.

The owner also answers the call, and the guest goes by what it is told. So the engine looks at the
pages that the guest wants changed. It tells the guest 0 when all that it asked for is so, and a
failure when none of them changed. Until then the owner may convert these pages both ways, and so
finish or undo what it began. Where several vCPUs ask at once, an answer to one ends its own request
alone; but pages that the guest was told to be private are no longer any other's to share.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL, EIO, EPERM
from itertools import pairwise
from typing import Final, final

from restrictedmem import sync
from restrictedmem.abi.kvm import KVM_MEM_READONLY
from restrictedmem.kvm.memslot import WRITE, Memslot
from restrictedmem.kvm.memslots import Memslots
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.protocol.guest_abi import MAP_GPA_RANGE_ENCRYPTED
from restrictedmem.protocol.measurement import Run
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, U64_MAX, gfn_t

_FAILED: Final = -EIO & U64_MAX
#: Exchanges 0 and 1.
_OTHER: Final = bytes((1, 0)) + bytes(254)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A conversion that the guest has asked for, and its owner has not answered yet; each vCPU has one at most."""

    start: gfn_t
    end: gfn_t
    private: bool
    #: Of each slot with a private half in the range: the first page, by its number in the slot, and
    #: a byte a page, 1 for one to change.
    changes: list[tuple[Memslot, int, bytearray]]

    def wanted(self, slot: Memslot, first: int, last: int) -> int:
        """Return a byte for each page of a range of a slot, 1 for one to change."""
        wanted = bytearray(last - first)
        for change, start, end, at in self._in(slot, first, last):
            wanted[start - first : end - first] = change[start - at : end - at]
        return _word(wanted)

    def leave(self, slot: Memslot, first: int, last: int) -> None:
        """Let the pages of a range of a slot stay as they are."""
        for change, start, end, at in self._in(slot, first, last):
            change[start - at : end - at] = bytes(end - start)

    def _in(
        self, slot: Memslot, first: int, last: int
    ) -> Iterator[tuple[bytearray, int, int, int]]:
        for changed, at, change in self.changes:
            start, end = max(first, at), min(last, at + len(change))
            if changed is slot and start < end:
                yield change, start, end, at


@final
class Conversions:
    """What of its memory a guest holds to be private, and what its owner may therefore not do; used by the VM's and the vCPUs' threads."""

    def __init__(self, memory: VmMemory, *, explicit: bool) -> None:
        self._memory = memory
        self._explicit = explicit
        self._mutex = sync.mutex()
        #: From the launch on, under the mutex: the slots with a private half, and what the guest
        #: wants changed in them.
        self._slots = Memslots()
        self._open: list[Asked] = []
        self._launched = False
        #: Slots that content was put into: showing other pages, they would make the measurement
        #: untrue.
        self._filled: set[int] = set()

    def launched(self) -> list[Run]:
        """Take what is private now for what the guest holds to be; returns its runs.

        Raises:
            OSError: EINVAL when two slots show one page of a restricted file.
        """
        with self._mutex:
            slots = [slot for slot in self._memory.slots if slot.private is not None]
            if self._explicit:
                _refuse_aliases(slots)
                self._launched = True
                self._slots = Memslots(slots)
            return [run for slot in slots for run in _private_runs(slot)]

    @contextmanager
    def putting_in(self, gpa: int) -> Generator[None]:
        """Note that content is put into the slot of a guest address meanwhile (launch_update); nothing was, when that raises OSError."""
        slot = self._memory.slot_of(gpa >> PAGE_SHIFT)
        first = {slot.number} - self._filled if self._explicit and slot is not None else set[int]()
        self._filled |= first
        try:
            yield
        except OSError:
            self._filled -= first
            raise

    @contextmanager
    def converting(self, address: int, size: int, *, private: bool) -> Generator[None]:
        """Let the owner convert a range meanwhile.

        Raises:
            OSError: EPERM, once launched, for pages of which the guest has asked for something
                else.
        """
        with self._mutex:
            for slot, first, last in self._parts(*_pages(address, size)):
                unasked = _word(_others(slot, first, last, private=private))
                for asked in self._open:
                    unasked &= ~asked.wanted(slot, first, last)
                if unasked:
                    raise OSError(
                        EPERM,
                        f"the guest has not asked for pages to be {'private' if private else 'shared'}",
                    )
            yield

    def change_slot(self, number: int, change: Callable[[], None], *, private: bool) -> None:
        """Let the owner create, delete or change a slot by ``change``, into one with a private half or without.

        Raises:
            OSError: EPERM for one with a private half, once launched or with content that was
                measured.
        """
        with self._mutex:
            if private and self._launched:
                raise OSError(EPERM, "the guest was launched: it gets no other private memory")
            if number in self._filled:
                raise OSError(EPERM, "what was put in there has been measured where it is")
            if self._slots.get(number) is not None:
                raise OSError(EPERM, "the guest was launched with private memory there")
            change()

    def asked(self, gpa: int, npages: int, attributes: int) -> Asked:
        """Take the guest's word (MAP_GPA_RANGE), before its owner hears it; no page is asked for at an address inside of one."""
        private = bool(attributes & MAP_GPA_RANGE_ENCRYPTED)
        start, end = (gfn_t(0), gfn_t(0)) if gpa & PAGE_MASK else _pages(gpa, npages << PAGE_SHIFT)
        with self._mutex:
            parts = self._parts(start, end)
            changes = [
                (slot, first, bytearray(_others(slot, first, last, private=private)))
                for slot, first, last in parts
            ]
            asked = Asked(start, end, private, changes)
            if self._launched:
                self._open.append(asked)
        return asked

    def answered(self, asked: Asked, result: int) -> int:
        """Return what the guest is told of a conversion that its owner has answered.

        Raises:
            OSError: EPERM when some of the pages were converted and others not: the owner has to
                finish or to undo it first.
        """
        if not self._launched:
            return result
        with self._mutex:
            told = self._truth(asked, result)
            if asked.private and not told:
                # Whatever else the guest has asked for: it takes these pages for private from now
                # on.
                for other in self._open:
                    for slot, first, change in asked.changes:
                        other.leave(slot, first, first + len(change))
            self._open.remove(asked)
        return told

    def _truth(self, asked: Asked, result: int) -> int:
        changed = any(
            _word(change) & ~_word(_others(slot, first, first + len(change), private=asked.private))
            for slot, first, change in asked.changes
        )
        if self._is_private(asked) if asked.private else self._is_shared(asked):
            return 0 if changed else result
        if changed:
            raise OSError(
                EPERM,
                "some of the pages were converted and others not: the guest can be told neither",
            )
        return result or _FAILED

    def _is_private(self, asked: Asked) -> bool:
        """Say whether all pages are private memory that can be written: what is stored elsewhere, the owner gets."""
        gfn = asked.start
        for slot, first, last in self._parts(asked.start, asked.end):
            if (
                first != gfn - slot.base_gfn
                or not slot.rights & WRITE
                or slot.attributes.count(0, first, last)
            ):
                return False
            gfn = gfn_t(slot.base_gfn + last)
        return gfn == asked.end > asked.start

    def _is_shared(self, asked: Asked) -> bool:
        parts = self._parts(asked.start, asked.end)
        return asked.start < asked.end and not any(
            slot.attributes.count(1, first, last) for slot, first, last in parts
        )

    def _parts(self, start: gfn_t, end: gfn_t) -> Iterator[tuple[Memslot, int, int]]:
        """Yield the slots that the guest was launched with in a range, each with the pages of it, by their numbers in the slot."""
        if start >= end:
            return
        for slot in self._slots.overlapping(start, end):
            first, last = slot.clip(start, end)
            yield slot, first - slot.base_gfn, last - slot.base_gfn


def _pages(address: int, size: int) -> tuple[gfn_t, gfn_t]:
    """Return the guest pages that a range of bytes touches."""
    return gfn_t(address >> PAGE_SHIFT), gfn_t((address + size + PAGE_MASK) >> PAGE_SHIFT)


def _refuse_aliases(slots: list[Memslot]) -> None:
    """Refuse a page at two addresses: the guest would overwrite its own memory where it asked for other."""
    windows = sorted(
        (half.ino, half.window.start, half.window.end)
        for slot in slots
        if (half := slot.private) is not None
    )
    if any(ino == other and start < end for (ino, _, end), (other, start, _) in pairwise(windows)):
        raise OSError(EINVAL, "two slots show one page of a restricted file")


def _others(slot: Memslot, first: int, last: int, *, private: bool) -> bytes:
    """Return a byte for each of a slot's pages, 1 for one that is not as ``private`` says."""
    attributes = bytes(slot.attributes[first:last])
    return attributes.translate(_OTHER) if private else attributes


def _word(pages: bytes | bytearray) -> int:
    return int.from_bytes(pages)


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
