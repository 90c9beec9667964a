"""Messages that a client can send, and a consumer's failures. Each can harm only its sender."""

import fcntl
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from errno import E2BIG, EACCES, EINVAL, EMSGSIZE, ENOTCONN, EPROTO
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outcomes import Errno, outcome
from processes import descriptors, exists, family, stop, wait_gone
from restrictedmem.abi import kvm, memory
from restrictedmem.fd import close_all, receive_with_fds, send_with_fds
from restrictedmem.fs.fuse_server import MAX_THREADS
from restrictedmem.fs.owner_abi import PROVE, TOKEN_BYTES
from restrictedmem.protocol import guest_abi
from restrictedmem.protocol import vm_wire as kvm_wire
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.tokens import MAX_TOKENS
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vm
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse")

DEADLINE = 0.5
_HEAD = struct.Struct("=II")


@pytest.fixture
def service() -> Iterator[Service]:
    with Service.start(Options(deadline=DEADLINE)) as service:
        yield service


def connect(service: Service) -> Channel:
    """Make one more connection, as a child after fork does."""
    channel = service._connect()
    channel.sock.settimeout(10)
    return channel


def ask(channel: Channel, message: bytes, fds: list[int]) -> int | None:
    """Send a message as it is; return the errno of the answer, or None if the connection ends."""
    send_with_fds(channel.sock, message, fds)
    data, received = receive_with_fds(channel.sock, wire.MAX_MESSAGE)
    close_all(received)
    return _HEAD.unpack_from(data)[0] if data else None


def serves(channel: Channel) -> bool:
    """Whether a connection still gets answers."""
    try:
        _, fds = channel.call(wire.STATUS)
    except OSError as error:
        if error.errno != ENOTCONN:
            raise
        return False
    close_all(fds)
    return True


def request(number: int, body: bytes = b"") -> bytes:
    return _HEAD.pack(number, 0) + body


# Malformed messages.

_PIPE = "a pipe"
_OWN_FILE = "a file of the mount"

_MALFORMED: dict[str, tuple[bytes, list[str], int, bool]] = {
    # name: message, descriptors, errno, whether the connection ends
    "one byte": (b"x", [], EPROTO, True),
    "half a head": (bytes(7), [], EPROTO, True),
    "too long": (request(wire.STATUS.number, bytes(wire.MAX_MESSAGE)), [], EMSGSIZE, True),
    "a descriptor": (request(wire.TOKEN.number), [_PIPE], EPROTO, True),
    "five descriptors": (request(wire.STATUS.number), [_PIPE] * 5, EPROTO, True),
    "a file of the mount": (request(wire.SPAWN.number, b"kvm"), [_OWN_FILE], EPROTO, True),
    "short, with descriptors": (b"x", [_PIPE, _OWN_FILE], EPROTO, True),
    "number 0": (request(0), [], EPROTO, False),
    "largest number": (request(0xFFFF_FFFF), [], EPROTO, False),
    "a reply's number": (request(wire.READY.number), [], EPROTO, False),
    "a consumer's call": (request(wire.BIND.number, bytes(TOKEN_BYTES)), [], EPROTO, False),
    "the spawner's call": (request(wire.FORK.number, bytes(8) + b"kvm"), [], EPROTO, False),
    "CONNECT again": (request(wire.CONNECT.number, bytes(wire.KEY_BYTES)), [], EPROTO, False),
    "ENDING of half a number": (request(wire.ENDING.number, bytes(4)), [], EPROTO, False),
    "ENDING of a number and more": (request(wire.ENDING.number, bytes(9)), [], EPROTO, False),
    "SPAWN of nothing": (request(wire.SPAWN.number), [], EINVAL, False),
    "SPAWN of no text": (request(wire.SPAWN.number, b"\xff\xfe"), [], EINVAL, False),
    "SPAWN of the unknown": (request(wire.SPAWN.number, b"qemu"), [], EINVAL, False),
    "SPAWN whose FORK is too long": (
        request(wire.SPAWN.number, b"kvm ".ljust(wire.MAX_BODY, b"x")),
        [],
        E2BIG,
        False,
    ),
}


