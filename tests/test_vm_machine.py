"""A VM compared with a model.

Slots are made, moved and deleted; pages are converted, punched, lost and prefaulted; a guest loads
and stores.
"""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from restrictedmem.abi import memory
from restrictedmem.abi.kvm import (
    EHWPOISON,
    KVM_MEM_PRIVATE,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    kvm_regs,
    kvm_userspace_memory_region_ext,
)
from restrictedmem.abi.memory import PUNCH
from restrictedmem.consumer import Bound
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine_vcpu import EngineVcpu, EngineVcpus
from restrictedmem.kvm.half import forbid_shrinking
from restrictedmem.kvm.software.software_vm import SoftwareVm
from restrictedmem.kvm.vm_memory import VmMemory
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.platform.platform import NoPlatform
from restrictedmem.protocol.exits import Exit, MemoryFault, MmioRead, MmioWrite, PortIn, PortOut
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_SIZE, PageRange, gfn_t, pgoff_t

EFAULT, ENOENT, EEXIST, EINVAL = 14, 2, 17, 22
#: Where the guest's code is; the pages under test, by number; how many a slot has.
CODE: Final = 0x4000_0000
BASE: Final = 0x2000_0000
PAGES: Final = 12
SLOT: Final = 4
NUMBERS: Final = (1, 2)
#: The guest asks for an address and a value, and loads or, if the value is not 0, stores. It goes
#: on from access to access, so that what it has cached is only dropped by whoever has to.
GUEST: Final = bytes.fromhex(
    "e590"  # again: in eax, 0x90
    "89c7"  # mov edi, eax
    "e591"  # in eax, 0x91
    "85c0"  # test eax, eax
    "7507"  # jne store
    "488b07"  # mov rax, [rdi]
    "e780"  # out 0x80, eax
    "ebef"  # jmp again
    "89c6"  # store: mov esi, eax
    "488937"  # mov [rdi], rsi
    "e681"  # out 0x81, al
    "ebe6"  # jmp again
)
ANSWER: Final = 0x77
_T = TypeVar("_T")


def gpa_of(page: int) -> int:
    return BASE + page * PAGE_SIZE


class Reports:
    """The service, as far as a VM tells it anything."""

    def call(self, *_: object) -> None:
        pass


@dataclass
class Notified:
    """One binding: the file's notifier, forwarded to the engine as the notify thread does."""

    number: int
    engine: SoftwareVm

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.engine.invalidate_start(self.number, PageRange(start, end), order)

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.engine.invalidate_end(self.number, PageRange(start, end), order)

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        raise AssertionError("no page was lost")

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        return 0


@dataclass
class Files:
    """Binds tokens, which are names of files of this process."""

    files: dict[bytes, RestrictedFile]
    engine: SoftwareVm | None = None
    bound: dict[int, tuple[RestrictedFile, Notified]] = field(
        default_factory=dict[int, tuple[RestrictedFile, Notified]]
    )
    count: int = 0
    #: A function that runs when a binding exists and its slot does not yet.
    when_bound: Callable[[Notified], None] = lambda _: None

    def bind(self, token: bytes, window: PageRange, take: Callable[[Bound], _T]) -> _T:
        file = self.files[token]
        fd, sequence = (
            OwnedFd(os.dup(fd)) for fd in (file.backing.fileno(), file.sequence().fd.fileno())
        )

        def took(number: int) -> _T:
            return take(Bound(number, token[0], None, fd, sequence, flags=0, order=0))

        return self._register(file, took)

    def bind_again(self, binding: int, window: PageRange, take: Callable[[int], _T]) -> _T:
        return self._register(self.bound[binding][0], take)

    def _register(self, file: RestrictedFile, take: Callable[[int], _T]) -> _T:
        self.count += 1
        assert self.engine is not None
        notified = Notified(self.count, self.engine)
        file.register_notifier(notified)
        self.bound[self.count] = file, notified
        taken = take(self.count)
        self.when_bound(notified)
        return taken

    def unbind(self, number: int) -> None:
        file, notified = self.bound.pop(number)
        file.unregister_notifier(notified)


