"""A random owner of a fake VM, on a ground of real memfds."""

import os
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from churn_board import Both
from planting import always, stub
from restrictedmem.abi import memory
from restrictedmem.protocol import guest_abi
from restrictedmem.protocol.exits import Hypercall
from restrictedmem.stress import owner
from restrictedmem.stress.ground import Ground
from restrictedmem.stress.owner import Owner
from restrictedmem.stress.plan import NAMES, OPERATIONS, Plan
from restrictedmem.stress.progress import Progress
from restrictedmem.stress.puncher import Puncher
from restrictedmem.units import PAGE_SIZE

PARK: Final = Hypercall(guest_abi.PARK, (0, 0, 0, 0))
PLAN: Final = Plan(
    seed="1/0",
    engine="software",
    platform="snp",
    vcpus=2,
    pages=40,
    reused=False,
    converting=7,
    operations=tuple(OPERATIONS),
    seconds=0,
    killed=False,
)


class FakeVm:
    """A VM that notes what is done to it, and gives up what is punched."""

    def __init__(self, service: object, *, engine: str, platform: str) -> None:
        self.engine, self.platform = engine, platform
        self.done: list[tuple[object, ...]] = []
        self.refuses: OSError | None = None
        self.report: dict[str, Any] = {}
        self.freed = 5
        #: Of a VM's pages, the most that one call maps.
        self.maps = 16 * PAGE_SIZE
        self.closed = False

    def __enter__(self) -> "FakeVm":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def set_user_memory_region(self, **of: int) -> None:
        self.done.append(("slot", of))

    def set_memory_attributes(self, address: int, size: int, *, private: bool) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.done.append(("private" if private else "shared", address, size))

    def launch_update(self, gpa: int, data: bytes) -> None:
        self.done.append(("launch", gpa, data))

    def inject_failure(self, gpa: int) -> None:
        self.done.append(("failure", gpa))

    @contextmanager
    def create_vcpu(self) -> Generator[Any]:
        number = sum(what == "vCPU" for what, *_ in self.done)
        self.done.append(("vCPU", number))

        def pre_fault(gpa: int, size: int) -> int:
            self.done.append(("map", number, gpa, size))
            return min(size, self.maps)

        def set_regs(**regs: int) -> None:
            self.done.append(("regs", number, regs))

        yield stub(
            number=number,
            run=always(PARK),
            set_regs=set_regs,
            interrupt=lambda: self.done.append(("interrupt", number)),
            pre_fault_memory=pre_fault,
        )

    def statistics(self) -> dict[str, int]:
        return {"pages_freed": self.freed}

    def destroy(self) -> dict[str, Any]:
        self.done.append(("destroy",))
        return self.report


class Scene(SimpleNamespace):
    """An owner of a fake VM, on a ground of real memfds."""

    owner: Owner
    vm: FakeVm
    ground: Ground
    puncher: Puncher
    takes: list[range]
    service: Any
    #: The board as the guest sees it.
    board: Both
    #: What was done to the VM while it was made.
    before: list[tuple[object, ...]]

    def clear(self) -> None:
        self.vm.done.clear()
        self.takes.clear()

    def choices(self, *numbers: int) -> None:
        """Let the owner draw these numbers, and no more."""
        comes = iter(numbers)
        self.drawn: list[object] = []

        def draw(among: object) -> int:
            self.drawn.append(among)
            return next(comes)

        self.puncher.random = stub(randrange=draw)


@contextmanager
def scene_of(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Generator[Scene]:
    with ExitStack() as stack:
        opened: list[int] = []

        def memfd_restricted() -> int:
            with memory.memfd_create("restricted") as fd:
                opened.append(os.dup(fd.fileno()))
            return opened[-1]

        service: Any = stub(memfd_restricted=memfd_restricted, opened=opened, consumers=[])
        service.status = lambda: {"consumers": service.consumers}
        monkeypatch.setattr(owner, "Vm", FakeVm)
        ground = stack.enter_context(closing(Ground(service, plan)))
        progress = stack.enter_context(closing(Progress(NAMES)))
        puncher = Puncher(ground, ground.board.lane(0), progress, "seed")
        takes: list[range] = []
        take = puncher.take

        def taken(pages: range) -> None:
            takes.append(pages)
            take(pages)

        monkeypatch.setattr(puncher, "take", taken)
        made = Owner(service, ground, plan, puncher, stack)
        vm = cast("FakeVm", made.vm)
        scene = Scene(
            owner=made,
            vm=vm,
            ground=ground,
            puncher=puncher,
            takes=takes,
            service=service,
            board=Both(ground.window, ground.board),
            before=list(vm.done),
        )
        scene.clear()
        yield scene
    assert vm.closed
    assert ground.window.closed
    for fd in (ground.fd, ground.half_fd, ground.window_fd):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
