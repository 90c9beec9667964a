"""As many slots as KVM_CAP_NR_MEMSLOTS promises, beside the messages that they need."""

import os
import socket
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Final

from benchmarks.common import Figure, Lab, Pairs, alternate, below, service
from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.vm_memory import MAX_SLOTS
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.vm import Vm

_BASE: Final = 0x4000_0000
#: A request for a slot, and a reply to it, of the real messages' sizes.
_REQUEST: Final = bytes(208)
_REPLY: Final = bytes(8)
_SOON: Final = below(3, "under 3 s")


@contextmanager
def _relays(count: int) -> Generator[socket.socket]:
    """Start ``count`` processes in a row; each asks the next one, and then answers a request.

    Yields the socket to the first process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            ours.close()
            _relay(theirs, count - 1)
        os._exit(0)
    theirs.close()
    with ours:
        yield ours
    os.waitpid(pid, 0)


def _relay(asked: socket.socket, others: int) -> None:
    with ExitStack() as stack:
        after = stack.enter_context(_relays(others)) if others else None
        while asked.recv(4096):
            if after is not None:
                after.send(_REQUEST)
                after.recv(4096)
            asked.send(_REPLY)


def _ask(relays: socket.socket, count: int) -> float:
    """Return the seconds that ``count`` round trips take."""
    began = time.perf_counter()
    for _ in range(count):
        relays.send(_REQUEST)
        relays.recv(4096)
    return time.perf_counter() - began


def _make_all(
    started: Service, count: int, halves: dict[str, Any], deletions: list[float]
) -> float:
    """Make slots of a page each, one page apart, and delete them.

    Returns the seconds that the making took, and appends those of the deletion to ``deletions``.
    """
    with Vm(started, engine="software") as vm:
        offsets = [name.replace("_fd", "_offset") for name in halves]
        began = time.perf_counter()
        for slot in range(count):
            shown: dict[str, Any] = dict.fromkeys(offsets, slot * PAGE_SIZE)
            gpa = _BASE + slot * 2 * PAGE_SIZE
            vm.set_user_memory_region(
                slot=slot, guest_phys_addr=gpa, memory_size=PAGE_SIZE, **halves, **shown
            )
        made = time.perf_counter()
        for slot in range(count):
            vm.set_user_memory_region(slot=slot, guest_phys_addr=0, memory_size=0)
        deletions.append(time.perf_counter() - made)
    return made - began


def slots(lab: Lab) -> Iterator[Figure]:
    """Make the most slots of a VM, on one memfd or on one restricted file, and delete them.

    The floor is bare Python that sends the same messages: for each slot the owner asks the engine,
    and for a private half the engine asks the service.
    """
    count = lab.amount(MAX_SLOTS, 200)
    with ExitStack() as stack:
        started = stack.enter_context(service())
        restricted = stack.enter_context(OwnedFd(started.memfd_restricted())).fileno()
        window = stack.enter_context(memory.memfd_create("window")).fileno()
        for fd in (restricted, window):
            os.ftruncate(fd, count * PAGE_SIZE)
        for name, asked, halves in (
            ("shared", 1, {"shared_fd": window}),
            ("private", 2, {"restricted_fd": restricted}),
        ):
            deletions: list[float] = []
            with _relays(asked) as relays:
                ask = partial(_ask, relays, count)
                pairs = alternate(
                    ask, partial(_make_all, started, count, halves, deletions), lab.rounds(3)
                )
            yield pairs.figure(f"{count:,} slots made, {name} half (floor: messages)", "s", _SOON)
            yield Pairs(pairs.floor, deletions[1:]).figure("  deleted (floor: the same)", "s")


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {"slots": slots}
