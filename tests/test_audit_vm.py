"""What the routes by the VM's interface ask of a VM.

A request with a slip in it would be refused, too. So a VM that takes everything notes the requests.
"""

import io
import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import pytest

from planting import stub
from restrictedmem.abi import memory
from restrictedmem.audit import on_vm
from restrictedmem.audit.attacker import fork_twin
from restrictedmem.audit.attempt import MeasurementTellsError
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import exits
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.elf import Image, Segment
from restrictedmem.vmm.vmm import Ended

MIB: Final = 1 << 20
#: Where a guest has its private memory and its window.
PRIVATE: Final = 0x4000_0000
SHARED: Final = 0x1000_0000
#: A guest's program, of two pages and a bit, and memory for which it has no content.
PROGRAM: Final = PRIVATE + 0x2000
PROGRAM_END: Final = PROGRAM + 3 * PAGE_SIZE
IMAGE: Final = Image(
    PROGRAM + PAGE_SIZE + 0x123,
    (
        Segment(PROGRAM + PAGE_SIZE, b"c" * (PAGE_SIZE + 1), 0x15000),
        Segment(PROGRAM + 0x10, b"d" * 16, 16),
    ),
)
IMAGE_END: Final = PROGRAM + PAGE_SIZE + 0x15000
HEAP: Final = PRIVATE + 2 * MIB
#: The slot of private memory, and the first that the VMM does not use.
SLOT, FREE = 0, 100

Request = tuple[object, ...]


class Notes(list[Request]):
    """An object's calls, in their order: the name, the arguments, the named arguments."""

    def call(self, name: str, answer: object = None) -> Callable[..., Any]:
        def note(*arguments: object, **named: object) -> object:
            self.append((name, *arguments, *([named] if named else [])))
            return answer

        return note

    def object(self, *names: str, **parts: object) -> Any:
        return stub(**{name: self.call(name) for name in names}, **parts)


VM_CALLS: Final = (
    "set_user_memory_region",
    "launch_update",
    "write_memory",
    "read_memory",
    "convert",
)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    monkeypatch.setattr(on_vm, "image", lambda: IMAGE)
    monkeypatch.setattr(on_vm, "of_descriptors", lambda: iter([b"descriptors"]))
    return Notes()


def owner_of(notes: Notes, **parts: object) -> Any:
    """An owner whose guest, and whose other guest, note what is asked of them."""
    vcpu = notes.object("set_regs", "get_regs", "get_sregs", "set_guest_debug")

    @contextmanager
    def create_vcpu() -> Generator[object]:
        notes.append(("create_vcpu",))
        yield vcpu
        notes.append(("vCPU closed",))

    @contextmanager
    def another() -> Generator[object]:
        notes.append(("another",))
        yield guest
        notes.append(("ended",))

    vm = notes.object(*VM_CALLS, create_vcpu=create_vcpu, statistics=lambda: {"pid": 7})
    guest = notes.object(
        *("ask", "send", "wait_idle", "wait_end"),
        start=HEAP,
        vmm=stub(vm=vm, vcpus=[vcpu], private_size=4 * MIB, restricted_fd=77),
    )
    return stub(guest=guest, another=another, fd=77, seed=5, engine="software", **parts)


def region(slot: int, start: int, size: int, **parts: object) -> tuple[str, dict[str, object]]:
    return (
        "set_user_memory_region",
        {"slot": slot, "guest_phys_addr": start, "memory_size": size, **parts},
    )


def restricted(slot: int, start: int, size: int, offset: int) -> Request:
    return region(slot, start, size, restricted_fd=77, restricted_offset=offset)


def told(notes: Notes) -> list[Request]:
    """The notes, with "own" for each descriptor of the owner's own."""
    return [tuple(map(without_number, request)) for request in notes]


def without_number(part: object) -> object:
    if not isinstance(part, dict):
        return part
    named = cast(dict[str, object], part)
    return named | {"shared_fd": "own"} if named.get("shared_fd", 77) != 77 else named


def on_another(*requests: Request) -> list[Request]:
    return [("another",), ("wait_idle",), *requests, ("ended",)]


def over(address: int, size: int) -> list[Request]:
    return [
        region(FREE, address, size, shared_fd="own"),
        region(FREE, address, 0),
    ]


