"""A random owner's VM, its answers to the guest, and its operations."""

import os
import random
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from errno import EINVAL, EIO
from functools import partial
from operator import itemgetter
from typing import Any, Final

import pytest

from fake_vm import PARK, PLAN, Scene, scene_of
from planting import stub
from restrictedmem.abi import memory
from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.protocol.exits import Hypercall
from restrictedmem.stress import owner
from restrictedmem.stress.board import EXTRA_BASE, EXTRA_PAGES
from restrictedmem.stress.finding import Finding
from restrictedmem.stress.ground import CHURN
from restrictedmem.stress.owner import Owner
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.boot import SHARED_SIZE, launch_pages, launch_regs

EXIT_1: Final = Hypercall(guest_abi.EXIT, (1, 0, 0, 0))


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Generator[Scene]:
    with scene_of(PLAN, monkeypatch) as made:
        yield made


# The VM.


def test_the_vm_has_the_memory_of_the_ground(scene: Scene) -> None:
    ground, size = scene.ground, scene.ground.private_size
    assert (scene.vm.engine, scene.vm.platform) == ("software", "snp")
    assert scene.before[:3] == [
        (
            "slot",
            {
                "slot": 0,
                "guest_phys_addr": guest_abi.PRIVATE_BASE,
                "memory_size": size,
                "restricted_fd": ground.fd,
                "shared_fd": ground.half_fd,
            },
        ),
        (
            "slot",
            {
                "slot": 1,
                "guest_phys_addr": guest_abi.SHARED_BASE,
                "memory_size": SHARED_SIZE,
                "shared_fd": ground.window_fd,
            },
        ),
        ("private", guest_abi.PRIVATE_BASE, size),
    ]
    sizes = [os.fstat(fd).st_size for fd in (ground.fd, ground.half_fd, ground.window_fd)]
    assert sizes == [size, size, SHARED_SIZE]
    assert ground.offset + (PLAN.pages << 12) + PLAN.vcpus * guest_abi.STACK_SIZE == size


def test_the_guest_begins_as_the_plan_says(scene: Scene) -> None:
    size = scene.ground.private_size
    seed = random.Random("1/0").randrange(1 << 31)
    pages = launch_pages(CHURN, [str(seed), "40", "0", "7"], private_size=size, vcpus=2)
    regs = [launch_regs(CHURN, private_size=size, index=index) for index in range(2)]
    assert scene.before[3:] == [
        ("vCPU", 0),
        ("vCPU", 1),
        *(("launch", *page) for page in pages),
        *(
            ("regs", index, {"rip": of.rip, "rsp": of.rsp, "rdi": of.rdi, "rsi": of.rsi})
            for index, of in enumerate(regs)
        ),
    ]


