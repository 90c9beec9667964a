"""Each process that is forked to hold something ends with its parent (PR_SET_PDEATHSIG)."""

import os
import socket
from collections.abc import Callable
from ctypes import byref, c_int
from signal import SIGKILL
from typing import Any, Final

import pytest

from planting import PlantedError, stub
from restrictedmem import burial, child, probe
from restrictedmem.abi._syscall import libc
from restrictedmem.audit import attacker
from restrictedmem.fs import mounter
from restrictedmem.kvm import checker
from restrictedmem.syscall import scout

_SYS_PRCTL: Final = 157
_PR_GET_PDEATHSIG: Final = 2


@pytest.mark.parametrize(("bound", "number"), [(True, SIGKILL), (False, 0)])
def test_a_bound_child_asks_to_be_killed(bound: bool, number: int) -> None:
    reader, writer = os.pipe()

    def tell() -> None:
        found = c_int(-1)
        libc.syscall(_SYS_PRCTL, _PR_GET_PDEATHSIG, byref(found), 0, 0, 0)
        os.write(writer, b"%d" % found.value)

    # Forked by a child, whose own end is asked of nobody.
    os.waitpid(child.fork(lambda: os.waitpid(child.fork(tell, bound=bound), 0)), 0)
    os.close(writer)
    with open(reader, "rb") as told:
        assert told.read() == b"%d" % number


def nothing() -> None:
    pass


def a_mount() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        mounter._fork(nothing, theirs)


#: Who forks, in which module.
FORKS: Final[dict[str, tuple[Any, Callable[[], object]]]] = {
    "twin": (attacker, attacker.fork_twin),
    "probe": (probe, lambda: probe.in_child(nothing)),
    "mount": (mounter, a_mount),
    "checker": (checker, lambda: checker.start(stub(), ())),
    "scout": (scout, lambda: scout.Scout(stub(fileno=int))),
    "burial": (burial, lambda: burial._leave_to_child(-1)),
}


@pytest.mark.parametrize("name", FORKS)
def test_whoever_holds_something_is_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork(_: object, *, bound: bool = False, **__: object) -> int:
        asked.append(bound)
        raise PlantedError

    asked = list[bool]()
    module, act = FORKS[name]
    monkeypatch.setattr(module, "fork", fork)
    with pytest.raises(PlantedError):
        act()
    assert asked == [True]
