"""One VM on one engine that runs program after program; each run is a list of events."""

import contextlib
import mmap
import os
import random
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from errno import EACCES, EFAULT
from itertools import chain, count, cycle, groupby, islice
from typing import Final, Self

from restrictedmem.abi import memory
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.protocol.exits import (
    Exit,
    Hypercall,
    Interrupted,
    MemoryFault,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Shutdown,
)
from restrictedmem.protocol.guest_abi import HYPERCALL_PAGE
from restrictedmem.service.client import Service
from restrictedmem.vmm.vm import Vm

from . import places
from .make import content as content_of
from .places import BASE, PAGE
from .program import ACTIONS, DONE, Action, Program
from .x86 import DF, STATUS

#: Programs that end with an exception take a vCPU with them.
VCPUS: Final = 12
#: Exits of one program, and how often one fault may come again.
_EXITS: Final = 400
_AGAIN: Final = 3
#: Seconds between two things that happen in a storm, at most.
_CALM: Final = 0.0005
#: mov eax, DONE; mov ecx, HYPERCALL_PAGE; call rcx; hlt
_BOOT_CODE: Final = bytes.fromhex("b8e7030000b900001000ffd1f4")
_NAMES: Final = (
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rsp",
    "rbp",
    "rsi",
    "rdi",
    *(f"r{number}" for number in range(8, 16)),
)
_SEEN: Final = STATUS | DF
#: Slots with a private half, what has a shared one, and what has no other.
_WITH_PRIVATE: Final = (places.FRONT_SLOT, places.TAIL_SLOT, places.BOTH_SLOT, places.LONE)
_WITH_SHARED: Final = (places.FRONT_SLOT, places.BOTH_SLOT, places.WINDOW, places.ROM, places.HOLE)
_OWNED: Final = (places.WINDOW, places.ROM, places.HOLE)
_INVERTED: Final = bytes(range(255, -1, -1))


@dataclass(frozen=True, slots=True)
class State:
    """A vCPU as a debugger sees it: registers by number, and the status flags and DF."""

    registers: tuple[int, ...]
    rip: int
    flags: int

    @classmethod
    def of(cls, regs: kvm_regs) -> Self:
        # Where in the hypercall page one waits is the engine's own.
        rip = HYPERCALL_PAGE if regs.rip & -PAGE == HYPERCALL_PAGE else regs.rip
        return cls(tuple(getattr(regs, name) for name in _NAMES), rip, regs.rflags & _SEEN)


@dataclass(frozen=True, slots=True)
class Event:
    """An exit of a guest, or a remark; ``state`` is None if the engines stop at other points."""

    exit: Exit | str
    state: State | None = None


_NOWHERE: Final = Event("an access to where nothing is")


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a program: its events, the content of pages' halves after it, and pages needed."""

    events: tuple[Event, ...]
    memory: Mapping[int, tuple[bytes, ...]]
    needed: frozenset[int]
    """Those of no slot, and those that are only to be read and were written."""


class Memory:
    """A memfd of the owner's for some pages, and its mapping."""

    def __init__(self, pages: range) -> None:
        self.pages = pages
        self.fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, len(pages) * PAGE)
        self._map = mmap.mmap(self.fd, len(pages) * PAGE)

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)

    def put(self, page: int, data: bytes, at: int = 0) -> None:
        start = (page - self.pages.start) * PAGE + at
        self._map[start : start + len(data)] = data

    def get(self, page: int) -> bytes:
        start = (page - self.pages.start) * PAGE
        return self._map[start : start + PAGE]


