"""The run of ``check --random``: one VM after the other, for the time asked for.

Around each VM there are a service, an engine, the guest ``churn``, the owner (``owner``) and a
second process with the descriptor (``puncher``). The guest finds stale and lost content
(guests/churn.c). This process only watches, so it can report a hang of any other process.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from errno import EINVAL
from pathlib import Path
from typing import Final, final

from restrictedmem.abi import process
from restrictedmem.failure import failed
from restrictedmem.fd import readable
from restrictedmem.mm.designs import make
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.stress.finding import PATIENCE, Finding, wait_for
from restrictedmem.stress.ground import Ground
from restrictedmem.stress.owner import be_owner
from restrictedmem.stress.party import Child
from restrictedmem.stress.plan import MIXES, OPERATIONS, Plan, plan_of
from restrictedmem.stress.puncher import be_second
from restrictedmem.text import Line
from restrictedmem.vmm.vm import Vm

_TICK: Final = 0.1


@dataclass(slots=True)
class Total:
    """The totals over all VMs."""

    vms: int = 0
    killed: int = 0
    reused: int = 0
    operations: int = 0
    punches: int = 0
    pages_punched: int = 0
    slowest_punch: float = 0.0
    guest_steps: int = 0
    faults: int = 0
    #: Seconds that the VMs ran whose faults were counted.
    counted_seconds: float = 0.0
    by_engine: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def faults_a_second(self) -> float:
        """Private faults a second of the software engine's VMs whose owner was not killed."""
        return self.faults / self.counted_seconds if self.counted_seconds else 0.0


def main(
    seconds: float,
    design: str | None = None,
    scenario: str | None = None,
    seed: int | None = None,
    as_json: bool = False,
) -> int:
    """Run for so many seconds, print totals and findings, and return 1 if a rule was broken.

    Raises:
        OSError: EINVAL for an unknown design or scenario; the service could not start.
    """
    if scenario is not None and scenario not in MIXES:
        raise failed(
            "check",
            EINVAL,
            f"the scenario {scenario!r} cannot run with real processes; choose one of these: "
            f"{', '.join(MIXES)}",
        )
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    run = Run(Options(design=design), scenario, seed)
    show = Line(sys.stderr, interval=1.0)
    failure = ""
    try:
        with run:
            run.until(time.monotonic() + seconds, show.update)
        run.look_for_remains()
        if not run.total.operations:
            failure = "no operation was done in this time, so nothing was tested; use a longer time"
    except Finding as finding:
        failure = str(finding)
    finally:
        show.clear()
    _print(run, failure, seconds, design, scenario, as_json=as_json)
    return 1 if failure else 0


def _print(
    run: "Run",
    failure: str,
    seconds: float,
    design: str | None,
    scenario: str | None,
    *,
    as_json: bool,
) -> None:
    total = run.total
    words = [f"restrictedmem check --random {seconds:g}", f"--seed {run.seed}"]
    words += [f"--design {design}"] if design else []
    words += [f"--scenario {scenario}"] if scenario else []
    again = " ".join(words)
    if as_json:
        found = {name: getattr(total, name) for name in Total.__slots__}
        about = {
            "seed": run.seed,
            "design": design,
            "scenario": scenario,
            "seconds": round(run.elapsed, 3),
        }
        print(
            json.dumps(
                {
                    **about,
                    **found,
                    "faults_a_second": total.faults_a_second,
                    "failure": failure or None,
                    "again": again,
                }
            )
        )
        return
    engines = ", ".join(f"{count} {name}" for name, count in total.by_engine.items())
    print(
        f"seed         {run.seed}, {run.elapsed:.0f} s, design {design or 'v10'}, "
        f"scenario {scenario or 'all'}"
    )
    print(
        f"VMs          {total.vms} ({engines}), {total.killed} killed, "
        f"{total.reused} on the descriptor of an earlier VM"
    )
    print(
        f"operations   {total.operations}, {total.punches} of them punches of "
        f"{total.pages_punched} pages; slowest {_ms(total)}"
    )
    print(
        f"guest        {total.guest_steps} steps, {total.faults_a_second:,.0f} private faults a "
        "second (software engine)"
    )
    if not failure:
        print(
            "holds        no stale read, nothing lost, no hang, callbacks in balance, "
            "nothing left behind"
        )
        return
    print(f"FAILED       {failure}")
    print(f"again        {again}")
    if run.plan is not None:
        print(f"the VM       {run.plan}")


