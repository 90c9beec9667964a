"""An owner, an ordinary user, that tries to look into the processes that it started.

It tries before, during and after the start, and in every known way. Root looks on from outside, and
does find the secret: a search that could find nothing would prove nothing.
"""

import faulthandler
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from errno import EACCES, EPERM
from functools import partial
from pathlib import Path
from typing import Any, final
from unittest import mock

import pytest

from attacks import ATTACKS, PTRACE_CONT, WALL, attach_and_stop, ptrace, search, seize
from outcomes import Errno, in_child, outcome
from processes import family, stop, wait_gone
from restrictedmem.abi import process as this_process
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import guest_abi
from restrictedmem.service import exec_service
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.privileges import harden
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vm
from users import as_user

pytestmark = pytest.mark.requires("fuse", "root")

SIZE = 16 * PAGE
_REFUSED = (Errno(EPERM), Errno(EACCES))


def secret() -> bytes:
    """Make a pattern that stands nowhere in this process but in the value returned."""
    return os.urandom(32)


def private_memory(service: Service, content: bytes) -> tuple[Vm, int]:
    """Make a VM whose private memory has ``content`` in it."""
    fd = service.memfd_restricted()
    os.ftruncate(fd, SIZE)
    vm = Vm(service)
    vm.set_user_memory_region(
        slot=0, guest_phys_addr=guest_abi.PRIVATE_BASE, memory_size=SIZE, restricted_fd=fd
    )
    vm.set_memory_attributes(guest_abi.PRIVATE_BASE, SIZE, private=True)
    vm.launch_update(guest_abi.PRIVATE_BASE + PAGE, content.ljust(PAGE, b"\0"))
    return vm, fd


def allowed(pid: int) -> dict[str, str]:
    """Try every attack and return those that were not refused, with what came of them."""
    found = {name: outcome(partial(attack, pid)) for name, attack in ATTACKS.items()}
    return {name: repr(result) for name, result in found.items() if result not in _REFUSED}


# After the start.


def test_the_attacks_work_on_a_process_that_is_not_protected() -> None:
    def body() -> list[str]:
        victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            return sorted(allowed(victim.pid))
        finally:
            victim.kill()

    namespaces = ("mnt", "pid", "net", "ipc", "uts", "cgroup", "time")
    # They need a capability even then, or what another tracer has taken already.
    refused = {
        "open stack",
        "process_madvise",
        "PTRACE_SEIZE",
        *(f"setns {name}" for name in namespaces),
    }
    assert as_user(body) == sorted(ATTACKS.keys() - refused)


@pytest.mark.parametrize(
    "namespaces", [True, pytest.param(False, marks=pytest.mark.requires("fusermount"))]
)
def test_every_attack_is_refused(namespaces: bool) -> None:
    def body() -> dict[str, dict[str, str]]:
        with Service.start() as service:
            vm, fd = private_memory(service, secret())
            found: dict[str, dict[str, str]] = {}
            for target in family(service):
                for state in ("", " stopped"):
                    if state:
                        stop(target.pid)
                    found[target.name + state] = allowed(target.pid)
                    if found[target.name + state]:
                        # A process with access may have stopped it for good.
                        return found
                os.kill(target.pid, signal.SIGCONT)
            # It was not hurt either.
            os.posix_fallocate(fd, 0, PAGE)
            assert vm.statistics()["private_bytes"] == SIZE
            return found

    names = ("rmem-spawner", "rmem-service", "rmem-kvm")
    assert as_user(body, namespaces=namespaces) == {
        name + state: {} for name in names for state in ("", " stopped")
    }


def test_root_without_capabilities_is_refused_like_anyone() -> None:
    def body() -> dict[str, dict[str, str]]:
        with Service.start() as service:
            vm, _ = private_memory(service, secret())
            assert vm.statistics()
            this_process.set_capabilities(0)
            return {target.name: allowed(target.pid) for target in family(service)}

    for name, found in as_user(body, uid=0).items():
        # The files of an undumpable process are root's: the numbers of its descriptors can be
        # listed, and none of them opened.
        assert "list fd" in found, name
        assert {
            what: answer
            for what, answer in found.items()
            if what != "list fd" and answer != "ENOENT"
        } == {}, name


def test_addresses_are_not_told() -> None:
    def body() -> list[list[str]]:
        with Service.start() as service:
            stats = [
                Path(f"/proc/{target.pid}/stat")
                .read_text(encoding="ascii")
                .rsplit(")", 1)[1]
                .split()
                for target in family(service)
            ]
            # startcode, endcode, startstack, kstkesp, kstkeip: proc_pid_stat(5), fields 26 to 30,
            # of which the first stands at 23.
            return [fields[23:28] for fields in stats]

    assert as_user(body) == [["1", "1", "0", "0", "0"]] * 2