class Machine:
    """A VM with every kind of page (``places``).

    A debug policy lets the owner see registers at each exit. Stores to read-only memory succeed in
    the end, and an address without a slot is the owner's memory. On the software engine the owner
    answers MMIO for it. On the kernel engine the owner makes a slot there when the guest first
    needs it. So guests find the same content.
    """

    def __init__(self, service: Service, engine: str, vcpus: int = VCPUS) -> None:
        """Make a VM with vCPUs that have run.

        The VM closes the descriptors; the caller keeps the service.

        Raises:
            OSError: the service's or the engine's error.
        """
        self.engine = engine
        with contextlib.ExitStack() as stack:
            self._files = {
                pages: stack.enter_context(_restricted(service, len(pages)))
                for pages in _WITH_PRIVATE
            }
            self._owned = {
                pages: stack.enter_context(contextlib.closing(Memory(pages)))
                for pages in _WITH_SHARED
            }
            self._vm = stack.enter_context(Vm(service, engine=engine, debug=True))
            self._private = dict.fromkeys(places.AT_REST, False)
            self._add_slots()
            self._vm.launch_update(BASE, _BOOT_CODE.ljust(PAGE, b"\xf4"))
            self._vcpus = [stack.enter_context(self._vm.create_vcpu()) for _ in range(vcpus)]
            for vcpu in self._vcpus:
                vcpu.set_regs(rip=BASE, rsp=places.address(places.STACK.stop))
            for vcpu in self._vcpus:
                vcpu.run()
            self._flags = self._vcpus[0].get_regs().rflags & ~_SEEN
            self._resources = stack.pop_all()
        self._stopped = self._lost = False
        #: Pages of memory that is only to be read, or of none, that the guest has needed.
        self._opened: set[int] = set()

    def _add_slots(self) -> None:
        for pages in dict.fromkeys((*_WITH_PRIVATE, places.WINDOW)):
            self._vm.set_user_memory_region(
                slot=pages.start,
                guest_phys_addr=places.address(pages.start),
                memory_size=len(pages) * PAGE,
                restricted_fd=self._files.get(pages),
                shared_fd=self._owned[pages].fd if pages in self._owned else None,
            )
        self._show(places.ROM.start, readonly=True)
        for pages in _WITH_PRIVATE:
            self._vm.set_memory_attributes(
                places.address(pages.start), len(pages) * PAGE, private=True
            )
        self._convert(places.AT_REST)

    def _show(self, page: int, *, readonly: bool = False) -> None:
        """Put a slot of one page where the owner's memory is to be seen."""
        shown = self._owner_of(page)
        self._vm.set_user_memory_region(
            slot=page,
            guest_phys_addr=places.address(page),
            memory_size=PAGE,
            shared_fd=shown.fd,
            shared_offset=(page - shown.pages.start) * PAGE,
            readonly=readonly,
        )

    def _hide(self, page: int) -> None:
        self._vm.set_user_memory_region(
            slot=page, guest_phys_addr=places.address(page), memory_size=0
        )

    def _owner_of(self, page: int) -> Memory:
        return next(shown for pages, shown in self._owned.items() if page in pages)

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def spent(self) -> bool:
        """Whether no other program can be run here."""
        return self._lost or self._stopped or not self._vcpus

    def stop(self) -> None:
        """End the program that runs, from another thread: no other follows."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self._running.interrupt()

    # One program.

    def run(self, program: Program) -> Run:
        """Run a program from its start to its end; an engine that fails is an event, too."""
        events: list[Event] = []
        self._running, self._answer = self._vcpus[-1], 0
        try:
            self._rewind(program)
            with self._storm(program):
                events.extend(self._follow(program))
            return Run(tuple(events), self._memory(), frozenset(self._opened))
        except OSError as error:
            self._lost = True
            return Run((*events, Event(f"error: {error}")), {}, frozenset())

    def _rewind(self, program: Program) -> None:
        """Undo the changes of earlier programs, then set up pages as the program needs them."""
        self._close_pages()
        private = {page: content_of(program.content, page) for page in places.PRIVATE_RUN}
        private |= dict(zip(places.CODE, code_pages(program), strict=True))
        self._vm.write_memory(places.address(places.PRIVATE_RUN.start), b"".join(private.values()))
        for page in places.TWO_HALVES:
            self._owner_of(page).put(
                page, private[page] if page in places.CODE else private[page].translate(_INVERTED)
            )
        for pages in _OWNED:
            for page in pages:
                self._owner_of(page).put(page, content_of(program.content, page))
        self._punch(program.punched)
        self._convert({page: page in program.private for page in places.AT_REST})
        regs = kvm_regs(rip=program.start, rflags=self._flags | program.flags)
        for name, value in zip(_NAMES, program.registers, strict=True):
            setattr(regs, name, value)
        self._vcpus[-1].change_regs(regs)

    def _close_pages(self) -> None:
        if self.engine == "kernel":
            for page in self._opened:
                self._hide(page)
                if page in places.ROM:
                    self._show(page, readonly=True)
        self._opened.clear()

    def _memory(self) -> dict[int, tuple[bytes, ...]]:
        """Return the content of each page's halves.

        Afterwards no page that can be shared is private.
        """
        self._rest()
        run = places.PRIVATE_RUN
        content = self._vm.read_memory(places.address(run.start), len(run) * PAGE)
        private = {page: content[(page - run.start) * PAGE :][:PAGE] for page in places.PRIVATE}
        shared = {
            page: self._owner_of(page).get(page) for page in (*places.TWO_HALVES, *chain(*_OWNED))
        }
        return {
            page: tuple(half[page] for half in (private, shared) if page in half)
            for page in private | shared
        }

    # The guest's exits.

    def _follow(self, program: Program) -> Iterator[Event]:
        """Run to the end, doing what an owner does at each exit; yields what is told of them."""
        answers, faults, last, again = cycle(program.answers), count(), Event(""), 0
        for event in islice(self._events(), _EXITS):
            yield event
            again = again + 1 if event == last else 0
            last = event
            match event.exit:
                case Hypercall(number) if number != DONE:
                    self._answer = next(answers)
                    if ACTIONS <= number < ACTIONS + len(program.actions):
                        self._act(program.actions[number - ACTIONS])
                case PortIn() | PortOut():
                    self._answer = next(answers)
                case MemoryFault() as fault if (
                    again < _AGAIN and next(faults) not in program.unmended and self._mend(fault)
                ):
                    pass
                case _:
                    return
        yield Event("too many exits")

    def _events(self) -> Iterator[Event]:
        """Yield what is told of each exit, MMIO done; whoever takes it leaves an answer."""
        vcpu = self._running
        while True:
            answer, self._answer = self._answer, 0
            match exit_ := vcpu.run(answer):
                case Interrupted():
                    if self._stopped:
                        yield Event("hangs")
                case MmioRead() | MmioWrite():
                    answered = self._mmio(exit_)
                    if answered is None:
                        yield _NOWHERE
                    else:
                        self._answer = answered
                case PortIn() | PortOut():
                    yield Event(exit_)
                case MemoryFault():
                    state = State.of(vcpu.get_regs())
                    if not self._is_mmio(exit_, state):
                        yield Event(exit_, state)
                    elif not self._open(places.page_of(exit_.gpa)):
                        yield _NOWHERE
                case _:
                    if isinstance(exit_, Shutdown):
                        self._vcpus.pop()
                    yield Event(exit_, State.of(vcpu.get_regs()))

    def _mmio(self, exit_: MmioRead | MmioWrite) -> int | None:
        """Be the device; returns the answer, None where no device is."""
        value = exit_.data if isinstance(exit_, MmioWrite) else 0
        data = bytearray(value.to_bytes(exit_.size, "little"))
        # One access may lie in two pages: without the second, nothing of it is done.
        if not all(self._open(places.page_of(exit_.gpa + index)) for index in (0, exit_.size - 1)):
            return None
        for index in range(exit_.size):
            page, at = places.page_of(exit_.gpa + index), (exit_.gpa + index) % PAGE
            shown = self._owner_of(page)
            if isinstance(exit_, MmioRead):
                data[index] = shown.get(page)[at]
            else:
                shown.put(page, bytes(data[index : index + 1]), at)
        return int.from_bytes(data, "little")

    def _is_mmio(self, fault: MemoryFault, state: State) -> bool:
        """Say whether a fault of the kernel engine is what is MMIO on the other."""
        page = places.page_of(fault.gpa)
        if self.engine != "kernel" or fault.flags or places.page_of(state.rip) == page:
            return False
        readonly = page in places.ROM or fault.gpa == HYPERCALL_PAGE
        return fault.errno == (EACCES if readonly else EFAULT) and places.MISSING.get(page, True)

    def _open(self, page: int) -> bool:
        """Give the guest a page that was read-only or missing; return False if there is none."""
        if page not in places.ROM and page not in places.HOLE:
            return False
        if page not in self._opened and self.engine == "kernel":
            if page in places.ROM:
                self._hide(page)
            self._show(page)
        self._opened.add(page)
        return True

    def _mend(self, fault: MemoryFault) -> bool:
        """Convert a page to the half that it has; False when there is nothing to mend."""
        page = places.page_of(fault.gpa)
        if places.MISSING.get(page) is not self._private.get(page) or page not in self._private:
            return False
        self._convert({page: not self._private[page]})
        return True

    # The owner's doings.

    def _convert(self, wanted: Mapping[int, bool]) -> None:
        """Let pages have the attributes that are wanted, a run of pages at a time."""
        for private in (False, True):
            for run in _runs(
                page for page, wants in wanted.items() if wants == private != self._private[page]
            ):
                self._vm.set_memory_attributes(
                    places.address(run.start), len(run) * PAGE, private=private
                )
        self._private.update(wanted)

    def _rest(self) -> None:
        """Let all pages have the attributes that they have at rest, most of them at once."""
        run = places.PRIVATE_RUN
        if not all(self._private[page] for page in places.PRIVATE):
            self._vm.set_memory_attributes(places.address(run.start), len(run) * PAGE, private=True)
            self._private.update(dict.fromkeys(places.PRIVATE, True))
        self._convert(places.AT_REST)

    def _punch(self, pages: Iterable[int]) -> None:
        for slot, run in (
            (slot, run)
            for slot in _WITH_PRIVATE
            for run in _runs(page for page in pages if page in slot)
        ):
            memory.fallocate(
                self._files[slot], memory.PUNCH, (run.start - slot.start) * PAGE, len(run) * PAGE
            )

    def _act(self, action: Action) -> None:
        match action.kind:
            case "convert":
                self._convert(dict.fromkeys(action.pages, action.private))
            case "punch":
                self._punch(action.pages)
            case _:
                # This writes as the guest sees the pages: where it would fault, there is nothing to
                # write to.
                for page in action.pages:
                    if self._private[page] is not places.MISSING.get(page):
                        self._vm.write_memory(
                            places.address(page), content_of(action.content, page)
                        )

    @contextlib.contextmanager
    def _storm(self, program: Program) -> Generator[None]:
        """Run a thread that stops the guest and punches other pages, if the program has a storm."""
        if not program.storm:
            yield
            return
        over, vcpu, dice = threading.Event(), self._running, random.Random(program.seed)

        def blow() -> None:
            private = dict.fromkeys(places.SPARE, True)
            with contextlib.suppress(OSError):
                # Without a pause the guest would get nowhere.
                while not over.wait(dice.uniform(0, _CALM)):
                    page = dice.choice(places.SPARE)
                    match dice.randrange(8):
                        case 0 | 1 | 2 | 3 | 4:
                            vcpu.interrupt()
                        case 5:
                            private[page] = not private[page]
                            self._vm.set_memory_attributes(
                                places.address(page), PAGE, private=private[page]
                            )
                        case _:
                            self._punch([page])
                for page in places.SPARE:
                    if not private[page]:
                        self._vm.set_memory_attributes(places.address(page), PAGE, private=True)

        thread = threading.Thread(target=blow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _runs(pages: Iterable[int]) -> Iterator[range]:
    """Yield pages as runs of neighbours."""
    for _, group in groupby(
        enumerate(sorted(pages)), key=lambda numbered: numbered[1] - numbered[0]
    ):
        run = [page for _, page in group]
        yield range(run[0], run[-1] + 1)


def code_pages(program: Program) -> list[bytes]:
    """Return the pages with the program's code; HLT where there is none."""
    pages = bytearray(b"\xf4" * (len(places.CODE) * PAGE))
    for line in program.lines:
        at = line.address - places.address(places.CODE.start)
        pages[at : at + len(line.code)] = line.code
    return [bytes(pages[start : start + PAGE]) for start in range(0, len(pages), PAGE)]


@contextlib.contextmanager
def _restricted(service: Service, npages: int) -> Generator[int]:
    fd = service.memfd_restricted()
    try:
        os.ftruncate(fd, npages * PAGE)
        yield fd
    finally:
        os.close(fd)
