"""The scenarios that are searched (``scenario``), those with two actors first.

A scenario is a function that makes a world. Its docstring is the description that a person reads.
If a design breaks a rule by its nature, the scenario has an entry for it with the reason. This is a
finding about the design (docs/understand/findings.md). A search that does not find it fails.
"""

from errno import ENOMEM, ENOSPC
from functools import partial
from typing import Final

from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.check.frames import HUGE_PAGES
from restrictedmem.check.guest_cpu import load, store
from restrictedmem.check.invariants import Rule
from restrictedmem.check.scenario import SCENARIOS, KnownFault, Make, scenario
from restrictedmem.check.world import World
from restrictedmem.kvm.engine_vcpu import EngineVcpu
from restrictedmem.platform.snp import Snp
from restrictedmem.protocol.exits import MemoryFault

#: A module that looks up a scenario imports this module, which fills ``SCENARIOS``.
__all__ = ["SCENARIOS"]

#: Guest pages of the first and the second slot.
FIRST: Final = 0x10
SECOND: Final = 0x20
#: First guest page of a slot that may be mapped large.
ALIGNED: Final = 2 * HUGE_PAGES

_UNHEARD: Final = KnownFault(
    Rule.FREED,
    "a part of 2 MiB is freed without a callback, while the guest has it mapped: this design needs "
    "pages to be converted before they are punched",
)
_OPEN: Final = KnownFault(
    Rule.FREED, "start and end come before the operation, and nothing is in progress while it frees"
)
_STILL_TAKEN: Final = KnownFault(
    Rule.FREED,
    "a page that was converted still counts as taken: after a punch without a callback the page is "
    "mapped although it was freed",
)
_BY_NATURE: Final = {"batched": _UNHEARD, "folio-poc": _OPEN}
#: Designs that differ from each other in how they tell consumers of a punch.
_APART: Final = ("v10", "folio", "folio-poc", "batched", "lazy")
_DEAF: Final = KnownFault(Rule.POISON, "consumers do not hear of pages that the machine has lost")


# Two actors.


@scenario(2, findings=_BY_NATURE, quick=True)
def punch_fault(new: Make) -> World:
    """The owner punches a page while the guest, which has it mapped, reads and writes it."""
    # The guest reads, writes and reads again.
    world = new()
    world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    world.guest(load(FIRST), store(FIRST, 2), load(FIRST))
    world.actor("owner", partial(world.punch, 0, 1))
    return world


@scenario(2, findings=_BY_NATURE)
def punch_block_fault(new: Make) -> World:
    """The owner punches the second of two pages; the guest touches both."""
    # The fault of one page maps the other.
    world = new(npages=2)
    world.add_slot(FIRST, 2)
    world.guest(store(FIRST, 1), store(FIRST + 1, 2), load(FIRST))
    world.actor("owner", partial(world.punch, 1, 2))
    return world


@scenario(2, findings={"batched": _UNHEARD})
def punch_punch(new: Make) -> World:
    """Two threads of the owner punch overlapping ranges of pages that the guest has mapped."""
    world = new(npages=3)
    world.add_slot(FIRST, 3)
    world.touched(store(FIRST, 1), store(FIRST + 1, 2), store(FIRST + 2, 3))
    world.actor("owner 1", partial(world.punch, 0, 2))
    world.actor("owner 2", partial(world.punch, 1, 3))
    return world


@scenario(2, findings=_BY_NATURE, quick=True)
def punch_register(new: Make) -> World:
    """A slot is made and the guest runs on it, while the owner punches the file."""
    world = new()
    world.fallocate(0, 1)
    view = world.make_slot(FIRST, 1)
    vcpu = world.add_vcpu(store(FIRST, 1), load(FIRST))
    world.actor("VM", partial(world.register, view), partial(world.run, vcpu))
    world.actor("owner", partial(world.punch, 0, 1))
    return world


@scenario(2, findings={"batched": _UNHEARD}, quick=True, leaves=True)
def punch_unregister(new: Make) -> World:
    """A slot that the guest has mapped is deleted, while the owner punches the file."""
    world = new()
    view = world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    world.actor("VM", partial(world.unregister, view))
    world.actor("owner", partial(world.punch, 0, 1))
    return world


@scenario(2, designs=("v10",))
def convert_fault(new: Make) -> World:
    """The owner makes a page shared and private again, while the guest reads and writes it."""
    world = new()
    world.add_slot(FIRST, 1)
    world.guest(store(FIRST, 1), load(FIRST))
    world.actor(
        "owner",
        partial(world.convert, FIRST, FIRST + 1, private=False),
        partial(world.convert, FIRST, FIRST + 1, private=True),
    )
    return world