def _ms(total: Total) -> str:
    return f"{total.slowest_punch * 1e3:.1f} ms"


@final
class Run:
    """A run: a service, and one VM after the other."""

    def __init__(self, options: Options, scenario: str | None, seed: int) -> None:
        self.seed = seed
        self.total = Total()
        self.plan: Plan | None = None
        self.elapsed = 0.0
        # On the kernel engine, no call makes a guest_memfd lose a page. And the engine frees from
        # the guest_memfd each range it is told of, even when a design tells of an allocation.
        told_of_allocation = make(options.design or options.api).notifies(0)
        operations = MIXES[scenario] if scenario else tuple(OPERATIONS)
        left_out = ("error", "allocate") if told_of_allocation else ("error",)
        #: By engine: the operations that are done on it.
        self._engines = {"software": operations}
        if any(name not in left_out for name in operations):
            self._engines["kernel"] = tuple(name for name in operations if name not in left_out)
        self._began = time.monotonic()
        # The run looks by pid for processes that the service leaves behind.
        process.proc().close()
        self._resources = ExitStack()
        self._service = self._resources.enter_context(Service.start(options))
        self._processes: set[tuple[int, str]] = set()
        self._said = ""
        self._ground: Ground | None = None
        self._line: Callable[[Callable[[], str]], None] = lambda _: None

    def __enter__(self) -> None:
        if "kernel" in self._engines and not self._has_kernel():
            del self._engines["kernel"]

    def __exit__(self, *_: object) -> None:
        if self._ground is not None:
            self._ground.close()
        self._note_processes()
        self._resources.close()
        self.elapsed = time.monotonic() - self._began

    def _has_kernel(self) -> bool:
        try:
            Vm(self._service, engine="kernel").close()
        except OSError:
            return False
        return True

    def until(self, deadline: float, line: Callable[[Callable[[], str]], None]) -> None:
        """Run VMs until a deadline; ``line`` often gets a function that returns a status line.

        Raises:
            Finding: a rule was broken.
        """
        self._line = line
        while (left := deadline - time.monotonic()) > 0:
            self.plan = plan_of(
                self.seed, self.total.vms, before=self.plan, engines=self._engines, left=left
            )
            self._live(self.plan, self._next_ground(self.plan))
            self.total.vms += 1
            self._look_at_the_service(killed=self.plan.killed)

    def _next_ground(self, plan: Plan) -> Ground:
        """Make a descriptor, or reuse the last; the new VM must not see its old content."""
        if self._ground is not None and plan.reused:
            self.total.reused += 1
            self._ground.renew()
            return self._ground
        if self._ground is not None:
            self._ground.close()
        self._ground = Ground(self._service, plan)
        return self._ground

    def _live(self, plan: Plan, ground: Ground) -> None:
        with _children(self._service, ground, plan) as children:
            began = time.monotonic()
            watch = _Watch(ground, plan)
            try:
                while time.monotonic() < began + plan.seconds:
                    readable([child.sock for child in children], _TICK)
                    for child in children:
                        child.poll()
                    watch.look(children)
                    self._line(lambda: self._say(children))
                self._note_processes()
                self._end(plan, children, time.monotonic() - began)
            finally:
                self._count(ground, plan, children)

    def _end(self, plan: Plan, children: "tuple[Child, Child]", seconds: float) -> None:
        owner, second = children
        if plan.killed:
            owner.end()
            self.total.killed += 1
        second.stop()
        second.take_report()
        if plan.killed:
            return
        # The second process has ended: no other operation disturbs the guest's end and the check of
        # callbacks and pages.
        owner.stop()
        owner.take_report()
        assert owner.report is not None
        statistics = owner.report["statistics"]
        if "faults_private" in statistics:
            self.total.faults += statistics["faults_private"]
            self.total.counted_seconds += seconds

    def _count(self, ground: Ground, plan: Plan, children: "tuple[Child, Child]") -> None:
        total = self.total
        total.by_engine[plan.engine] = total.by_engine.get(plan.engine, 0) + 1
        total.guest_steps += sum(ground.board.steps(vcpu) for vcpu in range(plan.vcpus))
        for child in children:
            total.operations += child.progress.operations
            total.punches += child.progress.punches
            total.pages_punched += child.progress.pages
            total.slowest_punch = max(total.slowest_punch, child.progress.slowest)

    def _say(self, children: "tuple[Child, Child]") -> str:
        plan, total = self.plan, self.total
        assert plan is not None
        punches = total.punches + sum(child.progress.punches for child in children)
        operations = total.operations + sum(child.progress.operations for child in children)
        seconds = time.monotonic() - self._began
        vm = f"VM {total.vms + 1}: {plan.engine}, {plan.vcpus} vCPUs, {plan.pages} pages"
        return (
            f"{seconds:5.0f} s  seed {self.seed}  {vm}; {operations} operations, {punches} punches"
        )

    # Checks when a VM or the run is over.

    def _look_at_the_service(self, *, killed: bool) -> None:
        def engines_gone() -> bool:
            return not self._service.status()["consumers"]

        wait_for("the engine to end with its owner", engines_gone)
        said, before = self._service.status()["last_error"], self._said
        self._said = said
        # If a punch met an engine that was killed, the service says that the engine is gone.
        if said != before and not (killed and said.endswith(" is gone")):
            raise Finding(f"the service says: {said}")
        wait_for(
            "the closed descriptors to go from the service's list",
            lambda: len(self._service.status()["descriptors"]) <= 1,
        )
        for descriptor in self._service.status()["descriptors"]:
            if descriptor["notifiers"]:
                raise Finding(f"a consumer is gone, but its notifier is left: {descriptor}")

    def _note_processes(self) -> None:
        """Remember every process of the service by its pid and start time."""
        pid = self._service.info["pid"]
        spawner = _stat(pid)[0]
        for number in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            parent, started = _stat(number)
            if spawner and started and spawner in (number, parent):
                self._processes.add((number, started))

    def look_for_remains(self) -> None:
        """Check that every process of the service is gone.

        The memory is gone with them, because only their descriptors keep it.

        Raises:
            Finding: a process is left.
        """

        def gone() -> bool:
            return not any(_stat(pid)[1] == started for pid, started in self._processes)

        wait_for(
            f"the service's processes to end: {sorted(pid for pid, _ in self._processes)}", gone
        )


