"""Routes by the VM's interface: slots, registers, launch and conversions against the guest."""

import mmap
import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final

from restrictedmem.abi import memory
from restrictedmem.audit.attacker import SMALL, Attacker
from restrictedmem.audit.attempt import MeasurementTellsError, Route
from restrictedmem.audit.held_guest import HeldGuest, image
from restrictedmem.audit.pattern import Buffer
from restrictedmem.audit.reading import of_descriptors, of_file
from restrictedmem.fd import OwnedFd, readable
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.units import PAGE_MASK, PAGE_SIZE
from restrictedmem.vmm.vm import Vcpu, Vm
from restrictedmem.vmm.vmm import Vmm

#: The first of the slot numbers that the VMM does not use.
_SLOT: Final = 100
#: A guest address at which the VMM has nothing.
_ELSEWHERE: Final = 1 << guest_abi.GPA_BITS - 1
#: The VMM's slot of private memory.
_PRIVATE_SLOT: Final = 0
#: Bytes that the guest takes as one line.
_LINE: Final = 15 * PAGE_SIZE
#: Bytes that a route converts.
CONVERTED: Final = 1 << 20
#: Bytes that the owner's code copies out.
COPIED: Final = 1 << 16


def _on_vcpu(call: Callable[[Vcpu, int], object], owner: Attacker) -> None:
    """Call ``call`` on a vCPU of a guest that this process runs.

    On a guest of another process, the call would consume the exits of that process.
    """
    with owner.another() as guest:
        guest.wait_idle()
        call(guest.vmm.vcpus[0], guest.start)


def _launch_update(owner: Attacker) -> None:
    owner.guest.vmm.vm.launch_update(image().entry & ~PAGE_MASK, code_page(owner.guest))


def _create_vcpu(owner: Attacker) -> None:
    with owner.guest.vmm.vm.create_vcpu() as vcpu:
        vcpu.set_regs(rip=image().entry)


def _slot_over(address: int, size: int, owner: Attacker) -> None:
    """Put a slot of the owner's memory over guest addresses; delete the slot afterwards."""
    region = owner.guest.vmm.vm.set_user_memory_region
    with _own_memory(size) as fd:
        region(slot=_SLOT, guest_phys_addr=address, memory_size=size, shared_fd=fd.fileno())
    region(slot=_SLOT, guest_phys_addr=address, memory_size=0)


def _own_memory(size: int) -> OwnedFd:
    fd = memory.memfd_create("owner")
    os.ftruncate(fd.fileno(), size)
    return fd


def _second_vm(owner: Attacker) -> None:
    size = owner.guest.vmm.private_size
    with Vm(owner.service) as second:
        second.set_user_memory_region(
            slot=0, guest_phys_addr=guest_abi.PRIVATE_BASE, memory_size=size, restricted_fd=owner.fd
        )


def _descriptor_as_shared(owner: Attacker) -> None:
    """Give the engine the restricted file as if it were the owner's shared memory."""
    owner.guest.vmm.vm.set_user_memory_region(
        slot=_SLOT, guest_phys_addr=_ELSEWHERE, memory_size=PAGE_SIZE, shared_fd=owner.fd
    )


_POWERS: Final[dict[str, Callable[[Attacker], None]]] = {
    "KVM_SET_REGS after the launch": partial(
        _on_vcpu, lambda vcpu, address: vcpu.set_regs(rip=address)
    ),
    "KVM_GET_REGS": partial(_on_vcpu, lambda vcpu, _: vcpu.get_regs()),
    "KVM_GET_SREGS": partial(_on_vcpu, lambda vcpu, _: vcpu.get_sregs()),
    "KVM_SET_GUEST_DEBUG": partial(
        _on_vcpu, lambda vcpu, address: vcpu.set_guest_debug(step=True, breakpoints=[address])
    ),
    "DBG_WRITE": lambda owner: owner.guest.vmm.vm.write_memory(
        owner.guest.start + CONVERTED, bytes(8)
    ),
    "launch_update after the launch": _launch_update,
    "KVM_CREATE_VCPU after the launch": _create_vcpu,
    "slot over the hypercall page": partial(_slot_over, guest_abi.HYPERCALL_PAGE, PAGE_SIZE),
    "slot over the report page": partial(_slot_over, guest_abi.REPORT_PAGE, PAGE_SIZE),
    "slot over all below the window": partial(_slot_over, 0, guest_abi.SHARED_BASE),
    "slot over the page tables": partial(_slot_over, 1 << guest_abi.GPA_BITS, PAGE_SIZE),
    "slot over private memory": partial(
        _slot_over, guest_abi.PRIVATE_BASE, guest_abi.PRIVATE_SIZE_MIN
    ),
    "the descriptor in a second VM": _second_vm,
    "the descriptor as shared memory": _descriptor_as_shared,
}