@dataclass
class Slot:
    """A slot of the model: its first page, and whether it has a private half.

    Both halves begin at page 0 of their file.
    """

    first: int
    private: bool

    def holds(self, page: int) -> bool:
        return self.first <= page < self.first + SLOT


class VmMachine(RuleBasedStateMachine):
    """One restricted file and one memfd for each slot number.

    ``private`` and ``shared`` are their content, a word a page.
    """

    @initialize(api=st.sampled_from(list(Api)))
    def make(self, api: Api) -> None:
        self.api = api
        self.files = {
            number: RestrictedFile(make(api.value), MemfdBacking(), Inode.make(0, 0))
            for number in (0, *NUMBERS)
        }
        self.windows = {number: memory.memfd_create("window") for number in NUMBERS}
        # Other content than the private half's zeroes, so that a page in the wrong half shows.
        self.shared = {number: [number << 8 | index for index in range(SLOT)] for number in NUMBERS}
        for number, window in self.windows.items():
            os.ftruncate(window.fileno(), SLOT * PAGE_SIZE)
            for index, word in enumerate(self.shared[number]):
                os.pwrite(window.fileno(), word.to_bytes(8, "little"), index * PAGE_SIZE + 8)
        self.vcpus = EngineVcpus()
        attributes = Attributes(api)
        binder = Files({bytes([number]) * 16: file for number, file in self.files.items()})
        self.engine = binder.engine = SoftwareVm(
            binder, self.vcpus, attributes, Trace(), NoPlatform()
        )
        self.vm = VmMemory(self.engine, cast(Channel, Reports()), api, attributes, forbid_shrinking)
        self.vm.set_region(region(0, CODE, PAGE_SIZE, KVM_MEM_PRIVATE), bytes(16), None)
        self.vm.set_attributes(api, CODE, PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE, 0)
        self.vm.launch_update(CODE, GUEST.ljust(PAGE_SIZE, b"\0"))
        self.vcpus.all = tuple(EngineVcpu(self.engine.create_vcpu(number)) for number in range(2))
        self.slots: dict[int, Slot] = {}
        #: vCPUs that are at the first IN.
        self.asking: set[int] = set()
        self.is_private = [api is Api.V9] * PAGES
        self.private = {number: [0] * SLOT for number in NUMBERS}
        self.lost: set[tuple[int, int]] = set()

    def teardown(self) -> None:
        if not hasattr(self, "vm"):
            return
        for number in (0, *self.slots):
            self.vm.set_region(region(number, 0, 0), b"", None)
        for vcpu in self.vcpus.all:
            cast(Any, vcpu.engine).close()
        for file in self.files.values():
            file.put()
        for window in self.windows.values():
            window.close()

    def slot_at(self, page: int) -> tuple[int, Slot] | None:
        return next(
            ((number, slot) for number, slot in self.slots.items() if slot.holds(page)), None
        )

    # The owner.

    def set_region(self, number: int, page: int, size: int, *, private: bool) -> int:
        flags = KVM_MEM_PRIVATE if private else 0
        with OwnedFd(os.dup(self.windows[number].fileno())) as window:
            try:
                self.vm.set_region(
                    region(number, gpa_of(page), size, flags), bytes([number]) * 16, window
                )
            except OSError as error:
                return error.errno or -1
        return 0

    @rule(number=st.sampled_from(NUMBERS), page=st.integers(0, PAGES - SLOT), private=st.booleans())
    def make_or_move(self, number: int, page: int, *, private: bool) -> None:
        old = self.slots.get(number)
        others = [slot for other, slot in self.slots.items() if other != number]
        overlaps = any(slot.first < page + SLOT and page < slot.first + SLOT for slot in others)
        if old is not None and (old.private or private):
            expected = EINVAL
        elif old is not None and old.first == page:
            expected = 0
        else:
            expected = EEXIST if overlaps else 0
        assert self.set_region(number, page, SLOT * PAGE_SIZE, private=private) == expected
        if not expected:
            self.slots[number] = Slot(page, private)

    @rule(number=st.sampled_from(NUMBERS))
    def delete(self, number: int) -> None:
        assert self.set_region(number, 0, 0, private=False) == (
            0 if number in self.slots else EINVAL
        )
        if self.slots.pop(number, None) is not None:
            self.lost = {lost for lost in self.lost if lost[0] != number}

    @rule(page=st.integers(0, PAGES - 1), count=st.integers(1, PAGES), private=st.booleans())
    def convert(self, page: int, count: int, *, private: bool) -> None:
        count = min(count, PAGES - page)
        attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        # So that there is a translation to be dropped, and one page shows whether it was.
        self.look(page)
        assert (
            self.vm.set_attributes(self.api, gpa_of(page), count * PAGE_SIZE, attributes, 0)
            == count * PAGE_SIZE
        )
        self.is_private[page : page + count] = [private] * count
        self.look(page)

    @rule(
        number=st.sampled_from(NUMBERS), page=st.integers(0, SLOT - 1), count=st.integers(1, SLOT)
    )
    def punch(self, number: int, page: int, count: int) -> None:
        count = min(count, SLOT - page)
        shown = self.slots[number].first + page if number in self.slots else 0
        self.look(shown)
        self.files[number].fallocate(PUNCH, page * PAGE_SIZE, count * PAGE_SIZE)
        self.private[number][page : page + count] = [0] * count
        self.lost -= {(number, index) for index in range(page, page + count)}
        self.look(shown)

    @precondition(lambda self: any(slot.private for slot in self.slots.values()))
    @rule(data=st.data(), index=st.integers(0, SLOT - 1))
    def lose(self, data: st.DataObject, index: int) -> None:
        number = data.draw(
            st.sampled_from([number for number, slot in self.slots.items() if slot.private]), "slot"
        )
        self.vm.inject_failure(gpa_of(self.slots[number].first + index))
        self.lost.add((number, index))

    # The guest.

    def access(self, page: int) -> tuple[list[int], int] | MemoryFault | None:
        """Return where an access goes, the fault it is, or None for MMIO."""
        private = self.is_private[page]
        found = self.slot_at(page)
        flag = KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0
        if found is None:
            return (
                MemoryFault(flag, gpa_of(page), PAGE_SIZE, EFAULT)
                if private and self.api is Api.V10
                else None
            )
        number, slot = found
        if self.api is Api.V9 and not slot.private:
            private = False
        index = page - slot.first
        if not private:
            return self.shared[number], index
        if not slot.private:
            return MemoryFault(flag, gpa_of(page), PAGE_SIZE, EFAULT)
        if (number, index) in self.lost:
            return MemoryFault(flag, gpa_of(page), PAGE_SIZE, EHWPOISON)
        return self.private[number], index

    def run(self, vcpu: int, page: int, value: int = 0) -> Exit:
        """Let a vCPU do one access; it is left at the exit that comes of it."""
        one = self.vcpus.all[vcpu]
        if vcpu not in self.asking:
            one.engine.set_regs(kvm_regs(rip=CODE))
            assert one.run() == PortIn(0x90, 4)
        self.asking.discard(vcpu)
        one.complete(gpa_of(page) + 8)
        assert one.run() == PortIn(0x91, 4)
        one.complete(value)
        return one.run()

    def finish(self, vcpu: int) -> None:
        """Let it ask for the next access."""
        assert self.vcpus.all[vcpu].run() == PortIn(0x90, 4)
        self.asking.add(vcpu)

    def look(self, page: int) -> None:
        for vcpu in range(2):
            self.load(vcpu, page)

    @rule(vcpu=st.integers(0, 1), page=st.integers(0, PAGES - 1))
    def load(self, vcpu: int, page: int) -> None:
        exit_ = self.run(vcpu, page)
        match self.access(page):
            case MemoryFault() as fault:
                assert exit_ == fault
                return
            case None:
                assert exit_ == MmioRead(gpa_of(page) + 8, 8)
                self.vcpus.all[vcpu].complete(ANSWER)
                assert self.vcpus.all[vcpu].run() == PortOut(0x80, 4, ANSWER)
            case content, index:
                assert exit_ == PortOut(0x80, 4, content[index])
        self.finish(vcpu)

    @rule(vcpu=st.integers(0, 1), page=st.integers(0, PAGES - 1), value=st.integers(1, 0xFFFF))
    def store(self, vcpu: int, page: int, value: int) -> None:
        exit_ = self.run(vcpu, page, value)
        match self.access(page):
            case MemoryFault() as fault:
                assert exit_ == fault
                return
            case None:
                assert exit_ == MmioWrite(gpa_of(page) + 8, 8, value)
                assert self.vcpus.all[vcpu].run() == PortOut(0x81, 1, value & 0xFF)
            case content, index:
                assert exit_ == PortOut(0x81, 1, value & 0xFF)
                content[index] = value
        self.finish(vcpu)

    @rule(vcpu=st.integers(0, 1), page=st.integers(0, PAGES - 1), count=st.integers(1, PAGES))
    def prefault(self, vcpu: int, page: int, count: int) -> None:
        count = min(count, PAGES - page)
        wanted = [self.access(page + index) for index in range(count)]
        good = next(
            (index for index, where in enumerate(wanted) if not isinstance(where, tuple)), count
        )
        start = gfn_t(gpa_of(page) // PAGE_SIZE)
        try:
            done = self.vcpus.all[vcpu].prefault(start, gfn_t(start + count))
        except OSError as error:
            failed, done = error.errno, 0
        else:
            failed = None
        assert done == good
        first = wanted[0]
        if not isinstance(first, tuple):
            assert failed == (ENOENT if first is None else first.errno)

    @invariant()
    def the_owner_sees_the_shared_halves_and_blocks_are_what_pages_say(self) -> None:
        if not hasattr(self, "vm"):
            return
        for number, window in self.windows.items():
            with mmap.mmap(window.fileno(), SLOT * PAGE_SIZE) as view:
                words = [
                    int.from_bytes(view[page * PAGE_SIZE + 8 : page * PAGE_SIZE + 16], "little")
                    for page in range(SLOT)
                ]
            assert words == self.shared[number]
        for slot in self.vm.slots:
            private = slot.attributes.count(1)
            assert self.vm.statistics()["mixed_2m"] or private in (0, len(slot.attributes))


def region(slot: int, gpa: int, size: int, flags: int = 0) -> kvm_userspace_memory_region_ext:
    return kvm_userspace_memory_region_ext(
        slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=0
    )


TestVmMachine = pytest.mark.no_cover(VmMachine.TestCase)
TestVmMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_punch_that_is_under_way_when_a_slot_is_made_has_its_end_there() -> None:
    punched = PageRange(pgoff_t(0), pgoff_t(SLOT))
    heard: list[Notified] = []

    def begin(notified: Notified) -> None:
        notified.invalidate_start(punched.start, punched.end, None)
        heard.append(notified)

    file = RestrictedFile(make("v10"), MemfdBacking(), Inode.make(0, 0))
    binder = Files({bytes(16): file}, when_bound=begin)
    attributes = Attributes(Api.V10)
    engine = binder.engine = SoftwareVm(binder, EngineVcpus(), attributes, Trace(), NoPlatform())
    vm = VmMemory(engine, cast(Channel, Reports()), Api.V10, attributes, forbid_shrinking)
    vm.set_region(region(0, CODE, SLOT * PAGE_SIZE, KVM_MEM_PRIVATE), bytes(16), None)
    (slot,) = vm.slots
    half = slot.memfd_half
    assert half.told == 1
    heard[0].invalidate_end(punched.start, punched.end, None)
    assert half.told == 0
    vm.clear()
    file.put()
