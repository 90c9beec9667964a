"""A random owner at its end: its accounts, and what its process reports."""

import json
import random
import socket
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import replace
from errno import EIO
from typing import Any, ClassVar, Final

import pytest

from fake_vm import PLAN, Scene, scene_of
from planting import Stub, stub
from restrictedmem.protocol import guest_abi
from restrictedmem.stress import owner
from restrictedmem.stress.finding import Finding
from restrictedmem.stress.owner import Owner, be_owner
from restrictedmem.stress.plan import NAMES
from restrictedmem.stress.progress import Progress
from restrictedmem.units import PAGE_SIZE


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Generator[Scene]:
    with scene_of(PLAN, monkeypatch) as made:
        yield made


# Accounts.


def free_what_is_punched(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the VM give up the pages that are punched after the first punch."""
    take = scene.puncher.take

    def taken(pages: range) -> None:
        take(pages)
        if len(scene.takes) > 1:
            scene.vm.freed += len(pages)

    monkeypatch.setattr(scene.puncher, "take", taken)


def test_the_account_maps_all_and_punches_some(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_what_is_punched(scene, monkeypatch)
    scene.owner._account()
    gpa = guest_abi.PRIVATE_BASE + scene.ground.offset
    assert scene.vm.done == [
        ("map", 0, gpa + done * PAGE_SIZE, (40 - done) * PAGE_SIZE) for done in (0, 16, 32)
    ]
    every, *some = scene.takes
    assert every == range(40)
    assert {len(pages) for pages in some} == {1}
    assert len({pages.start for pages in some}) == len(some) == 32
    assert {pages.start for pages in some} <= set(range(40))


def test_the_account_of_a_small_vm_punches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with scene_of(replace(PLAN, pages=3), monkeypatch) as scene:
        free_what_is_punched(scene, monkeypatch)
        scene.owner._account()
        assert sorted(pages.start for pages in scene.takes[1:]) == [0, 1, 2]


@pytest.mark.parametrize("lost", [1, -1])
def test_an_account_out_of_balance_is_a_finding(
    lost: int, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([{"pages_freed": 5}, {"pages_freed": 5 + 32 - lost}])
    monkeypatch.setattr(scene.vm, "statistics", lambda: next(counts))
    words = f"accounting: 32 pages were punched, and the engine gave up {32 - lost} of them"
    with pytest.raises(Finding, match=f"^{words}$"):
        scene.owner._account()


def ended(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """End a VM, and return what was done under which operation's name."""
    done: list[str] = []

    def note(what: str) -> Any:
        def act(_: Owner) -> None:
            done.append(f"{what} during {scene.puncher.progress.stuck(-1)}")

        return act

    monkeypatch.setattr(Owner, "_remove_extra", note("slot"))
    monkeypatch.setattr(Owner, "join", note("join"))
    monkeypatch.setattr(Owner, "_account", note("account"))
    try:
        scene.owner.end()
    finally:
        # The guest was told to end in any case.
        assert scene.board.guest.stop == 1
    return done


def test_the_end_is_in_order(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.service.consumers = [{"in_progress": 0}]
    assert ended(scene, monkeypatch) == [
        "slot during slot",
        "join during wait",
        "account during account",
    ]
    scene.vm.engine = "kernel"
    assert ended(scene, monkeypatch)[1:] == ["join during wait"]


def test_a_callback_without_end_is_a_finding(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.service.consumers = [{"in_progress": 0}, {"in_progress": 2}, {"in_progress": 1}]
    with pytest.raises(Finding, match=r"^accounting: 3 callbacks are without their end, although"):
        ended(scene, monkeypatch)


def test_a_guest_that_failed_is_a_finding_without_an_account(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.owner.failure = "stale"
    with pytest.raises(Finding, match=r"^stale$"):
        ended(scene, monkeypatch)


def test_a_rule_of_the_platform_is_a_finding(scene: Scene) -> None:
    scene.owner.destroy()
    scene.vm.report = {"violated_pages": 0, "violations": []}
    scene.owner.destroy()
    assert scene.vm.done == [("destroy",)] * 2
    assert scene.puncher.progress.operations == 2
    scene.vm.report = {"violated_pages": 3, "violations": ["page 1", "page 2"]}
    words = "snp: 3 pages violate a rule; the first violation: page 1"
    with pytest.raises(Finding, match=f"^{words}$"):
        scene.owner.destroy()


# The process.


class Acts(Stub):
    """An owner that notes what its process has it do."""

    failure = ""
    #: By operation: what it does, besides that it is noted.
    answers: ClassVar[dict[str, Callable[[Any], None]]] = {}

    def __init__(self, service: object, ground: object, plan: object, puncher: Any, _: Any) -> None:
        super().__init__(done=[], vm=stub(statistics=lambda: {"steps": 5}), puncher=puncher)
        self.methods = {"interrupt": self.note("interrupt")}
        for name in ("start", "end", "destroy"):
            setattr(self, name, self.note(name))
        made.append(self)

    def note(self, what: str) -> Callable[[], None]:
        def act() -> None:
            self.done.append(what)
            self.answers.get(what, lambda _: None)(self)

        return act


made: Final[list[Acts]] = []


@contextmanager
def process(monkeypatch: pytest.MonkeyPatch) -> Generator[tuple[Any, socket.socket]]:
    """Return a function that is a whole owner's process; and its parent's socket."""
    made.clear()
    monkeypatch.setattr(owner, "Owner", Acts)
    lanes = list[int]()
    ground: Any = stub(board=stub(lane=lanes.append), pages=1)
    parent, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with parent, child, closing(Progress(NAMES)) as progress:

        def run() -> Any:
            be_owner(stub(), ground, PLAN, progress, child)
            assert lanes == [0]
            return json.loads(parent.recv(4096))

        yield run, parent


def test_the_owners_process_works_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    with process(monkeypatch) as (run, parent):
        parent.send(b".")
        assert run() == {"statistics": {"steps": 5}}
        assert made[0].done == ["start", "end", "destroy"]
        assert made[0].puncher.random.random() == random.Random("1/0 owner").random()


def test_the_owners_process_ends_with_its_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Acts) -> None:
        self.failure = "stale"

    def end(self: Acts) -> None:
        raise Finding(self.failure)

    with process(monkeypatch) as (run, _):
        monkeypatch.setattr(Acts, "answers", {"start": start, "end": end})
        assert run() == {"failure": "stale"}
        assert made[0].done == ["start", "end"]


@pytest.mark.parametrize(("failure", "words"), [("", "lost"), ("stale", "stale")])
def test_an_operation_that_fails_is_a_finding(
    failure: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Acts) -> None:
        self.failure = failure
        raise OSError(EIO, "lost")

    with process(monkeypatch) as (run, _):
        monkeypatch.setattr(Acts, "answers", {"interrupt": interrupt})
        assert run() == {"failure": words}
        assert made[0].done == ["start", "interrupt"]