def _debug_read(owner: Attacker) -> Iterator[Buffer]:
    yield owner.guest.vmm.vm.read_memory(owner.guest.start, COPIED)


def _without_content(call: Callable[[Attacker], None], owner: Attacker) -> Iterator[Buffer]:
    call(owner)
    yield b""


# Conversions.


def _shared_half(owner: Attacker) -> Iterator[Buffer]:
    _converted(owner.guest, "share", "shared")
    yield from of_descriptors()


def _freed_pages(owner: Attacker) -> Iterator[Buffer]:
    memory.fallocate(owner.fd, memory.PUNCH, owner.guest.start - guest_abi.PRIVATE_BASE, CONVERTED)
    size = 8 * CONVERTED
    with mmap.mmap(-1, size) as fresh, memoryview(fresh) as view:
        yield view
    with memory.memfd_create("owner") as file:
        memory.fallocate(file.fileno(), 0, 0, size)
        yield os.pread(file.fileno(), size, 0)


def _hidden_again(owner: Attacker) -> Iterator[Buffer]:
    _converted(owner.guest, "hide", "hidden")
    yield from of_descriptors()


def _converted(guest: HeldGuest, request: str, expected: str) -> None:
    answer = guest.ask(f"{request} {guest.start:x} {CONVERTED:x}")
    if answer != expected:
        raise AssertionError(f"{request}: {answer}")


# The owner's code in the guest; each route has a guest of its own.