def test_a_ground_is_new_for_the_next_vm(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    ground, last = scene.ground, PLAN.pages - 1
    scene.board.write("steps", 9, 1)
    ground.board.stop()
    for at in (0, ground.private_size - 1):
        os.pwrite(ground.half_fd, b"x", at)
    fallocate, said = memory.fallocate, list[dict[str, dict[int, int]]]()

    def watched(*of: int) -> None:
        said.append(scene.board.nonzero())
        fallocate(*of)

    monkeypatch.setattr(memory, "fallocate", watched)
    ground.renew()
    assert os.fstat(ground.half_fd).st_blocks == 0
    assert os.fstat(ground.half_fd).st_size == ground.private_size
    every = dict.fromkeys(range(last + 1), 1)
    assert said == [{"begun": every}]
    assert scene.board.nonzero() == {"begun": every, "done": every}


def test_vcpus_run_in_threads_that_end_with_the_process(scene: Scene) -> None:
    assert all(thread.daemon for thread in scene.owner._threads)
    scene.owner.start()
    scene.owner.join()
    assert not any(thread.is_alive() for thread in scene.owner._threads)


@pytest.mark.parametrize("failure", ["", "before"])
def test_a_vcpu_that_does_not_end_is_a_hang(
    failure: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "PATIENCE", 0.05)
    release = threading.Event()

    def run(_: int) -> exits.Exit:
        release.wait(20)
        return PARK

    monkeypatch.setattr(scene.owner._vcpus[1], "run", run)
    scene.owner.start()
    scene.owner.failure = failure
    words = failure or "hang: waited 0.05 s for every vCPU to end"
    with pytest.raises(Finding, match=f"^{words}$"):
        scene.owner.join()
    release.set()
    monkeypatch.setattr(owner, "PATIENCE", 20.0)
    scene.owner.join()


# Answers to the guest.


def owner_of(*, failure: str = "") -> Any:
    made = stub(failure=failure, said=" a word\n")
    made._answer = partial(Owner._answer, made)
    return made


def drive(owner: Any, *said: exits.Exit | OSError) -> str:
    """Have a vCPU come back so."""
    comes = iter(said)

    def run(answer: int) -> exits.Exit:
        assert answer == 0
        exit_ = next(comes)
        if isinstance(exit_, OSError):
            raise exit_
        return exit_

    Owner._drive(owner, stub(number=3, run=run))
    return str(owner.failure)


BAD_PAGE: Final = exits.MemoryFault(0, guest_abi.PRIVATE_BASE, PAGE_SIZE, EINVAL)
#: How a vCPU comes back, and what that is.
FAILURES: Final[dict[str, tuple[exits.Exit | OSError, str]]] = {
    "error": (OSError(EIO, "lost"), "vCPU 3: lost"),
    "status": (EXIT_1, "the guest ended with 1: a word"),
    "shutdown": (exits.Shutdown(13), f"a vCPU stopped: {exits.Shutdown(13)}"),
    "fault": (BAD_PAGE, f"a vCPU stopped: {BAD_PAGE}"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_first_failure_is_the_one(name: str) -> None:
    exit_, words = FAILURES[name]
    assert drive(owner_of(), exits.Interrupted(), exit_) == words
    assert drive(owner_of(failure="before"), exit_) == "before"


@pytest.mark.parametrize("end", [Hypercall(guest_abi.EXIT, (0, 0, 0, 0)), PARK])
def test_an_end_is_no_failure(end: exits.Exit) -> None:
    assert drive(owner_of(), end) == ""


def test_a_page_that_the_machine_lost_is_punched(scene: Scene) -> None:
    gpa = guest_abi.PRIVATE_BASE + scene.ground.offset + 7 * PAGE_SIZE
    assert scene.owner._answer(exits.MemoryFault(0, gpa, PAGE_SIZE, EHWPOISON)) == 0
    assert (scene.takes, scene.owner.failure) == ([range(7, 8)], "")


def test_the_guest_writes_what_the_owner_says(scene: Scene) -> None:
    scene.ground.window[3:8] = b"abcde"
    for _ in range(2):
        assert scene.owner._answer(Hypercall(guest_abi.WRITE, (1, 4, 3, 0))) == 3
    assert scene.owner.said == "bcdbcd"


@pytest.mark.parametrize(("attributes", "private"), [(0x10, True), (0xF, False), (0, False)])
def test_a_conversion_frees_the_half_that_is_left(
    attributes: int, private: bool, scene: Scene
) -> None:
    ground, gpa = scene.ground, guest_abi.PRIVATE_BASE + 5 * PAGE_SIZE
    for fd in (ground.fd, ground.half_fd):
        os.pwrite(fd, b"x" * (10 * PAGE_SIZE), 0)
    assert scene.owner._answer(Hypercall(guest_abi.MAP_GPA_RANGE, (gpa, 2, attributes, 0))) == 0
    assert scene.vm.done == [("private" if private else "shared", gpa, 2 * PAGE_SIZE)]
    empty = [
        page
        for fd in (ground.fd, ground.half_fd)
        for page in range(10)
        if not any(os.pread(fd, PAGE_SIZE, page * PAGE_SIZE))
    ]
    assert empty == [5, 6]
    freed = ground.half_fd if private else ground.fd
    assert not any(os.pread(freed, PAGE_SIZE, 5 * PAGE_SIZE))


@pytest.mark.parametrize(
    ("error", "answer"), [(OSError(EINVAL, ""), -EINVAL), (OSError("no errno"), -EIO)]
)
def test_a_conversion_that_fails_is_answered_with_its_errno(
    error: OSError, answer: int, scene: Scene
) -> None:
    scene.vm.refuses = error
    asked = Hypercall(guest_abi.MAP_GPA_RANGE, (guest_abi.PRIVATE_BASE, 1, 0, 0))
    assert scene.owner._answer(asked) == answer


# Operations.


def test_each_operation_has_its_method(scene: Scene) -> None:
    assert {name: method.__name__ for name, method in scene.owner.methods.items()} == {
        "punch": "punch",
        "punch-block": "punch_block",
        "allocate": "allocate",
        "convert": "_convert",
        "slot": "_change_slot",
        "interrupt": "_interrupt",
        "error": "_lose_page",
    }


def test_the_owner_has_the_operations_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    with scene_of(replace(PLAN, operations=("slot", "punch")), monkeypatch) as scene:
        assert list(scene.owner.methods) == ["slot", "punch"]


def test_a_conversion_unasked_is_announced_and_frees_both_halves(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages, punched = range(3, 5), list[tuple[int, int, int]]()
    monkeypatch.setattr(scene.puncher, "some", lambda: pages)

    def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
        assert mode == memory.PUNCH
        punched.append((fd, offset, size))
        scene.vm.done.append(("punch",))
        # Nobody else converts, and the guest is told of pages that go, and are shared.
        assert scene.owner._converting.locked()
        assert scene.board.nonzero() == {"begun": {3: 1, 4: 1}, "exposed": {3: 1, 4: 1}}

    monkeypatch.setattr(memory, "fallocate", fallocate)
    scene.owner._convert()
    at, size = scene.ground.offset + 3 * PAGE_SIZE, 2 * PAGE_SIZE
    gpa = guest_abi.PRIVATE_BASE + at
    assert scene.vm.done == [
        ("shared", gpa, size),
        ("punch",),
        ("private", gpa, size),
        ("punch",),
    ]
    assert punched == [(scene.ground.fd, at, size), (scene.ground.half_fd, at, size)]


def slot_of(scene: Scene) -> dict[str, int | None]:
    return {
        "slot": 2,
        "guest_phys_addr": EXTRA_BASE,
        "memory_size": EXTRA_PAGES * PAGE_SIZE,
        "restricted_fd": scene.owner._extra_fd,
        "shared_fd": scene.owner._extra_half,
    }


def test_a_slot_comes_is_punched_and_goes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    board, size = scene.ground.board, EXTRA_PAGES * PAGE_SIZE
    scene.choices()
    scene.owner._change_slot()
    assert scene.vm.done == [("slot", slot_of(scene)), ("private", EXTRA_BASE, size)]
    assert board.extra == 1
    fd = scene.owner._extra_fd
    assert fd is not None
    assert (os.fstat(fd).st_size, os.fstat(scene.owner._extra_half).st_size) == (size, size)
    # It is punched from one page on to the end.
    os.pwrite(fd, b"x" * size, 0)
    scene.clear()
    scene.choices(1, 62)
    fallocate, punched = memory.fallocate, list[tuple[int, ...]]()

    def watched(*of: int) -> None:
        punched.append(of)
        fallocate(*of)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "fallocate", watched)
        scene.owner._change_slot()
    assert punched == [(fd, memory.PUNCH, 62 * PAGE_SIZE, 2 * PAGE_SIZE)]
    assert scene.drawn == [2, EXTRA_PAGES]
    assert os.pread(fd, size, 0).rstrip(b"\0") == b"x" * (62 * PAGE_SIZE)
    assert os.fstat(fd).st_size == size
    assert (scene.vm.done, board.extra) == ([], 1)
    # It goes, and the next has another number.
    scene.choices(0)
    yielded = list[int]()
    monkeypatch.setattr(os, "sched_yield", lambda: yielded.append(board.extra))
    scene.owner._change_slot()
    gone = {"slot": 2, "guest_phys_addr": EXTRA_BASE, "memory_size": 0}
    assert (scene.vm.done, board.extra, yielded) == ([("slot", gone)], 0, [0])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    scene.owner._change_slot()
    assert (board.extra, len(scene.service.opened)) == (2, 3)


def test_a_slot_stays_while_the_guest_uses_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = list[str]()

    def wait_for(what: str, holds: Callable[[], bool]) -> None:
        waited.append(what)
        assert (scene.vm.done, scene.ground.board.extra) == ([], 0)
        assert not holds()
        scene.owner.failure = "stale"
        assert holds()
        scene.owner.failure = ""
        scene.board.write("extra_users", 0)
        assert holds()

    monkeypatch.setattr(owner, "wait_for", wait_for)
    scene.owner._change_slot()
    scene.clear()
    scene.board.write("extra_users", 1)
    scene.owner._remove_extra()
    scene.owner._remove_extra()
    assert waited == ["the guest to leave the slot that is to be deleted"]
    assert [what for what, *_ in scene.vm.done] == ["slot"]
    assert scene.owner._extra_fd is None


def test_a_vcpu_is_interrupted_and_a_page_is_lost(scene: Scene) -> None:
    scene.puncher.random = stub(choice=itemgetter(1), randrange=(-1).__add__)
    scene.owner._interrupt()
    scene.owner._lose_page()
    last = guest_abi.PRIVATE_BASE + scene.ground.offset + 39 * PAGE_SIZE
    assert scene.vm.done == [("interrupt", 1), ("failure", last)]
