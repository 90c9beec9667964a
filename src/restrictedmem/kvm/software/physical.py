"""Unicorn's physical memory: where the halves of the slots lie in it, and what was translated into code from there.

Each half lies there once and whole, whatever of it the guest may see; so no page is ever mapped or unmapped by itself, which Unicorn does
in quadratic time. Guest addresses do not lead here but through the TLB hook, so everything lies beyond them.
"""

from typing import Final, final

from restrictedmem.kvm.memslot import Half, Memslot
from restrictedmem.kvm.software.unicorn import Uc
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, gfn_t

#: Below lies what is the engine's own.
_HALVES: Final = 1 << 48
#: From this size on, dropping the translated code of a range costs more than dropping all of it.
_MUCH_CODE: Final = 16 << 20


@final
class View:
    """A half in physical memory at ``base``, and the hull of where the guest has fetched code from it."""

    __slots__ = ("_code_end", "_code_start", "base", "end")

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.end = base + size
        self.forget_code()

    def forget_code(self) -> None:
        """Take note that no translated code is left."""
        self._code_start, self._code_end = self.end, self.base

    def fetched(self, page: int) -> None:
        """Take note that there may be translated code of a page."""
        self._code_start = min(self._code_start, page)
        self._code_end = max(self._code_end, page + PAGE_SIZE)

    def code_in(self, start: int, end: int) -> tuple[int, int]:
        """Return the part of a range that may have translated code; nothing when it does not begin before it ends."""
        return max(start, self._code_start), min(end, self._code_end)


@final
class Window:
    """A slot in the guest's addresses, from ``start`` to ``end``, and its halves in physical memory."""

    __slots__ = ("end", "offsets", "slot", "start", "views")

    def __init__(self, slot: Memslot, shared: View | None, private: View | None) -> None:
        self.slot = slot
        self.start = slot.base_gfn << PAGE_SHIFT
        self.end = slot.end_gfn << PAGE_SHIFT
        #: The shared half, the private half; and what leads there from a guest address, by an entry without its rights.
        self.views = shared, private
        self.offsets = tuple(0 if view is None else view.base - self.start for view in self.views) * 8


@final
class PhysicalMemory:
    """The halves of all slots of one emulator."""

    def __init__(self, uc: Uc) -> None:
        self._uc = uc
        self._windows: list[Window] = []
        self._views: list[View] = []
        #: Whether Unicorn is at work on physical memory itself: a TLB miss then asks for the page of the same number.
        self.maintaining = False

    def find(self, gpa: int) -> Window | None:
        """Return the window that a guest address lies in."""
        for window in self._windows:
            if window.start <= gpa < window.end:
                return window
        return None

    def add(self, slot: Memslot) -> None:
        """Put a slot's halves into physical memory."""
        shared = None if slot.shared is None else self._map(slot.shared)
        private = None if slot.private is None else self._map(slot.memfd_half.half)
        self._windows.append(Window(slot, shared, private))
        self._uc.flush_tlb()

    def _map(self, half: Half) -> View:
        base = _HALVES
        for view in sorted(self._views, key=lambda view: view.base):
            if view.base - base >= half.size:
                break
            base = view.end
        self._uc.map(base, half.size, half.address)
        self._views.append(View(base, half.size))
        return self._views[-1]

    def remove(self, slot: Memslot) -> None:
        """Take a slot's halves out of physical memory, with their code and translations; one that never got there is nothing."""
        window = next((window for window in self._windows if window.slot is slot), None)
        if window is None:
            return
        self._windows.remove(window)
        self.maintaining = True
        try:
            for view in window.views:
                if view is not None:
                    self._uc.unmap(view.base, view.end - view.base)
                    self._views.remove(view)
        finally:
            self.maintaining = False
        self._uc.flush_tlb()

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Forget the code and the translations of a range of guest pages, in time that does not depend on its size."""
        for window in self._windows:
            first, last = (gfn << PAGE_SHIFT for gfn in window.slot.clip(start, end))
            for view, offset in zip(window.views, window.offsets, strict=False):
                if view is not None:
                    self._drop_code(view, first + offset, last + offset)
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
        self.maintaining = True
        try:
            self._uc.drop_code(first, last)
        finally:
            self.maintaining = False
        if (first, last) == view.code_in(view.base, view.end):
            view.forget_code()