def _stat(pid: int) -> tuple[int, str]:
    """Return a process's parent and its start time; 0 and "" when it is gone."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
    except (FileNotFoundError, ProcessLookupError):
        return 0, ""
    return int(fields[1]), "" if fields[0] in "ZX" else fields[19]


@contextmanager
def _children(service: Service, ground: Ground, plan: Plan) -> "Generator[tuple[Child, Child]]":
    with ExitStack() as stack:
        second = Child(
            "second process", lambda progress, sock: be_second(ground, plan, progress, sock)
        )
        stack.callback(second.close)
        owner = Child(
            "owner", lambda progress, sock: be_owner(service, ground, plan, progress, sock)
        )
        stack.callback(owner.close)
        yield owner, second


@final
class _Watch:
    """A watch over operations and vCPUs that do not go on for too long."""

    def __init__(self, ground: Ground, plan: Plan) -> None:
        self._board = ground.board
        self._steps = [(0, time.monotonic())] * plan.vcpus

    def look(self, children: "tuple[Child, Child]") -> None:
        """Check all processes and vCPUs once.

        Raises:
            Finding: an operation or a vCPU is stuck.
        """
        for child in children:
            stuck = child.progress.stuck(PATIENCE)
            if stuck is not None:
                raise Finding(
                    f"hang: the {child.name} waited {PATIENCE:g} s for the operation {stuck!r} to "
                    "end"
                )
        now = time.monotonic()
        for vcpu, (steps, since) in enumerate(self._steps):
            if self._board.steps(vcpu) != steps:
                self._steps[vcpu] = self._board.steps(vcpu), now
            elif now - since > PATIENCE:
                raise Finding(
                    f"hang: waited {PATIENCE:g} s for vCPU {vcpu} to go on after its step {steps}"
                )
