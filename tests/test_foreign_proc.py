"""A /proc with another PID namespace's numbers, as ``unshare -pf`` leaves it.

No process is found by its pid there.
"""

import os
from collections.abc import Callable
from errno import ESRCH
from typing import Any, cast

import pytest

from outcomes import Errno, in_child, outcome
from restrictedmem.abi import process
from restrictedmem.audit.prove import prove
from restrictedmem.fd import OwnedFd
from restrictedmem.fs import mounter
from restrictedmem.fs.mount_ways import Way
from restrictedmem.service import discover
from restrictedmem.service.options import Options
from restrictedmem.stress.run import Run
from users import MS_PRIVATE, MS_REC, mount

pytestmark = pytest.mark.requires("root")

_CLONE_NEWPID = 0x2000_0000


def inside(body: Callable[[], object]) -> Any:
    """Return a function's outcome in the first process of a new PID namespace, with our /proc."""

    def enter() -> str:
        process.unshare(_CLONE_NEWPID)
        return in_child(body)

    return eval(eval(in_child(enter)), {"ESRCH": Errno(ESRCH)})


def test_that_of_a_namespace_above_is_refused() -> None:
    with process.proc() as proc:
        assert process.status(os.getpid(), b"Pid:", proc) == [str(os.getpid()).encode()]
    assert inside(process.proc) == Errno(ESRCH)


def test_that_of_a_namespace_below_is_refused() -> None:
    """It has no number for this process."""

    def body() -> object:
        process.unshare(process.CLONE_NEWNS)
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        process.unshare(_CLONE_NEWPID)
        assert in_child(lambda: mount("proc", "/proc", "proc", 0)) == "None"
        return outcome(process.proc)

    assert in_child(body) == "ESRCH"


def test_nobody_is_taken_for_one_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    # The bit of SIGKILL is 100.
    def status(_whose: object, name: bytes, _proc: OwnedFd) -> list[bytes]:
        return [b"100"] if name == b"SigPnd:" else [b"2", b"1"]

    monkeypatch.setattr(process, "status", status)
    assert inside(lambda: process.is_dying(2)) is False


def test_nobody_has_anothers_numbers() -> None:
    def numbers() -> bool:
        outer = int(os.readlink("/proc/self"))
        return discover._numbers_of(outer) == {outer}

    assert inside(numbers) is True


@pytest.mark.requires("fuse")
def test_nobody_enters_anothers_user_namespace() -> None:
    assert inside(lambda: mounter.mount(Way.USERNS)) == Errno(ESRCH)


def test_nobody_is_tried_or_missed_in_anothers_place() -> None:
    nothing = cast("Any", None)
    assert inside(
        lambda: prove(nothing, nothing, 0, engine="software", as_root=False, progress=nothing)
    ) == Errno(ESRCH)
    assert inside(lambda: Run(Options(), None, 0)) == Errno(ESRCH)
