"""A program that is waited for as if it ran in this process's place."""

import os
import signal
from typing import NoReturn

import pytest

from outcomes import in_child
from restrictedmem.abi import process
from restrictedmem.syscall.attend import attend, end_as

KILLED = 128 + signal.SIGKILL


def test_the_program_has_the_signal_mask_that_there_was() -> None:
    def body() -> object:
        before = signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1})

        def program() -> NoReturn:
            os._exit(
                3 if signal.pthread_sigmask(signal.SIG_SETMASK, before) == {signal.SIGUSR1} else 4
            )

        return os.waitstatus_to_exitcode(attend(program))

    assert in_child(body) == "3"


def test_an_interrupt_before_the_program_is_executed_ends_it_as_one() -> None:
    """And not by an exception of this interpreter's, with a status that the program never had."""

    def body() -> object:
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def program() -> NoReturn:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(3)

        return os.waitstatus_to_exitcode(attend(program))

    assert in_child(body) == str(-signal.SIGINT)


def test_what_is_sent_after_the_programs_end_changes_nothing() -> None:
    def body() -> object:
        status = attend(lambda: os._exit(5))
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGRTMAX:
            os.kill(os.getpid(), number)
        return end_as(status)

    assert in_child(body) == "5"


def test_alarms_and_orphans_are_the_programs() -> None:
    def body() -> object:
        process.prctl(process.PR_SET_CHILD_SUBREAPER, 1)
        # The tests' own limit on time has a handler.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

        def program() -> NoReturn:
            if process.is_subreaper():
                signal.pause()
            os._exit(0)

        return os.waitstatus_to_exitcode(attend(program)), process.is_subreaper()

    assert in_child(body) == f"({-signal.SIGALRM}, False)"


@pytest.mark.parametrize(
    "handler", [signal.SIG_IGN, signal.SIG_DFL], ids=lambda handler: handler.name
)
def test_the_program_ignores_ended_children_if_the_command_did(handler: signal.Handlers) -> None:
    def body() -> object:
        signal.signal(signal.SIGCHLD, handler)
        return os.waitstatus_to_exitcode(
            attend(lambda: os._exit(int(signal.getsignal(signal.SIGCHLD) == handler)))
        )

    assert in_child(body) == "1"


def test_a_program_that_raises_ends_with_1_and_nobody_goes_on_in_its_place() -> None:
    def body() -> object:
        this = os.getpid()

        def program() -> NoReturn:
            raise ValueError

        status = attend(program)
        return os.waitstatus_to_exitcode(status), os.getpid() == this

    assert in_child(body) == "(1, True)"


def test_nothing_is_started_for_who_is_gone_before_the_kernel_would_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def body() -> object:
        # Pretend that another process forked the child, and this one adopted it.
        monkeypatch.setattr(os, "getpid", lambda: 1 << 30)
        return os.waitstatus_to_exitcode(attend(lambda: os._exit(0)))

    assert in_child(body) == str(KILLED)
