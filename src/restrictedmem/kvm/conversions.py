"""Conversions under ``POLICY_EXPLICIT``: the owner converts only what the guest asks for.

KVM lets an owner make any page shared at any time. On hardware this does no harm. There, a bit of
the address or of the guest's own page tables says which half an access means. An access exits if
the attribute differs from that bit.

Guests here have no such bit. Without this policy an owner could attack its guest in three ways:

- It makes a page shared behind the guest's back. Then it reads what the guest stores there next,
  or has the guest run the owner's code.
- It deletes the slot of a page. Then the guest's stores become MMIO.
- It shows private pages at another address, for example in the shared window. Then the guest
  overwrites them, or discloses their content.

So under this policy the owner may convert a page only as the guest asked by MAP_GPA_RANGE. Private
memory stays where it was at the launch.

The owner also answers the guest's call, and the guest relies on the result. So the engine looks at
the pages of the request. It tells the guest 0 when all of them are as the guest asked, and a
failure when none of them changed. Until then the owner may convert these pages both ways, to finish
or to undo the change.

Several vCPUs may ask at once. An answer to one ends only the request of that one. But once the
guest was told that pages are private, no other request lets the owner share them.
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
#: A table for bytes.translate that exchanges 0 and 1.
_OTHER: Final = bytes((1, 0)) + bytes(254)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A conversion that the guest has asked for, and that its owner has not answered yet.

    Each vCPU has at most one.
    """

    start: gfn_t
    end: gfn_t
    private: bool
    #: For each slot with a private half in the range: the slot, the number of the first page in
    #: it, and a byte for each page, which is 1 if the page has to change.
    changes: list[tuple[Memslot, int, bytearray]]

    def wanted(self, slot: Memslot, first: int, last: int) -> int:
        """Return a byte for each page of a slot's range, 1 for a page that has to change."""
        wanted = bytearray(last - first)
        for change, start, end, at in self._in(slot, first, last):
            wanted[start - first : end - first] = change[start - at : end - at]
        return _word(wanted)

    def leave(self, slot: Memslot, first: int, last: int) -> None:
        """Take the pages of a range of a slot out of the request."""
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
    """The pages that the guest holds to be private, and what its owner may therefore not do.

    The VM's thread and the vCPUs' threads use it.
    """

    def __init__(self, memory: VmMemory, *, explicit: bool) -> None:
        self._memory = memory
        self._explicit = explicit
        self._mutex = sync.mutex()
        #: The slots with a private half at the launch, and the requests of the guest that are not
        #: answered yet. The mutex protects both.
        self._slots = Memslots()
        self._open: list[Asked] = []
        self._launched = False
        #: Slots that content was put into. If such a slot showed other pages, the measurement would
        #: not be true any more.
        self._filled: set[int] = set()

    def launched(self) -> list[Run]:
        """Note what is private now as what the guest holds to be private, and return its runs.

        Raises:
            OSError: EINVAL under this policy, when two slots show the same page of a restricted
                file.
        """
        with self._mutex:
            slots = [slot for slot in self._memory.slots if slot.private is not None]
            if self._explicit:
                if any(slot.in_place for slot in slots):
                    raise OSError(EINVAL, "the owner of a guest_memfd converts its pages unasked")
                _refuse_aliases(slots)
                self._launched = True
                self._slots = Memslots(slots)
            return [run for slot in slots for run in _private_runs(slot)]

    @contextmanager
    def putting_in(self, gpa: int) -> Generator[None]:
        """Note that content is put into the slot of a guest address meanwhile (launch_update).

        If that raises OSError, nothing was put in, and the note is taken back.
        """
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
        """Let the owner convert a range of bytes meanwhile.

        Raises:
            OSError: EPERM, after the launch, for a page that would change without a request of the
                guest.
        """
        with self._mutex:
            for slot, first, last in self._parts(*_pages(address, size)):
                unasked = _word(_others(slot, first, last, private=private))
                for asked in self._open:
                    unasked &= ~asked.wanted(slot, first, last)
                if unasked:
                    raise OSError(
                        EPERM,
                        "the guest has not asked for these pages to be "
                        f"{'private' if private else 'shared'}",
                    )
            yield

    def change_slot(self, number: int, change: Callable[[], None], *, private: bool) -> None:
        """Let the owner create, delete or change a slot, by a call of ``change``.

        ``private`` says whether the slot will have a private half.

        Raises:
            OSError: EPERM, after the launch, for a slot that has a private half or would get one;
                EPERM for a slot with content that was measured.
        """
        with self._mutex:
            if private and self._launched:
                raise OSError(EPERM, "after the launch the guest gets no further private memory")
            if number in self._filled:
                raise OSError(EPERM, "the slot has content that was measured: it cannot change")
            if self._slots.get(number) is not None:
                raise OSError(EPERM, "after the launch a slot with private memory cannot change")
            change()

    def asked(self, gpa: int, npages: int, attributes: int) -> Asked:
        """Note a request of the guest (MAP_GPA_RANGE), before its owner hears of it.

        A request whose address is not aligned asks for no page.
        """
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
        """Return the result that the guest gets for a conversion that its owner has answered.

        Raises:
            OSError: EPERM when some of the pages were converted and others were not. The owner has
                to finish or to undo the conversion first.
        """
        if not self._launched:
            return result
        with self._mutex:
            told = self._truth(asked, result)
            if asked.private and not told:
                # No other request may share these pages: from now on the guest takes them for
                # private.
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
                "some of the pages were converted and others not: finish or undo the conversion",
            )
        return result or _FAILED

    def _is_private(self, asked: Asked) -> bool:
        """Say whether all pages are private memory that can be written.

        The owner would get what the guest stores to other memory.
        """
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
        """Yield the slots of the launch that lie in a range, each with its pages of the range.

        The pages are given by their numbers in the slot.
        """
        if start >= end:
            return
        for slot in self._slots.overlapping(start, end):
            first, last = slot.clip(start, end)
            yield slot, first - slot.base_gfn, last - slot.base_gfn


def _pages(address: int, size: int) -> tuple[gfn_t, gfn_t]:
    """Return the guest pages that a range of bytes touches."""
    return gfn_t(address >> PAGE_SHIFT), gfn_t((address + size + PAGE_MASK) >> PAGE_SHIFT)


def _refuse_aliases(slots: list[Memslot]) -> None:
    """Refuse slots that show one page at two addresses.

    The guest would overwrite its own memory where it asked for other memory.
    """
    windows = sorted(
        (half.ino, half.window.start, half.window.end)
        for slot in slots
        if (half := slot.private) is not None
    )
    if any(ino == other and start < end for (ino, _, end), (other, start, _) in pairwise(windows)):
        raise OSError(EINVAL, "two slots show one page of a restricted file")


def _others(slot: Memslot, first: int, last: int, *, private: bool) -> bytes:
    """Return a byte for each of a slot's pages, 1 if its attribute is not ``private``."""
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
