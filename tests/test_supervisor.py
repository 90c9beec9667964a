"""The supervisor when it does not get a listener's lock, because it was stopped, frozen or traced.

The kernel's answer is then POLLERR or EINTR. To cause that takes contended calls and many tries. So
here the test returns it in the kernel's place.
"""

import ctypes
import os
import select
from collections.abc import Callable
from errno import EAGAIN, EINTR, EINVAL, EIO, EMFILE, ENOENT, ENOMEM, ESRCH
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from outcomes import Errno, outcome
from processes import descriptors
from restrictedmem.abi import process, seccomp
from restrictedmem.fd import OwnedFd
from restrictedmem.service.client import Service
from restrictedmem.syscall import supervisor
from restrictedmem.syscall.scout import _Looks
from restrictedmem.syscall.supervisor import Supervisor

_LISTENER, _PORTER = 7, 8


@pytest.mark.parametrize(
    ("fd", "events", "goes_on", "hears"),
    [
        (_LISTENER, select.POLLIN, True, 1),
        (_LISTENER, select.POLLERR, True, 0),
        (_LISTENER, select.POLLERR | select.POLLIN, True, 1),
        (_LISTENER, select.POLLHUP, False, 0),
        (_LISTENER, select.POLLHUP | select.POLLERR, False, 0),
        (_PORTER, select.POLLERR, False, 0),
    ],
)
def test_only_the_end_of_all_programs_and_of_the_porter_ends_it(
    fd: int, events: int, goes_on: bool, hears: int
) -> None:
    heard: list[int] = []
    listener, porter = _file(_LISTENER), _file(_PORTER)
    poll = SimpleNamespace(poll=partial(_events, (fd, events)))
    one = SimpleNamespace(
        _calls={},
        _killed=set[int](),
        _poll=poll,
        _listener=listener,
        _porter=porter,
        _hear=partial(heard.append, 1),
    )
    assert Supervisor._turn(cast(Supervisor, one)) == goes_on
    assert len(heard) == hears


def _events(found: tuple[int, int], _: object) -> list[tuple[int, int]]:
    return [found]


def _file(number: int) -> Any:
    return SimpleNamespace(fileno=lambda: number, kill=lambda: None, pid=number)


_REQUESTS: dict[str, Callable[[OwnedFd], None]] = {
    "SEND": lambda fd: seccomp.respond(fd, 1),
    "ADDFD": lambda fd: seccomp.give(fd, 1, fd),
    "ID_VALID": lambda fd: seccomp.check_waiting(fd, seccomp.seccomp_notif(id=1)),
}


@pytest.mark.parametrize("name", _REQUESTS)
@pytest.mark.parametrize("killably", [False, True])
def test_what_was_not_done_is_done_again(
    name: str, killably: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [EINTR, EINTR, ENOENT]

    def request(*_: object) -> int:
        raise OSError(answers.pop(0), name)

    monkeypatch.setattr(seccomp, f"SECCOMP_IOCTL_NOTIF_{name}", request)
    monkeypatch.setattr(seccomp, "_waits_killably", lambda: killably)
    # A call that nobody waits for any more is answered none the less.
    assert outcome(lambda: _REQUESTS[name](_file(0))) == (None if name == "SEND" else Errno(ENOENT))
    assert answers == []


def test_a_call_that_no_scout_can_be_sent_out_for_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered: list[int] = []
    steps = (one for one in [("is_restricted", (1, 2, 3))])
    one = Supervisor.__new__(Supervisor)
    one._listener, one._calls, one._idle, one._killed = cast(OwnedFd, None), {}, [], set()
    one._proc = cast(OwnedFd, None)

    def none_is_had(_: object) -> object:
        raise OSError(EAGAIN, "fork")

    monkeypatch.setattr(supervisor, "Scout", none_is_had)

    def respond(_listener: object, call: int, _error: int = 0) -> None:
        answered.append(call)

    monkeypatch.setattr(supervisor, "respond", respond)
    one._begin(seccomp.seccomp_notif(id=5), cast(Any, steps))
    assert (answered, one._calls) == ([5], {})


@pytest.mark.parametrize(
    ("failure", "errno"),
    [(EAGAIN, EAGAIN), (ENOMEM, EAGAIN), (EMFILE, EAGAIN), (EIO, EAGAIN), (ESRCH, EINVAL)],
)
def test_a_cachestat_that_nobody_can_look_into_is_not_called_wrong(
    failure: int, errno: int
) -> None:
    one = Supervisor.__new__(Supervisor)
    one._cachestat = True
    call = seccomp.seccomp_notif(data=seccomp.seccomp_data(arg0=5, arg1=8, arg2=16))
    steps = one._pass_cachestat(call)
    assert next(steps)[0] == "may_be_cachestat"
    assert outcome(lambda: steps.throw(OSError(failure, "fork"))) == Errno(errno)


@pytest.mark.requires("fuse")
def test_a_scout_holds_no_programs_memory_once_it_has_written() -> None:
    with (
        Service.start() as service,
        OwnedFd(service.memfd_restricted()) as fd,
        process.proc() as proc,
    ):
        looks, room = _Looks(proc), ctypes.create_string_buffer(8)
        address, device = ctypes.addressof(room), os.fstat(fd.fileno()).st_dev
        before = descriptors(os.getpid())
        for content in b"one", b"two":
            assert looks.open_memory(os.getpid(), fd.fileno(), device)
            # Another program's is let go of first.
            assert looks.open_memory(os.getpid(), fd.fileno(), device)
            assert looks.write(address, content)
            assert room.value == content
            assert descriptors(os.getpid()) == before


def test_of_idle_scouts_the_one_that_has_ended_is_let_go_of() -> None:
    one = Supervisor.__new__(Supervisor)
    killed: list[object] = []
    poll = SimpleNamespace(unregister=killed.append)
    one._calls, one._idle, one._killed = {}, [_file(number) for number in (5, 6, 7)], set()
    one._poll = one._scouts = cast(Any, poll)
    one._go_on(6)
    assert ([scout.fileno() for scout in one._idle], one._killed, killed) == ([5, 7], {6}, [6, 6])
