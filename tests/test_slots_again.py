"""Further slots of memfds that slots show already.

The owner names the memfds, and sends no descriptor.
"""

import os
import signal
import threading
from typing import Final

import pytest

from outcomes import Errno, in_child, outcome
from processes import children, descriptors, stop
from restrictedmem.abi import kvm, stat
from restrictedmem.protocol import vm_wire
from restrictedmem.protocol.vm_wire import SlotFiles
from restrictedmem.service.client import Service
from restrictedmem.vmm.vm import Vm
from slots_shown import GPA, delete, either, named, seen, service, show_private, vm, window
from waiting import wait_until

__all__ = ["either", "service", "vm"]

pytestmark = pytest.mark.requires("fuse")

PAGE: Final = 4096

EPERM, EBADF, EEXIST, EINVAL, ETIMEDOUT, ESTALE = 1, 9, 17, 22, 110, 116


def show(vm: Vm, slot: int, fd: int, page: int = 0, at: int | None = None) -> None:
    """Make a slot of one page of a memfd."""
    gpa = GPA + (slot if at is None else at) * PAGE
    vm.set_user_memory_region(
        slot=slot, guest_phys_addr=gpa, memory_size=PAGE, shared_fd=fd, shared_offset=page * PAGE
    )


def name_of(fd: int) -> SlotFiles:
    """Name a memfd."""
    return SlotFiles(0, *stat.identity(fd))


def wait_held(pid: int, expected: list[str]) -> None:
    """Wait until a process has certain descriptors.

    It closes the descriptors of a request after the answer.
    """
    wait_until(
        lambda: sorted(descriptors(pid)) == expected,
        f"{expected} instead of {sorted(descriptors(pid))}",
    )


def end_checker(vm: Vm) -> None:
    """Let the engine take no descriptor any more."""
    (checker,) = children(int(vm.statistics()["pid"]))
    os.kill(checker.pid, signal.SIGKILL)
    ends = os.pipe()
    assert outcome(lambda: vm._channel.call(vm_wire.TRACE, fds=[ends[1]])) == Errno(ETIMEDOUT)
    for end in ends:
        os.close(end)


# Shared halves.


def test_slots_of_one_memfd_send_it_once(either: Vm) -> None:
    first, second = window(b"a"), window(b"b")
    show(either, 0, first)
    show(either, 1, second)
    end_checker(either)
    for slot in range(2, 8):
        show(either, slot, (first, second)[slot % 2], slot)
    assert [seen(either, slot) for slot in range(8)] == [
        b"a\0",
        b"b\0",
        b"a\2",
        b"b\3",
        b"a\4",
        b"b\5",
        b"a\6",
        b"b\7",
    ]
    third = window(b"c")
    assert outcome(lambda: show(either, 8, third)) == Errno(ETIMEDOUT)
    for fd in (first, second, third):
        os.close(fd)


def test_another_memfd_with_the_same_number_is_sent(vm: Vm) -> None:
    first = window(b"a")
    show(vm, 0, first)
    os.dup2(second := window(b"b"), first)
    show(vm, 1, first)
    assert (seen(vm, 0), seen(vm, 1)) == (b"a\0", b"b\0")
    os.close(first)
    os.close(second)


@pytest.mark.requires("root")
def test_an_engine_lets_go_of_a_memfd_with_its_last_slot(vm: Vm) -> None:
    pid = int(vm.statistics()["pid"])
    before = sorted(descriptors(pid))
    fd = window(b"a")
    show(vm, 0, fd)
    held = sorted([*before, "/memfd:window (deleted)"])
    for slot in range(1, 5):
        show(vm, slot, fd, slot)
    wait_held(pid, held)
    for slot in range(4):
        delete(vm, slot)
    wait_held(pid, held)
    delete(vm, 4)
    wait_held(pid, before)
    # The owner does not know, and its call works all the same.
    show(vm, 0, fd, 3)
    assert seen(vm, 0) == b"a\3"
    os.close(fd)


