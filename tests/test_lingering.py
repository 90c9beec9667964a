"""A socket that lingers, sent by a stranger: nobody waits for it.

The kernel refuses such a socket, or cannot.
"""

import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from errno import EAGAIN, EPROTO
from pathlib import Path

import pytest

from lingering import LINGER, SOON, let_linger
from outcomes import Errno, in_child, outcome
from processes import children, process, stopped, wait_gone
from restrictedmem import burial, fd
from restrictedmem.burial import bury
from restrictedmem.fd import receive_without_fds
from restrictedmem.protocol import vm_wire as kvm_wire
from restrictedmem.service import exec_service, wire
from restrictedmem.service.address import address
from restrictedmem.service.client import Service
from restrictedmem.service.consumer_process import ConsumerProcess
from restrictedmem.vmm.vm import Vm
from under_exec import PRELUDE, supervisor_of
from waiting import wait_until

ROGUE = 64002
_HEAD = struct.Struct("=II")
#: Act as if the kernel were older than Linux 6.16.
OLDER = "from restrictedmem import fd; fd.KERNEL_REFUSES = False; "
STATUS = _HEAD.pack(wire.STATUS.number, 0)
in_both = pytest.mark.parametrize(
    "older", [False, True], ids=["this kernel", "one that refuses nothing"]
)


@pytest.fixture
def older_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fd, "KERNEL_REFUSES", False)


@contextmanager
def soon(what: str) -> Generator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON, what


def hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        # It had not read everything.
        return True


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def command(older: bool, *arguments: str) -> list[str]:
    """Return a command line of the program, and have services that it starts believe the same."""
    start = (
        f"exec_service._START = exec_service._START.replace('from restrictedmem.service', "
        f"{OLDER!r} + 'from restrictedmem.service', 1); "
    )
    setup = f"{OLDER}from restrictedmem.service import exec_service; {start}" if older else ""
    return [
        sys.executable,
        "-c",
        f"{setup}from restrictedmem.cli.main import run; run()",
        *arguments,
    ]