def code_page(guest: HeldGuest) -> bytes:
    """Return a page of code that copies private memory to the shared window and exits.

    The guest may enter the page anywhere before this code: it begins with NOPs.
    """
    code = b"".join(
        (
            b"\xfc\x48\xbe" + guest.start.to_bytes(8, "little"),  # cld; mov rsi, start
            b"\x48\xbf" + guest_abi.SHARED_BASE.to_bytes(8, "little"),  # mov rdi, SHARED_BASE
            b"\xb9" + (COPIED // 8).to_bytes(4, "little"),  # mov ecx, words
            b"\xf3\x48\xa5",  # rep movsq
            b"\x31\xc0\x31\xff",  # xor eax, eax; xor edi, edi
            b"\xbb"
            + guest_abi.HYPERCALL_PAGE.to_bytes(4, "little")
            + b"\xff\xd3",  # mov ebx, HYPERCALL_PAGE; call rbx
        )
    )
    return code.rjust(PAGE_SIZE, b"\x90")


def _program() -> tuple[int, int]:
    """Return the page-aligned guest addresses where the guest's program begins and ends.

    Memory for which the program has no content is left out.
    """
    segments = image().segments
    end = max(segment.gpa + len(segment.data) for segment in segments)
    return min(segment.gpa for segment in segments) & ~PAGE_MASK, (end + PAGE_MASK) & ~PAGE_MASK


def _code_in_the_shared_half(owner: Attacker) -> Iterator[Buffer]:
    """Make the guest's program shared, with the owner's code in its place; run the guest."""
    start, end = _program()
    with owner.another() as guest:
        guest.wait_idle()
        for half in _shared_halves():
            os.pwrite(
                half,
                code_page(guest) * ((end - start) // PAGE_SIZE),
                start - guest_abi.PRIVATE_BASE,
            )
        guest.vmm.vm.convert(start, end - start, private=False)
        yield from _what_it_copied_out(guest)


def _shared_halves() -> Iterator[int]:
    """Yield the VMMs' descriptors of the shared halves of private memory."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:shared-half"):
                yield int(name)


def _code_in_a_slot_of_its_own(owner: Attacker) -> Iterator[Buffer]:
    """Replace the guest's program by a slot of the owner's memory, with the owner's code.

    Then let the guest go on.
    """
    start, end = _program()
    with owner.another() as guest, _own_memory(end - start) as code:
        guest.wait_idle()
        os.pwrite(code.fileno(), code_page(guest) * ((end - start) // PAGE_SIZE), 0)
        base, top = guest_abi.PRIVATE_BASE, guest_abi.PRIVATE_BASE + guest.vmm.private_size
        _place(guest.vmm, [(base, start, base), (end, top, end)])
        vm = guest.vmm.vm
        vm.set_user_memory_region(
            slot=_PRIVATE_SLOT,
            guest_phys_addr=start,
            memory_size=end - start,
            shared_fd=code.fileno(),
        )
        vm.convert(start, end - start, private=False)
        yield from _what_it_copied_out(guest)


def _code_in_its_input(owner: Attacker) -> Iterator[Buffer]:
    """Give the guest the owner's code as input, and replace its program by the input's pages.

    Then let the guest go on.
    """
    start, end = _program()
    with owner.another() as guest:
        guest.ask(code_page(guest) * (_LINE // PAGE_SIZE))
        guest.wait_idle()
        # The guest has one buffer. It ends where the program's memory ends, and is filled from its
        # beginning.
        code_at = (image().end - _LINE) & ~PAGE_MASK
        base, top = guest_abi.PRIVATE_BASE, guest_abi.PRIVATE_BASE + guest.vmm.private_size
        _place(guest.vmm, [(base, start, base), (start, end, code_at), (end, top, end)])
        yield from _what_it_copied_out(guest)


# Dishonest launches. Each is tried to the end only if a verifier of the guest could not tell it
# from an honest one.


def _no_slot_below_its_heap(owner: Attacker) -> Iterator[Buffer]:
    """Leave the guest's heap without a slot, so that its writes there exit as MMIO."""
    base, top = guest_abi.PRIVATE_BASE, guest_abi.PRIVATE_BASE + SMALL
    heap, stack = (image().end + PAGE_MASK) & ~PAGE_MASK, top - guest_abi.STACK_SIZE
    with (
        _launched(owner, [(base, top, base)]) as honest,
        _launched(owner, [(base, heap, base), (stack, top, stack)]) as vmm,
    ):
        if vmm.vm.launch_finish() != honest.vm.launch_finish():
            raise MeasurementTellsError
        with open(os.devnull, "r+b", 0) as nothing:
            ended = vmm.run(nothing, nothing, nothing)
        yield (
            ended.fatal.data.to_bytes(8, "little")
            if isinstance(ended.fatal, exits.MmioWrite)
            else b""
        )


def _pages_exchanged(owner: Attacker) -> Iterator[Buffer]:
    """Exchange two pages after they were added and measured."""
    if _measured(owner, (0, 1)) != _measured(owner, (1, 0)):
        raise MeasurementTellsError
    yield b""


def _measured(owner: Attacker, order: tuple[int, int]) -> bytes:
    """Launch a VM with two slots of one page each; return its measurement.

    The slots show the file's pages in ``order`` until both have content, and then in the order of
    the file.
    """
    base = guest_abi.PRIVATE_BASE
    with (
        OwnedFd(owner.service.memfd_restricted()) as fd,
        Vm(owner.service, engine=owner.engine, explicit=True) as vm,
    ):
        os.ftruncate(fd.fileno(), 2 * PAGE_SIZE)
        region = partial(vm.set_user_memory_region, restricted_fd=fd.fileno())

        def make(slot: int, page: int) -> None:
            region(
                slot=slot,
                guest_phys_addr=base + slot * PAGE_SIZE,
                memory_size=PAGE_SIZE,
                restricted_offset=page * PAGE_SIZE,
            )

        for slot, page in enumerate(order):
            make(slot, page)
        vm.convert(base, 2 * PAGE_SIZE, private=True)
        for slot, content in enumerate((b"A", b"B")):
            vm.launch_update(base + slot * PAGE_SIZE, content * PAGE_SIZE)
        for slot in range(2):
            region(slot=slot, guest_phys_addr=base, memory_size=0)
        for slot in range(2):
            make(slot, slot)
        return vm.launch_finish()


#: Slots, in guest addresses: the beginning and the end of each, and the address at which an honest
#: VMM would have the page that the slot shows first.
_Layout = list[tuple[int, int, int]]


@contextmanager
def _launched(owner: Attacker, layout: _Layout) -> Generator[Vmm]:
    with Vmm(SMALL, owner.service, engine=owner.engine) as vmm:
        _place(vmm, layout)
        vmm.load(image(), ["hold", f"{owner.seed:016x}"])
        yield vmm


def _place(vmm: Vmm, layout: _Layout) -> None:
    """Replace the slot of private memory by those of a layout."""
    region = vmm.vm.set_user_memory_region
    region(slot=_PRIVATE_SLOT, guest_phys_addr=guest_abi.PRIVATE_BASE, memory_size=0)
    for number, (first, after, shown) in enumerate(layout, _SLOT):
        region(
            slot=number,
            guest_phys_addr=first,
            memory_size=after - first,
            restricted_fd=vmm.restricted_fd,
            restricted_offset=shown - guest_abi.PRIVATE_BASE,
        )


def _what_it_copied_out(guest: HeldGuest) -> Iterator[Buffer]:
    guest.send("check 0 0")
    guest.wait_end()
    yield from of_descriptors()


# Signals.


def _killed(number: signal.Signals, owner: Attacker) -> Iterator[Buffer]:
    """Kill another guest's engine by a signal that dumps core, and read the core file."""
    places = _core_places()
    before = {entry.path for place in places for entry in os.scandir(place)}
    with owner.another() as guest:
        pid: int = guest.vmm.vm.statistics()["pid"]
        with OwnedFd(os.pidfd_open(pid)) as pidfd:
            os.kill(pid, number)
            readable([pidfd])
        for place in places:
            for entry in os.scandir(place):
                if entry.path not in before and entry.is_file(follow_symlinks=False):
                    with OwnedFd(os.open(entry.path, os.O_RDONLY)) as file:
                        yield from of_file(file.fileno())


def _core_places() -> set[str]:
    """Return the directories of this machine's core files.

    The directory is that of the pattern in core_pattern, or else one of the process.
    """
    with open("/proc/sys/kernel/core_pattern", encoding="utf-8") as file:
        pattern = file.read().strip()
    return {os.path.dirname(pattern)} if pattern.startswith("/") else {os.getcwd(), "/"}


def routes() -> Iterator[Route]:
    """Yield the routes by the VM's calls; those that cost the guest its memory come last."""
    for name, call in _POWERS.items():
        yield Route("VM", name, partial(_without_content, call), power=True)
    yield Route("VM", "DBG_READ", _debug_read)
    for number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGQUIT):
        yield Route("core dump", number.name, partial(_killed, number))
    yield Route("VM", "owner's code in the shared half", _code_in_the_shared_half)
    yield Route("VM", "owner's code in a slot of its own", _code_in_a_slot_of_its_own)
    yield Route("VM", "owner's code in the pages of the guest's input", _code_in_its_input)
    yield Route("launch", "no slot below the guest's heap", _no_slot_below_its_heap)
    yield Route("launch", "pages exchanged after they were measured", _pages_exchanged, power=True)
    yield Route("VM", "shared half after a conversion", _shared_half)
    yield Route("VM", "memory that a punch freed", _freed_pages)
    yield Route("VM", "shared half after a conversion back", _hidden_again)