@pytest.mark.requires("root")
def test_a_call_that_fails_is_no_trouble_for_the_next(vm: Vm) -> None:
    first, second = window(b"a"), window(b"b")
    pid = int(vm.statistics()["pid"])
    before = sorted([*descriptors(pid), "/memfd:window (deleted)"])
    show(vm, 0, first)
    for _ in range(3):
        assert outcome(lambda: show(vm, 1, second, at=0)) == Errno(EEXIST)
        assert outcome(lambda: show(vm, 1, second, page=8)) == Errno(EINVAL)
        assert outcome(lambda: show(vm, 1, first, at=0)) == Errno(EEXIST)
        assert outcome(lambda: show(vm, 1, first, page=8)) == Errno(EINVAL)
    wait_held(pid, before)
    show(vm, 1, second, 1)
    show(vm, 2, first, 2)
    assert [seen(vm, slot) for slot in range(3)] == [b"a\0", b"b\1", b"a\2"]
    os.close(first)
    os.close(second)


def test_a_memfd_that_grew_is_as_long_as_it_is(vm: Vm) -> None:
    fd = window(b"a", pages=2)
    show(vm, 0, fd)
    assert outcome(lambda: show(vm, 1, fd, page=2)) == Errno(EINVAL)
    os.ftruncate(fd, 3 * PAGE)
    show(vm, 1, fd, page=2)
    assert outcome(lambda: show(vm, 2, fd, page=3)) == Errno(EINVAL)
    assert outcome(lambda: os.ftruncate(fd, 2 * PAGE)) == Errno(EPERM)
    os.close(fd)


def test_a_slot_moves_with_a_memfd_that_is_named(vm: Vm) -> None:
    first, second, third = window(b"a"), window(b"b"), window(b"c")
    show(vm, 0, first, 3)
    show(vm, 9, second)
    end_checker(vm)
    show(vm, 0, first, 3, at=1)
    show(vm, 0, first, 3, at=2)
    assert seen(vm, 2) == b"a\3"
    for fd, page in ((second, 3), (first, 2)):
        assert outcome(lambda fd=fd, page=page: show(vm, 0, fd, page, at=3)) == Errno(EINVAL)  # type: ignore[misc]
    assert seen(vm, 2) == b"a\3"
    # It is still the only slot of its memfd, which is there after all moves.
    show(vm, 1, first, 1)
    assert seen(vm, 1) == b"a\1"
    for fd in (first, second, third):
        os.close(fd)


def test_what_a_descriptor_may_not_do_its_name_does_not_do(vm: Vm, service: Service) -> None:
    fd, restricted = window(b"a"), service.memfd_restricted()
    os.ftruncate(restricted, 8 * PAGE)
    show(vm, 0, fd)
    show_private(vm, 1, restricted)
    for flags in (os.O_RDONLY, os.O_PATH):
        weaker = os.open(f"/proc/self/fd/{fd}", flags)
        assert outcome(lambda weaker=weaker: show(vm, 2, weaker, 2)) == Errno(EINVAL)  # type: ignore[misc]
        os.close(weaker)
    assert outcome(lambda: show(vm, 2, -1)) == Errno(EBADF)
    os.close(fd)
    os.close(restricted)


def test_which_file_it_is_no_server_is_asked() -> None:
    found: list[stat.Identity] = []
    with Service.start() as own:
        fd = own.memfd_restricted()
        expected, pid = (os.fstat(fd).st_dev, os.fstat(fd).st_ino), own.info["pid"]
        thread = threading.Thread(target=lambda: found.append(stat.identity(fd)))
        try:
            stop(pid)
            thread.start()
            wait_until(lambda: found, "the kernel alone to answer")
        finally:
            os.kill(pid, signal.SIGCONT)
            thread.join()
        assert found == [expected]
        os.close(fd)
    assert outcome(lambda: stat.identity(fd)) == Errno(EBADF)


