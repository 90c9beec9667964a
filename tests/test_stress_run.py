"""A random run: what it does with each VM, and what it looks at afterwards."""

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from planting import PlantedError, Stub, always, fail, noting, stub
from restrictedmem.abi import process
from restrictedmem.child import end_child, fork
from restrictedmem.service import client
from restrictedmem.service.options import Options
from restrictedmem.stress import run
from restrictedmem.stress.finding import Finding
from restrictedmem.stress.plan import MIXES, OPERATIONS, Plan
from restrictedmem.stress.run import Run
from waiting import wait_until

PLAN: Final = Plan(
    seed="3/0",
    engine="software",
    platform="",
    vcpus=2,
    pages=64,
    reused=False,
    converting=0,
    operations=("punch",),
    seconds=4,
    killed=False,
)


class Service(Stub):
    """A service that says what a test wants."""

    def __init__(self) -> None:
        super().__init__(info={"pid": os.getpid()}, closed=False)
        self.said: dict[str, Any] = {"consumers": [], "last_error": "", "descriptors": []}

    def status(self) -> dict[str, Any]:
        return self.said

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


class Scene(SimpleNamespace):
    run: Any
    service: Service
    #: The time in seconds, which stands still.
    now: float
    proc_closed: bool


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scene]:
    def make(design: str | None = None, scenario: str | None = None) -> Scene:
        scene = Scene(now=100.0, proc_closed=False)
        scene.service = Service()

        def close() -> None:
            scene.proc_closed = True

        def start(options: Options) -> Service:
            assert options.design == design
            assert scene.proc_closed
            return scene.service

        monkeypatch.setattr(client.Service, "start", start)
        monkeypatch.setattr(process, "proc", lambda: stub(close=close))
        monkeypatch.setattr(run, "time", stub(monotonic=lambda: scene.now))
        scene.run = Run(Options(design=design), scenario, 3)
        return scene

    return make


# Engines and their operations.


@pytest.mark.parametrize(
    ("design", "scenario", "kernel"),
    [
        (None, None, tuple(name for name in OPERATIONS if name != "error")),
        ("v9", None, tuple(name for name in OPERATIONS if name not in ("error", "allocate"))),
        ("v9", "allocate-fault", ("punch",)),
        (None, "allocate-fault", ("punch", "allocate")),
        (None, "error-fault", None),
    ],
)
def test_an_engine_has_the_operations_that_it_can_do(
    design: str | None,
    scenario: str | None,
    kernel: tuple[str, ...] | None,
    made: Callable[..., Scene],
) -> None:
    engines = {"software": MIXES[scenario] if scenario else tuple(OPERATIONS)}
    assert made(design, scenario).run._engines == engines | (
        {} if kernel is None else {"kernel": kernel}
    )


