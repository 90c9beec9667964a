"""Further slots of files that slots show already: the owner names them, and sends neither descriptor nor token."""

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import pytest

from outcomes import Errno, in_child, outcome
from processes import children, descriptors, stop
from restrictedmem.abi import kvm, memory, stat
from restrictedmem.protocol import vm_wire
from restrictedmem.protocol.vm_wire import SlotFiles
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vm
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse")

PAGE: Final = 4096
GPA: Final = 0x4000_0000
EPERM, EBADF, EEXIST, EINVAL, ETIMEDOUT, ESTALE = 1, 9, 17, 22, 110, 116
ENGINES: Final = ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]


@pytest.fixture(scope="module", params=["v10", "bindings", "pinned"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    options = Options(pin=True) if request.param == "pinned" else Options(design=request.param)
    with Service.start(options) as found:
        yield found


@pytest.fixture
def vm(service: Service) -> Iterator[Vm]:
    with Vm(service, engine="software", debug=True) as found:
        yield found


@pytest.fixture(params=ENGINES)
def either(request: pytest.FixtureRequest, service: Service) -> Iterator[Vm]:
    with Vm(service, engine=request.param, debug=True) as found:
        yield found


def window(content: bytes, pages: int = 8) -> int:
    """Make a memfd, each page of which begins with some bytes and its number."""
    fd = os.memfd_create("window", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, pages * PAGE)
    for page in range(pages):
        os.pwrite(fd, content + bytes([page]), page * PAGE)
    return fd


def show(vm: Vm, slot: int, fd: int, page: int = 0, at: int | None = None) -> None:
    """Make a slot of one page of a memfd."""
    gpa = GPA + (slot if at is None else at) * PAGE
    vm.set_user_memory_region(
        slot=slot, guest_phys_addr=gpa, memory_size=PAGE, shared_fd=fd, shared_offset=page * PAGE
    )


def show_private(vm: Vm, slot: int, fd: int, page: int = 0) -> None:
    gpa = GPA + slot * PAGE
    vm.set_user_memory_region(
        slot=slot,
        guest_phys_addr=gpa,
        memory_size=PAGE,
        restricted_fd=fd,
        restricted_offset=page * PAGE,
    )
    vm.set_memory_attributes(gpa, PAGE, private=True)


def delete(vm: Vm, slot: int) -> None:
    vm.set_user_memory_region(slot=slot, guest_phys_addr=0, memory_size=0)


def seen(vm: Vm, slot: int) -> bytes:
    """Return the first two bytes that the guest has in a slot."""
    return vm.read_memory(GPA + slot * PAGE, 2)


def named(
    slot: int, names: SlotFiles, *, token: bytes = bytes(16), flags: int = 0, offset: int = 0
) -> bytes:
    region = kvm.kvm_userspace_memory_region_ext(
        slot=slot,
        flags=flags,
        guest_phys_addr=GPA + slot * PAGE,
        memory_size=PAGE,
        userspace_addr=offset,
    )
    return bytes(region) + token + names.pack()


def name_of(fd: int) -> SlotFiles:
    """Name a memfd."""
    return SlotFiles(0, *stat.identity(fd))


def wait_held(pid: int, expected: list[str]) -> None:
    """Wait until a process has certain descriptors: what came with a request is closed when that was answered."""
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
    """Each remembers what it sent itself. What the other one has deleted, it sends again."""
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


# Private halves.


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