@pytest.mark.requires("root")
@pytest.mark.parametrize("name", _MALFORMED)
def test_a_malformed_message_is_answered_and_harms_no_one(service: Service, name: str) -> None:
    message, kinds, number, ends = _MALFORMED[name]
    own_file, pipe = service.memfd_restricted(), os.pipe()
    known = {_PIPE: pipe[0], _OWN_FILE: own_file}
    with closing(connect(service)) as other:
        assert serves(other)
        before = len(descriptors(service.info["pid"]))
        with closing(connect(service)) as channel:
            try:
                assert ask(channel, message, [known[kind] for kind in kinds]) == number
                assert serves(channel) != ends
            except PermissionError:
                # A kernel with SO_PASSRIGHTS refuses descriptors to the sender.
                assert kinds
        wait_until(
            lambda: len(descriptors(service.info["pid"])) <= before,
            "the connection's end in the service",
        )
        assert serves(other)
    for fd in (own_file, *pipe):
        os.close(fd)


_NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 16, 17, 18, 32, 48, 49, 1 << 16]), st.integers(0, (1 << 32) - 1)
)
_MESSAGES = st.one_of(
    st.binary(min_size=1, max_size=64), st.builds(request, _NUMBERS, st.binary(max_size=200))
)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
@given(messages=st.lists(_MESSAGES, min_size=1, max_size=5))
def test_noise(service: Service, messages: list[bytes]) -> None:
    with closing(connect(service)) as channel:
        for message in messages:
            ask(channel, message, [])
            if len(message) < _HEAD.size:
                assert not serves(channel)
                break
    assert service.status()["last_error"] == ""


@pytest.mark.alone("nobody may be late by half a second")
def test_a_client_that_takes_no_answers_is_dropped(service: Service) -> None:
    with closing(connect(service)) as greedy, closing(connect(service)) as other:
        greedy.sock.setblocking(False)
        sent = 0
        worst = 0.0
        for _ in range(20_000):
            try:
                greedy.sock.send(request(wire.STATUS.number))
                sent += 1
            except BlockingIOError:
                began = time.monotonic()
                assert serves(other)
                worst = max(worst, time.monotonic() - began)
            except (BrokenPipeError, ConnectionResetError):
                break
        else:
            pytest.fail(f"still connected after {sent} requests without a reply read")
        assert worst < 0.5
        assert serves(other)
    fd = service.memfd_restricted()
    os.posix_fallocate(fd, 0, PAGE)
    os.close(fd)


# Tokens.


def _region(slot: int = 0) -> bytes:
    return bytes(
        kvm.kvm_userspace_memory_region_ext(
            slot=slot,
            flags=kvm.KVM_MEM_PRIVATE,
            guest_phys_addr=guest_abi.PRIVATE_BASE + slot * PAGE,
            memory_size=PAGE,
            userspace_addr=0,
        )
    )


def _bind(vm: Vm, token: bytes, slot: int = 0) -> object:
    """Bind with a token that ``Vm`` itself would have asked for; 0 or an errno."""
    return outcome(
        lambda: (
            (vm._channel.call(kvm_wire.SET_USER_MEMORY_REGION, _region(slot) + token)[0] and 1) or 0
        )
    )


def test_a_token_binds_once(service: Service) -> None:
    fd = service.memfd_restricted()
    with Vm(service) as vm:
        token = service.token_for(fd)
        assert _bind(vm, token) == 0
        assert _bind(vm, token, slot=1) == Errno(EINVAL)
        assert outcome(lambda: fcntl.ioctl(fd, PROVE, token)) == Errno(EACCES)
    os.close(fd)


def test_a_token_is_presented_once(service: Service) -> None:
    first, second = service.memfd_restricted(), service.memfd_restricted()
    token = service.token_for(first)
    assert outcome(lambda: fcntl.ioctl(first, PROVE, token)) == Errno(EACCES)
    assert outcome(lambda: fcntl.ioctl(second, PROVE, token)) == Errno(EACCES)
    os.close(first)
    os.close(second)


def test_a_token_that_was_never_presented_binds_nothing(service: Service) -> None:
    token, _ = service._own_channel().call(wire.TOKEN)
    with Vm(service) as vm:
        assert _bind(vm, token) == Errno(EINVAL)
        assert _bind(vm, random.Random(1).randbytes(TOKEN_BYTES)) == Errno(EINVAL)
        assert _bind(vm, token[:-1]) == Errno(EINVAL)
        assert _bind(vm, b"") == Errno(EINVAL)
        assert vm.statistics()["private_bytes"] == 0


def test_a_token_of_another_service(service: Service) -> None:
    with Service.start() as other:
        fd, others = service.memfd_restricted(), other.memfd_restricted()
        assert outcome(lambda: other.token_for(fd)) == Errno(EACCES)
        token = other.token_for(others)
        with Vm(service) as vm:
            assert _bind(vm, token) == Errno(EINVAL)
        os.close(fd)
        os.close(others)