@scenario(2, quick=True)
def convert_then_punch(new: Make) -> World:
    """The owner makes a page shared, then punches it; the guest goes on touching the page."""
    # This is the order that batched callbacks ask for.
    world = new()
    world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    world.guest(load(FIRST), store(FIRST, 2))
    world.actor(
        "owner", partial(world.convert, FIRST, FIRST + 1, private=False), partial(world.punch, 0, 1)
    )
    return world


@scenario(2, findings=_BY_NATURE)
def punch_then_convert(new: Make) -> World:
    """The owner punches a still private page, then makes it shared; the guest touches it."""
    # This is the order of KVM's selftests.
    world = new()
    world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    world.guest(store(FIRST, 2))
    world.actor(
        "owner", partial(world.punch, 0, 1), partial(world.convert, FIRST, FIRST + 1, private=False)
    )
    return world


@scenario(2, designs=("bindings",))
def bind_punch(new: Make) -> World:
    """A second range is bound, beside one bound before, while the owner punches both."""
    world = new(npages=2)
    world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    view = world.make_slot(SECOND, 1, start=1)
    vcpu = world.add_vcpu(store(SECOND, 2), load(FIRST))
    world.actor("VM", partial(world.register, view), partial(world.run, vcpu))
    world.actor("owner", partial(world.punch, 0, 2))
    return world


@scenario(2, designs=("bindings",), leaves=True)
def unbind_punch(new: Make) -> World:
    """One of two bound ranges is unbound, the owner punches both, the guest touches one."""
    # After the unbinding, the vCPU touches the range that is left.
    world = new(npages=2)
    world.add_slot(FIRST, 1)
    view = world.add_slot(SECOND, 1, start=1)
    world.touched(store(FIRST, 1), store(SECOND, 2))
    vcpu = world.add_vcpu(load(FIRST))
    world.actor("VM", partial(world.unregister, view), partial(world.run, vcpu))
    world.actor("owner", partial(world.punch, 0, 2))
    return world


@scenario(2, designs=("bindings",), quick=True)
def punch_unbound(new: Make) -> World:
    """The owner punches pages that nobody has bound, while the guest touches a bound page."""
    world = new(npages=2)
    world.add_slot(FIRST, 1)
    world.guest(store(FIRST, 1), load(FIRST))
    world.actor("owner", partial(world.punch, 1, 2))
    return world


@scenario(2, findings=_BY_NATURE)
def punch_beside(new: Make) -> World:
    """Two slots show a page of a file each; the owner punches one, the guest touches both."""
    # The first slot's guest page has a lower number than its page of the file.
    world = new(npages=4)
    world.add_slot(0, 1, start=3)
    world.add_slot(1, 1, start=1)
    world.touched(store(0, 1), store(1, 2))
    world.guest(load(1), load(0))
    world.actor("owner", partial(world.punch, 1, 2))
    return world


@scenario(2, findings={"batched": _STILL_TAKEN}, quick=True)
def no_memory_fault(new: Make) -> World:
    """The guest touches a page while memory is short; later the owner allocates it."""
    world = new(npages=2)
    world.add_slot(FIRST, 2)
    # The guest has written the page beside it. This fault maps both.
    world.touched(store(FIRST, 1))
    world.convert(FIRST + 1, FIRST + 2, private=False)
    world.punch(1, 2)
    world.convert(FIRST + 1, FIRST + 2, private=True)
    world.frames.exhausted = True
    vcpu = world.add_vcpu(store(FIRST + 1, 2), load(FIRST))

    def owner() -> None:
        world.frames.refill()
        world.fallocate(1, 2)

    world.actor("vCPU", partial(_until_memory, world, vcpu))
    world.actor("owner", owner)
    return world


def _until_memory(world: World, vcpu: EngineVcpu) -> None:
    # A VMM does the same: it exits with an ENOSPC that its owner can mend. Here it exits once.
    found = vcpu.run()
    if isinstance(found, MemoryFault):
        assert found.errno == ENOSPC, found
        return
    world.expect_done(found)


@scenario(2, findings={"folio-poc": _OPEN, "batched": _UNHEARD}, quick=True)
def failing_punch(new: Make) -> World:
    """A punch fails without memory to split a folio; the guest reads and writes the page."""
    world = new()
    world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    world.frames.refuses = True

    world.guest(load(FIRST), store(FIRST, 2))
    world.actor("owner", partial(_fail_to_punch, world))
    return world


def _fail_to_punch(world: World) -> None:
    errno = None
    try:
        world.punch(0, 1)
    except OSError as error:
        errno = error.errno
    assert errno == ENOMEM, f"the punch was to fail with ENOMEM, not with {errno}"


