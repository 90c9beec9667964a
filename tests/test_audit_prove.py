"""``run --prove``, whole: what an owner gets of a running guest's memory, and that the verdict can be guilty."""

import json
import os
import secrets

import pytest

from restrictedmem.abi import memory
from restrictedmem.audit import prove
from restrictedmem.audit.attempt import Attempt, Outcome
from restrictedmem.audit.guest import held_guest
from restrictedmem.audit.pattern import content
from restrictedmem.service.client import Service
from users import as_user

pytestmark = pytest.mark.requires("fuse")

SIZE = 4 << 20
ENGINES = ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]

Came = dict[tuple[str, str], tuple[str, str]]


def proof(engine: str, *, as_root: bool = False) -> Came:
    # Another each time: what one test leaves in this process's free memory must not convict the next.
    seed = secrets.randbits(64)
    with Service.start() as service, held_guest(service, SIZE, seed, engine) as guest:
        return table(prove.prove(service, guest, seed, engine=engine, as_root=as_root, progress=lambda _: None))


def table(attempts: list[Attempt]) -> Came:
    assert len({(one.target, one.name) for one in attempts}) == len(attempts)
    return {(one.target, one.name): (one.outcome.value, one.errno or one.detail) for one in attempts}


def bad(came: Came) -> Came:
    return {name: said for name, said in came.items() if Outcome(said[0]).bad}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.requires("root")
def test_root_without_capabilities_gets_nothing(engine: str) -> None:
    came = proof(engine)
    assert bad(came) == {}
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
    assert by_design == [("machine", "a service inside one's own user namespace")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.requires("root")
def test_root_has_the_engine(engine: str) -> None:
    came = proof(engine, as_root=True)
    for name in ("PTRACE_SEIZE", "PTRACE_ATTACH", "pidfd_getfd 0 to 63"):
        assert came["engine", name][0] == Outcome.OPEN.value, name
        assert came["engine", name][1].endswith("(Root)"), name
    # guest_memfd's pages are in no process's memory, the engine's own included.
    by_reading = Outcome.OPEN if engine == "software" else Outcome.NOTHING
    for route in (("engine /proc", "mem"), ("engine", "process_vm_readv"), ("machine", "a service inside one's own user namespace")):
        assert came[route][0] == by_reading.value, route
    # What is the VM's to refuse, it refuses to root as well.
    assert bad(came) == {}


def heap() -> int:
    """Return where the guest's heap begins."""
    with Service.start() as service, held_guest(service, SIZE, 0, "software") as guest:
        return guest.start


def test_a_copy_in_the_owners_memory_convicts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seed = secrets.randbits(64)
    kept = content(seed, heap(), 1 << 16)
    assert ("owner", "its memory") in guilty(seed, monkeypatch, capsys)
    assert kept


def test_a_copy_in_the_owners_files_convicts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seed = secrets.randbits(64)
    with memory.memfd_create("copy") as fd:
        os.write(fd.fileno(), content(seed, heap(), 1 << 16))
        assert ("owner", "its files") in guilty(seed, monkeypatch, capsys)


def guilty(seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """Prove with a known seed; the verdict must be guilty, and what convicts is returned."""

    def known(_: int) -> int:
        return seed

    monkeypatch.setattr(secrets, "randbits", known)
    with Service.start() as service:
        status = prove.prove_main(service, memory=SIZE, engine="software", as_root=False, as_json=True, quiet=True)
    said = json.loads(capsys.readouterr().out)
    assert status == 1
    assert said["proved"] is False
    return [(one["target"], one["name"]) for one in said["attempts"] if Outcome(one["outcome"]).bad]