@pytest.mark.parametrize("there", [True, False])
def test_the_kernel_engine_is_tried_before_it_is_used(
    there: bool, made: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, tried = made(), list[object]()

    def vm(service: object, *, engine: str) -> Any:
        tried.append((service, engine))
        if not there:
            raise OSError
        return stub(close=lambda: tried.append("closed"))

    monkeypatch.setattr(run, "Vm", vm)
    scene.run.__enter__()
    assert tried == [(scene.service, "kernel"), *(["closed"] if there else [])]
    assert list(scene.run._engines) == ["software", *(["kernel"] if there else [])]


def test_a_scenario_of_the_software_engine_tries_no_other(
    made: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Vm", fail)
    made(None, "error-fault").run.__enter__()


# One VM after the other.


def test_vms_follow_one_another_until_the_deadline(
    made: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = made()
    told: list[object] = []

    def plan_of(seed: int, number: int, **options: Any) -> Plan:
        assert options["engines"] is scene.run._engines
        before = options["before"]
        told.append((seed, number, before and before.seed, options["left"]))
        return replace(PLAN, seed=f"{seed}/{number}", killed=number == 1)

    def live(plan: Plan, ground: object) -> None:
        told.append((plan.seed, ground))
        scene.now += 4

    def next_ground(plan: Plan) -> str:
        return f"ground of {plan.seed}"

    def look(*, killed: bool) -> None:
        told.append(killed)

    monkeypatch.setattr(run, "plan_of", plan_of)
    scene.run._live = live
    scene.run._next_ground = next_ground
    scene.run._look_at_the_service = look
    scene.run.until(scene.now + 4.5, print)
    assert told == [
        (3, 0, None, 4.5),
        ("3/0", "ground of 3/0"),
        False,
        (3, 1, "3/0", 0.5),
        ("3/1", "ground of 3/1"),
        True,
    ]
    assert scene.run.total.vms == 2
    assert scene.run._line is print


def test_a_ground_is_reused_or_closed(
    made: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, done = made(), list[str]()

    def ground(service: object, plan: Plan) -> Any:
        assert service is scene.service
        return stub(
            renew=lambda: done.append(f"renew {plan.seed}"),
            close=lambda: done.append(f"close {plan.seed}"),
        )

    monkeypatch.setattr(run, "Ground", ground)
    next_ground, total = scene.run._next_ground, scene.run.total
    # There is nothing to reuse yet, whatever the plan says.
    first = next_ground(replace(PLAN, seed="a", reused=True))
    assert (done, total.reused) == ([], 0)
    assert next_ground(replace(PLAN, seed="b", reused=True)) is first
    assert (done, total.reused) == (["renew a"], 1)
    other = next_ground(replace(PLAN, seed="c"))
    assert other is not first
    assert next_ground(replace(PLAN, seed="d", reused=True)) is other
    assert (done, total.reused) == (["renew a", "close a", "renew c"], 2)
    scene.now += 2.5
    scene.run._note_processes = lambda: done.append(f"note, closed {scene.service.closed}")
    scene.run.__exit__()
    assert done[3:] == ["close c", "note, closed False"]
    assert scene.service.closed
    assert scene.run.elapsed == 2.5


def child(name: str, done: list[str], **report: object) -> Any:
    made: Any = stub(
        sock=name,
        report=report or None,
        progress=stub(operations=5, punches=3, pages=7, slowest=0.25 if name == "owner" else 0.5),
    )
    for what in ("poll", "end", "stop", "take_report"):
        setattr(made, what, lambda what=what: done.append(f"{name} {what}"))
    return made


def test_a_vm_lives_as_long_as_planned(
    made: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, done = made(), list[str]()
    both = child("owner", done), child("second", done)
    ground: Any = stub(board=stub(steps=(10).__add__))

    @contextmanager
    def children(*of: object) -> Generator[Any]:
        assert of == (scene.service, ground, PLAN)
        yield both
        done.append("closed")

    def readable(files: list[object], seconds: float) -> None:
        assert (files, seconds) == (["owner", "second"], 0.1)
        scene.now += 2

    def look(_: object, children: object) -> None:
        assert children is both
        done.append("look")

    def line(text: Callable[[], str]) -> None:
        done.append(text())

    def end(_plan: Plan, _children: object, seconds: float) -> None:
        done.append(f"end after {seconds}")

    monkeypatch.setattr(run, "_children", children)
    monkeypatch.setattr(run, "readable", readable)
    monkeypatch.setattr(run._Watch, "look", look)
    scene.run.plan = PLAN
    scene.run._line = line
    scene.run._note_processes = lambda: done.append("note")
    scene.run._end = end
    scene.run._live(PLAN, ground)
    assert done == [
        *("owner poll", "second poll", "look"),
        "    2 s  seed 3  VM 1: software, 2 vCPUs, 64 pages; 10 operations, 6 punches",
        *("owner poll", "second poll", "look"),
        "    4 s  seed 3  VM 1: software, 2 vCPUs, 64 pages; 10 operations, 6 punches",
        *("note", "end after 4.0", "closed"),
    ]
    total = scene.run.total
    assert (total.by_engine, total.guest_steps) == ({"software": 1}, 10 + 11)
    assert (total.operations, total.punches, total.pages_punched) == (10, 6, 14)
    assert total.slowest_punch == 0.5
    # What was done before a finding counts, too.
    scene.run._end = fail
    with pytest.raises(PlantedError):
        scene.run._live(PLAN, ground)
    assert (total.by_engine, total.operations, total.slowest_punch) == ({"software": 2}, 20, 0.5)
    assert scene.run._say(both).endswith("30 operations, 18 punches")


@pytest.mark.parametrize(
    ("statistics", "faults", "seconds"), [({"faults_private": 9}, 9, 2.5), ({"exits": 1}, 0, 0)]
)
def test_the_second_process_ends_before_the_owner(
    statistics: dict[str, int], faults: int, seconds: float, made: Callable[..., Scene]
) -> None:
    scene, done = made(), list[str]()
    both = child("owner", done, statistics=statistics), child("second", done)
    for _ in range(2):
        scene.run._end(PLAN, both, 2.5)
    assert done[:4] == ["second stop", "second take_report", "owner stop", "owner take_report"]
    total = scene.run.total
    assert (total.faults, total.counted_seconds, total.killed) == (2 * faults, 2 * seconds, 0)


def test_an_owner_is_killed_in_the_middle(made: Callable[..., Scene]) -> None:
    scene, done = made(), list[str]()
    both = child("owner", done), child("second", done)
    scene.run._end(replace(PLAN, killed=True), both, 2.5)
    assert done == ["owner end", "second stop", "second take_report"]
    assert (scene.run.total.killed, scene.run.total.faults) == (1, 0)


# Checks after a VM.


def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Return what is waited for, and whether it holds."""
    waited: list[tuple[str, bool]] = []

    def wait_for(what: str, holds: Callable[[], bool]) -> None:
        waited.append((what, holds()))

    monkeypatch.setattr(run, "wait_for", wait_for)
    return waited


@pytest.mark.parametrize(
    ("consumers", "descriptors", "holds"),
    [(0, 0, (True, True)), (0, 1, (True, True)), (1, 2, (False, False))],
)
def test_the_service_forgets_the_vm(
    consumers: int,
    descriptors: int,
    holds: tuple[bool, bool],
    made: Callable[..., Scene],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene, waited = made(), waits(monkeypatch)
    scene.service.said |= {
        "consumers": [{}] * consumers,
        "descriptors": [{"notifiers": 0}] * descriptors,
    }
    scene.run._look_at_the_service(killed=False)
    assert waited == [
        ("the engine to end with its owner", holds[0]),
        ("the closed descriptors to go from the service's list", holds[1]),
    ]


def test_a_notifier_that_is_left_is_a_finding(
    made: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits(monkeypatch)
    scene = made()
    scene.service.said["descriptors"] = [{"notifiers": 0}, {"notifiers": 1}]
    with pytest.raises(Finding, match=r"^a consumer is gone, but its notifier is left: .* 1}$"):
        scene.run._look_at_the_service(killed=True)


@pytest.mark.parametrize(
    ("words", "killed", "found"),
    [
        ("the engine of VM 1 is gone", True, False),
        ("the engine of VM 1 is gone", False, True),
        ("a callback failed", True, True),
        ("", False, False),
    ],
)
def test_an_error_of_the_service_is_a_finding_unless_a_kill_explains_it(
    words: str,
    killed: bool,
    found: bool,
    made: Callable[..., Scene],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits(monkeypatch)
    scene = made()
    scene.service.said["last_error"] = words
    if found:
        with pytest.raises(Finding, match=f"^the service says: {words}$"):
            scene.run._look_at_the_service(killed=killed)
    else:
        scene.run._look_at_the_service(killed=killed)
    # It is said once: the next VM has nothing to do with it.
    scene.run._look_at_the_service(killed=False)


# Processes.


def test_processes_of_the_service_are_noted_and_looked_for(
    made: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, waited = made(), waits(monkeypatch)
    pid, other = fork(signal.pause), fork(signal.pause)
    try:
        scene.service.info["pid"] = pid
        scene.run._note_processes()
        noted = {number for number, _ in scene.run._processes}
        assert {os.getpid(), pid, other} <= noted
        assert os.getppid() not in noted
        started = dict(scene.run._processes)
        field = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        assert started[pid] == field[19]
        scene.run._processes = {(pid, started[pid]), (other, "0")}
        scene.run.look_for_remains()
        end_child(pid)
        scene.run.look_for_remains()
        words = f"the service's processes to end: {sorted([pid, other])}"
        assert waited == [(words, False), (words, True)]
        # Without a service there is no process of it.
        scene.run._processes.clear()
        scene.run._note_processes()
        assert scene.run._processes == set()
    finally:
        end_child(other)


def test_the_parent_of_a_process_is_not_its_group() -> None:
    def lead() -> None:
        os.setsid()
        signal.pause()

    pid = fork(lead)
    try:
        wait_until(lambda: os.getpgid(pid) == pid, "the process to lead a group")
        assert run._stat(pid)[0] == os.getpid()
    finally:
        end_child(pid)


def test_a_process_that_was_not_reaped_is_gone() -> None:
    pid = fork(lambda: None)
    try:
        wait_until(lambda: run._stat(pid)[1] == "", "the process to end")
        assert run._stat(pid) == (os.getpid(), "")
    finally:
        end_child(pid)
    assert run._stat(pid) == (0, "")


def test_the_processes_of_a_vm_end_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[object, ...]] = []

    def child(name: str, body: Callable[[object, object], None]) -> Any:
        body("progress", "sock")
        return stub(name=name, close=lambda: done.append(("close", name)))

    monkeypatch.setattr(run, "Child", child)
    monkeypatch.setattr(run, "be_owner", noting(done, "owner"))
    monkeypatch.setattr(run, "be_second", noting(done, "second"))
    names: Any = "service", "ground", "plan"
    with run._children(*names) as children:
        assert [each.name for each in children] == ["owner", "second process"]
        assert done == [
            ("second", "ground", "plan", "progress", "sock"),
            ("owner", "service", "ground", "plan", "progress", "sock"),
        ]
    assert done[2:] == [("close", "owner"), ("close", "second process")]


# Hangs.


def test_an_operation_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = run._Watch(stub(board=stub()), replace(PLAN, vcpus=0))
    asked: list[float] = []

    def stuck(seconds: float) -> str | None:
        asked.append(seconds)
        return "slot" if len(asked) == 4 else None

    both: Any = [stub(name=name, progress=stub(stuck=stuck)) for name in ("owner", "second")]
    watch.look(both)
    words = "hang: the second waited 20 s for the operation 'slot' to end"
    with pytest.raises(Finding, match=f"^{words}$"):
        watch.look(both)
    assert asked == [20.0] * 4


def test_a_vcpu_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    now, steps = [50.0], [0, 0]
    monkeypatch.setattr(run, "time", stub(monotonic=lambda: now[0]))
    watch = run._Watch(stub(board=stub(steps=steps.__getitem__)), PLAN)
    nobody: Any = ()
    now[0], steps[0] = 60, 7
    watch.look(nobody)
    now[0] = 70
    watch.look(nobody)
    steps[1] = 9
    now[0] = 80
    watch.look(nobody)
    now[0] = 80.5
    fresh = run._Watch(stub(board=stub(steps=always(0))), replace(PLAN, vcpus=1))
    words = "hang: waited 20 s for vCPU 0 to go on after its step 7"
    with pytest.raises(Finding, match=f"^{words}$"):
        watch.look(nobody)
    now[0] += 21
    with pytest.raises(Finding, match=r"vCPU 0 to go on after its step 0$"):
        fresh.look(nobody)