def test_a_name_of_nothing_is_estale_and_costs_no_token(vm: Vm, service: Service) -> None:
    shown, hidden, restricted = window(b"a"), window(b"b"), service.memfd_restricted()
    os.ftruncate(restricted, PAGE)
    show(vm, 0, shown)
    token, private = service.token_for(restricted), kvm.KVM_MEM_PRIVATE

    def call(names: SlotFiles, flags: int = 0) -> object:
        return outcome(
            lambda: vm._channel.call(
                vm_wire.SET_USER_MEMORY_REGION, named(1, names, token=token, flags=flags)
            )
        )

    device, ino = stat.identity(shown)
    for names in (name_of(hidden), SlotFiles(0, device, ino + 1), SlotFiles(0, device + 1, ino)):
        assert call(names, private) == call(names) == Errno(ESTALE)
    assert call(
        SlotFiles(restricted=stat.identity(restricted)[1], device=device, memfd=ino), private
    ) == Errno(ESTALE)
    assert service.status()["descriptors"][-1]["notifiers"] == 0
    assert call(name_of(shown), private) == (b"", [])
    assert service.status()["descriptors"][-1]["notifiers"] == 1
    for fd in (shown, hidden, restricted):
        os.close(fd)


def test_a_descriptor_counts_where_a_name_comes_with_it(vm: Vm) -> None:
    first, second = window(b"a"), window(b"b")
    show(vm, 0, first)
    for slot, name in ((1, name_of(first)), (2, SlotFiles(0, 1, 1))):
        vm._channel.call(vm_wire.SET_USER_MEMORY_REGION, named(slot, name), [second])
        assert seen(vm, slot) == b"b\0"
    os.close(first)
    os.close(second)


@pytest.mark.requires("root")
def test_clients_that_always_send_need_no_more_room(vm: Vm) -> None:
    pid, fd = int(vm.statistics()["pid"]), window(b"a")
    held = sorted([*descriptors(pid), "/memfd:window (deleted)"])
    show(vm, 0, fd)
    for slot in range(1, 8):
        region = named(slot, SlotFiles(), offset=slot * PAGE)[: vm_wire.TOKEN_OFFSET]
        vm._channel.call(vm_wire.SET_USER_MEMORY_REGION, region, [fd])
    wait_held(pid, held)
    assert [seen(vm, slot) for slot in range(8)] == [b"a" + bytes([slot]) for slot in range(8)]
    os.close(fd)


# Owners of several threads, and of several processes.


def test_threads_make_slots_of_two_memfds_at_once(vm: Vm) -> None:
    fds, count = [window(b"a", 64), window(b"b", 64)], 16
    failed: list[BaseException] = []

    def make(first: int) -> None:
        try:
            for slot in range(first, first + count):
                show(vm, slot, fds[slot % 2], slot)
                # The last one of its memfd, at times.
                delete(vm, slot)
                show(vm, slot, fds[slot % 2], slot)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=make, args=[first]) for first in range(0, 4 * count, count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [seen(vm, slot) for slot in range(4 * count)] == [
        b"ab"[slot % 2 :][:1] + bytes([slot]) for slot in range(4 * count)
    ]
    for fd in fds:
        os.close(fd)


def test_two_processes_have_one_vm(vm: Vm, service: Service) -> None:
    """Each process remembers only what it sent itself.

    So it sends a slot again that the other deleted.
    """
    first, restricted = window(b"a"), service.memfd_restricted()
    os.ftruncate(restricted, 8 * PAGE)
    show(vm, 0, first)
    show_private(vm, 1, restricted)

    def other() -> bool:
        second = window(b"b")
        delete(vm, 0)
        delete(vm, 1)
        show(vm, 2, second, 2)
        show(vm, 3, first, 3)
        show_private(vm, 4, restricted, 4)
        delete(vm, 3)
        delete(vm, 4)
        return True

    assert in_child(other) == "True"
    show(vm, 5, first, 5)
    show_private(vm, 6, restricted, 6)
    assert (seen(vm, 2), seen(vm, 5)) == (b"b\2", b"a\5")
    assert service.status()["descriptors"][-1]["notifiers"] == 1
    os.close(first)
    os.close(restricted)
