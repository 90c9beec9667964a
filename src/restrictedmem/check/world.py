"""A world small enough to search: one restricted file and one VM of production's objects.

Three parts are models, because no search could control the real ones: the frames (``frames``), the
guest with its TLB (``GuestCpu``), and the sockets between service and engine. A mutex stands for
the sockets, because a consumer answers one notification at a time.
"""

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Final, cast, final

from restrictedmem import sync
from restrictedmem.abi.memory import PUNCH
from restrictedmem.check.control import forget, saw, touch, watch
from restrictedmem.check.explorer import RuleBroken
from restrictedmem.check.frames import HUGE, MEMORY, Frames
from restrictedmem.check.guest_cpu import DONE, Access, GuestCpu, WatchedVcpu
from restrictedmem.check.invariants import Invariants, Rule, SlotHistory, acting
from restrictedmem.check.objects import SharedBytes
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine import Binder, VcpuEngine
from restrictedmem.kvm.engine_vcpu import EngineVcpu, EngineVcpus
from restrictedmem.kvm.half import SharedHalf, forbid_shrinking
from restrictedmem.kvm.memslot import MemfdHalf, Memslot
from restrictedmem.kvm.mmu import Mmu
from restrictedmem.kvm.software.software_vm import SoftwareVm
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.mm import designs
from restrictedmem.mm.design import Design
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.punched import Punched
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.platform.platform import NoPlatform, Platform
from restrictedmem.platform.snp import Snp
from restrictedmem.protocol.exits import Exit, Interrupted, MmioRead
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_SHIFT, PageRange, gfn_t, pgoff_t

_INO: Final = 1


@final
@dataclass(frozen=True, slots=True)
class Parts:
    """The classes of a world: production's, or one with a slip of a posting (``slips``)."""

    design: Callable[[str], Design] = designs.make
    file: type[RestrictedFile] = RestrictedFile
    sequence: type[InvalidationSequence] = InvalidationSequence
    slot: type[Memslot] = Memslot


@cache
def _telling(parts: Parts) -> type[InvalidationSequence]:
    """Return the class of a sequence that tells the rules when an invalidation ends."""

    class Sequence(parts.sequence):  # type: ignore[name-defined, misc]
        __slots__ = ("_invariants",)

        def end(self) -> None:
            self._invariants.opened()
            super().end()

        def close(self) -> None:
            pass

    return Sequence


@final
class MappedFile:
    """The engine's mapping of the file (``Allocator``)."""

    def __init__(self, world: "World") -> None:
        self._world = world

    def allocate(self, offset: int, length: int) -> None:
        """Make pages present and mapped."""
        self._world.frames.allocate(offset, length)
        self._world.invariants.take(PageRange.of_bytes(offset, length))

    def order_of(self, pgoff: pgoff_t) -> int:
        """Return the order of a page's folio."""
        return self._world.frames.order_of(pgoff)

    def release(self, offset: int, length: int) -> None:
        """Do nothing: frames are not pinned."""

    def close(self) -> None:
        """Do nothing: the frames belong to the file."""


@final
class Host:
    """The platform of a world (``Platform``): it applies the rules, then asks the real one."""

    def __init__(self, world: "World", inner: Platform) -> None:
        self._world = world
        self.inner = inner

    def prepare(self, ino: int, span: PageRange, gfn: gfn_t, order: int) -> None:
        """Check pages that are about to be mapped, and pass them on."""
        view = self._world.invariants.view_of(gfn)
        self._world.invariants.install(view, span, gfn)
        folio = self._world.frames.order(span.start)
        if order > folio:
            self._world.invariants.violate(
                Rule.LEVEL,
                f"pages {span} are mapped with order {order}, but their folio has order {folio}",
            )
        self.inner.prepare(ino, span, gfn, order)

    def invalidate(self, ino: int, span: PageRange, order: int | None) -> None:
        """Pass the call on."""
        self.inner.invalidate(ino, span, order)

    def freed(self, ino: int, span: PageRange) -> None:
        """Pass the call on."""
        self.inner.freed(ino, span)

    def report(self) -> dict[str, object]:
        """Pass the call on."""
        return self.inner.report()


