"""``auto`` and ``doctor`` trust the kernel engine only after a guest has run on it."""

import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from errno import EFAULT, EIO, EPERM
from typing import Any, cast

import pytest

from other_kernel import BROKEN_KVM, STUCK_KVM
from outcomes import in_child
from restrictedmem.devkvm import Kvm
from restrictedmem.kvm import engine_process, trial
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine_vcpu import EngineVcpus
from restrictedmem.kvm.kernel.kernel_vm import KernelVm
from restrictedmem.mm.notifier import Api
from restrictedmem.protocol.trace_events import Trace
from restrictedmem.protocol.vm_wire import POLICY_DEBUG, Creation

needs_kvm = pytest.mark.requires("kvm")
filtered = [
    pytest.mark.requires("fuse", "kvm", "seccomp"),
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="the filter knows the numbers of x86-64"
    ),
]
MAIN = [sys.executable, "-m", "restrictedmem"]
DATA = bytes(100_000)
DIGEST = hashlib.sha256(DATA).hexdigest().encode() + b"  -\n"


def attempt(*, debug: bool = False) -> None:
    with Kvm.open() as kvm:
        trial.run_guest(kvm, debug=debug)


def raising(error: OSError) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def nothing(*_: object, **__: object) -> None:
    """Do nothing."""


@needs_kvm
@pytest.mark.parametrize("debug", [False, True])
def test_a_guest_runs_to_its_end(debug: bool) -> None:
    attempt(debug=debug)
    assert engine_process.refuse_kernel(Creation("auto", POLICY_DEBUG if debug else 0)) == ""


@needs_kvm
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("launch_update", "on a launched page a trial guest ended with"),
        ("set_attributes", "on a shared page the guest found 0x6 instead of 0x32"),
        ("invalidate_start", "on a freed page the guest found 0x7 instead of 0x0"),
    ],
)
def test_a_guest_that_finds_what_should_not_be_there_is_no_proof(
    broken: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KernelVm, broken, nothing)
    with pytest.raises(OSError, match=words) as caught:
        attempt()
    assert caught.value.errno == EIO


@needs_kvm
@pytest.mark.parametrize(
    "broken",
    [
        "__init__",
        "bind",
        "add_slot",
        "launch_update",
        "create_vcpu",
        "set_attributes",
        "statistics",
    ],
)
def test_what_the_kernel_refuses_is_the_reason(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KernelVm, broken, raising(OSError(EPERM, "the kernel will not")))
    assert engine_process.refuse_kernel(Creation("auto")) == "the kernel will not"


@needs_kvm
def test_only_who_asked_for_auto_waits_for_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []

    def here(attempt: Callable[[], None], _deadline: float) -> None:
        attempt()

    monkeypatch.setattr(engine_process, "in_child", here)

    def run_guest(kvm: Kvm, *, debug: bool) -> None:
        tried.append(debug)

    monkeypatch.setattr(trial, "run_guest", run_guest)
    for creation in (Creation("kernel"), Creation("software"), Creation("auto", 0, "snp")):
        assert engine_process.refuse_kernel(creation) == ""
    assert tried == []
    assert (
        engine_process.refuse_kernel(Creation("auto"))
        == engine_process.refuse_kernel(Creation("auto", POLICY_DEBUG))
        == ""
    )
    assert tried == [False, True]


@needs_kvm
def test_a_trial_lets_go_of_its_engines_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()

    def run_guest(kvm: Kvm, *, debug: bool) -> None:
        raise OSError(EIO, f"socket {theirs.fileno()}")

    monkeypatch.setattr(trial, "run_guest", run_guest)
    with ours, theirs:
        assert engine_process.refuse_kernel(Creation("auto"), theirs) == "socket -1"
        assert theirs.fileno() >= 0


@needs_kvm
def test_a_trial_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_guest(kvm: Kvm, *, debug: bool) -> None:
        signal.pause()

    monkeypatch.setattr(trial, "run_guest", run_guest)
    monkeypatch.setattr(engine_process, "_TRIAL_DEADLINE", 0.1)
    # In a process that has no child of another test's.
    assert in_child(
        lambda: (engine_process.refuse_kernel(Creation("auto")), os.waitpid(-1, 0)[1])
    ) == repr(("no answer within 0.1 s", 9))


def test_who_is_refused_the_kernel_engine_gets_the_software_engine_and_the_reason() -> None:
    binder = cast("engine_process.EngineBinder", object())
    engine = engine_process.make_engine(
        Creation("auto"), binder, EngineVcpus(), Attributes(Api.V10), Trace(), "it failed"
    )
    assert (engine.name, engine.statistics()["not_kernel"]) == ("software", "it failed")


def test_who_asked_for_the_software_engine_is_told_nothing_of_the_other() -> None:
    binder = cast("engine_process.EngineBinder", object())
    engine = engine_process.make_engine(
        Creation("software"), binder, EngineVcpus(), Attributes(Api.V10), Trace()
    )
    assert "not_kernel" not in engine.statistics()


# The main job, where no guest runs on KVM.


def run(before: list[str], *arguments: str, status: int = 0) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [*before, *MAIN, *arguments], input=DATA, capture_output=True, timeout=100, check=False
    )
    assert done.returncode == status, done.stderr.decode()
    return done


#: Options that write the closing table as JSON to stderr, alone.
JSON = ("--quiet", "--json", "/dev/stderr")


class TestNoGuestRunsOnKvm:
    pytestmark = filtered

    def test_run_takes_the_other_engine_and_says_why(self) -> None:
        done = run(BROKEN_KVM, "run", "--memory", "4M", *JSON, "sha256")
        found: dict[str, Any] = json.loads(done.stderr)
        assert (done.stdout, found["engine"]) == (DIGEST, "software")
        assert os.strerror(EFAULT) in found["not_kernel"] or "KVM_RUN" in found["not_kernel"]
        table = run(BROKEN_KVM, "run", "--memory", "4M", "sha256").stderr.decode()
        assert (
            f"kernel engine      not used, a trial guest did not run: {found['not_kernel']}\n"
            in table
        )

    def test_by_name_it_is_tried_and_its_error_told(self) -> None:
        done = run(BROKEN_KVM, "run", "--memory", "4M", "--engine", "kernel", "sha256", status=1)
        assert done.stderr.decode().startswith("error: KVM_CREATE_VM: ")
        assert done.stdout == b""

    def test_doctor_tells_the_truth(self) -> None:
        found = json.loads(run(BROKEN_KVM, "doctor", "--json").stdout)["conclusion"]
        assert (
            found["usable"],
            found["software_engine"]["state"],
            found["kernel_engine"]["state"],
        ) == (True, "yes", "no")
        assert found["kernel_engine"]["detail"].startswith("no guest ran: KVM_CREATE_VM: ")

    def test_a_kvm_that_hangs_does_not_hang_run(self) -> None:
        done = run(STUCK_KVM, "run", "--memory", "4M", *JSON, "sha256")
        found = json.loads(done.stderr)
        assert (done.stdout, found["engine"], found["not_kernel"]) == (
            DIGEST,
            "software",
            "no answer within 5 s",
        )