@pytest.mark.alone("where the kernel writes core files is one setting")
@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGQUIT])
def test_no_signal_leaves_a_core_file(number: signal.Signals) -> None:
    def body() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        # One that is not protected shows that a core file would be written.
        if os.fork() == 0:
            faulthandler.disable()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _, status = os.wait()
        assert os.WCOREDUMP(status)
        for victim in range(3):
            service = Service.start()
            vm, fd = private_memory(service, secret())
            assert vm.statistics()
            targets = family(service)
            assert resource.prlimit(targets[victim].pid, resource.RLIMIT_CORE) == (0, 0)
            os.kill(targets[victim].pid, number)
            wait_gone([targets[victim]])
            vm.close()
            os.close(fd)
            service.close()

    with core_files() as place:
        as_user(body)
        assert len(os.listdir(place)) == 1


@contextmanager
def core_files() -> Generator[str, None, None]:
    """Have the kernel write core files of any user into a directory."""
    pattern = Path("/proc/sys/kernel/core_pattern")
    before, limits = pattern.read_text(encoding="ascii"), resource.getrlimit(resource.RLIMIT_CORE)
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o777)
        resource.setrlimit(resource.RLIMIT_CORE, (limits[0], resource.RLIM_INFINITY))
        pattern.write_text(f"{place}/core.%e.%p", encoding="ascii")
        try:
            yield place
        finally:
            pattern.write_text(before, encoding="ascii")


# Before and during the start.


@final
class Spy:
    """A process of the owner's user that looks into each new process of its session.

    It keeps the memory open and attaches, where it can.
    """

    def __init__(self, attach: Callable[[int], None] | None, *, scan: bool) -> None:
        """Start the spy.

        With ``scan`` it always looks for new processes, else only at those it is told of.
        """
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._sock.close()
                _SpyProcess(theirs, attach, scan).live()
            finally:
                os._exit(1)
        theirs.close()

    def _ask(self, question: str, content: bytes) -> Any:
        self._sock.send(question.encode() + content)
        return json.loads(self._sock.recv(1 << 16))

    def catch(self, pid: int) -> None:
        """Look into one process now."""
        self._ask("c", str(pid).encode())

    def caught(self) -> tuple[list[int], list[int], int]:
        """Return whose memory it has open, whom it attached to, and how often it was refused."""
        memories, attached, refused = self._ask("l", b"")
        return memories, attached, refused

    def finds(self, pattern: bytes) -> list[int]:
        """Search all memory that it has open, and return in whose the pattern is."""
        found: list[int] = self._ask("f", pattern)
        return found

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._sock.close()


class _SpyProcess:
    def __init__(
        self, sock: socket.socket, attach: Callable[[int], None] | None, scan: bool
    ) -> None:
        self._sock = sock
        self._attach = attach
        self._scan = scan
        self._known = set(_pids()) if scan else set[int]()
        self._memories: dict[int, int] = {}
        self._maps: dict[int, str] = {}
        self._attached: set[int] = set()
        self._refused = 0

    def live(self) -> None:
        while True:
            with suppress(BlockingIOError):
                message = self._sock.recv(
                    200, 0 if self._attach is None and not self._scan else socket.MSG_DONTWAIT
                )
                self._sock.send(json.dumps(self._answer(message[:1], message[1:])).encode())
            if self._scan:
                for pid in _pids() - self._known:
                    self._catch(pid)
            self._let_run()

    def _answer(self, question: bytes, content: bytes) -> object:
        match question:
            case b"c":
                self._catch(int(content))
                return None
            case b"l":
                return sorted(self._memories), sorted(self._attached), self._refused
            case _:
                return [
                    pid
                    for pid, maps in self._maps.items()
                    if search(pid, content, self._memories[pid], maps)
                ]

    def _catch(self, pid: int) -> None:
        try:
            if pid not in self._memories:
                self._memories[pid] = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
            # Again and again: the last one before it is refused tells most.
            self._maps[pid] = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
            if self._attach is not None and pid not in self._attached:
                self._attach(pid)
                self._attached.add(pid)
        except PermissionError:
            self._refused += 1
        except (ProcessLookupError, FileNotFoundError):
            return

    def _let_run(self) -> None:
        """Let a stopped process continue.

        A tracer that only stops its victim would keep it from starting.
        """
        with suppress(ChildProcessError):
            while (waited := os.waitpid(-1, os.WNOHANG | WALL))[0]:
                if os.WIFSTOPPED(waited[1]):
                    self._attached.add(waited[0])
                    with suppress(OSError):
                        ptrace(PTRACE_CONT, waited[0])


