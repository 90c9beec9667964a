"""The guest of a world: a sequence of accesses on a CPU with a TLB."""

from collections.abc import Hashable
from dataclasses import dataclass
from errno import EFAULT
from typing import Final, final

from restrictedmem.abi.kvm import KVM_MEMORY_EXIT_FLAG_PRIVATE
from restrictedmem.check.control import forget, saw, touch
from restrictedmem.check.frames import MEMORY
from restrictedmem.check.invariants import Invariants, SlotHistory, acting
from restrictedmem.kvm.engine import VcpuEngine
from restrictedmem.kvm.engine_vcpu import EngineVcpu
from restrictedmem.kvm.memslot import PRIVATE, READ, WRITE
from restrictedmem.kvm.mmu import Fault, Mmu
from restrictedmem.protocol.exits import Exit, Hypercall, MemoryFault, MmioRead
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, gfn_t

#: The exit of a guest that has done all its accesses.
DONE: Final = Hypercall(0, (0, 0, 0, 0))


@final
@dataclass(frozen=True, slots=True)
class Access:
    """A guest's access to a page: a load, or a store of ``value``."""

    gfn: int
    value: int | None = None


def load(gfn: int) -> Access:
    """Return a guest's read of a page."""
    return Access(gfn)


def store(gfn: int, value: int) -> Access:
    """Return a guest's write of a value to a page."""
    return Access(gfn, value)


@final
class GuestCpu:
    """A CPU and its guest code: a sequence of accesses through a TLB.

    It has the part of ``VcpuEngine`` that a run needs. Its run ends as ``SoftwareVcpu``'s does: at
    an exit, at a kick between two instructions, or when a fault has to be tried again.
    """

    def __init__(self, invariants: Invariants, mmu: Mmu, number: int) -> None:
        self._invariants = invariants
        self._mmu = mmu
        self._name = f"vCPU {number}"
        self.program: list[Access] = []
        self._next = 0
        #: By guest page: the entry, and the number of the frame that it led to.
        self.tlb: dict[int, tuple[int, int]] = {}
        self.kicked = False

    def state(self) -> Hashable:
        """Return the state, as far as the guest will still need it."""
        if self._next == len(self.program):
            return None
        tlb = sorted(
            (gfn, entry, self._leads_to(gfn, number)) for gfn, (entry, number) in self.tlb.items()
        )
        return self._next, tuple(tlb), self.kicked

    def _leads_to(self, gfn: int, number: int) -> bytes:
        view = self._invariants.view_of(gfn)
        return self._invariants.frames.against(
            bytes([number]), gfn - view.slot.base_gfn + view.window.start
        )

    def settle(self) -> None:
        """Wait until no invalidation is in progress, or until ``kick``."""
        # A caller of this remembers nothing that it has read; it only goes on with the guest.
        forget(("settle", self._name, acting.get()))
        self._mmu.wait_settled(unless=self._was_kicked)

    def _was_kicked(self) -> bool:
        touch(self._name, write=False)
        saw(self.kicked)
        return self.kicked

    def run(self) -> Exit | None:
        """Run guest code until it exits, is kicked, or a fault has to be tried again."""
        while self._next < len(self.program):
            touch(self._name, write=True)
            saw(self.kicked)
            if self.kicked:
                self.kicked = False
                return None
            access = self.program[self._next]
            exit_ = self._access(access)
            if exit_ is not DONE:
                return exit_
            self._next += 1
        return DONE

    def _access(self, access: Access) -> Exit | None:
        view = self._invariants.view_of(access.gfn)
        needed = READ if access.value is None else WRITE
        if access.gfn not in self.tlb or not self.tlb[access.gfn][0] & needed:
            exit_ = self._fill(view, access.gfn)
            if exit_ is not DONE:
                return exit_
        touch(MEMORY, write=False)
        saw(None)
        entry, number = self.tlb[access.gfn]
        self._invariants.access(view, access.gfn, entry, number, access.value)
        return DONE

    def _fill(self, view: SlotHistory, gfn: int) -> Exit | None:
        index = gfn - view.slot.base_gfn
        # Slots come and go only while every vCPU is held, so this look at them is no step.
        if self._mmu.slot_of(gfn) is None:
            return MmioRead(gfn << PAGE_SHIFT, 8)
        entry = view.slot.entries[index]
        if not entry:
            try:
                fault = self._mmu.fault(view.slot, gfn)
            except OSError as error:
                return self._memory_fault(gfn, error.errno or EFAULT)
            if fault is Fault.NO_HALF:
                return self._memory_fault(gfn, EFAULT)
            entry = view.slot.entries[index]
            if not entry:
                return None
        self.tlb[gfn] = entry, view.led[index] if entry & PRIVATE else 0
        return DONE

    @staticmethod
    def _memory_fault(gfn: int, errno: int) -> MemoryFault:
        return MemoryFault(KVM_MEMORY_EXIT_FLAG_PRIVATE, gfn << PAGE_SHIFT, PAGE_SIZE, errno)

    def drop(self, start: gfn_t, end: gfn_t) -> None:
        """Drop the translations of a range of guest pages."""
        self._invariants.dropped(start, end)
        for gfn in [gfn for gfn in self.tlb if start <= gfn < end]:
            del self.tlb[gfn]

    def kick(self) -> None:
        """Make ``run`` or ``settle`` return soon."""
        touch(self._name, write=True)
        saw(None)
        self.kicked = True
        self._mmu.wake()

    def flush(self) -> None:
        """Drop all translations, as when a slot is deleted.

        Preconditions: the vCPU is held.
        """
        self.tlb.clear()


@final
class WatchedVcpu(EngineVcpu):  # type: ignore[misc] # production's, with a finite state
    """A vCPU whose state has the actors that wait for it to exit the guest.

    These stand for the number of its entries into the guest, which would make each state new.
    """

    def __init__(self, engine: VcpuEngine) -> None:
        super().__init__(engine)
        self._asked: set[int] = set()

    def state(self) -> Hashable:
        """Return the state."""
        flags = self._running, self._in_guest, self._holds, self._interrupted
        return flags, frozenset(self._stale), frozenset(self._asked)

    def _enter(self) -> None:
        super()._enter()
        self._asked.clear()

    def request_drop(self, start: gfn_t, end: gfn_t) -> int | None:
        """Request the drop, and record the actor if it has to wait for the vCPU's exit."""
        stay = super().request_drop(start, end)
        saw(stay is not None)
        if stay is not None:
            self._asked.add(acting.get())
        return stay

    def send_out(self, stay: int) -> None:
        """Wait for the vCPU's exit, and record that the actor has seen it."""
        super().send_out(stay)
        self._asked.discard(acting.get())