def test_a_token_ends_with_its_connection(service: Service) -> None:
    fd = service.memfd_restricted()
    os.posix_fallocate(fd, 0, PAGE)
    with closing(connect(service)) as channel:
        token, _ = channel.call(wire.TOKEN)
        fcntl.ioctl(fd, PROVE, token)
    # Requests of one round are served in the order of the descriptors' readiness: the hang-up came
    # before these.
    service.status()
    service.status()
    with Vm(service) as vm:
        assert _bind(vm, token) == Errno(EINVAL)
    os.close(fd)


def test_a_token_holds_no_file(service: Service) -> None:
    """A token that held a file could drop its last reference.

    The thread that serves all owners would then free gigabytes.
    """
    fd = service.memfd_restricted()
    token = service.token_for(fd)
    os.close(fd)
    wait_until(lambda: service.status()["descriptors"] == [], "the file's end")
    with Vm(service) as vm:
        assert _bind(vm, token) == Errno(EINVAL)


def test_unused_tokens_are_bounded_for_each_connection(service: Service) -> None:
    """The oldest makes room, so that whoever lost some is not shut out for ever."""
    fd = service.memfd_restricted()
    with closing(connect(service)) as greedy, closing(connect(service)) as other:
        others, _ = other.call(wire.TOKEN)
        tokens = [greedy.call(wire.TOKEN)[0] for _ in range(MAX_TOKENS + 6)]
        proved = [
            outcome(partial(fcntl.ioctl, fd, PROVE, token)) != Errno(EACCES) for token in tokens
        ]
        assert proved == [False] * 6 + [True] * MAX_TOKENS
        fcntl.ioctl(fd, PROVE, others)
    os.close(fd)


def test_used_tokens_are_not(service: Service) -> None:
    fd = service.memfd_restricted()
    with Vm(service, engine="software") as vm:
        for slot in range(100):
            vm.set_user_memory_region(
                slot=slot,
                guest_phys_addr=guest_abi.PRIVATE_BASE + slot * PAGE,
                memory_size=PAGE,
                restricted_fd=fd,
            )
    os.close(fd)


def test_a_descriptor_without_a_file_to_prove(service: Service) -> None:
    with memory.memfd_create("ordinary") as ordinary:
        assert outcome(lambda: service.token_for(ordinary.fileno())) == Errno(25)
    assert outcome(lambda: service.token_for(1 << 20)) == Errno(9)


# A consumer that does not answer.


def _stopped_vm(service: Service, fd: int) -> tuple[Vm, int]:
    vm = Vm(service, engine="software")
    vm.set_user_memory_region(
        slot=0, guest_phys_addr=guest_abi.PRIVATE_BASE, memory_size=PAGE, restricted_fd=fd
    )
    pid: int = vm.statistics()["pid"]
    stop(pid)
    return vm, pid


@pytest.mark.alone("nobody may be late by half a second")
def test_a_consumer_that_does_not_answer_is_named_and_ended(service: Service) -> None:
    fd = service.memfd_restricted()
    os.posix_fallocate(fd, 0, PAGE)
    vm, pid = _stopped_vm(service, fd)
    relatives = family(service)
    engine = next(found for found in relatives if found.pid == pid)
    began = time.monotonic()
    memory.fallocate(fd, memory.PUNCH, 0, PAGE)
    assert DEADLINE <= time.monotonic() - began < 2 * DEADLINE
    assert os.fstat(fd).st_blocks == 0
    wait_gone([engine])
    wait_until(lambda: service.status()["consumers"] == [], "the consumer's end")
    assert (
        service.status()["last_error"]
        == f"kvm 1 did not answer INVALIDATE_START within {DEADLINE:g} s"
    )
    assert outcome(vm.statistics) == Errno(ENOTCONN)
    assert all(exists(found) for found in relatives if found is not engine)
    # The next VM is none the worse for it.
    with Vm(service) as other:
        other.set_user_memory_region(
            slot=0, guest_phys_addr=guest_abi.PRIVATE_BASE, memory_size=PAGE, restricted_fd=fd
        )
        memory.fallocate(fd, memory.PUNCH, 0, PAGE)
        assert other.statistics()["invalidations"] == 1
    vm.close()
    os.close(fd)


