"""A worker of the conformance suite with cases that misbehave.

``conformance_worker.py COLUMN CASE…`` runs some of CASES on a column. ``conformance_worker.py run
CASE…`` runs some of CASES, as the command does, and prints each result with its steps.
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Final

from restrictedmem.child import fork
from restrictedmem.conformance.case import Case, Family, NotApplicable, UnsupportedError
from restrictedmem.conformance.columns import Column, Ground
from restrictedmem.conformance.outcome import Errno
from restrictedmem.conformance.steps import Steps
from restrictedmem.conformance.suite_run import run
from restrictedmem.conformance.worker import serve


class _Subject:
    """The object of a case, which is nothing but its steps."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps


class _Ground:
    @contextmanager
    def subject(self, case: Case, steps: Steps) -> Generator[_Subject]:
        del case
        steps.call("open()", lambda: 3)
        yield _Subject(steps)


@contextmanager
def _opened() -> Generator[Ground]:
    yield _Ground()


def _missing() -> AbstractContextManager[Ground]:
    raise UnsupportedError("there is none")


@contextmanager
def _hanging() -> Generator[Ground]:
    _pause()
    yield _Ground()


def _pause() -> None:
    threading.Event().wait()


def _killed(number: int) -> Callable[[_Subject], object]:
    return lambda subject: subject.steps.call(
        f"raise({number})", lambda: os.kill(os.getpid(), number)
    )


def _ends(subject: _Subject) -> None:
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)


def _leaves(subject: _Subject) -> int:
    """Leave a process that is in no group of the worker's; note its pid."""
    pid = fork(signal.pause)
    os.setpgid(pid, pid)
    subject.steps.note(f"left {pid}")
    return 0


def _silent(subject: _Subject) -> None:
    subject.steps.note(f"waits {os.getpid()}")
    _pause()


def _prints(subject: _Subject) -> int:
    del subject
    print('{"case": "printed"}\nwords', flush=True)
    os.write(1, b"[" * 100)
    return 0


def _mistaken(subject: _Subject) -> int:
    raise LookupError("no such thing")


def _state(subject: _Subject) -> str:
    """Return what a case could inherit that it should not."""
    default = signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return f"{default} {len(blocked)} {resource.getrlimit(resource.RLIMIT_CORE)[0]}"


def _case(name: str, does: Callable[[_Subject], object], expected: object = 0) -> Case:
    return Case(name, Family.FILE, does, {"some": expected}, source="a test")


CASES: Final = (
    _case("answers", lambda _: 0),
    _case("fails", lambda _: 1),
    _case("refuses", lambda subject: subject.steps.call("read(fd)", _refuse), Errno(22)),
    _case("killed", _killed(signal.SIGKILL)),
    _case("aborts", lambda _: os.abort()),
    _case("ends", _ends),
    _case("leaves", _leaves),
    _case("prints", _prints),
    _case("mistaken", _mistaken),
    _case("state", _state, "True 0 0"),
    _case("senseless", lambda _: 0, NotApplicable("no sense")),
    _case("silent", _silent),
    _case("last", lambda _: 0),
)


def _refuse() -> None:
    raise OSError(22, "Invalid argument")


def _column(name: str, opened: Callable[[], AbstractContextManager[Ground]]) -> Column:
    return Column(name, "a column of a test", ("some",), frozenset({Family.FILE}), opened)


COLUMNS: Final = (
    _column("good/one", _opened),
    _column("good/two", _opened),
    _column("missing", _missing),
    _column("hanging", _hanging),
)


def body(column: Column, cases: Sequence[str]) -> Callable[[], None]:
    """Return the body of a worker for one of these columns."""
    return lambda: serve(column.name, cases, COLUMNS, CASES)


if __name__ == "__main__":
    if sys.argv[1] != "run":
        serve(sys.argv[1], sys.argv[2:], COLUMNS, CASES)
    else:
        cases = [case for case in CASES if case.id in sys.argv[2:]]
        with closing(run(COLUMNS[:1], cases, 1, body=body)) as results:
            for result in results:
                print(result.case, *result.steps, sep="\n", flush=True)
