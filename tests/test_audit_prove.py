"""``run --prove`` as a whole: what an owner gets of a running guest's memory.

The verdict can also be guilty.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import cast

import pytest

from restrictedmem.abi import memory
from restrictedmem.audit import prove
from restrictedmem.audit.attempt import Attempt, Outcome
from restrictedmem.audit.held_guest import held_guest
from restrictedmem.audit.pattern import content
from restrictedmem.service.client import Service
from users import as_user

pytestmark = [
    pytest.mark.requires("fuse"),
    pytest.mark.alone("enters every namespace of its user's on the machine"),
]

SIZE = 4 << 20
ENGINES = ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]

Came = dict[tuple[str, str], tuple[str, str]]


def proof(engine: str, *, as_root: bool = False) -> Came:
    """Prove in a process of its own, whose whole memory is searched.

    This process has much memory, and other tests have left data there.
    """
    code = (
        f"import sys; sys.path.insert(0, sys.argv[1]); import test_audit_prove; "
        f"test_audit_prove.tell({engine!r}, as_root={as_root})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return table(
        [
            Attempt(outcome=Outcome(one.pop("outcome")), **one)
            for one in json.loads(done.stdout)["attempts"]
        ]
    )


def tell(engine: str, *, as_root: bool) -> None:
    """Write to stdout what a proof came to."""
    with Service.start() as service:
        print(
            json.dumps(
                prove.prove_main(
                    service, memory=SIZE, engine=engine, as_root=as_root, quiet=True
                ).as_data()
            )
        )


def table(attempts: list[Attempt]) -> Came:
    assert len({(one.target, one.name) for one in attempts}) == len(attempts)
    return {
        (one.target, one.name): (one.outcome.value, one.errno or one.detail) for one in attempts
    }


def bad(came: Came) -> Came:
    return {name: said for name, said in came.items() if Outcome(said[0]).bad}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.requires("root")
def test_root_without_capabilities_gets_nothing(engine: str) -> None:
    came = proof(engine)
    # Root may use its own files without a capability: it can trace the kernel, where tracefs is
    # mounted.
    assert bad(came).keys() == (
        {("machine", "tracefs")} if os.path.isdir("/sys/kernel/tracing/events") else set()
    )
    assert came["descriptor", "mmap shared"] == ("refused", "ENODEV")
    assert came["engine", "process_vm_readv"] == ("refused", "EPERM")
    assert came["engine /proc", "mem"] == ("refused", "EACCES")
    assert came["VM", "KVM_SET_REGS after the launch"] == ("refused", "EPERM")
    assert came["VM", "slot over the hypercall page"] == ("refused", "EEXIST")
    assert came["control", "a process that lets itself be read"][0] == "found, as it must"
    assert came["control", "the guest still holds it"] == ("found, as it must", "intact")
    assert not [name for name, (said, _) in came.items() if said == Outcome.OPEN.value]


@pytest.mark.requires("root")
def test_an_ordinary_user_gets_what_the_threat_model_says() -> None:
    came = as_user(lambda: proof("software"))
    assert bad(came) == {}
    by_design = [name for name, (said, _) in came.items() if said == Outcome.OPEN.value]
    assert by_design == [("machine", "a service in a user namespace of the owner's")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.requires("root")
def test_root_has_the_engine(engine: str) -> None:
    came = proof(engine, as_root=True)
    for name in ("PTRACE_SEIZE", "PTRACE_ATTACH", "pidfd_getfd 0 to 63"):
        assert came["engine", name][0] == Outcome.OPEN.value, name
        assert came["engine", name][1].endswith("(Root)"), name
    # guest_memfd's pages are in no process's memory, the engine's own included.
    by_reading = Outcome.OPEN if engine == "software" else Outcome.NOTHING
    for route in (
        ("engine /proc", "mem"),
        ("engine", "process_vm_readv"),
        ("machine", "a service in a user namespace of the owner's"),
    ):
        assert came[route][0] == by_reading.value, route
    # The VM's refusals hold for root as well.
    assert bad(came) == {}


def heap() -> int:
    """Return where the guest's heap begins."""
    with Service.start() as service, held_guest(service, SIZE, 0, "software") as guest:
        return guest.start


def test_a_copy_in_the_owners_memory_convicts(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = secrets.randbits(64)
    kept = content(seed, heap(), 1 << 16)
    assert ("owner", "its memory") in guilty(seed, monkeypatch)
    assert kept


def test_a_copy_in_the_owners_files_convicts(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = secrets.randbits(64)
    with memory.memfd_create("copy") as fd:
        os.write(fd.fileno(), content(seed, heap(), 1 << 16))
        assert ("owner", "its files") in guilty(seed, monkeypatch)


def guilty(seed: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Prove with a known seed; the verdict must be guilty, and what convicts is returned."""

    def known(_: int) -> int:
        return seed

    monkeypatch.setattr(secrets, "randbits", known)
    # The owner's own objects are looked at last.
    monkeypatch.setattr(prove, "_routes", lambda: iter(()))
    with Service.start() as service:
        said = prove.prove_main(service, memory=SIZE, engine="software", as_root=False, quiet=True)
    assert not said.proved
    return [(one.target, one.name) for one in said.attempts if one.outcome.bad]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_line_of_progress_is_gone_at_the_end(
    error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Line:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def update(self, text: Callable[[], str]) -> None:
            said.append(text())

        def clear(self) -> None:
            said.append("cleared")

    def prove_one(*_: object, progress: Callable[[Attempt], None], **__: object) -> list[Attempt]:
        progress(Attempt("engine", "setns mnt", Outcome.REFUSED))
        if error is not None:
            raise error
        return []

    monkeypatch.setattr(prove, "Line", Line)

    def held_guest(*_: object) -> nullcontext[None]:
        return nullcontext()

    monkeypatch.setattr(prove, "held_guest", held_guest)
    monkeypatch.setattr(prove, "prove", prove_one)
    with suppress(KeyboardInterrupt):
        prove.prove_main(
            cast(Service, None), memory=SIZE, engine="software", as_root=False, quiet=False
        )
    assert said == ["engine: setns mnt", "cleared"]