@pytest.mark.alone("nobody may be late by half a second")
def test_many_that_wait_for_it_wait_once(service: Service) -> None:
    fd = service.memfd_restricted()
    vm, _ = _stopped_vm(service, fd)
    punches = [_Punch(fd) for _ in range(2 * MAX_THREADS)]
    for punch in punches:
        punch.start()
    for punch in punches:
        punch.join()
    # One after the other they would take twice as long.
    assert max(punch.took for punch in punches) < MAX_THREADS * DEADLINE
    vm.close()
    os.close(fd)


@pytest.mark.alone("nobody may be late by half a second")
def test_what_owners_ask_goes_on_while_it_is_waited_for(service: Service) -> None:
    """A client reports a lost page of a stopped VM's file, and another VM wants the file.

    Only the callers of these requests wait.
    """
    fd = service.memfd_restricted()
    os.posix_fallocate(fd, 0, PAGE)
    vm, _ = _stopped_vm(service, fd)
    lost = wire.ERROR_REQUEST.pack(service.token_for(fd), 0, 1)
    with Vm(service, engine="software") as other, closing(connect(service)) as channel:
        asked = [
            threading.Thread(target=outcome, args=(partial(channel.call, wire.ERROR_PAGE, lost),))
        ]
        region = partial(
            other.set_user_memory_region,
            slot=0,
            guest_phys_addr=guest_abi.PRIVATE_BASE,
            memory_size=PAGE,
            restricted_fd=fd,
        )
        asked.append(threading.Thread(target=outcome, args=(region,)))
        for thread in asked:
            thread.start()
        worst, rounds = 0.0, 0
        while any(thread.is_alive() for thread in asked):
            began = time.monotonic()
            assert service.status()["pid"] == service.info["pid"]
            with Vm(service, engine="software") as third:
                third.set_user_memory_region(
                    slot=0,
                    guest_phys_addr=guest_abi.PRIVATE_BASE,
                    memory_size=PAGE,
                    restricted_fd=service.memfd_restricted(),
                )
            worst, rounds = max(worst, time.monotonic() - began), rounds + 1
        assert rounds > 1
        assert worst < DEADLINE
        for thread in asked:
            thread.join()
    vm.close()
    os.close(fd)


def test_of_vms_that_come_together_one_has_the_file(service: Service) -> None:
    for _ in range(20):
        fd = service.memfd_restricted()
        with ExitStack() as stack:
            vms = [stack.enter_context(Vm(service, engine="software")) for _ in range(3)]
            tokens = [service.token_for(fd) for _ in vms]
            with ThreadPoolExecutor(len(vms)) as pool:
                came = list(pool.map(_bind, vms, tokens))
        assert sorted(map(str, came)) == sorted(map(str, (0, Errno(EINVAL), Errno(EINVAL))))
        os.close(fd)


@pytest.mark.alone("nobody may be late by half a second")
def test_others_go_on_while_it_is_waited_for(service: Service) -> None:
    healthy, other = service.memfd_restricted(), service.memfd_restricted()
    # More than threads that a server might have to spare.
    files = [service.memfd_restricted() for _ in range(MAX_THREADS + 2)]
    with Vm(service, engine="software") as vm:
        vm.set_user_memory_region(
            slot=0, guest_phys_addr=guest_abi.PRIVATE_BASE, memory_size=PAGE, restricted_fd=healthy
        )
        stopped = [_stopped_vm(service, fd)[0] for fd in files]
        punches = [_Punch(fd) for fd in files]
        for punch in punches:
            punch.start()
        worst, rounds = 0.0, 0
        while punches[0].is_alive():
            began = time.monotonic()
            os.posix_fallocate(other, 0, PAGE)
            assert os.fstat(files[0]).st_size == 0
            os.close(service.memfd_restricted())
            # A silent consumer does not delay one that answers.
            memory.fallocate(healthy, memory.PUNCH, 0, PAGE)
            assert service.status()["pid"] == service.info["pid"]
            worst, rounds = max(worst, time.monotonic() - began), rounds + 1
        for punch in punches:
            punch.join()
        assert min(punch.took for punch in punches) > DEADLINE / 2
        assert rounds > 20
        assert worst < DEADLINE / 2
        for gone in stopped:
            gone.close()
    for fd in (healthy, other, *files):
        os.close(fd)


class _Punch(threading.Thread):
    """One punch, and the seconds it took."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self.took = 0.0

    def run(self) -> None:
        began = time.monotonic()
        memory.fallocate(self._fd, memory.PUNCH, 0, PAGE)
        self.took = time.monotonic() - began