POWERS: Final[dict[str, list[Request]]] = {
    "KVM_SET_REGS after the launch": on_another(("set_regs", {"rip": HEAP})),
    "KVM_GET_REGS": on_another(("get_regs",)),
    "KVM_GET_SREGS": on_another(("get_sregs",)),
    "KVM_SET_GUEST_DEBUG": on_another(("set_guest_debug", {"step": True, "breakpoints": [HEAP]})),
    "DBG_WRITE": [("write_memory", HEAP + MIB, bytes(8))],
    "launch_update after the launch": [
        ("launch_update", PROGRAM + PAGE_SIZE, on_vm.code_page(stub(start=HEAP)))
    ],
    "KVM_CREATE_VCPU after the launch": [
        ("create_vcpu",),
        ("set_regs", {"rip": PROGRAM + PAGE_SIZE + 0x123}),
        ("vCPU closed",),
    ],
    "slot over the hypercall page": over(0x10_0000, PAGE_SIZE),
    "slot over the report page": over(0x10_1000, PAGE_SIZE),
    "slot over all below the window": over(0, SHARED),
    "slot over the page tables": over(1 << 44, PAGE_SIZE),
    "slot over private memory": over(PRIVATE, MIB),
    "the descriptor as shared memory": [region(FREE, 1 << 43, PAGE_SIZE, shared_fd=77)],
}


@pytest.mark.parametrize("name", POWERS)
def test_each_power_is_asked_for(name: str, notes: Notes) -> None:
    before = os.listdir("/proc/self/fd")
    assert list(on_vm._without_content(on_vm._POWERS[name], owner_of(notes))) == [b""]
    assert told(notes) == POWERS[name]
    assert os.listdir("/proc/self/fd") == before


def test_every_power_is_in_the_table() -> None:
    assert {*POWERS, "the descriptor in a second VM"} == on_vm._POWERS.keys()


def test_a_slot_of_the_owners_has_its_memory(notes: Notes) -> None:
    with on_vm._own_memory(3 * PAGE_SIZE) as fd:
        assert os.fstat(fd.fileno()).st_size == 3 * PAGE_SIZE