@pytest.fixture(params=[False, True], ids=["this kernel", "one that refuses nothing"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    if request.param:
        older = exec_service._START.replace(
            "from restrictedmem.service", OLDER + "from restrictedmem.service", 1
        )
        assert older != exec_service._START
        monkeypatch.setattr(exec_service, "_START", older)
    with Service.start() as found:
        yield found


# One socket.


@pytest.mark.usefixtures("older_kernel")
@pytest.mark.parametrize(
    "before",
    [(), (b"a message",), (b"",)],
    ids=["first", "behind a message", "behind an empty one"],
)
def test_a_burial_does_not_wait(before: tuple[bytes, ...]) -> None:
    ours, theirs = pair()
    with theirs, let_linger(theirs, before=before) as taken:
        assert taken
        with soon("the burial"):
            bury(ours)
        assert ours.fileno() < 0
        assert hung_up(theirs)
        wait_until(lambda: not zombies_beside(burial._dying), "the child to end")


def test_another_process_closes_it_last() -> None:
    def body() -> list[tuple[int, bool]]:
        ours, theirs = pair()
        number, said = ours.fileno(), list[tuple[int, bool]]()
        burial.bury_elsewhere(
            lambda fds: said.append((len(fds), os.path.exists(f"/proc/self/fd/{number}")))
        )
        with theirs:
            theirs.send(b"a message")
            bury(ours)
        return said

    assert in_child(body) == repr([(1, True), (0, False)])


def test_sockets_of_several_threads_are_let_go_one_after_another() -> None:
    def body() -> bool:
        said: list[int] = []

        def send(fds: list[int]) -> None:
            said.append(len(fds))
            os.sched_yield()

        burial.bury_elsewhere(send)
        sys.setswitchinterval(1e-6)

        def bury_some() -> None:
            for _ in range(50):
                ours, theirs = pair()
                with theirs:
                    theirs.send(b"a message")
                    bury(ours)

        burying = [threading.Thread(target=bury_some) for _ in range(8)]
        for thread in burying:
            thread.start()
        for thread in burying:
            thread.join()
        return said == [1, 0] * 400

    assert in_child(body) == "True"


def zombies_beside(pids: set[int]) -> list[int]:
    return [pid for pid in pids if process(pid) is not None]


@pytest.mark.usefixtures("older_kernel")
def test_who_was_not_let_in_yet_is_buried_too() -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")
    listener.listen()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as knocks:
        knocks.connect(listener.getsockname())
        with let_linger(knocks), soon("the burial of the listening socket"):
            bury(listener)


@pytest.mark.usefixtures("older_kernel")
@pytest.mark.parametrize("said", [(), (b"hello",), (b"",)])
def test_nothing_is_forked_for_an_empty_queue(
    said: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", fork)
    ours, theirs = pair()
    with theirs:
        for message in said:
            theirs.send(message)
            assert ours.recv(100) == message
        bury(ours)
        assert hung_up(theirs)


@pytest.mark.usefixtures("older_kernel")
def test_a_burial_without_a_process_to_be_had_is_made_up_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fork() -> int:
        raise OSError(EAGAIN, "no process")

    first, second = pair(), pair()
    with first[1], second[1], let_linger(first[1]), let_linger(second[1]):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", fork)
            with soon("a burial that cannot be had"):
                bury(first[0])
            assert len(burial._unburied) == 1
            # Its other end knows all the same.
            assert hung_up(first[1])
        with soon("both burials"):
            bury(second[0])
        assert not burial._unburied


@pytest.mark.usefixtures("older_kernel")
def test_a_shared_socket_goes_on_elsewhere() -> None:
    ours, theirs = pair()
    with theirs, ours.dup() as elsewhere:
        theirs.send(b"left there")
        bury(ours, shared=True)
        elsewhere.send(b"goes on")
        assert theirs.recv(100) == b"goes on"


@pytest.mark.usefixtures("older_kernel")
def test_a_message_with_descriptors_stays_in_the_queue() -> None:
    ours, theirs = pair()
    with theirs, let_linger(theirs, b"data", (b"before",)), soon("the message"):
        assert receive_without_fds(ours, 100) == b"before"
        for _ in range(2):
            assert outcome(lambda: receive_without_fds(ours, 100)) == Errno(EPROTO)
        bury(ours)


@in_both
def test_a_consumer_that_answers_with_it(older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if older:
        monkeypatch.setattr(fd, "KERNEL_REFUSES", False)
    reasons: list[str] = []
    consumer = ConsumerProcess("broken", 1, 5.0, lambda _, reason: reasons.append(reason))
    requests, notify = consumer.give_sockets()
    with (
        requests,
        notify,
        let_linger(notify, _HEAD.pack(0, 0)) as taken,
        let_linger(requests),
        soon("the consumer's end"),
    ):
        if not taken:
            notify.send(b"none")
        consumer.notify(wire.INVALIDATE_START, b"", 0)
        consumer.close()
    assert reasons == [
        "broken 1 answered INVALIDATE_START with "
        + ("descriptors" if taken else "a malformed reply")
    ]


# Parties.


def send_and_hang_up(sock: socket.socket, hold: ExitStack) -> bool:
    with closing(sock):
        return hold.enter_context(let_linger(sock, STATUS))


@contextmanager
def stranger(act: Callable[[ExitStack], object]) -> Generator[None]:
    """Have another user act, and stay there; the block begins when it has acted."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with ExitStack() as hold:
                os.setgid(ROGUE)
                os.setuid(ROGUE)
                act(hold)
                os.write(writer, b".")
                signal.pause()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            assert pipe.read(1) == b"."
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(SOON)
    sock.connect(path)
    return sock


@contextmanager
def serving(older: bool, *arguments: str) -> Generator[tuple[subprocess.Popen[str], str]]:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = f"{directory}/socket"
        running = subprocess.Popen(
            command(older, "serve", "--socket", path, *arguments), stderr=subprocess.PIPE, text=True
        )
        try:
            assert running.stderr is not None
            assert running.stderr.readline() == f"listening on {path}\n"
            yield running, path
        finally:
            running.kill()
            running.communicate()


@pytest.mark.requires("fuse", "root")
@in_both
@pytest.mark.parametrize("places", [1, 64], ids=["turned away", "waiting"])
def test_serve(older: bool, places: int) -> None:
    with serving(older, "--user", "nobody", "--max-per-user", str(places)) as (running, path):

        def act(hold: ExitStack) -> None:
            for _ in range(3):
                hold.enter_context(connected(path))
            send_and_hang_up(connected(path), hold)

        with ExitStack() as hold:
            # Otherwise it might have hung up before anything came.
            with stopped(running.pid):
                hold.enter_context(stranger(act))
            with soon("another client of serve"), Service.connect(path) as service:
                os.close(service.memfd_restricted())
            running.terminate()
            with soon("serve's end"):
                assert running.wait(LINGER) == 0


@pytest.mark.requires("fuse", "root")
@in_both
def test_serve_ends_with_clients_that_wait_or_were_not_let_in(older: bool) -> None:
    with serving(older) as (running, path):

        def wait(hold: ExitStack) -> None:
            socks = [hold.enter_context(connected(path)) for _ in range(5)]
            for sock in socks:
                hold.enter_context(let_linger(sock, STATUS))

        with ExitStack() as hold:
            hold.enter_context(stranger(wait))
            with stopped(running.pid):
                hold.enter_context(stranger(wait))
                running.terminate()
            with soon("serve's end"):
                assert running.wait(LINGER) == 0


@pytest.mark.requires("fuse", "root")
@in_both
def test_exec(older: bool) -> None:
    code = (
        f"{PRELUDE}\nprint(call(0) >= 0, flush=True)\nsys.stdin.readline()\n"
        f"print(call(0) >= 0, os.environ['RESTRICTEDMEM_SERVER'])"
    )
    mark = f"{os.getpid()}-{older}-{time.monotonic_ns()}"
    arguments = command(older, "exec", "--", sys.executable, "-c", code)
    pipe = subprocess.PIPE
    program = subprocess.Popen(
        arguments, stdin=pipe, stdout=pipe, text=True, env={**os.environ, "MARK": mark}
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "True\n"
        supervisor = supervisor_of(mark)
        assert supervisor is not None
        (porter,) = [found.pid for found in children(supervisor) if found.name == "rmem-porter"]
        names = [
            line.split()[-1]
            for line in Path("/proc/net/unix").read_text().splitlines()
            if f"@restrictedmem-exec/{program.pid}/" in line
        ]
        with ExitStack() as hold:
            with stopped(porter):
                hold.enter_context(
                    stranger(lambda held: send_and_hang_up(connected("\0" + names[0][1:]), held))
                )
            with soon("the program's call"):
                out, _ = program.communicate("\n", timeout=LINGER)
        assert out.startswith("True @restrictedmem-exec/")
    finally:
        program.kill()
        program.communicate()


def answer_with_it(hold: ExitStack) -> None:
    listener = hold.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    listener.bind(f"\0restrictedmem/{os.getpid()}/{secrets.token_hex(8)}")
    listener.listen()

    def serve() -> None:
        while True:
            sock, _ = listener.accept()
            # At once, and again in place of an answer.
            hold.enter_context(sock)
            with suppress(OSError):
                hold.enter_context(let_linger(sock, _HEAD.pack(0, 0)))

    threading.Thread(target=serve, daemon=True).start()


@pytest.mark.requires("fuse", "root")
@in_both
def test_ps(older: bool) -> None:
    with Service.start() as own, stranger(answer_with_it), soon("ps"):
        done = subprocess.run(
            command(older, "ps", "--json"),
            capture_output=True,
            text=True,
            check=False,
            timeout=LINGER,
        )
        assert done.returncode == 0, done.stderr
        found = {entry["pid"]: entry for entry in json.loads(done.stdout)["services"]}
    assert found[own.info["pid"]]["owner_pid"] == os.getpid()
    assert any("error" in entry and entry["uid"] == ROGUE for entry in found.values())


@pytest.mark.requires("fuse", "root")
def test_a_service(service: Service) -> None:
    def act(hold: ExitStack) -> None:
        for _ in range(5):
            with suppress(ConnectionError):
                send_and_hang_up(connected(address(service.info["socket"])), hold)

    with stranger(act), ExitStack() as hold, soon("the service's owner"):
        for _ in range(3):
            sock = hold.enter_context(connected(address(service.info["socket"])))
            taken = hold.enter_context(let_linger(sock, STATUS))
            if taken:
                # The hang-up may overtake the reply, as not all was read.
                with suppress(ConnectionResetError):
                    assert _HEAD.unpack_from(sock.recv(1000))[0] == EPROTO
            sock.close()
        assert service.status()["owner_pid"] == os.getpid()
        with Vm(service, engine="software") as vm:
            vm.create_vcpu().close()
        own = service.memfd_restricted()
        os.posix_fallocate(own, 0, 4096)
        os.close(own)


# An engine, which is its owner's alone, ends when that has gone.


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("target", ["vm", "vcpu"])
@pytest.mark.parametrize("before", [(), (b"1234567",)], ids=["first", "behind what is no request"])
def test_an_engine_ends_with_its_owner(
    service: Service, target: str, before: tuple[bytes, ...]
) -> None:
    vm = Vm(service, engine="software")
    vcpu = vm.create_vcpu()
    engine = process(int(vm.statistics()["pid"]))
    assert engine is not None
    sock = (vm if target == "vm" else vcpu)._channel.sock
    with let_linger(sock, _HEAD.pack(kvm_wire.TRACE.number, 0), before), soon("the engine's end"):
        vcpu.close()
        vm.close()
        wait_gone([engine], SOON)
        # The service has noticed, and goes on.
        wait_until(lambda: not service.status()["consumers"], "the consumer's end")


@pytest.mark.requires("fuse")
def test_an_engine_without_a_checker_ends_rather_than_linger(service: Service) -> None:
    with Vm(service, engine="software") as vm:
        engine = process(int(vm.statistics()["pid"]))
        assert engine is not None
        (checker,) = children(engine.pid)
        os.kill(checker.pid, signal.SIGKILL)
        with ExitStack() as hold:
            with stopped(engine.pid):
                hold.enter_context(
                    let_linger(vm._channel.sock, _HEAD.pack(kvm_wire.TRACE.number, 0))
                )
            wait_gone([engine], SOON)