@final
class WatchedMmu(Mmu):  # type: ignore[misc] # production's, with points
    """The MMU, with a point where it looks at slots that may be going.

    Elsewhere slots stay while code looks at them. A slot goes only while every vCPU is held, and
    the engine's notify thread has a point of its own (``World.reaching_engine``).
    """

    def wait_settled(self, unless: Callable[[], bool]) -> None:
        """Wait for the invalidations of the present slots."""
        self._look()
        super().wait_settled(unless)

    def _told(self) -> bool:
        self._look()
        return super()._told()

    def _look(self) -> None:
        touch("slots", write=False)
        saw(tuple(slot.number for slot in self.slots))


@final
class SlotNotifier:
    """The service's notifier for a slot of the VM (``Notifier``).

    It makes a round trip to the engine, and does there what the engine's notify thread does.
    """

    def __init__(self, world: "World", view: SlotHistory) -> None:
        self._world = world
        self._view = view

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Make the engine stop using a range."""
        span = PageRange(start, end)
        with self._world.reaching_engine():
            self._world.vm.invalidate_start(self._view.slot.memfd_half.binding, span, order)
        self._world.invariants.start(self._view, span)

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Let the engine use the range again."""
        span = PageRange(start, end)
        self._world.invariants.end(self._view, span)
        with self._world.reaching_engine():
            self._world.vm.invalidate_end(self._view.slot.memfd_half.binding, span, order)

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Make the engine give pages up."""
        with self._world.reaching_engine():
            self._world.vm.error(self._view.slot.memfd_half.binding, PageRange(start, end))

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        """Return the number of the engine's references."""
        with self._world.reaching_engine():
            return self._world.vm.page_count(
                self._view.slot.memfd_half.binding, PageRange(start, end)
            )