def test_a_second_vm_is_given_the_whole_descriptor(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def made(service: object) -> Generator[object]:
        notes.append(("Vm", service))
        yield notes.object(*VM_CALLS)

    monkeypatch.setattr(on_vm, "Vm", made)
    on_vm._POWERS["the descriptor in a second VM"](owner_of(notes, service="service"))
    assert notes == [("Vm", "service"), region(0, PRIVATE, 4 * MIB, restricted_fd=77)]


def test_routes_that_give_content_are_no_powers() -> None:
    routes = list(on_vm.routes())
    assert {route.name for route in routes if route.power} == {
        *on_vm._POWERS,
        "pages exchanged after they were measured",
    }
    assert not [route.name for route in routes if route.root or route.control or route.open_by]


def test_memory_is_read_for_debugging(notes: Notes) -> None:
    assert list(on_vm._debug_read(owner_of(notes))) == [None]
    assert notes == [("read_memory", HEAP, 1 << 16)]


# Conversions.


@pytest.mark.parametrize(
    ("route", "request_", "answer"),
    [(on_vm._shared_half, "share", "shared"), (on_vm._hidden_again, "hide", "hidden")],
)
def test_the_guest_is_asked_to_convert(
    route: Callable[[Any], Iterator[bytes]], request_: str, answer: str, notes: Notes
) -> None:
    owner = owner_of(notes)
    for said in (answer, "no"):
        notes.clear()
        owner.guest.ask = notes.call("ask", said)
        if said == answer:
            assert list(route(owner)) == [b"descriptors"]
        else:
            with pytest.raises(AssertionError, match=f"{request_}: no"):
                list(route(owner))
        assert notes == [("ask", f"{request_} {HEAP:x} 100000")]


def test_freed_pages_are_looked_for_in_new_memory(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = memory.memfd_create
    own = list[OwnedFd]()

    def create(name: str) -> OwnedFd:
        fd = before(name)
        own.append(OwnedFd(os.dup(fd.fileno())))
        return fd

    owner = owner_of(notes)
    with memory.memfd_create("private") as private:
        os.write(private.fileno(), bytes(4 * MIB))
        owner.fd = private.fileno()
        monkeypatch.setattr(memory, "memfd_create", create)
        sizes = [len(chunk) for chunk in on_vm._freed_pages(owner)]
        hole = os.lseek(private.fileno(), 0, os.SEEK_HOLE)
        data = os.lseek(private.fileno(), hole, os.SEEK_DATA)
        assert (hole, data) == (2 * MIB, 3 * MIB)
    assert sizes == [8 * MIB, 8 * MIB]
    # A hole would be read as zeroes without any page.
    with own[0]:
        assert os.fstat(own[0].fileno()).st_blocks * 512 == 8 * MIB


# The owner's code.


def test_the_program_is_the_pages_with_content(notes: Notes) -> None:
    assert on_vm._program() == (PROGRAM, PROGRAM_END)


def test_the_halves_are_told_by_their_name() -> None:
    with memory.memfd_create("shared-half of 7") as half, memory.memfd_create("another") as other:
        found = list(on_vm._shared_halves())
        assert half.fileno() in found
        assert other.fileno() not in found


def test_code_is_put_into_the_shared_half(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = owner_of(notes)
    page = on_vm.code_page(owner.guest)
    with memory.memfd_create("half") as half:
        monkeypatch.setattr(on_vm, "_shared_halves", lambda: iter([half.fileno()]))
        assert list(on_vm._code_in_the_shared_half(owner)) == [b"descriptors"]
        assert os.pread(half.fileno(), MIB, 0) == bytes(PROGRAM - PRIVATE) + 3 * page
    assert notes == on_another(
        ("convert", PROGRAM, 3 * PAGE_SIZE, {"private": False}),
        ("send", "check 0 0"),
        ("wait_end",),
    )


def test_code_is_put_into_a_slot_of_its_own(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = owner_of(notes)
    before = on_vm._own_memory
    own = list[OwnedFd]()

    def own_memory(size: int) -> OwnedFd:
        fd = before(size)
        own.append(OwnedFd(os.dup(fd.fileno())))
        return fd

    monkeypatch.setattr(on_vm, "_own_memory", own_memory)
    assert list(on_vm._code_in_a_slot_of_its_own(owner)) == [b"descriptors"]
    with own[0]:
        assert os.pread(own[0].fileno(), MIB, 0) == 3 * on_vm.code_page(owner.guest)
    below, size = PROGRAM - PRIVATE, 3 * PAGE_SIZE
    assert told(notes) == on_another(
        region(SLOT, PRIVATE, 0),
        restricted(FREE, PRIVATE, below, 0),
        restricted(FREE + 1, PROGRAM_END, 4 * MIB - below - size, below + size),
        region(SLOT, PROGRAM, size, shared_fd="own"),
        ("convert", PROGRAM, size, {"private": False}),
        ("send", "check 0 0"),
        ("wait_end",),
    )


def test_code_is_put_into_the_guests_input(notes: Notes) -> None:
    owner = owner_of(notes)
    assert list(on_vm._code_in_its_input(owner)) == [b"descriptors"]
    below, size = PROGRAM - PRIVATE, 3 * PAGE_SIZE
    input_ = IMAGE_END - 15 * PAGE_SIZE - PRIVATE
    assert notes == [
        ("another",),
        ("ask", on_vm.code_page(owner.guest) * 15),
        ("wait_idle",),
        region(SLOT, PRIVATE, 0),
        restricted(FREE, PRIVATE, below, 0),
        restricted(FREE + 1, PROGRAM, size, input_),
        restricted(FREE + 2, PROGRAM_END, 4 * MIB - below - size, below + size),
        ("send", "check 0 0"),
        ("wait_end",),
        ("ended",),
    ]


# Dishonest launches.


@pytest.mark.parametrize(
    ("ended", "found"),
    [
        (Ended(0, exits.MmioWrite(HEAP, 8, 0x1234)), [(0x1234).to_bytes(8, "little")]),
        (Ended(0), [b""]),
    ],
)
def test_a_heap_without_a_slot_is_read_by_its_writes(
    ended: Ended, found: list[bytes], notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements = [b"dishonest", b"honest"]

    def run(*files: io.FileIO) -> Ended:
        notes.append(("run", *({(file.name, type(file), file.mode) for file in files})))
        return ended

    @contextmanager
    def launched(_: object, layout: object) -> Generator[object]:
        number = len(notes)
        notes.append(("launched", layout))
        finish = lambda: measurements[1 - number]  # noqa: E731
        yield stub(vm=stub(launch_finish=finish), run=run if number else pytest.fail)

    monkeypatch.setattr(on_vm, "_launched", launched)
    with pytest.raises(MeasurementTellsError):
        list(on_vm._no_slot_below_its_heap(owner_of(notes)))
    base, top, heap = PRIVATE, PRIVATE + 2 * MIB, -(-IMAGE_END // PAGE_SIZE) * PAGE_SIZE
    stack = top - (1 << 16)
    layouts: list[Request] = [
        ("launched", [(base, top, base)]),
        ("launched", [(base, heap, base), (stack, top, stack)]),
    ]
    assert notes == layouts
    notes.clear()
    measurements[0] = b"honest"
    assert list(on_vm._no_slot_below_its_heap(owner_of(notes))) == found
    assert notes == [*layouts, ("run", (os.devnull, io.FileIO, "rb+"))]


def test_pages_are_exchanged_unless_the_measurement_tells(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(_: object, order: tuple[int, int]) -> bytes:
        notes.append(("measured", order))
        return bytes(order) if tells else b"same"

    monkeypatch.setattr(on_vm, "_measured", measured)
    tells = False
    assert list(on_vm._pages_exchanged(owner_of(notes))) == [b""]
    assert notes == [("measured", (0, 1)), ("measured", (1, 0))]
    tells = True
    with pytest.raises(MeasurementTellsError):
        list(on_vm._pages_exchanged(owner_of(notes)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_pages_are_measured_in_one_order_and_shown_in_another(
    order: tuple[int, int], notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = memory.memfd_create("restricted")

    @contextmanager
    def made(*arguments: object, **named: object) -> Generator[object]:
        notes.append(("Vm", *arguments, named))
        yield notes.object(*VM_CALLS, launch_finish=notes.call("launch_finish", b"measurement"))

    monkeypatch.setattr(on_vm, "Vm", made)
    with memory.memfd_create("looked at") as again:
        os.dup2(file.fileno(), again.fileno())
        number = file.fileno()
        service = stub(memfd_restricted=file.detach)
        assert on_vm._measured(owner_of(notes, service=service), order) == b"measurement"
        assert os.fstat(again.fileno()).st_size == 2 * PAGE_SIZE

    def show(slot: int, page: int) -> Request:
        name, named = region(slot, PRIVATE + slot * PAGE_SIZE, PAGE_SIZE)
        return name, {**named, "restricted_fd": number, "restricted_offset": page * PAGE_SIZE}

    first, second = order
    assert notes == [
        ("Vm", service, {"engine": "software", "explicit": True}),
        show(0, first),
        show(1, second),
        ("convert", PRIVATE, 2 * PAGE_SIZE, {"private": True}),
        ("launch_update", PRIVATE, b"A" * PAGE_SIZE),
        ("launch_update", PRIVATE + PAGE_SIZE, b"B" * PAGE_SIZE),
        region(0, PRIVATE, 0, restricted_fd=number),
        region(1, PRIVATE, 0, restricted_fd=number),
        show(0, 0),
        show(1, 1),
        ("launch_finish",),
    ]


def test_a_guest_is_launched_in_a_layout(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def made(*arguments: object, **named: object) -> Generator[object]:
        notes.append(("Vmm", *arguments, named))
        yield notes.object("load", vm=notes.object(*VM_CALLS), restricted_fd=77)

    monkeypatch.setattr(on_vm, "Vmm", made)
    owner = owner_of(notes, service="service")
    with on_vm._launched(owner, [(PRIVATE, PRIVATE + 5 * PAGE_SIZE, PRIVATE + PAGE_SIZE)]):
        notes.append(("launched",))
    assert notes == [
        ("Vmm", 2 * MIB, "service", {"engine": "software"}),
        region(SLOT, PRIVATE, 0),
        restricted(FREE, PRIVATE, 5 * PAGE_SIZE, PAGE_SIZE),
        ("load", IMAGE, ["hold", "0000000000000005"]),
        ("launched",),
    ]


# Core files.


def test_new_core_files_are_read(
    notes: Notes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "old").write_bytes(b"old")
    victim = fork_twin()

    def dumped(watched: list[OwnedFd]) -> None:
        (pidfd,) = watched
        assert os.waitid(os.P_PIDFD, pidfd.fileno(), os.WEXITED) is not None
        (tmp_path / "core").write_bytes(b"core")
        (tmp_path / "link").symlink_to(tmp_path / "core")
        (tmp_path / "directory").mkdir()

    monkeypatch.setattr(on_vm, "readable", dumped)
    monkeypatch.setattr(on_vm, "_core_places", lambda: {str(tmp_path)})
    owner = owner_of(notes)
    owner.guest.vmm.vm.statistics = lambda: {"pid": victim}
    before = os.listdir("/proc/self/fd")
    assert list(on_vm._killed(signal.SIGKILL, owner)) == [b"core"]
    assert notes == [("another",), ("ended",)]
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("/var/crash/core.%p\n", {"/var/crash"}),
        ("core\n", {os.getcwd(), "/"}),
        ("|/usr/lib/handler %p\n", {os.getcwd(), "/"}),
    ],
)
def test_core_files_are_where_the_machine_puts_them(
    pattern: str, places: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: str, **_: object) -> io.StringIO:
        assert path == "/proc/sys/kernel/core_pattern"
        return io.StringIO(pattern)

    monkeypatch.setattr(on_vm, "open", opened, raising=False)
    assert on_vm._core_places() == places