@scenario(2, quick=True)
def allocate_fault(new: Make) -> World:
    """The owner preallocates pages that the guest faults at the same moment."""
    # v9 tells consumers of preallocations, too.
    world = new(npages=2)
    world.add_slot(FIRST, 2)
    world.guest(store(FIRST, 1), load(FIRST), store(FIRST + 1, 2))
    world.actor("owner", partial(world.fallocate, 0, 2))
    return world


@scenario(2, findings={"v9": _DEAF, "folio-poc": _DEAF}, quick=True)
def error_fault(new: Make) -> World:
    """The machine loses a page that the guest reads and writes."""
    world = new()
    world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    vcpu = world.add_vcpu(load(FIRST), store(FIRST, 2), load(FIRST))
    world.actor("vCPU", partial(_until_poison, world, vcpu))
    world.actor("machine", partial(world.error, 0, 1))
    return world


def _until_poison(world: World, vcpu: EngineVcpu) -> None:
    found = vcpu.run()
    if isinstance(found, MemoryFault):
        assert found.errno == EHWPOISON, found
        return
    world.expect_done(found)


@scenario(2, quick=True)
def interrupt_fault(new: Make) -> World:
    """Another thread stops the vCPU while it faults and reads."""
    world = new()
    world.add_slot(FIRST, 1)
    vcpu = world.guest(store(FIRST, 1), load(FIRST))
    world.actor("VM", vcpu.interrupt)
    return world


# Two actors, with huge folios.


@scenario(2, findings=_BY_NATURE)
def folios_fault(new: Make) -> World:
    """The owner punches a huge folio and a page of the next; the guest writes to the first."""
    # The guest has mapped the first folio as one.
    world = new(npages=2 * HUGE_PAGES, kind="thp")
    world.add_slot(ALIGNED, 2 * HUGE_PAGES)
    world.touched(store(ALIGNED + 1, 1), store(ALIGNED + HUGE_PAGES, 2))
    world.guest(load(ALIGNED + 1), store(ALIGNED + 1, 3))
    world.actor("owner", partial(world.punch, 0, HUGE_PAGES + 1))
    return world


@scenario(2, findings=_BY_NATURE, quick=True)
def sub_page_fault(new: Make) -> World:
    """The owner punches a page of a huge folio; the guest writes to this page and another."""
    # The punch splits the folio.
    world = new(npages=HUGE_PAGES, kind="thp")
    world.add_slot(ALIGNED, HUGE_PAGES)
    world.touched(store(ALIGNED, 1))
    world.guest(store(ALIGNED, 2), store(ALIGNED + 1, 3))
    world.actor("owner", partial(world.punch, 0, 1))
    return world


@scenario(2)
def huge_page_in_parts(new: Make) -> World:
    """The owner punches a hugetlb page in two parts; the guest writes to the first part."""
    # The guest writes again: before, between or after the punches.
    world = new(npages=HUGE_PAGES, kind="hugetlb")
    world.add_slot(ALIGNED, HUGE_PAGES)
    world.touched(store(ALIGNED, 1))
    world.guest(store(ALIGNED, 2))
    world.actor(
        "owner",
        partial(world.punch, 0, HUGE_PAGES - 1),
        partial(world.punch, HUGE_PAGES - 1, HUGE_PAGES),
    )
    return world


@scenario(2, findings=_BY_NATURE)
def punch_fault_snp(new: Make) -> World:
    """As ``punch-fault``; the host also keeps its RMP and direct map in step."""
    world = new(platform=Snp(unmap=False))
    world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    world.guest(load(FIRST), store(FIRST, 2))
    world.actor("owner", partial(world.punch, 0, 1))
    return world


# Three actors. v9 differs from v10 only in plain allocations and memory errors. The design
# ``bindings`` differs only in how consumers come and go, and in which consumers hear of a range.


@scenario(3, designs=_APART, findings=_BY_NATURE)
def punch_convert_fault(new: Make) -> World:
    """One thread of the owner punches a page, another makes it shared; the guest writes it."""
    world = new()
    world.add_slot(FIRST, 1)
    world.guest(store(FIRST, 1))
    world.actor("owner", partial(world.punch, 0, 1))
    world.actor("VM", partial(world.convert, FIRST, FIRST + 1, private=False))
    return world


@scenario(3, designs=_APART, findings=_BY_NATURE)
def punch_punch_fault(new: Make) -> World:
    """Two threads of the owner punch neighbouring pages, and the guest touches one of them."""
    # The guest's fault maps both pages.
    world = new(npages=2)
    world.add_slot(FIRST, 2)
    world.guest(store(FIRST, 1))
    world.actor("owner 1", partial(world.punch, 0, 1))
    world.actor("owner 2", partial(world.punch, 1, 2))
    return world


