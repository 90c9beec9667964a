"""The tools of ``run --prove``: each finds what is there.

A proof that could not fail would prove nothing.
"""

import mmap
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hidden_pattern import SEED, START, holding, owner_of, pattern
from outcomes import outcome
from restrictedmem.abi import memory
from restrictedmem.abi.process import CLONE_NEWNS
from restrictedmem.audit import (
    on_descriptor,
    on_namespaces,
    on_processes,
    on_sockets,
    on_vm,
    syscalls,
)
from restrictedmem.audit.attacker import Attacker, drop_capabilities, fork_twin
from restrictedmem.audit.attempt import Attempt, Outcome, Route, attempt
from restrictedmem.audit.held_guest import HeldGuest, held_guest
from restrictedmem.audit.pattern import Pattern, content, word
from restrictedmem.audit.reading import of_descriptors, of_file, of_process
from restrictedmem.child import end_child
from restrictedmem.fd import OwnedFd, send_with_fds
from restrictedmem.fs.mounter import enter_user_namespace
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.wire import Channel
from restrictedmem.vmm.vm import Vm
from users import as_user

__all__ = ["pattern"]

MIB = 1 << 20


# The pattern.


def test_words_are_the_outputs_of_splitmix64() -> None:
    # The reference implementation's first outputs for the seed 1234567.
    first = (
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    )
    assert tuple(word(1234567, 8 * number) for number in range(1, 6)) == first


@pytest.mark.parametrize("shift", range(16))
def test_a_page_is_found_wherever_it_lies(pattern: Pattern, shift: int) -> None:
    noise = random.Random(shift)
    address = START + noise.randrange(4095) * 4096
    found = pattern.find(
        noise.randbytes(4096 + shift) + content(SEED, address, 4096) + noise.randbytes(512)
    )
    assert found is not None
    assert address <= found < address + 4096


def test_noise_zeroes_and_another_seed_are_not_it(pattern: Pattern) -> None:
    for data in (
        random.Random(1).randbytes(MIB),
        bytes(MIB),
        content(SEED + 1, START, 1 << 16),
        b"",
        b"1234567",
    ):
        assert pattern.find(data) is None


