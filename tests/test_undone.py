"""A call that fails half way passes the error on, and leaves no descriptor and no mapping behind.

The table has the places that undo by themselves, the call that is made to fail there, and the
caller that then fails. The error is kept while the process is looked at, and with it all that its
frames hold. So leftovers are not collected before.
"""

import fcntl
import os
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from planting import PlantedError, always, fail, stub
from restrictedmem.abi import io_uring, memory, mount, userfaultfd
from restrictedmem.audit import on_sockets
from restrictedmem.consumer import memfd_file
from restrictedmem.fd import OwnedFd
from restrictedmem.fs import mount_ways
from restrictedmem.kvm import checker, half, memslot
from restrictedmem.mm import memfd, pin, sequence
from restrictedmem.service import (
    client,
    client_cgroups,
    client_services,
    discover,
    exec_service,
    spawn_requests,
    wire,
)
from restrictedmem.service.cgroup import Cgroup
from restrictedmem.service.options import Options
from restrictedmem.syscall import exec_program, scout
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t
from restrictedmem.vmm import vm

#: Bytes of a mapping that shows beside whatever else the process maps.
LARGE: Final = 64 << 30


def held() -> tuple[list[str], int]:
    """Return this process's descriptors, and its address space in halves of a large mapping."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    # The list's own descriptor has the same number each time, unless something is left.
    return sorted(os.listdir("/proc/self/fd")), pages * PAGE_SIZE // (LARGE // 2)


def null(*_: object) -> OwnedFd:
    return OwnedFd(os.open(os.devnull, os.O_RDWR))


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


Place = Callable[[pytest.MonkeyPatch], object]


def place(where: object, name: str, act: Callable[[], object]) -> Place:
    """Have one function fail, then act."""

    def run(patch: pytest.MonkeyPatch) -> object:
        patch.setattr(where, name, fail)
        return act()

    return run


def map_a_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memory, "map_over", fail)
    memory.Mapping(0, 0, LARGE)


def mount_by_the_helper(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nowhere(_: str) -> Generator[tuple[str, int]]:
        yield "/nowhere", -1

    patch.setattr(mount_ways, "_mount_point", nowhere)
    patch.setattr(mount_ways, "_fusermount", null)
    patch.setattr(mount_ways, "shutil", stub(which=str))
    patch.setattr(mount_ways, "os", stub(open=fail, O_PATH=0, O_DIRECTORY=0, O_CLOEXEC=0))
    mount_ways.mount_fusermount()


def pin_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(io_uring, "io_uring_setup", null)
    patch.setattr(io_uring, "register_sparse_buffers", fail)
    pin.PinnedBacking(stub(), 0, PageRange(pgoff_t(0), pgoff_t(1)))


def show_a_pinned_file(_: pytest.MonkeyPatch) -> None:
    with memory.memfd_create("pinned") as fd:
        parts = {"blksize": PAGE_SIZE, "sequence": None, "is_guest_memfd": False}
        file = stub(ino=1, order=0, memfd=fd, pages=fail, **parts)
        window = PageRange(pgoff_t(0), pgoff_t(LARGE >> PAGE_SHIFT))
        memslot.MemfdHalf(file, 1, window, fail)


def take_a_bound_file_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memfd_file, "InvalidationSequence", fail)
    memfd_file.MemfdFile(stub(ino=1, flags=0, order=0, limit=None, memfd=null(), sequence=null()))


def share_a_memfd(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(half.Half, "__init__", fail)
    counted = list[int]()
    file = stub(get=lambda: counted.append(1), put=lambda: counted.append(-1), fileno=lambda: 0)
    try:
        half.SharedHalf(file, 0, PAGE_SIZE)
    finally:
        assert counted == [1, -1], "nobody has the file"


def make_a_round_trip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(wire, "send_with_fds", fail)
    channel, theirs = wire.Channel.pair("the other")
    with theirs:
        channel.call(wire.TOKEN)


def connect_to_a_service(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client, "connect", fail)
    client.Service._knock(stub(info={"socket": "name"}, _own_ending=str))


def ask_the_checker(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checker, "send_with_fds", fail)
    ours, theirs = pair()
    with theirs:
        theirs.send(b".")
        pid = os.fork()
        if not pid:
            signal.pause()
        try:
            checker.Intake(stub(), ours, pid)._ask(b"?", 0)
        finally:
            with pytest.raises(ChildProcessError):
                os.waitpid(pid, 0)


def limit_clients(patch: pytest.MonkeyPatch) -> None:
    own = stub(version=2, directory=Path("/nowhere/leaf"))
    patch.setattr(Cgroup, "own", lambda: own)
    patch.setattr(client_cgroups.ClientCgroups, "_take", null)
    patch.setattr(client_cgroups.ClientCgroups, "_make_room", fail)
    client_cgroups.ClientCgroups(1 << 20)


def make_a_vm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(wire.Channel, "call", fail)
    ours, theirs = pair()
    with theirs:
        vm.Vm(stub(spawn_numbered=always((1, ours)), ending=fail), engine="software")


def fork_a_consumer(_: pytest.MonkeyPatch) -> None:
    some = stub(_consumers=stub(add=fail), _waiting=[])
    spawn_requests.Spawns.add(some, stub(), "dma", b"")


def start_a_client(_: pytest.MonkeyPatch) -> None:
    client_services.ClientServices._start(stub(_cgroup_for=fail), stub())


PLACES: Final[dict[str, Place]] = {
    "mount_detached": place(mount, "fsopen", lambda: mount_ways.mount_detached(allow_other=False)),
    "mount_fusermount": mount_by_the_helper,
    "refuse_missing": place(
        userfaultfd, "UFFDIO_API", lambda: userfaultfd.refuse_missing(0, PAGE_SIZE)
    ),
    "Mapping": map_a_file,
    "make_memfd": place(fcntl, "fcntl", lambda: memfd.make_memfd(PAGE_SIZE)),
    "InvalidationSequence": place(os, "ftruncate", sequence.InvalidationSequence.create),
    "PinnedBacking": pin_pages,
    "MemfdHalf": show_a_pinned_file,
    "SharedHalf": share_a_memfd,
    "take_over": take_a_bound_file_over,
    "begin": place(exec_service, "start_process", lambda: exec_service.begin(Options())),
    "knock": connect_to_a_service,
    "call": make_a_round_trip,
    "ask": ask_the_checker,
    "checker": place(checker, "fork", lambda: checker.start(stub(), ())),
    "question": place(
        discover, "refuse_fds", lambda: discover._Question._connected(stub(name="name"))
    ),
    "attempt": place(on_sockets, "address", lambda: on_sockets._connect("name")),
    "door": place(exec_program, "refuse_fds", lambda: exec_program._door("name")),
    "scout": place(scout, "fork", lambda: scout.Scout(stub(fileno=int))),
    "cgroups": limit_clients,
    "Vm": make_a_vm,
    "spawn": fork_a_consumer,
    "client": start_a_client,
}


@pytest.mark.parametrize("name", PLACES)
def test_what_fails_half_way_leaves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A device that everybody may open.
    monkeypatch.setattr(mount_ways, "DEVICE", os.devnull)
    before = held()
    try:
        with monkeypatch.context() as patch:
            PLACES[name](patch)
    except PlantedError:
        assert held() == before
    else:
        pytest.fail("the error was swallowed")
