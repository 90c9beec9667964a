"""A run of the suite: each column in a process of its own, some at the same time."""

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, TypeAlias, final

from restrictedmem.abi import memory, process
from restrictedmem.child import ends, fork
from restrictedmem.conformance.case import Case, Family
from restrictedmem.conformance.cases import CASES
from restrictedmem.conformance.columns import COLUMNS, Column
from restrictedmem.conformance.result import Result, Verdict, load
from restrictedmem.conformance.worker import serve
from restrictedmem.failure import named
from restrictedmem.fd import OwnedFd, readable
from restrictedmem.patience import SLICE, Clock, Patience
from restrictedmem.service.exec_service import PACKAGE_ROOT

#: Seconds that one case may take, with the opening of its column where it is the first.
DEADLINE: Final = 60.0
#: How many processes of a column in turn may say nothing; then its other cases are not tried.
_SILENT: Final = 2
#: Seconds that the processes which a worker has started may take to end after it.
_ENDING: Final = 5.0
#: Seconds between two looks at them.
_LOOK: Final = 0.01
#: Targets whose calls are messages to an engine.
_ENGINES: Final = ("software", "kernel-engine")
#: Bytes of a worker's last words that a result has, and of a line.
_WORDS: Final = 400
_LONGEST: Final = 1 << 20

_PYTHON: Final = (
    sys.executable,
    "-I",
    "-c",
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import restrictedmem.{module} as module;"
    " module.{function}()",
)


#: Takes a column and the ids of its cases; returns what the process does that runs them.
Body: TypeAlias = Callable[[Column, Sequence[str]], Callable[[], object]]


def body_of(column: Column, cases: Sequence[str]) -> Callable[[], object]:
    """Return a body that is the worker, or executes a command around it."""
    if not column.under:
        return lambda: serve(column.name, cases, COLUMNS, CASES)
    outer, worker = (
        [*(part.format(module=module, function=function) for part in _PYTHON), PACKAGE_ROOT]
        for module, function in (("cli.main", "run"), ("conformance.worker", "main"))
    )
    command = [*outer, *column.under, *worker, column.name, *cases]
    return lambda: os.execv(command[0], command)


def run(
    columns: Sequence[Column],
    cases: Sequence[Case],
    jobs: int,
    *,
    body: Body = body_of,
    deadline: float = DEADLINE,
) -> Generator[Result]:
    """Run cases on columns, ``jobs`` columns at the same time; yield results as they come.

    Each column runs the cases of its families, in a process of its own (``body``). Columns that
    take longest come first. A case whose process dies, or says nothing for ``deadline`` seconds,
    has failed; a new process runs the cases after it. When the iterator ends or is closed, all
    these processes are gone, with everything that they have started.

    Raises:
        OSError: a process cannot be started.
    """
    waiting = deque(
        _Part(column, mine)
        for column in sorted(columns, key=_turn)
        if (mine := [case.id for case in cases if case.family in column.families])
    )
    running: list[_Worker] = []
    ended: list[_Worker] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                part = waiting.popleft()
                with _uninterrupted():
                    running.append(_Worker(part, body(part.column, part.cases), deadline))
            ready = readable(running, SLICE)
            for worker in tuple(running):
                yield from worker.take() if worker in ready else worker.wait()
                if worker.over:
                    running.remove(worker)
                    ended.append(worker)
                    worker.kill()
                    rest = worker.rest()
                    if rest.silent >= _SILENT:
                        yield from rest.given_up()
                    elif rest.cases:
                        waiting.appendleft(rest)
    finally:
        for worker in running:
            worker.kill()
        _end([*running, *ended])


def _turn(column: Column) -> tuple[bool, bool]:
    """Return what comes first if it is small: VMs of the engines, then other VMs, then files."""
    return Family.VM not in column.families, column.target not in _ENGINES


