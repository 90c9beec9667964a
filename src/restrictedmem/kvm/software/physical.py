"""Unicorn's physical memory: where the slots' halves lie in it, and which code is theirs.

Each half that was touched lies there once and whole, whatever the guest may see of it. So no page
is ever mapped or unmapped by itself, which Unicorn does in quadratic time. Guest addresses lead
here only through the TLB hook, so everything lies beyond them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Generator
from contextlib import contextmanager
from operator import attrgetter
from typing import Final, final

from restrictedmem.kvm.half import Half
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.kvm.software.uc import Uc
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, gfn_t

#: Halves lie from here on. Below lies the engine's own memory.
_HALVES: Final = 1 << 48
#: From this size on, to drop the translated code of a range costs more than to drop all code.
_MUCH_CODE: Final = 16 << 20
_START: Final = attrgetter("start")
_WINDOW_END: Final = attrgetter("end")


@final
class View:
    """A half in physical memory at ``base``, and a range with all code fetched from it."""

    __slots__ = ("_code_end", "_code_start", "base", "end", "half")

    def __init__(self, base: int, half: Half) -> None:
        self.half = half
        self.base = base
        self.end = base + half.size
        self.forget_code()

    def forget_code(self) -> None:
        """Note that no translated code is left."""
        self._code_start, self._code_end = self.end, self.base

    def fetched(self, page: int) -> None:
        """Note that there may be translated code of a page."""
        self._code_start = min(self._code_start, page)
        self._code_end = max(self._code_end, page + PAGE_SIZE)

    def code_in(self, start: int, end: int) -> tuple[int, int]:
        """Return the part of a range that may have translated code.

        There is none if the part does not begin before it ends.
        """
        return max(start, self._code_start), min(end, self._code_end)


@final
class Window:
    """A slot in guest addresses ``start`` to ``end``, and its halves in physical memory.

    The halves get there at the first touch.
    """

    __slots__ = ("end", "offsets", "slot", "start", "views")

    def __init__(self, slot: Memslot) -> None:
        self.slot = slot
        self.start = slot.base_gfn << PAGE_SHIFT
        self.end = slot.end_gfn << PAGE_SHIFT
        #: The shared half and the private half; and what leads there from a guest address, by an
        #: entry without its rights.
        self.views: tuple[View | None, View | None] = None, None
        self.offsets: tuple[int, ...] = ()


@final
class PhysicalMemory:
    """The halves of all slots of one emulator.

    A slot's halves come here when the guest first touches the slot. The more halves there are, the
    longer Unicorn takes to map one. A guest may have thousands of slots that this vCPU never
    touches.
    """

    def __init__(self, uc: Uc) -> None:
        self._uc = uc
        # Both are in the order of their addresses.
        self._windows: list[Window] = []
        self._views: list[View] = []
        #: Whether Unicorn is at work on physical memory itself. A TLB miss then asks for the
        #: physical page of the same number, if the page is not one of the guest's.
        self.maintaining = False

    @contextmanager
    def maintenance(self) -> Generator[None]:
        """Let no TLB miss be taken for the guest's meanwhile."""
        self.maintaining = True
        try:
            yield
        finally:
            self.maintaining = False

    def find(self, gpa: int) -> Window | None:
        """Return the window that a guest address lies in."""
        index = bisect_right(self._windows, gpa, key=_START)
        return self._windows[index - 1] if index and gpa < self._windows[index - 1].end else None

    def add(self, slot: Memslot) -> None:
        """Add a slot, without its halves yet."""
        window = Window(slot)
        self._windows.insert(bisect_right(self._windows, window.start, key=_START), window)
        self._uc.flush_tlb()

    def show(self, window: Window) -> None:
        """Put the halves of a window into physical memory; a TLB miss may be under way."""
        slot = window.slot
        shared = None if slot.shared is None else self._map(slot.shared)
        try:
            private = None if slot.private is None else self._map(slot.memfd_half.half)
        except BaseException:
            self._unmap(shared)
            raise
        window.views = shared, private
        window.offsets = (
            tuple(0 if view is None else view.base - window.start for view in window.views) * 8
        )

    def _map(self, half: Half) -> View:
        base, place = _HALVES, len(self._views)
        for index, view in enumerate(self._views):
            if view.base - base >= half.size:
                place = index
                break
            base = view.end
        self._uc.map(base, half.size, half.address)
        self._views.insert(place, View(base, half))
        return self._views[place]

    def _unmap(self, view: View | None) -> None:
        if view is not None:
            with self.maintenance():
                self._uc.unmap(view.base, view.end - view.base)
                self._views.remove(view)

    def remove(self, slot: Memslot) -> None:
        """Remove a slot's halves from physical memory, with their code and translations.

        A slot that was never added is ignored.
        """
        window = self.find(slot.base_gfn << PAGE_SHIFT)
        if window is None or window.slot is not slot:
            return
        del self._windows[bisect_left(self._windows, window.start, key=_START)]
        for view in window.views:
            self._unmap(view)
        self._uc.flush_tlb()

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Forget the code and the translations of a range of guest pages.

        The time for this does not depend on the range's size.
        """
        first = bisect_right(self._windows, start << PAGE_SHIFT, key=_WINDOW_END)
        last = bisect_left(self._windows, end << PAGE_SHIFT, key=_START)
        for window in self._windows[first:last]:
            clipped = [gfn << PAGE_SHIFT for gfn in window.slot.clip(start, end)]
            for view, offset in zip(window.views, window.offsets, strict=False):
                if view is not None:
                    self._drop_code(view, clipped[0] + offset, clipped[1] + offset)
        self._uc.flush_tlb()

    def _drop_code(self, view: View, start: int, end: int) -> None:
        first, last = view.code_in(start, end)
        if first >= last:
            return
        if last - first >= _MUCH_CODE:
            self._uc.flush_code()
            for other in self._views:
                other.forget_code()
            return
        with self.maintenance():
            self._uc.drop_code(first, last)
        if (first, last) == view.code_in(view.base, view.end):
            view.forget_code()
