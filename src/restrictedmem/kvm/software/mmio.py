"""Memory-mapped I/O: how one instruction that touches pages without memory is carried out.

Unicorn cannot end a run before a store, and cannot give a load its value later. So the engine
executes the instruction alone, with a device in place of every such page. The device knows the
values that loads were given so far, and keeps the instruction's stores.

If a value is missing, the engine puts registers back to what they were, and asks the VMM. Then it
executes the instruction again with the VMM's value, which completes the load. If no value is
missing, the stores are the exits.
"""

from typing import Final, final

from restrictedmem.kvm.software.uc import Uc
from restrictedmem.protocol.exits import MmioRead, MmioWrite
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

#: More pages than any instruction touches: two operands, each across a page boundary, and a stack.
_PAGES: Final = 8
#: The largest access of one exit, as in ``kvm_run.mmio.data``; bytes.
_LARGEST: Final = 8


@final
class Scratch:
    """The device, at ``base`` in physical memory.

    Its pages are in place of guest pages, in the order in which the instruction touches them.
    """

    __slots__ = ("_around", "_base", "_known", "_pages", "_slack", "stepping", "stores", "wanted")

    def __init__(self, uc: Uc, base: int) -> None:
        self._base = base
        self._known: dict[int, int] = {}
        #: The bytes that Unicorn loads for the first load, with those beside it that it throws
        #: away; and the bytes of these that it has not loaded in this try.
        self._around = range(0)
        self._slack: set[int] = set()
        self._pages: list[int] = []
        #: Whether an instruction is being executed with the device in place.
        self.stepping = False
        #: What the instruction stored, and the first load whose value is not known.
        self.stores: list[MmioWrite] = []
        self.wanted: MmioRead | None = None
        uc.map_device(base, _PAGES * PAGE_SIZE, self._read, self._write)

    def begin(self) -> None:
        """Begin another try at the instruction."""
        self._pages.clear()
        self._slack = {*self._around}
        self.stores = []
        self.wanted = None
        self.stepping = True

    def forget(self) -> None:
        """Forget the values, because the next instruction loads anew."""
        self._known.clear()
        self._around = range(0)

    def answer(self, load: MmioRead, value: int) -> None:
        """Give the value of a load."""
        # An unaligned load comes as two aligned ones. Unicorn throws away bytes to either side of
        # it, and the VMM must not be asked for them. Only the first load is known as it was. Each
        # later load is asked for as it comes here.
        start = load.gpa & -load.size
        if load.gpa != start:
            self._around = range(start, start + 2 * load.size)
        for index in range(load.size):
            self._known[load.gpa + index] = value >> 8 * index & 0xFF

    def translate(self, page: int) -> int:
        """Return the physical page that stands for a guest page, both by their addresses.

        Raises:
            RuntimeError: when an instruction touches more pages than any does.
        """
        if page not in self._pages:
            if len(self._pages) == _PAGES:
                raise RuntimeError("an instruction touched too many pages")
            self._pages.append(page)
        return self._base + (self._pages.index(page) << PAGE_SHIFT)

    def _gpa(self, offset: int) -> int:
        return self._pages[offset >> PAGE_SHIFT] + (offset & PAGE_MASK)

    def _read(self, _uc: int, offset: int, size: int) -> int:
        gpa = self._gpa(offset)
        span = range(gpa, gpa + size)
        data = [self._known.get(at, 0 if at in self._slack else None) for at in span]
        self._slack.difference_update(span)
        if None in data and self.wanted is None:
            self.wanted = MmioRead(gpa, size)
        return int.from_bytes(bytes(byte or 0 for byte in data), "little")

    def _write(self, _uc: int, offset: int, size: int, value: int) -> None:
        gpa = self._gpa(offset)
        value &= (1 << 8 * size) - 1
        # Unicorn takes stores apart: 8 bytes into 4 and 4, unaligned ones into single bytes. Here
        # they are put together again.
        last = self.stores[-1] if self.stores else None
        if last is not None and last.gpa + last.size == gpa and last.size + size <= _LARGEST:
            self.stores[-1] = MmioWrite(
                last.gpa, last.size + size, last.data | value << 8 * last.size
            )
        else:
            self.stores.append(MmioWrite(gpa, size, value))
