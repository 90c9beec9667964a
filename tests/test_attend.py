"""A program that is waited for as if it ran in this process's place."""

import os
import signal
from typing import NoReturn

import pytest

from outcomes import in_child
from restrictedmem.syscall.attend import attend

KILLED = 128 + signal.SIGKILL


def test_signals_are_blocked_for_neither_afterwards() -> None:
    def body() -> object:
        before = signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1})

        def program() -> NoReturn:
            os._exit(3 if signal.pthread_sigmask(signal.SIG_SETMASK, before) == {signal.SIGUSR1} else 4)

        return os.waitstatus_to_exitcode(attend(program)), signal.pthread_sigmask(signal.SIG_SETMASK, before)

    assert in_child(body) == f"(3, {{{signal.SIGUSR1!r}}})"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL], ids=lambda handler: handler.name)
def test_the_program_ignores_ended_children_if_the_command_did(handler: signal.Handlers) -> None:
    def body() -> object:
        signal.signal(signal.SIGCHLD, handler)
        return os.waitstatus_to_exitcode(attend(lambda: os._exit(int(signal.getsignal(signal.SIGCHLD) == handler))))

    assert in_child(body) == "1"


def test_a_program_that_raises_ends_with_1_and_nobody_goes_on_in_its_place() -> None:
    def body() -> object:
        this = os.getpid()

        def program() -> NoReturn:
            raise ValueError

        status = attend(program)
        return os.waitstatus_to_exitcode(status), os.getpid() == this

    assert in_child(body) == "(1, True)"


def test_nothing_is_started_for_who_is_gone_before_the_kernel_would_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> object:
        # As if another had forked, and this one taken the child in.
        monkeypatch.setattr(os, "getpid", lambda: 1 << 30)
        return os.waitstatus_to_exitcode(attend(lambda: os._exit(0)))

    assert in_child(body) == str(KILLED)