@final
class World:
    """One file, one VM with slots on it, and actors (``Program``).

    The file has the pages below ``npages``, and no others.
    """

    def __init__(
        self,
        design: str,
        *,
        npages: int = 1,
        kind: str = "memfd",
        platform: Platform | None = None,
        parts: Parts | None = None,
        exact: bool = True,
    ) -> None:
        self.parts = parts or Parts()
        self.design = self.parts.design(design)
        self.invariants = Invariants(exact=exact, large=kind != "memfd", binds=self.design.binds)
        self.frames = Frames(self.invariants, npages, kind)
        watch(MEMORY)
        # The check looks at ``SlotHistory.live``.
        watch("slots")
        self.invariants.frames = self.frames
        self.invariants.taken = bytearray(npages)
        self.file = self.parts.file(self.design, self.frames, Inode.make(0, 0))
        self.sequence = self._make_sequence()
        # The file itself would make a page of shared memory for the sequence.
        self.file._sequence = self.sequence
        attributes, self.vcpus = Attributes(Api.V10), EngineVcpus()
        self.vm = SoftwareVm(
            cast("Binder", None), self.vcpus, attributes, Trace(), platform or NoPlatform()
        )
        self.vm.mmu = WatchedMmu(attributes, Trace(), Host(self, platform or NoPlatform()))
        self.platform = platform
        # Production calls mincore(2), which needs a mapping.
        self.vm._find_freed = self._find_freed  # type: ignore[method-assign]
        self.memory = VmMemory(
            self.vm, cast("Channel", None), Api.V10, attributes, forbid_shrinking
        )
        self._channel = sync.mutex()
        self._notifiers: dict[int, SlotNotifier] = {}
        self._cpus: list[GuestCpu] = []
        self._vcpus: list[WatchedVcpu] = []
        self._actors: list[tuple[str, Callable[[], None]]] = []

    def _make_sequence(self) -> InvalidationSequence:
        """Make the sequence that service and engine share, without a page of shared memory."""
        sequence = object.__new__(_telling(self.parts))
        sequence._invariants = self.invariants  # type: ignore[attr-defined]
        sequence._words = sync.SharedWords(memoryview(bytearray(4 * 8)))
        sequence._mutex = sync.mutex()
        return sequence

    def _find_freed(self, half: MemfdHalf, span: PageRange) -> None:
        if self.platform is not None:
            touch(MEMORY, write=False)
            for pgoff in [
                pgoff for pgoff in range(span.start, span.end) if not self.frames.numbers[pgoff]
            ]:
                gone = PageRange(pgoff_t(pgoff), pgoff_t(pgoff + 1))
                if half.pages.count(gone):
                    self.platform.freed(half.ino, gone)
                    half.pages.forget(gone)

    # Making a world.

    def add_vcpu(self, *program: Access) -> EngineVcpu:
        """Make a vCPU with guest code."""
        cpu = GuestCpu(self.invariants, self.vm.mmu, len(self._cpus))
        cpu.program = list(program)
        # The CPU has the part of ``VcpuEngine`` that a run needs.
        vcpu = WatchedVcpu(cast("VcpuEngine", cpu))
        self._cpus.append(cpu)
        self._vcpus.append(vcpu)
        self.vcpus.all = (*self.vcpus.all, vcpu)
        return vcpu

    def make_slot(
        self, base: int, npages: int, start: int = 0, *, private: bool = True
    ) -> SlotHistory:
        """Make a slot at guest page ``base`` that shows the file from page ``start`` on.

        The slot is not registered yet.
        """
        window = PageRange(pgoff_t(start), pgoff_t(start + npages))
        half = object.__new__(MemfdHalf)
        half.binding, half.ino, half.failed, half.window = (
            len(self.invariants.views) + 1,
            _INO,
            set(),
            window,
        )
        half.told, half.in_place = 0, False
        half.pages, half.sequence = Pages(MappedFile(self), window, self.sequence), self.sequence
        half.order, half.may_have_folios = (
            (HUGE, True) if self.frames.kind != "memfd" else (0, False)
        )
        self.vm._halves[half.binding] = half
        shared = object.__new__(SharedHalf)
        shared.offset = start << PAGE_SHIFT
        slot = self.parts.slot(half.binding, gfn_t(base), npages, private=half, shared=shared)
        slot.attributes[:] = bytes((private,)) * npages
        if isinstance(slot.entries, SharedBytes):
            slot.entries.watch()
        view = SlotHistory(slot, window, bytearray(npages))
        self.invariants.views.append(view)
        self._notifiers[half.binding] = SlotNotifier(self, view)
        return view

    def add_slot(
        self, base: int, npages: int, start: int = 0, *, private: bool = True
    ) -> SlotHistory:
        """Make a slot, register its notifier, and let the guest reach the slot."""
        view = self.make_slot(base, npages, start, private=private)
        self.register(view)
        return view

    def touched(self, *accesses: Access) -> None:
        """Make a vCPU do accesses before anything else happens, and remove the vCPU."""
        before, self.vcpus.all = self.vcpus.all, ()
        self.run(self.add_vcpu(*accesses))
        self._cpus.pop()
        self._vcpus.pop()
        self.vcpus.all = before

    def actor(self, name: str, *steps: Callable[[], None]) -> None:
        """Add an actor that calls ``steps`` one after the other."""
        number = len(self._actors)

        def act() -> None:
            acting.set(number)
            for index, step in enumerate(steps):
                forget(("step", number, index))
                step()

        self._actors.append((name, act))

    def guest(self, *program: Access) -> EngineVcpu:
        """Add a vCPU, and an actor that runs it to its end."""
        vcpu = self.add_vcpu(*program)
        self.actor(f"vCPU {len(self._cpus) - 1}", partial(self.run, vcpu))
        return vcpu

    def run(self, vcpu: EngineVcpu) -> None:
        """Run a vCPU until its guest has done all its accesses."""
        while isinstance(found := vcpu.run(), Interrupted):
            pass
        self.expect_done(found)

    def run_until_gone(self, vcpu: EngineVcpu) -> None:
        """Run a vCPU until its guest is done, or finds a slot deleted."""
        found = vcpu.run()
        if not isinstance(found, MmioRead):
            self.expect_done(found)

    @staticmethod
    def expect_done(found: Exit) -> None:
        """Check that a guest exited only because it was done."""
        assert found is DONE, f"the guest exited with {found} before it was done"

    # Actions of actors.

    @contextmanager
    def reaching_engine(self) -> Generator[None]:
        """Hold the engine's notify thread, which finds out first which slots there are."""
        with self._channel:
            touch("slots", write=False)
            saw(tuple(slot.number for slot in self.vm.mmu.slots))
            yield

    def register(self, view: SlotHistory) -> None:
        """Register a slot's notifier and let the guest reach the slot.

        KVM_SET_USER_MEMORY_REGION does the same.
        """
        notifier = self._notifiers[view.slot.memfd_half.binding]
        with self.vcpus.held():
            if self.design.binds:
                self.file.bind(view.window.start, view.window.end, notifier, exclusive=True)
            else:
                self.file.register_notifier(notifier)
            self.file.get()
            touch("slots", write=True)
            saw(None)
            self.vm.add_slot(view.slot)
            self.memory.slots.add(view.slot)

    def unregister(self, view: SlotHistory) -> None:
        """Delete a slot, then its notifier and its reference, in production's order."""
        with self.vcpus.held():
            touch("slots", write=True)
            saw(None)
            view.live = False
            self.vm.remove_slot(view.slot)
            self.memory.slots.remove(view.slot)
            for cpu in self._cpus:
                cpu.flush()
            view.leaving = True
            self.file.unregister_notifier(self._notifiers[view.slot.memfd_half.binding])
            view.leaving = False
            self.file.put()

    def punch(self, start: int, end: int) -> None:
        """Punch a hole (fallocate(2)); the range is in pages of the file."""
        span = PageRange(pgoff_t(start), pgoff_t(end))
        with self.invariants.punching(span):
            self.file.fallocate(PUNCH, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)

    def fallocate(self, start: int, end: int) -> None:
        """Preallocate (fallocate(2) with mode 0); the range is in pages of the file."""
        with self.invariants.allocating(PageRange(pgoff_t(start), pgoff_t(end))):
            self.file.fallocate(0, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)

    def convert(self, start: int, end: int, *, private: bool) -> None:
        """Make guest pages private or shared (KVM_SET_MEMORY_ATTRIBUTES)."""
        with self.invariants.converting(gfn_t(start), gfn_t(end)):
            self.memory.set_attributes(
                Api.V10, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT, 8 if private else 0, 0
            )

    def error(self, start: int, end: int) -> None:
        """Make the machine lose pages of the file."""
        span = PageRange(pgoff_t(start), pgoff_t(end))
        with self.invariants.losing(span):
            self.file.error_page(span.start, span.end)

    def close(self) -> None:
        """Drop the owner's reference to the file."""
        self.file.put()

    # Questions of the explorer (Program).

    def actors(self) -> Sequence[tuple[str, Callable[[], None]]]:
        """Return the actors."""
        return self._actors

    def state(self) -> Hashable:
        """Return the shared state that no object of ``sync`` holds."""
        return (
            self.frames.state(),
            self.invariants.state(),
            tuple(cpu.state() for cpu in self._cpus),
            tuple(vcpu.state() for vcpu in self._vcpus),
            self.file._references,
            tuple(
                (
                    list(self._notifiers.values()).index(cast("SlotNotifier", r.notifier)),
                    r.start,
                    r.end,
                )
                for r in self.file.registrations()
            ),
            tuple(slot.number for slot in self.vm.mmu.slots),
            tuple(_half_state(view.slot.memfd_half) for view in self.invariants.views),
            _plain(self.design),
        )

    def check(self) -> None:
        """Raise if the last step broke a rule.

        Raises:
            RuleBroken: the rule, and how it was broken.
        """
        self.invariants.check()
        if isinstance(self.platform, Snp):
            found = self.platform._violations
            if found:
                raise RuleBroken(
                    f"{Rule.PLATFORM.value}: {found[0].rule}, page {found[0].start:#x}"
                )

    def finish(self) -> None:
        """Raise if a rule does not hold at the end.

        Raises:
            RuleBroken: the rule, and how it is broken.
        """
        self.invariants.finish()


def _half_state(half: MemfdHalf) -> Hashable:
    pages = half.pages
    return (
        tuple(sorted(half.failed)),
        bytes(pages._state),
        bytes(pages._orders),
        tuple(pages._changing),
        half.told,
    )


def _plain(thing: object) -> Hashable:
    """Return the data that a design remembers; the explorer knows the state of its locks."""
    match thing:
        case int() | str() | PageRange():
            return thing
        case dict():
            return tuple(sorted(cast("dict[int, int]", thing).items()))
        case set():
            return tuple(sorted(cast("set[int]", thing)))
        case Design() | Punched():
            names = (
                name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())
            )
            return tuple(_plain(getattr(thing, name)) for name in names)
        case _:
            return None