@scenario(3, designs=_APART, findings=_BY_NATURE)
def punch_two_vcpus(new: Make) -> World:
    """Two vCPUs fault the same page while the owner punches it."""
    world = new()
    world.add_slot(FIRST, 1)
    world.guest(store(FIRST, 1))
    world.guest(load(FIRST))
    world.actor("owner", partial(world.punch, 0, 1))
    return world


@scenario(3, designs=("bindings", *_APART), findings=_BY_NATURE, leaves=True)
def punch_unregister_fault(new: Make) -> World:
    """The guest touches a page while the owner punches it and the slot is deleted."""
    world = new()
    view = world.add_slot(FIRST, 1)
    vcpu = world.add_vcpu(store(FIRST, 1))
    world.actor("vCPU", partial(world.run_until_gone, vcpu))
    world.actor("VM", partial(world.unregister, view))
    world.actor("owner", partial(world.punch, 0, 1))
    return world


@scenario(3, designs=("v9", *_APART), findings={**_BY_NATURE, "v9": _DEAF, "folio-poc": _DEAF})
def error_punch_fault(new: Make) -> World:
    """The machine loses a page while the owner punches it and the guest reads it."""
    world = new()
    world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    vcpu = world.add_vcpu(load(FIRST))
    world.actor("vCPU", partial(_until_poison, world, vcpu))
    world.actor("machine", partial(world.error, 0, 1))
    world.actor("owner", partial(world.punch, 0, 1))
    return world


@scenario(3, designs=("bindings", *_APART), findings=_BY_NATURE, leaves=True)
def teardown(new: Make) -> World:
    """The VM ends, the owner closes the file, and another holder punches and closes it."""
    # Any of the three may drop the last reference.
    world = new()
    view = world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    world.file.get()
    vcpu = world.add_vcpu(load(FIRST))
    world.actor("VM", partial(world.run, vcpu), partial(world.unregister, view))
    world.actor("owner", world.close)
    world.actor("other", partial(world.punch, 0, 1), world.close)
    return world


@scenario(3, designs=("v10",))
def interrupt_punch_fault(new: Make) -> World:
    """A vCPU is stopped while the owner punches the page that it faults."""
    world = new()
    world.add_slot(FIRST, 1)
    vcpu = world.guest(store(FIRST, 1))
    world.actor("VM", vcpu.interrupt)
    world.actor("owner", partial(world.punch, 0, 1))
    return world


@scenario(3, designs=("v10", "bindings", "folio"))
def unregister_one_of_two(new: Make) -> World:
    """One of two slots of a file is deleted; the owner punches, the guest reads the other."""
    world = new(npages=2)
    gone = world.add_slot(FIRST, 1)
    world.add_slot(SECOND, 1, start=1)
    world.touched(store(FIRST, 1), store(SECOND, 2))
    world.guest(load(SECOND))
    world.actor("VM", partial(world.unregister, gone))
    world.actor("owner", partial(world.punch, 1, 2))
    return world


@scenario(3, designs=("batched", "lazy", "v10"))
def huge_page_in_turn(new: Make) -> World:
    """Two threads of the owner punch the halves of a hugetlb page; the guest writes to one."""
    world = new(npages=HUGE_PAGES, kind="hugetlb")
    world.add_slot(ALIGNED, HUGE_PAGES)
    world.guest(store(ALIGNED, 1))
    world.actor("owner 1", partial(world.punch, 0, HUGE_PAGES // 2))
    world.actor("owner 2", partial(world.punch, HUGE_PAGES // 2, HUGE_PAGES))
    return world


# Four actors.


@scenario(4, designs=("v10",))
def four_at_once(new: Make) -> World:
    """Two threads of the owner punch a page, a third makes it shared; the guest reads it."""
    world = new()
    world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    world.guest(load(FIRST))
    world.actor("owner 1", partial(world.punch, 0, 1))
    world.actor("owner 2", partial(world.punch, 0, 1))
    world.actor("VM", partial(world.convert, FIRST, FIRST + 1, private=False))
    return world


@scenario(4, designs=("v10",))
def four_with_unregister(new: Make) -> World:
    """Two threads of the owner punch a page, its slot is deleted; the guest reads the page."""
    world = new()
    view = world.add_slot(FIRST, 1)
    world.touched(store(FIRST, 1))
    vcpu = world.add_vcpu(load(FIRST))
    world.actor("vCPU", partial(world.run_until_gone, vcpu))
    world.actor("VM", partial(world.unregister, view))
    world.actor("owner 1", partial(world.punch, 0, 1))
    world.actor("owner 2", partial(world.punch, 0, 1))
    return world
