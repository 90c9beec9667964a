"""INS, for which KVM reads the port before it looks where the values go, several under REP.

On a processor the page fault comes first, and no port is read in vain. KVM lets the store fault
later. The instruction, executed again, would then ask for values anew, and the values that the
owner gave would be lost. So the engine asks the owner only for what can be stored. If a page is
taken away meanwhile, KVM gets the same values again.
"""

from collections.abc import Callable
from typing import Final, final

from restrictedmem.kvm.decode import LONGEST, decode
from restrictedmem.kvm.kernel.page_tables import PRESENT, WRITABLE, PageTables
from restrictedmem.units import PAGE_MASK, PAGE_SIZE

_INS: Final = (0x6C, 0x6D)
_ADDRESS_SIZE: Final = 0x67
_DIRECTION_FLAG: Final = 1 << 10
_U32: Final = (1 << 32) - 1

#: The progress of an instruction: RIP, RCX and RDI.
Place = tuple[int, int, int]


@final
class StringInput:
    """The values of an INS of one vCPU that is under way."""

    def __init__(self, tables: PageTables, read: Callable[[int, int], bytes]) -> None:
        """``read`` returns what the engine can see of a piece of a guest page."""
        self._tables = tables
        self._read = read
        #: What KVM is about to take, how many bytes of it the owner gives, and what the owner gave
        #: before; then what KVM was given. Each also has its place, and the bytes of one value.
        self._asked: tuple[Place, memoryview, int, bytes, int] | None = None
        self._given: tuple[Place, bytes, int] | None = None
        #: What was given at a place, and not stored there.
        self._rest: tuple[Place, bytes] | None = None

    def ask(self, place: Place, flags: int, data: memoryview, size: int) -> range:
        """Fill in what KVM reads from a port.

        Return the offsets of the values that the owner has to be asked for, ``size`` bytes each.
        """
        rest, self._rest = self._rest, None
        known = rest[1] if rest is not None and rest[0] == place else b""
        data[: len(known)] = known
        wanted = self._storable(place, flags, len(data), size)
        if wanted < len(data):
            data[wanted:] = self._there(place, flags, wanted, size).ljust(len(data) - wanted, b"\0")
        self._asked = place, data, wanted, known, size
        return range(len(known), wanted, size)

    def entered(self) -> None:
        """Note that KVM takes the values, before it runs."""
        asked, self._asked = self._asked, None
        self._given = None
        if asked is not None:
            place, data, wanted, known, size = asked
            self._given = place, max(known, bytes(data[:wanted]), key=len), size

    def faulted(self, place: Place) -> None:
        """Note that the last run ended with a fault of the instruction at a place."""
        if self._given is not None and self._given[0][0] == place[0]:
            before, values, size = self._given
            self._rest = place, values[(before[1] - place[1]) * size :]

    def _storable(self, place: Place, flags: int, length: int, size: int) -> int:
        """Return how many bytes can be stored before a store faults; all of them for IN."""
        address = self._destination(place)
        if address is None:
            return length
        pages: dict[int, bool] = {}
        for done in range(0, length, size):
            at = _at(address, flags, done)
            for page in (at & ~PAGE_MASK, at + size - 1 & ~PAGE_MASK):
                if page not in pages:
                    pages[page] = self._writable(page)
                if not pages[page]:
                    return done
        return length

    def _there(self, place: Place, flags: int, done: int, size: int) -> bytes:
        """Return what is where the first value would go that cannot be stored.

        KVM stores the part of this value that it can.
        """
        address = self._destination(place)
        assert address is not None
        return self._read(_at(address, flags, done), size)

    def _destination(self, place: Place) -> int | None:
        """Return the address at which an INS stores first; None for IN."""
        rip, _, rdi = place
        piece = min(LONGEST, PAGE_SIZE - (rip & PAGE_MASK))
        instruction = decode(self._read(rip, piece) + self._read(rip + piece, LONGEST - piece))
        if instruction is None or instruction.opcode not in _INS:
            return None
        return rdi & _U32 if _ADDRESS_SIZE in instruction.prefixes else rdi

    def _writable(self, page: int) -> bool:
        wanted = PRESENT | WRITABLE
        return self._tables.entry(page) & wanted == wanted


def _at(address: int, flags: int, done: int) -> int:
    """Return the address of a value after ``done`` bytes."""
    return address - done if flags & _DIRECTION_FLAG else address + done