def test_every_page_of_a_large_guest_has_a_sample() -> None:
    large = Pattern(SEED, START, START + 256 * MIB)
    for page in random.Random(2).choices(range(256 * MIB // 4096), k=20):
        assert large.find(content(SEED, START + page * 4096, 4096)) is not None


# Reading.


def test_a_process_that_holds_it_is_convicted(pattern: Pattern) -> None:
    # A twin of this process would not do: the searcher's own memory has the samples.
    clean = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    holder = fork_twin(lambda: content(SEED, START + MIB, 8192))
    try:
        assert [found(pattern, of_process(pid)) for pid in (clean.pid, holder)] == [False, True]
    finally:
        end_child(holder)
        clean.kill()
        clean.wait()


def test_memory_that_is_shared_without_a_file_is_read_too() -> None:
    with mmap.mmap(-1, 8192) as mapping:
        twin = fork_twin()
        mapping[:] = content(SEED + 2, START, 8192)
        try:
            assert any(content(SEED + 2, START, 4096) in bytes(chunk) for chunk in of_process(twin))
        finally:
            end_child(twin)


def found(pattern: Pattern, chunks: Iterable[Any]) -> bool:
    return any(pattern.find(chunk) is not None for chunk in chunks)


def test_a_file_is_read_at_its_data_and_not_at_its_holes(pattern: Pattern) -> None:
    with memory.memfd_create("sparse") as fd:
        os.ftruncate(fd.fileno(), 1 << 40)
        os.pwrite(fd.fileno(), content(SEED, START, 4096), 1 << 39)
        chunks = list(of_file(fd.fileno()))
        assert sum(map(len, chunks)) == 4096
        assert found(pattern, chunks)
        assert found(pattern, of_descriptors())


# Routes, at what is not protected.


@pytest.mark.parametrize("route", on_descriptor.ROUTES, ids=lambda route: route.name)
def test_an_ordinary_file_gives_its_content_by_every_route(route: Route, pattern: Pattern) -> None:
    with holding(1 << 16) as fd:
        came = attempt(route, owner_of(pattern, fd=fd.fileno()))
    # Calls without an offset of their own begin where writing ended.
    at_the_end = {"read", "readv", "splice", "sendfile", "copy_file_range"}
    assert came.outcome is (
        Outcome.NOTHING if route.name in at_the_end and came.searched == 0 else Outcome.FOUND
    ), came
    if route.name in at_the_end:
        with holding(1 << 16) as fd:
            os.lseek(fd.fileno(), 0, os.SEEK_SET)
            assert attempt(route, owner_of(pattern, fd=fd.fileno())).outcome is Outcome.FOUND


def test_a_rings_read_says_what_it_came_to() -> None:
    """As the read of the same descriptor does."""
    with tempfile.TemporaryFile() as file, OwnedFd(os.open("/", os.O_RDONLY)) as directory:
        file.write(b"content")
        file.flush()
        try:
            found = syscalls.io_uring_read(file.fileno(), 100)
        except PermissionError:
            pytest.skip("no rings here: kernel.io_uring_disabled")
        assert found == b"content"
        assert outcome(lambda: syscalls.io_uring_read(directory.fileno(), 1)) == outcome(
            lambda: os.read(directory.fileno(), 1)
        )


HOLDER = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from hidden_pattern import SEED, START, content, holding
kept = holding(8192), content(SEED, START, 8192)
print(end=".", flush=True)
signal.pause()
"""


@pytest.mark.requires("root")
def test_a_dumpable_process_is_convicted_by_every_way_in(pattern: Pattern) -> None:
    # Its memory is searched again and again, so it is a small process.
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(Path(__file__).parent)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.read(1) == b"."
        victim = owner_of(pattern, processes=dict.fromkeys(on_processes.NAMES, holder.pid))
        came = {
            route.name: attempt(route, victim)
            for route in on_processes.routes()
            if route.target.startswith("engine")
        }
        holder.kill()
    convicted = {name for name, one in came.items() if one.outcome is Outcome.FOUND}
    ways = {
        "mem",
        "task/PID/mem",
        "fd/*",
        "process_vm_readv",
        "PTRACE_ATTACH",
        "PTRACE_SEIZE",
        "pidfd_getfd 0 to 63",
        "kcmp",
        "move_pages",
    }
    assert convicted >= ways
    assert not [one for one in came.values() if one.outcome is Outcome.FAILED]
    assert came["maps"].searched > 0


@pytest.mark.requires("root")
@pytest.mark.alone("enters every namespace of its user's on the machine")
@pytest.mark.parametrize("which", [min, max], ids=["first CPU", "last CPU"])
def test_a_process_in_a_user_namespace_is_convicted_by_its_handles(
    pattern: Pattern, which: Callable[[set[int]], int]
) -> None:
    """As a service was once that lived in the namespace of its mount."""

    def body() -> tuple[Attempt, str]:
        def inside() -> None:
            # Numbers of namespaces are a CPU's own.
            os.sched_setaffinity(0, {which(os.sched_getaffinity(0))})
            enter_user_namespace(CLONE_NEWNS)

        holder = fork_twin(inside)
        drop_capabilities()
        try:
            route = next(
                route for route in on_namespaces.routes() if "user namespaces" in route.name
            )
            owner = owner_of(pattern, processes=dict.fromkeys(on_processes.NAMES, holder))
            return attempt(route, owner), b"".join(map(bytes, route.run(owner))).decode()
        finally:
            end_child(holder)

    try:
        syscalls.namespace_handle("/proc/self/ns/user")
    except OSError:
        pytest.skip("namespaces have no handles before Linux 6.18")
    came, allowed = as_user(body)
    assert (came.outcome, came.detail) == (Outcome.FOUND, "accepted")
    # A user's own process is open to it in some ways as it is.
    assert "a mount namespace" in allowed


@contextmanager
def yes(pattern: Pattern) -> Generator[Attacker]:
    """Yield an owner whose service and engine allow everything, and give memory to any binder."""

    def answer(sock: socket.socket) -> None:
        with sock:
            # Descriptors are taken as well.
            while message := socket.recv_fds(sock, wire.MAX_MESSAGE, 4):
                if not message[0]:
                    return
                number = int.from_bytes(message[0][:4], sys.byteorder)
                send_with_fds(sock, bytes(8), [held.fileno()] if number == wire.BIND.number else [])
                for fd in message[1]:
                    os.close(fd)

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    def token_for(_: int) -> bytes:
        return bytes(16)

    name = f"restrictedmem/{os.getpid()}/{secrets.token_hex(8)}"
    with holding(1 << 16) as held, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen(9)
        threading.Thread(target=serve, daemon=True).start()
        service = SimpleNamespace(
            info={"socket": f"@{name}", "key": "00" * wire.KEY_BYTES}, token_for=token_for
        )
        engine, theirs = Channel.pair("engine")
        threading.Thread(target=answer, args=(theirs,), daemon=True).start()
        guest = SimpleNamespace(vmm=SimpleNamespace(vm=SimpleNamespace(_channel=engine)))
        yield owner_of(
            pattern,
            service=service,
            guest=guest,
            fd=held.fileno(),
            processes={"service": os.getpid()},
        )
        engine.close()
        listener.shutdown(socket.SHUT_RDWR)


def test_a_service_that_says_yes_is_convicted_by_every_question(pattern: Pattern) -> None:
    with yes(pattern) as owner:
        came = {
            f"{route.target}: {route.name}": attempt(route, owner) for route in on_sockets.routes()
        }
    assert {
        name: one.outcome for name, one in came.items() if one.outcome is not Outcome.FOUND
    } == {}
    # The memory itself, and no mere yes.
    assert came["service's socket: BIND"].detail.startswith("the guest's ")


def test_a_name_that_nobody_has_is_refused(pattern: Pattern) -> None:
    route = next(route for route in on_sockets.routes() if route.name == "names of /proc/net/unix")
    came = attempt(route, owner_of(pattern, processes={"service": os.getpid()}))
    assert (came.outcome, came.errno) == (Outcome.REFUSED, "ECONNREFUSED")


def test_memory_that_is_not_restricted_can_be_shared(pattern: Pattern) -> None:
    """Where the engine takes it, the owner has what the guest writes there."""
    pytest.importorskip("unicorn")
    route = next(
        route for route in on_vm.routes() if route.name == "the descriptor as shared memory"
    )
    with (
        Service.start() as service,
        Vm(service, engine="software") as machine,
        holding(1 << 16) as fd,
    ):
        guest = SimpleNamespace(vmm=SimpleNamespace(vm=machine))
        came = attempt(route, owner_of(pattern, guest=guest, fd=fd.fileno()))
    assert (came.outcome, came.detail) == (Outcome.FOUND, "accepted")


def test_code_of_the_owners_would_copy_it_out(pattern: Pattern) -> None:
    """The attempts against a guest work when the owner allows them: with a guest of its own."""
    pytest.importorskip("unicorn")
    size, code_at = MIB, guest_abi.PRIVATE_BASE + 0x10000
    guest = cast(HeldGuest, SimpleNamespace(start=START))
    with (
        Service.start() as service,
        Vm(service, engine="software") as machine,
        memory.memfd_create("window") as window,
    ):
        fd = service.memfd_restricted()
        os.ftruncate(fd, size)
        os.ftruncate(window.fileno(), on_vm.COPIED)
        machine.set_user_memory_region(
            slot=0, guest_phys_addr=guest_abi.PRIVATE_BASE, memory_size=size, restricted_fd=fd
        )
        machine.set_user_memory_region(
            slot=1,
            guest_phys_addr=guest_abi.SHARED_BASE,
            memory_size=on_vm.COPIED,
            shared_fd=window.fileno(),
        )
        machine.set_memory_attributes(guest_abi.PRIVATE_BASE, size, private=True)
        machine.launch_update(START, content(SEED, START, on_vm.COPIED))
        machine.launch_update(code_at, on_vm.code_page(guest))
        with machine.create_vcpu() as vcpu:
            vcpu.set_regs(rip=code_at + 123, rsp=guest_abi.PRIVATE_BASE + size)
            left = vcpu.run()
            assert isinstance(left, exits.Hypercall)
            assert left.number == guest_abi.EXIT
        assert found(pattern, of_file(window.fileno()))
        os.close(fd)


def test_a_guest_made_for_debugging_is_open() -> None:
    """And says so in its measurement; the calls are those that any other guest refuses."""
    seed = secrets.randbits(64)
    routes = {route.name: route for route in on_vm.routes()}
    with (
        Service.start() as service,
        held_guest(service, 2 * MIB, seed, "software", debug=True) as guest,
    ):
        owner = owner_of(Pattern(seed, guest.start, guest.end), guest=guest)
        came = [attempt(routes[name], owner).outcome for name in ("DBG_READ", "DBG_WRITE")]
    assert came == [Outcome.FOUND, Outcome.FOUND]
