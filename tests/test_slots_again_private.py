"""Further slots of restricted files that slots show already.

The owner names the files, and sends no token.
"""

import os
from functools import partial
from typing import Any, Final

import pytest

from outcomes import Errno, outcome
from restrictedmem.abi import kvm, memory
from restrictedmem.protocol import vm_wire
from restrictedmem.protocol.vm_wire import SlotFiles
from restrictedmem.service.client import Service
from restrictedmem.vmm.vm import Vm
from slots_shown import GPA, delete, either, named, seen, service, show_private, vm, window

__all__ = ["either", "service", "vm"]

pytestmark = pytest.mark.requires("fuse")

PAGE: Final = 4096

EEXIST, EINVAL, ESTALE = 17, 22, 116


@pytest.fixture
def tokens(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the descriptors that tokens were presented on."""
    presented: list[int] = []
    ask = service.token_for

    def token_for(fd: int) -> bytes:
        presented.append(fd)
        return ask(fd)

    monkeypatch.setattr(service, "token_for", token_for)
    return presented


@pytest.mark.parametrize("both", [False, True])
def test_slots_of_one_restricted_file_present_one_token(
    either: Vm, service: Service, tokens: list[int], both: bool
) -> None:
    first, second, fd = service.memfd_restricted(), service.memfd_restricted(), window(b"w", 16)
    for restricted in (first, second):
        os.ftruncate(restricted, 16 * PAGE)
    halves: dict[str, Any] = {"shared_fd": fd} if both else {}
    for slot in range(12):
        halves |= {"shared_offset": slot * PAGE} if both else {}
        gpa, offset = GPA + slot * PAGE, slot * PAGE
        restricted = (first, second)[slot % 2]
        either.set_user_memory_region(
            slot=slot,
            guest_phys_addr=gpa,
            memory_size=PAGE,
            restricted_fd=restricted,
            restricted_offset=offset,
            **halves,
        )
    assert tokens == [first, second]
    either.set_memory_attributes(GPA, 12 * PAGE, private=True)
    for slot in range(12):
        either.write_memory(GPA + slot * PAGE, b"p" + bytes([slot]))
    assert [seen(either, slot) for slot in range(12)] == [
        b"p" + bytes([slot]) for slot in range(12)
    ]
    # Each slot is told of its own.
    for number, restricted in enumerate((first, second)):
        memory.fallocate(restricted, memory.PUNCH, (4 + number) * PAGE, PAGE)
    assert [slot for slot in range(12) if seen(either, slot) == b"\0\0"] == [4, 5]
    if both:
        either.set_memory_attributes(GPA, 12 * PAGE, private=False)
        assert [seen(either, slot) for slot in range(12)] == [
            b"w" + bytes([slot]) for slot in range(12)
        ]
    for one in (first, second, fd):
        os.close(one)


def notifiers(service: Service, fd: int) -> int:
    ino = os.fstat(fd).st_ino
    return int(
        next(found["notifiers"] for found in service.status()["descriptors"] if found["ino"] == ino)
    )


def test_each_slot_has_a_notifier_that_goes_with_it(vm: Vm, service: Service) -> None:
    fd = service.memfd_restricted()
    os.ftruncate(fd, 8 * PAGE)
    for slot in range(8):
        show_private(vm, slot, fd, slot)
        assert notifiers(service, fd) == slot + 1
    for slot in (0, 3, 7, 5):
        delete(vm, slot)
    assert notifiers(service, fd) == 4
    for slot in (1, 2, 4, 6):
        vm.write_memory(GPA + slot * PAGE, bytes([1, slot]))
    for slot in (7, 0):
        show_private(vm, slot, fd, slot)
    assert notifiers(service, fd) == 6
    assert [seen(vm, slot) for slot in (1, 2, 4, 6)] == [bytes([1, slot]) for slot in (1, 2, 4, 6)]
    os.close(fd)


def test_a_file_without_slots_needs_a_token_again(
    either: Vm, service: Service, tokens: list[int]
) -> None:
    fd = service.memfd_restricted()
    os.ftruncate(fd, 8 * PAGE)
    for _ in range(2):
        show_private(either, 0, fd)
        show_private(either, 1, fd, 1)
        delete(either, 0)
        # By the other slot.
        show_private(either, 0, fd)
        delete(either, 1)
        delete(either, 0)
        names = SlotFiles(restricted=os.fstat(fd).st_ino)
        body = named(0, names, flags=kvm.KVM_MEM_PRIVATE)
        assert outcome(
            partial(either._channel.call, vm_wire.SET_USER_MEMORY_REGION, body)
        ) == Errno(ESTALE)
    assert tokens == [fd, fd]
    os.close(fd)


def test_a_slot_that_cannot_be_made_leaves_the_others(
    either: Vm, service: Service, tokens: list[int]
) -> None:
    fd = service.memfd_restricted()
    os.ftruncate(fd, 8 * PAGE)
    show_private(either, 0, fd)
    before = notifiers(service, fd)
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            show_private(either, 1, fd, 1 << 51)
        assert caught.value.errno == EINVAL
        with pytest.raises(OSError) as caught:
            either.set_user_memory_region(
                slot=1, guest_phys_addr=GPA, memory_size=PAGE, restricted_fd=fd
            )
        assert caught.value.errno == EEXIST
    assert notifiers(service, fd) == before
    show_private(either, 1, fd, 1)
    assert tokens == [fd]
    os.close(fd)


def test_a_page_is_bound_once_where_bindings_exclude_each_other(vm: Vm, service: Service) -> None:
    fd = service.memfd_restricted()
    os.ftruncate(fd, 8 * PAGE)
    show_private(vm, 0, fd)
    assert outcome(lambda: show_private(vm, 1, fd)) == (
        Errno(EINVAL) if service.info["design"] == "bindings" else None
    )
    os.close(fd)


def test_another_vm_needs_a_token_of_its_own(vm: Vm, service: Service) -> None:
    fd = service.memfd_restricted()
    os.ftruncate(fd, 8 * PAGE)
    show_private(vm, 0, fd)
    with Vm(service, engine="software") as other:
        body = named(0, SlotFiles(restricted=os.fstat(fd).st_ino), flags=kvm.KVM_MEM_PRIVATE)
        assert outcome(lambda: other._channel.call(vm_wire.SET_USER_MEMORY_REGION, body)) == Errno(
            ESTALE
        )
    os.close(fd)