@contextmanager
def _uninterrupted() -> Generator[None]:
    """Let Ctrl-C wait, so that it comes to no process between its start and its record."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@final
class _Part:
    """Cases of a column that no process has run yet."""

    def __init__(self, column: Column, cases: Sequence[str], silent: int = 0) -> None:
        self.column, self.cases = column, cases
        #: How many processes in turn have said nothing before.
        self.silent = silent

    def given_up(self) -> Iterator[Result]:
        """Yield a result for each case."""
        why = f"not tried: {self.silent} processes in turn gave no answer"
        for case in self.cases:
            yield Result(case, self.column.name, Verdict.FAIL, why=why)


def _pipe() -> tuple[OwnedFd, OwnedFd]:
    try:
        reader, writer = os.pipe()
    except OSError as error:
        raise named("pipe", error) from None
    return OwnedFd(reader), OwnedFd(writer)


def _begin(body: Callable[[], object], given: Sequence[int]) -> None:
    """Be a column's process, with these standard descriptors.

    It has a session of its own: no signal of this terminal, and one id for all of it.
    """
    os.setsid()
    for number, fd in enumerate(given):
        os.dup2(fd, number)
    process.close_others(())
    # Python's own streams have other descriptors where something has replaced them, as pytest does.
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, encoding="utf-8", closefd=False)
        for number, mode in enumerate("rww")
    )
    try:
        body()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise


@final
class _Worker:
    """A process that runs cases of a column."""

    def __init__(self, part: _Part, body: Callable[[], object], deadline: float) -> None:
        self._part, self._left = part, deque(part.cases)
        self._deadline, self._clock = deadline, Clock()
        self._got = b""
        self._silent = False
        self.over = False
        with ExitStack() as stack:
            self._kept, self._words = (
                stack.enter_context(memory.memfd_create(name)) for name in ("steps", "words")
            )
            self._said, said = map(stack.enter_context, _pipe())
            given = self._kept.fileno(), said.fileno(), self._words.fileno()
            self.pid = fork(lambda: _begin(body, given), bound=True, keep=given)
            said.close()
            stack.pop_all()

    def fileno(self) -> int:
        """Return the pipe on which the process speaks."""
        return self._said.fileno()

    def take(self) -> Iterator[Result]:
        """Yield the results that have come, when something has come."""
        piece = os.read(self.fileno(), 1 << 16)
        self._got += piece
        yield from self._results()
        if not piece and not self.over:
            yield self._failed(self._how())

    def wait(self) -> Iterator[Result]:
        """Yield that a case has failed, when the process has said nothing for too long."""
        if self._clock.look() >= self._deadline:
            self._silent = True
            yield self._failed(f"no answer within {self._deadline:g} s")

    def _results(self) -> Iterator[Result]:
        while not self.over and (b"\n" in self._got or len(self._got) > _LONGEST):
            line, _, self._got = self._got.partition(b"\n")
            try:
                result = self._heard(json.loads(line))
            except (ValueError, RecursionError):
                shown = line[:_WORDS].decode(errors="replace")
                yield self._failed(f"the process of the case wrote no result, but {shown!r}")
                return
            self._left.popleft()
            self._clock = Clock()
            self.over = not self._left
            yield result

    def _heard(self, found: object) -> Result:
        """Return the result of the case that the process owes one.

        Raises:
            ValueError: for anything else.
        """
        result = load(Result, found)
        if (result.case, result.column) != (self._left[0], self._part.column.name):
            raise ValueError(f"the result of {result.case} on {result.column}")
        return result

    def _failed(self, why: str) -> Result:
        """Return the result of the case that the process owes one."""
        self.over = True
        case, column = self._left.popleft(), self._part.column.name
        steps = os.pread(self._kept.fileno(), _LONGEST, 0).decode(errors="replace").splitlines()
        return Result(case, column, Verdict.FAIL, why=why, steps=tuple(steps))

    def _how(self) -> str:
        """Say how the process ended."""
        if not ends(self.pid, Patience(_ENDING)):
            return "the process of the case closed its output"
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert found is not None
        how = (
            f"exit status {found.si_status}"
            if found.si_code == os.CLD_EXITED
            else signal.Signals(found.si_status).name
        )
        size = os.fstat(self._words.fileno()).st_size
        words = os.pread(self._words.fileno(), _WORDS, max(0, size - _WORDS))
        last = words.decode(errors="replace").strip().rpartition("\n")[2]
        return f"the process of the case ended: {how}" + (f"; {last}" if last else "")

    def kill(self) -> None:
        """Kill the process and its group, and close all that is open. ``_end`` reaps it.

        The process has ended when this returns, as far as that can be waited for.
        """
        # It is not reaped yet, so that its id stays that of its session, if it has begun one.
        os.kill(self.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._said.close()
        self._kept.close()
        self._words.close()
        # Without a free descriptor it cannot be waited for.
        with suppress(OSError):
            ends(self.pid, Patience(_ENDING))

    def rest(self) -> _Part:
        """Return the cases that have no result."""
        silent = self._part.silent + 1 if self._silent else 0
        return _Part(self._part.column, tuple(self._left), silent)


def _end(workers: Sequence[_Worker]) -> None:
    """Reap killed workers, after the end of everything that they have started.

    Services end by themselves when their owner is gone. A process that does not end is killed.
    """
    sessions, clock = {worker.pid for worker in workers}, Clock()
    while clock.look() < 2 * _ENDING and (left := list(_members(sessions))):
        if clock.seconds >= _ENDING:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK)
    for worker in workers:
        os.waitpid(worker.pid, 0)


def _members(sessions: Container[int]) -> Iterator[int]:
    """Yield the processes of some sessions that have not ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name in parentheses may have any character.
            state, _, _, session, *_ = path.read_bytes().rpartition(b") ")[2].split()
            if int(session) in sessions and state not in (b"Z", b"X"):
                yield int(path.parent.name)