def _pids() -> set[int]:
    """Return the processes of this session: other tests have the same user."""
    return {
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and _session_of(int(name)) == os.getsid(0)
    }


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@contextmanager
def caught_at_exec(spy: Spy) -> Generator[None, None, None]:
    """Show the spy the first process of a service right after its exec.

    The process stops itself before its first step, else a busy machine might show it too late.
    """
    honest = exec_service.start_process
    begin = f"import os; os.kill(os.getpid(), {int(signal.SIGSTOP)}); {exec_service._START}"

    def start_process(
        theirs: socket.socket,
        options: Options,
        inherited: Sequence[int] = (),
        *,
        own_session: bool = False,
        cgroup: OwnedFd | None = None,
    ) -> "subprocess.Popen[bytes]":
        started = honest(theirs, options, inherited, own_session=own_session, cgroup=cgroup)
        _, status = os.waitpid(started.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        spy.catch(started.pid)
        os.kill(started.pid, signal.SIGCONT)
        return started

    with (
        mock.patch.object(exec_service, "start_process", start_process),
        mock.patch.object(exec_service, "_START", begin),
    ):
        yield


@pytest.mark.parametrize("attach", [seize, attach_and_stop], ids=["SEIZE", "ATTACH"])
def test_a_service_that_is_traced_from_exec_on_does_not_start(
    attach: Callable[[int], None],
) -> None:
    def body() -> tuple[int, str]:
        spy = Spy(attach, scan=False)
        with caught_at_exec(spy), pytest.raises(OSError) as caught:
            Service.start()
        memories, attached, _ = spy.caught()
        spy.close()
        assert len(memories) == 1
        assert set(attached) >= set(memories)
        return caught.value.errno or 0, str(caught.value)

    number, words = as_user(body)
    assert number == EPERM
    assert "the service is being traced" in words


def test_memory_opened_at_exec_never_shows_a_secret() -> None:
    def body() -> bool:
        spy = Spy(None, scan=False)
        with caught_at_exec(spy):
            service = Service.start()
        content = secret()
        vm, fd = private_memory(service, content)
        memories, _, _ = spy.caught()
        assert len(memories) == 1
        assert not {target.pid for target in family(service)} & set(memories)
        found = spy.finds(content)
        # The spy can search: this very process is its user's too, and has the secret.
        spy.catch(os.getpid())
        assert spy.finds(content) == [os.getpid()]
        spy.close()
        vm.close()
        os.close(fd)
        service.close()
        return found == []

    assert as_user(body)


@pytest.mark.parametrize("attach", [None, seize], ids=["mem", "SEIZE"])
def test_a_race_with_the_start_is_never_won(attach: Callable[[int], None] | None) -> None:
    least, most = 10, 60

    def body() -> tuple[int, int, int, int]:
        os.setsid()
        turn = started = caught = refused = 0
        for turn in range(most):
            # It has to be there in time to see something, and late enough to be turned away; when
            # it is, is chance.
            if turn >= least and (refused if attach is None else started < turn):
                break
            spy = Spy(attach, scan=True)
            content = secret()
            with suppress(PermissionError):
                service = Service.start()
                started += 1
                vm, fd = private_memory(service, content)
                targets = {target.pid for target in family(service)}
                memories, attached, refusals = spy.caught()
                assert not targets & {*memories, *attached}
                caught, refused = caught + len(memories), refused + refusals
                assert set(spy.finds(content)) <= {os.getpid()}
                assert [allowed(pid) for pid in targets] == [{}] * 3
                vm.close()
                os.close(fd)
                service.close()
            spy.close()
        return turn, started, caught, refused

    turns, started, caught, refused = as_user(body)
    assert refused if attach is None else started < turns
    assert caught or attach is not None


def test_root_finds_the_secret_in_the_engine_and_nowhere_else() -> None:
    content = secret()
    ours, theirs = socket.socketpair()

    def body() -> None:
        service = Service.start()
        vm, fd = private_memory(service, content)
        theirs.send(str(service.info["pid"]).encode())
        theirs.recv(1)
        vm.close()
        os.close(fd)
        service.close()

    owner = threading.Thread(target=as_user, args=(body,))
    owner.start()
    with ours, theirs:
        targets = family(int(ours.recv(20)))
        found = {target.name: search(target.pid, content) for target in targets}
        ours.send(b".")
        owner.join()
    assert found == {"rmem-spawner": False, "rmem-service": False, "rmem-kvm": True}


def test_a_process_that_stays_dumpable_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a seccomp filter says 0 in the kernel's place (SECCOMP_RET_ERRNO)."""
    prctl = this_process.prctl

    def lie(option: int, argument: int = 0) -> int:
        return 0 if option == this_process.PR_SET_DUMPABLE else prctl(option, argument)

    assert prctl(this_process.PR_GET_DUMPABLE) == 1
    assert in_child(harden) == repr(None)
    monkeypatch.setattr(this_process, "prctl", lie)
    assert in_child(harden) == "EPERM"
