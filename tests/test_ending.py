"""The reports of how a service's processes ended.

A call that finds the process gone reports it, and so does the start.
"""

import os
import resource
import signal
from collections.abc import Callable
from contextlib import closing
from errno import EINVAL, EIO, ENOMEM, ENOSPC, ENOTCONN
from pathlib import Path

import pytest

from processes import descendants, process
from restrictedmem.abi import pidfd
from restrictedmem.failure import FAULT, status_of
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import vm_wire
from restrictedmem.service import ending
from restrictedmem.service.client import Service
from restrictedmem.service.consumers import Endings
from restrictedmem.service.ending import OomKills, Word, limits, words_of
from restrictedmem.service.wire import Channel
from restrictedmem.vmm.vm import Vm
from waiting import PATIENCE, wait_until

EXITED = 1 << 8


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(ENOSPC, "x"), ENOSPC),
        (MemoryError(), ENOMEM),
        (OSError("x"), FAULT),
        (OSError(4095, "x"), FAULT),
        (KeyError(1), FAULT),
    ],
    ids=repr,
)
def test_the_status_of_a_child_says_what_it_failed_with(error: Exception, status: int) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "it ended by itself"),
        (EXITED * ENOSPC, "No space left on device"),
        (EXITED * ENOMEM, "no memory: ulimit -v, memory.max of its cgroup, or the machine's"),
        (EXITED * FAULT, "a fault of its program"),
        (signal.SIGSEGV, "killed by SIGSEGV"),
        (signal.SIGXCPU, "killed by SIGXCPU, the limit on CPU time, ulimit -t"),
        (signal.SIGXFSZ, "killed by SIGXFSZ, the limit on file sizes, ulimit -f"),
        (signal.SIGKILL, "killed by SIGKILL"),
        (signal.SIGRTMIN + 1, f"killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_the_words_of_a_wait_status(status: int, words: str) -> None:
    assert words_of(status) == words


@pytest.mark.parametrize(
    ("seconds", "oom", "words"),
    [
        (9.9, "/a", "killed by SIGKILL, after 9.9 of 10 seconds of CPU time, ulimit -Ht"),
        (1.0, "/a", "killed by SIGKILL, and the kernel killed for want of memory in the cgroup /a"),
        (1.0, "", "killed by SIGKILL"),
    ],
)
def test_what_may_have_killed_is_said(
    seconds: float, oom: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limit(_: int) -> tuple[int, int]:
        return 5, 10

    monkeypatch.setattr(resource, "getrlimit", limit)
    assert words_of(signal.SIGKILL, cpu_seconds=seconds, oom=oom) == words


def test_the_limits_are_said_as_a_shell_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    most = {resource.RLIMIT_AS: 1 << 20, resource.RLIMIT_CPU: 3}

    def limit(kind: int) -> tuple[int, int]:
        return most.get(kind, resource.RLIM_INFINITY), 0

    monkeypatch.setattr(resource, "getrlimit", limit)
    assert limits() == ", under ulimit -v 1024, ulimit -t 3"
    most.clear()
    assert limits() == ""


def test_a_kill_for_want_of_memory_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "memory.events"
    monkeypatch.setattr(ending, "_counter", lambda: ("/mine", str(counter)))
    counter.write_text("low 0\noom_kill 3\n")
    kills = OomKills()
    assert kills.since() == ""
    counter.write_text("low 9\noom_kill 4\n")
    assert [kills.since(), kills.since()] == ["/mine", ""]
    counter.unlink()
    assert kills.since() == ""


def heard(tell: Callable[[Word], None]) -> tuple[int, str] | None:
    """Return what a word comes to that another process tells."""
    word = Word()
    child = os.fork()
    if child == 0:
        word.only_tell()
        tell(word)
        os._exit(0)
    try:
        word.hear()
    except OSError as error:
        return error.errno or 0, error.strerror or ""
    finally:
        os.waitpid(child, 0)
    return None


def test_a_word() -> None:
    assert heard(Word.ready) is None
    assert heard(lambda word: word.ended(EXITED * ENOSPC)) == (
        ENOSPC,
        "start: No space left on device (No space left on device)",
    )
    assert heard(lambda word: word.ended(signal.SIGKILL, "/a")) == (
        EIO,
        "start: Input/output error (killed by SIGKILL, "
        "and the kernel killed for want of memory in the cgroup /a)",
    )
    assert heard(Word.close) == (EIO, "start: Input/output error (its processes died)")


def test_what_the_service_killed_a_consumer_for_goes_before_how_it_ended() -> None:
    endings = Endings()
    endings.blame(1, "VM 1 did not answer")
    assert endings.of(1) == ""
    endings.note(1, "killed by SIGKILL")
    assert endings.of(1) == "VM 1 did not answer"
    # One that had ended by itself was killed for nothing.
    endings.blame(2, "VM 2 is gone")
    endings.note(2, "killed by SIGSEGV")
    endings.blame(2, "VM 2 did not answer")
    assert endings.of(2) == "killed by SIGSEGV"


def test_so_many_endings_are_kept_as_were_last() -> None:
    endings = Endings()
    for number in range(257):
        endings.note(number, str(number))
    assert [endings.of(0), endings.of(1), endings.of(256)] == ["", "1", "256"]


def told() -> bool:
    """Return whether this kernel tells of a process that is no child how it ended."""
    child = os.fork()
    if child == 0:
        os._exit(3)
    with OwnedFd(os.pidfd_open(child)) as held:
        os.waitpid(child, 0)
        try:
            return pidfd.wait_status(held) == EXITED * 3
        except OSError:
            return False


@pytest.mark.requires("fuse")
def test_a_call_says_how_its_engine_ended() -> None:
    with (
        Service.start() as service,
        closing(Vm(service, engine="software")) as vm,
        closing(Vm(service, engine="software")) as other,
    ):
        engine = next(
            found for found in descendants([service_parent(service)]) if found.name == "rmem-kvm"
        )
        os.kill(engine.pid, signal.SIGSEGV)
        with pytest.raises(
            OSError,
            match=r"^\[Errno 107\] KVM_CREATE_VCPU: .* \(engine is gone: killed by SIGSEGV\)$",
        ):
            vm.create_vcpu()
        # Its neighbour is not taken for it.
        other.create_vcpu().close()


@pytest.mark.requires("fuse")
def test_an_engine_that_refuses_its_vm_ends_with_that_errno() -> None:
    with Service.start() as service:
        number, sock = service.spawn_numbered("kvm", '{"policy": 4}')
        with (
            closing(Channel(sock, "engine")) as engine,
            pytest.raises(OSError, match=os.strerror(EINVAL)),
        ):
            engine.call(vm_wire.STATISTICS)
        assert service.ending(number) == os.strerror(EINVAL)


@pytest.mark.requires("fuse")
@pytest.mark.skipif(
    not told(), reason="PIDFD_GET_INFO does not tell how a process ended (Linux 6.15)"
)
def test_a_call_says_how_its_service_ended() -> None:
    with Service.start() as service, closing(Vm(service, engine="software")) as vm:
        service.status()
        pid = service.info["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: process(pid) is None, "the service to be gone", PATIENCE)
        ended = "service is gone: killed by SIGKILL"
        for call, words in (
            (service.status, f"STATUS: .* ({ended})"),
            (service.memfd_restricted, f"memfd_restricted: .* ({ended})"),
            (
                vm.create_vcpu,
                f"KVM_CREATE_VCPU: .* (engine is gone: its service is gone, too (ENDING: {ended}))",
            ),
        ):
            with pytest.raises(
                OSError, match=words.replace("(", r"\(").replace(")", r"\)")
            ) as caught:
                call()
            assert caught.value.errno == ENOTCONN


def service_parent(service: Service) -> int:
    """Return the pid of the process that forks a service's consumers."""
    found = process(service.info["pid"])
    assert found is not None
    return found.parent
